// Rotary embedding and the write into the KV pages, apart or as one pass over a merged qkv row. Slots of each entry:
// kernels/cpu/rope.py.
#include "kv_page.h"
#include "linear_call.h"
#include "rotate.h"

namespace {

using namespace hs;

constexpr int MAX_DIM = 256;

template <class T>
void kv_write(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, K, V, K_SHARED, KV_SLOTS, KV, LAYER_OFFSET, PAGE_BYTES, KV_HEADS, HEAD_DIM, V_HEAD_DIM, SHARED };
    KvLayer<T> layer{(char*)a[KV].p + a[LAYER_OFFSET].i, a[PAGE_BYTES].i, a[HEAD_DIM].i, a[V_HEAD_DIM].i};
    int64_t heads = a[KV_HEADS].i, units = ((const int32_t*)a[LIVE].p)[0] * heads;
    int64_t shared = a[SHARED].i, own = layer.dim - shared;  // dims of a key that all heads share, that it has alone
    const float *k = (const float*)a[K].p, *v = (const float*)a[V].p;
    int64_t k_row = heads * own, v_row = heads * layer.v_dim;
    if (!v) v = k + k_row, k_row = v_row = k_row + v_row;  // the values stand behind the keys
    Range range = split(units, ctx);
    for (int64_t u = range.begin; u < range.end; u++) {
        int64_t t = u / heads, head = u % heads, slot = ((const int32_t*)a[KV_SLOTS].p)[t];
        kv_store_k(layer, slot, head, k + t * k_row + head * own, 0, own);
        if (shared) kv_store_k(layer, slot, head, (const float*)a[K_SHARED].p + t * shared, own, shared);
        kv_store_v(layer, slot, head, v + t * v_row + head * layer.v_dim);
    }
}

template <class T>
void rope_kv(const hs_ctx* ctx, const hs_arg* a) {
    enum {
        LIVE, QKV, TABLE, Q_NORM, K_NORM, KV_SLOTS, KV, Q,
        LAYER_OFFSET, PAGE_BYTES, HEADS, KV_HEADS, HEAD_DIM, ROTARY, INTERLEAVED, OWN, CENTRE, EPS, CLIP
    };
    const float limit = (float)a[CLIP].f;
    int64_t heads = a[HEADS].i, kv_heads = a[KV_HEADS].i, dim = a[HEAD_DIM].i, rotary = a[ROTARY].i;
    int64_t all = heads + 2 * kv_heads;
    KvLayer<T> layer{(char*)a[KV].p + a[LAYER_OFFSET].i, a[PAGE_BYTES].i, dim, dim};
    Range range = split(((const int32_t*)a[LIVE].p)[0] * all, ctx);
    float buffer[MAX_DIM];
    for (int64_t u = range.begin; u < range.end; u++) {
        int64_t t = u / all, head = u % all;
        const float* x = (const float*)a[QKV].p + u * dim;
        const bool value = head >= heads + kv_heads;
        float* out = head < heads ? (float*)a[Q].p + (t * heads + head) * dim : buffer;
        const float* norm = value ? nullptr : (const float*)a[head < heads ? Q_NORM : K_NORM].p;
        if (norm) {
            norm += (head < heads ? head : head - heads) * a[OWN].i;
            if (a[CENTRE].i)
                layer_norm(x, norm, nullptr, (float)a[EPS].f, dim, out);
            else
                rms_norm(x, norm, (float)a[EPS].f, dim, out);
            x = out;
        }
        if (limit != 0.0f) {
            for (int64_t i = 0; i < dim; i++) out[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
            x = out;
        }
        if (value) {
            kv_store_v(layer, ((const int32_t*)a[KV_SLOTS].p)[t], head - heads - kv_heads, x);
            continue;
        }
        if (a[TABLE].p)
            rotate(x, (const float*)a[TABLE].p + t * rotary, rotary, a[INTERLEAVED].i, dim, out);
        else if (x != out)
            memcpy(out, x, dim * sizeof(float));
        if (head >= heads) kv_store_k(layer, ((const int32_t*)a[KV_SLOTS].p)[t], head - heads, out, 0, dim);
    }
}

}  // namespace

HS_EXPORT void hs_rope_table(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, POSITIONS, INV_FREQ, VARIANT, OUT, HALF, SCALE };
    int64_t half = a[HALF].i;
    const int32_t* variant = (const int32_t*)a[VARIANT].p;  // row of frequencies per token; NULL: the first
    float scale = (float)a[SCALE].f;
    Range range = split(((const int32_t*)a[LIVE].p)[0] * half, ctx);
    for (int64_t u = range.begin; u < range.end; u++) {
        int64_t t = u / half, i = u % half;
        // Rounded to float32 before the sine, as every published implementation does.
        const float* freq = (const float*)a[INV_FREQ].p + (variant ? variant[t] * half : 0);
        float angle = (float)((const int32_t*)a[POSITIONS].p)[t] * freq[i];
        float* row = (float*)a[OUT].p + t * 2 * half;
        row[i] = std::cos(angle) * scale;
        row[half + i] = std::sin(angle) * scale;
    }
}

HS_EXPORT void hs_rope(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, X, TABLE, OUT, HEADS, HEAD_DIM, START, ROTARY, INTERLEAVED };
    int64_t heads = a[HEADS].i, dim = a[HEAD_DIM].i, start = a[START].i, rotary = a[ROTARY].i;
    Range range = split(((const int32_t*)a[LIVE].p)[0] * heads, ctx);
    for (int64_t u = range.begin; u < range.end; u++) {
        const float* x = (const float*)a[X].p + u * dim;
        float* out = (float*)a[OUT].p + u * dim;
        if (out != x) memcpy(out, x, start * sizeof(float));
        rotate(x + start, (const float*)a[TABLE].p + u / heads * rotary, rotary, a[INTERLEAVED].i, dim - start, out + start);
    }
}

HS_EXPORT void hs_kv_write_f32(const hs_ctx* ctx, const hs_arg* a) { kv_write<float>(ctx, a); }
HS_EXPORT void hs_kv_write_bf16(const hs_ctx* ctx, const hs_arg* a) { kv_write<uint16_t>(ctx, a); }
HS_EXPORT void hs_kv_write_e4m3(const hs_ctx* ctx, const hs_arg* a) { kv_write<E4M3>(ctx, a); }
HS_EXPORT void hs_kv_write_e5m2(const hs_ctx* ctx, const hs_arg* a) { kv_write<E5M2>(ctx, a); }
HS_EXPORT void hs_rope_kv_f32(const hs_ctx* ctx, const hs_arg* a) { rope_kv<float>(ctx, a); }
HS_EXPORT void hs_rope_kv_bf16(const hs_ctx* ctx, const hs_arg* a) { rope_kv<uint16_t>(ctx, a); }
HS_EXPORT void hs_rope_kv_e4m3(const hs_ctx* ctx, const hs_arg* a) { rope_kv<E4M3>(ctx, a); }
HS_EXPORT void hs_rope_kv_e5m2(const hs_ctx* ctx, const hs_arg* a) { rope_kv<E5M2>(ctx, a); }
