// Rotary embedding and the write into the KV pages: apart, as one pass over a merged qkv row, or with the product that makes the
// row. Slots of each entry: kernels/cpu/rope.py, linear_rope_kv.py.
#include "kv_page.h"
#include "linear_call.h"
#include "rotate.h"

namespace {

using namespace hs;

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

// What becomes of the heads of merged qkv rows; first in the slots of both entries that do it.
enum HeadSlot {
    LIVE, TABLE, Q_NORM, K_NORM, KV_SLOTS, KV, Q,
    LAYER_OFFSET, PAGE_BYTES, HEADS, KV_HEADS, HEAD_DIM, ROTARY, INTERLEAVED, OWN, CENTRE, HEAD_EPS, CLIP, KV_DTYPE, HEAD_SLOTS
};

// A head after its norm (NULL: none) and clip, in `out`. Out of line: most models have neither, and between two layers the code is
// out of the caches, so what runs should lie together.
__attribute__((noinline)) const float* norm_and_clip(const hs_arg* a, const float* x, const float* norm, float* out) {
    const int64_t dim = a[HEAD_DIM].i;
    const float limit = (float)a[CLIP].f;
    if (norm && a[CENTRE].i)
        layer_norm(x, norm, nullptr, (float)a[HEAD_EPS].f, dim, out);
    else if (norm)
        rms_norm(x, norm, (float)a[HEAD_EPS].f, dim, out);
    if (limit == 0.0f) return out;
    const float* from = norm ? out : x;
    for (int64_t i = 0; i < dim; i++) out[i] = from[i] > limit ? limit : from[i] < -limit ? -limit : from[i];
    return out;
}

// Piece u of `pieces` is head first + u % count of row u / count.
template <class T>
void store_heads(const hs_arg* a, const float* qkv, int64_t first, int64_t count, Range pieces) {
    int64_t heads = a[HEADS].i, kv_heads = a[KV_HEADS].i, dim = a[HEAD_DIM].i, rotary = a[ROTARY].i;
    int64_t all = heads + 2 * kv_heads;
    KvLayer<T> layer{(char*)a[KV].p + a[LAYER_OFFSET].i, a[PAGE_BYTES].i, dim, dim};
    float buffer[MAX_DIM];
    for (int64_t u = pieces.begin; u < pieces.end; u++) {
        int64_t t = u / count, head = first + u % count;
        const float* x = qkv + (t * all + head) * dim;
        const bool value = head >= heads + kv_heads;
        float* out = head < heads ? (float*)a[Q].p + (t * heads + head) * dim : buffer;
        const float* norm = value ? nullptr : (const float*)a[head < heads ? Q_NORM : K_NORM].p;
        if (norm || a[CLIP].f != 0.0) {
            if (norm) norm += (head < heads ? head : head - heads) * a[OWN].i;
            x = norm_and_clip(a, x, norm, out);
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

void store_heads(const hs_arg* a, const float* qkv, int64_t first, int64_t count, Range pieces) {
    switch (a[KV_DTYPE].i) {
        case KV_F32: return store_heads<float>(a, qkv, first, count, pieces);
        case KV_BF16: return store_heads<uint16_t>(a, qkv, first, count, pieces);
        case KV_E4M3: return store_heads<E4M3>(a, qkv, first, count, pieces);
        case KV_E5M2: return store_heads<E5M2>(a, qkv, first, count, pieces);
    }
}

void store_all(const hs_ctx* ctx, const hs_arg* a, const float* qkv) {
    const int64_t all = a[HEADS].i + 2 * a[KV_HEADS].i;
    store_heads(a, qkv, 0, all, split(((const int32_t*)a[LIVE].p)[0] * all, ctx));
}

// The heads whose outputs this share's product has computed. Of one that reaches over the end of a share's tiles the last share
// that computes a part of it is the one to store it.
void store_product(const hs_ctx* ctx, const hs_arg* a, const Linear& c) {
    const Range own = split(c.tiles(), ctx);
    if (own.begin == own.end) return;
    const int64_t dim = a[HEAD_DIM].i, begin = own.begin * TILE, end = own.end * TILE < c.n ? own.end * TILE : c.n;
    auto store = [&](int64_t first, int64_t count) { store_heads(a, c.out, first, count, {0, c.t * count}); };
    auto share_of = [&](int64_t tile) { return ((tile + 1) * ctx->threads - 1) / c.tiles(); };
    auto is_last = [&](int64_t head) {
        const int64_t first = head * dim / TILE, last = ((head + 1) * dim - 1) / TILE, share = share_of(first);
        const int64_t next = share_of(last) - share, tiles = last - first;  // with more shares than tiles some have none
        return hs_last(ctx, share, 1 + (next < tiles ? next : tiles));  // one head alone reaches over the end of `share`
    };
    const int64_t whole = (begin + dim - 1) / dim, stop = end / dim;  // heads from `whole` to `stop` are this share's alone
    if (begin % dim && is_last(whole - 1)) store(whole - 1, 1);
    if (end % dim && stop >= whole && is_last(stop)) store(stop, 1);
    if (whole < stop) store(whole, stop - whole);
}

Linear bind(int format, const hs_arg* a) {
    enum { X = HEAD_SLOTS, BIAS, NORM, WORK, K, EPS, DATA };
    Linear c;
    c.t = ((const int32_t*)a[LIVE].p)[0];
    c.x = (const float*)a[X].p;
    c.x_stride = a[K].i;
    c.bias = (const float*)a[BIAS].p;
    c.norm = (const float*)a[NORM].p;
    c.eps = (float)a[EPS].f;
    c.n = c.out_stride = (a[HEADS].i + 2 * a[KV_HEADS].i) * a[HEAD_DIM].i;
    c.out = (float*)a[WORK].p;
    c.work = (uint8_t*)(c.out + c.t * c.n);
    c.w = bind_weight(format, a[K].i, a + DATA);
    return c;
}

template <int FMT>
void linear_rope_kv(const hs_ctx* ctx, const hs_arg* a) {
    Linear c = bind(FMT, a);
    if (c.t <= 0) return;
    c.then = ctx->then;
    if (c.t <= FEW_ROWS) {
        product<FMT>(ctx, c);
        return store_product(ctx, a, c);
    }
    // By tiles one share would get the queries and one the keys and values, of all rows: heads are shared out anew.
    if (ctx->phase == 2) return store_all(ctx, a, c.out);
    ctx->phase == 0 ? prepare<FMT>(ctx, c) : product<FMT>(ctx, c);
    hs_again(ctx);
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

HS_EXPORT void hs_rope_kv(const hs_ctx* ctx, const hs_arg* a) { store_all(ctx, a, (const float*)a[HEAD_SLOTS].p); }

HS_LINEAR(hs_linear_rope_kv_f32, linear_rope_kv, F32)
HS_LINEAR(hs_linear_rope_kv_bf16, linear_rope_kv, BF16)
HS_LINEAR(hs_linear_rope_kv_int8, linear_rope_kv, INT8)
HS_LINEAR(hs_linear_rope_kv_int4, linear_rope_kv, INT4)
HS_LINEAR(hs_linear_rope_kv_bf16_widened, linear_rope_kv, WIDENED)
