// Latent attention in its absorbed form: the write of a token's latent and rope key, attention of all heads over the latents,
// and the linears per head on both sides of it. Slots of each entry: kernels/cpu/mla.py.
//
// One layer of a page is [16][C + R] in the KV dtype: per token the latent, then the rotated key. All heads read the same row, as
// key (all of it) and as value (the latent), so rows of many heads share every load.
//
// As in attention.cpp a row's result is defined block by block over absolute positions, blocks are merged in order, and no other
// split exists: a row has the same bits whatever chunk, batch or thread it is computed in.
#include "kv_page.h"
#include "linear_call.h"
#include "rotate.h"
#include "softmax.h"

namespace {

using namespace hs;

constexpr int BLOCK = 256;  // keys
constexpr int ROWS = 24;    // query rows of a work item
constexpr int MAX_LATENT = 512, MAX_WIDTH = 576;
// Register tiles: SR rows x SK keys of scores, VR rows x NV vectors of values.
constexpr int SR = 4, SK = VL == 16 ? 4 : 2;
constexpr int VR = VL == 16 ? 6 : VL == 8 ? 6 : 3, NV = VL == 16 ? 4 : VL == 8 ? 2 : 4;

template <class T>
struct LatentLayer {
    char* base;  // pool + layer offset
    int64_t page_bytes, width;

    T* row(int64_t page, int64_t offset) const { return (T*)(base + page * page_bytes) + offset * width; }
};

template <class T>
void kv_write(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, X, NORM, TABLE, KV_SLOTS, KV, LAYER_OFFSET, PAGE_BYTES, LATENT, ROTARY, INTERLEAVED, EPS };
    const int64_t latent = a[LATENT].i, rotary = a[ROTARY].i, width = latent + rotary;
    const LatentLayer<T> layer{(char*)a[KV].p + a[LAYER_OFFSET].i, a[PAGE_BYTES].i, width};
    float buffer[MAX_WIDTH];
    Range range = split(((const int32_t*)a[LIVE].p)[0], ctx);
    for (int64_t t = range.begin; t < range.end; t++) {
        const float* x = (const float*)a[X].p + t * width;
        rms_norm(x, (const float*)a[NORM].p, (float)a[EPS].f, latent, buffer);
        rotate(x + latent, (const float*)a[TABLE].p + t * rotary, rotary, a[INTERLEAVED].i, rotary, buffer + latent);
        int64_t slot = ((const int32_t*)a[KV_SLOTS].p)[t];
        T* to = layer.row(slot / PAGE, slot % PAGE);
        for (int64_t i = 0; i < width; i++) narrow(buffer[i], to + i);
    }
}

// Every head's own matrix on rows of few at a time, so that nothing is prepared and one phase is enough; a thread takes
// neighbouring pieces, and with them the matrix that is in its cache.
template <int FMT>
void head_linear(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, X, TABLE, OUT, HEADS, K, N, ROTARY, INTERLEAVED, DATA };
    constexpr bool GROUPED = FMT == INT8 || FMT == INT4;
    const int64_t heads = a[HEADS].i, rotary = a[ROTARY].i, live = ((const int32_t*)a[LIVE].p)[0];
    const int64_t from = a[K].i + rotary, to = a[N].i + rotary;
    Linear c;
    c.x_stride = heads * from;
    c.out_stride = heads * to;
    c.n = a[N].i;
    c.w = bind_weight(FMT, a[K].i, a + DATA);
    const Weight first = c.w;
    const hs_ctx alone{0, 1, ctx->team, 0, ctx->epoch, {}};
    const int64_t pieces = (live + FEW_ROWS - 1) / FEW_ROWS;
    Range range = split(heads * pieces, ctx);
    for (int64_t u = range.begin; u < range.end; u++) {
        const int64_t head = u / pieces, row = u % pieces * FEW_ROWS;
        c.t = live - row < FEW_ROWS ? live - row : FEW_ROWS;
        c.x = (const float*)a[X].p + row * c.x_stride + head * from;
        c.out = (float*)a[OUT].p + row * c.out_stride + head * to;
        c.w.data = first.tile(head * c.tiles());
        if (GROUPED) c.w.scale = first.tile_scale(head * c.tiles());
        product<FMT>(&alone, c);
        for (int64_t r = 0; rotary && r < c.t; r++)
            rotate(c.row(r) + c.w.k, (const float*)a[TABLE].p + (row + r) * rotary, rotary, a[INTERLEAVED].i, rotary,
                   c.out_row(r) + c.n);
    }
}

struct Call {
    const int32_t *live, *seq_start, *seq_len, *pages;
    const float* q;
    float* out;
    float* partial;       // room for `room` partial results
    int64_t room, table;  // table: columns of `pages`
    int64_t heads, latent, width;
    char* kv;
    int64_t page_bytes;
    float scale;

    int64_t partial_size() const { return latent + 2; }  // values, max, sum
};

// Query rows of one item: row r is token (first_row + r) / heads of the sequence's tokens, head (first_row + r) % heads. Rows
// follow each other in q and in out.
struct Item {
    int64_t seq, first_row, rows;
    int64_t first_position;  // of the sequence's first token in this step

    int64_t position(int64_t r, int64_t heads) const { return first_position + (first_row + r) / heads; }
};

struct alignas(64) Buffers {
    float q[ROWS * MAX_WIDTH];
    float scores[ROWS * BLOCK];
    float values[ROWS * MAX_LATENT];  // of one block
    float total[ROWS * MAX_LATENT];   // merged so far
    float max[ROWS], sum[ROWS], total_max[ROWS], total_sum[ROWS];
};

// scores[r][j] = q[r] . k[j] for R rows and SK keys: one accumulator per vector lane along the width, added at the end.
template <class T, int R>
void score_tile(const float* q, int64_t width, const T* const* k, float* scores) {
    vf acc[R][SK] = {};
    int64_t e = 0;
    for (; e + VL <= width; e += VL) {
        vf x[SK];
        HS_UNROLL for (int j = 0; j < SK; j++) x[j] = widen(k[j] + e);
        HS_UNROLL for (int r = 0; r < R; r++) {
            vf y = loadf(q + r * width + e);
            HS_UNROLL for (int j = 0; j < SK; j++) acc[r][j] = fma(y, x[j], acc[r][j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < SK; j++) {
            float s = hsum(acc[r][j]);
            for (int64_t i = e; i < width; i++) s += q[r * width + i] * widen_one(k[j] + i);
            scores[r * BLOCK + j] = s;
        }
}

template <class T, int R>
void score_rows(const float* q, int64_t width, int64_t rows, const T* const* k, float* scores) {
    if constexpr (R > 1)
        if (rows < R) return score_rows<T, R - 1>(q, width, rows, k, scores);
    score_tile<T, R>(q, width, k, scores);
}

// values[r][0:N*VL] = sum over keys of weights[r][key] * c[key][0:N*VL], in key order.
template <class T, int R, int N>
void value_tile(const float* weights, int64_t keys, const T* const* k, int64_t column, int64_t latent, float* values) {
    vf acc[R][N] = {};
    for (int64_t i = 0; i < keys; i++) {
        vf x[N];
        HS_UNROLL for (int j = 0; j < N; j++) x[j] = widen(k[i] + column + j * VL);
        HS_UNROLL for (int r = 0; r < R; r++) {
            vf w = splat(weights[r * BLOCK + i]);
            HS_UNROLL for (int j = 0; j < N; j++) acc[r][j] = fma(w, x[j], acc[r][j]);
        }
    }
    HS_UNROLL for (int r = 0; r < R; r++)
        HS_UNROLL for (int j = 0; j < N; j++) store(values + r * latent + column + j * VL, acc[r][j]);
}

template <class T, int R, int N>
void value_rows(const float* weights, int64_t rows, int64_t keys, const T* const* k, int64_t column, int64_t latent,
                float* values) {
    if constexpr (R > 1)
        if (rows < R) return value_rows<T, R - 1, N>(weights, rows, keys, k, column, latent, values);
    value_tile<T, R, N>(weights, keys, k, column, latent, values);
}

void finish(const Call& c, const float* total, float sum, int64_t row) {
    float* out = c.out + row * c.latent;
    for (int64_t i = 0; i < c.latent; i += VL) store(out + i, loadf(total + i) / sum);
}

// Key blocks first..end-1 of an item, the work of one thread at a time.
struct Job {
    Item item;
    int64_t first, end;
    int64_t number = -1;  // among the items that are split; -1: this one is whole
    int64_t parts, base;  // blocks of the item; where in `partial` their results begin, `rows` for each
};

// One key block for all rows of an item: b.values, b.max, b.sum.
template <class T>
void run_block(const Call& c, const Item& item, int64_t block, Buffers& b) {
    const LatentLayer<T> layer{c.kv, c.page_bytes, c.width};
    const int32_t* table = c.pages + item.seq * c.table;
    const int64_t start = block * BLOCK, seen = item.position(item.rows - 1, c.heads) + 1 - start;
    const int64_t keys = seen < BLOCK ? seen : BLOCK, padded = round_up(keys, 16);
    const T* k[BLOCK];  // a tile reads whole groups of keys: the last one is repeated, its scores are masked
    for (int64_t i = 0; i < padded; i++) {
        int64_t key = start + (i < keys ? i : keys - 1);
        k[i] = layer.row(table[key / PAGE], key % PAGE);
    }
    for (int64_t i = 0; i < padded; i += SK)
        for (int64_t r = 0; r < item.rows; r += SR)
            score_rows<T, SR>(b.q + r * c.width, c.width, item.rows - r, k + i, b.scores + r * BLOCK + i);
    for (int64_t r = 0; r < item.rows; r++) {
        int64_t last = item.position(r, c.heads) + 1 - start;
        last = last < 0 ? 0 : last < BLOCK ? last : BLOCK;
        soften(b.scores + r * BLOCK, padded, 0, (int)last, b.max + r, b.sum + r);
    }
    int64_t column = 0;
    for (; column + NV * VL <= c.latent; column += NV * VL)
        for (int64_t r = 0; r < item.rows; r += VR)
            value_rows<T, VR, NV>(b.scores + r * BLOCK, item.rows - r, keys, k, column, c.latent, b.values + r * c.latent);
    for (; column < c.latent; column += VL)
        for (int64_t r = 0; r < item.rows; r += VR)
            value_rows<T, VR, 1>(b.scores + r * BLOCK, item.rows - r, keys, k, column, c.latent, b.values + r * c.latent);
}

void merge_parts(const Call& c, const Job& job, int64_t row, Buffers& b) {
    const Item& item = job.item;
    for (int64_t r = 0; r < item.rows; r++) {
        float max = LOWEST, sum = 0;
        memset(b.total, 0, c.latent * sizeof(float));
        for (int64_t i = 0; i < job.parts; i++) {
            const float* p = c.partial + (job.base + i * item.rows + r) * c.partial_size();
            merge(b.total, &max, &sum, p, p[c.latent], p[c.latent + 1], c.latent);
        }
        finish(c, b.total, sum, row + r);
    }
}

template <class T>
void run_part(const hs_ctx* ctx, const Call& c, const Job& job, int64_t row, Buffers& b) {
    const Item& item = job.item;
    run_block<T>(c, item, job.first, b);
    for (int64_t r = 0; r < item.rows; r++) {
        float* part = c.partial + (job.base + job.first * item.rows + r) * c.partial_size();
        memcpy(part, b.values + r * c.latent, c.latent * sizeof(float));
        part[c.latent] = b.max[r];
        part[c.latent + 1] = b.sum[r];
    }
    if (hs_last(ctx, job.number, job.parts)) merge_parts(c, job, row, b);
}

template <class T>
void run_whole(const Call& c, const Job& job, int64_t row, Buffers& b) {
    const Item& item = job.item;
    for (int64_t r = 0; r < item.rows; r++) b.total_max[r] = LOWEST, b.total_sum[r] = 0;
    memset(b.total, 0, item.rows * c.latent * sizeof(float));
    for (int64_t block = job.first; block < job.end; block++) {
        run_block<T>(c, item, block, b);
        for (int64_t r = 0; r < item.rows; r++)
            merge(b.total + r * c.latent, b.total_max + r, b.total_sum + r, b.values + r * c.latent, b.max[r], b.sum[r], c.latent);
    }
    for (int64_t r = 0; r < item.rows; r++) finish(c, b.total + r * c.latent, b.total_sum[r], row + r);
}

template <class T>
void run(const hs_ctx* ctx, const Call& c, const Job& job, Buffers& b) {
    const Item& item = job.item;
    const int64_t row = c.seq_start[item.seq] * c.heads + item.first_row;
    for (int64_t i = 0; i < item.rows * c.width; i++) b.q[i] = c.q[row * c.width + i] * c.scale;
    if (job.number < 0)
        run_whole<T>(c, job, row, b);
    else
        run_part<T>(ctx, c, job, row, b);
}

// All jobs in an order every thread agrees on. A single token's items are split by block while the partial results have room:
// its heads alone may not fill the threads. Who finishes the last block of an item merges them.
template <class F>
void each_job(const Call& c, F visit) {
    int64_t used = 0, numbers = 0;
    for (int64_t s = 0; s < c.live[1]; s++) {
        const int64_t tokens = c.seq_start[s + 1] - c.seq_start[s], rows = tokens * c.heads;
        const int64_t first_position = c.seq_len[s] - tokens;
        for (int64_t row = 0; row < rows; row += ROWS) {
            Job job;
            job.item = Item{s, row, rows - row < ROWS ? rows - row : ROWS, first_position};
            job.first = 0;
            job.end = job.parts = job.item.position(job.item.rows - 1, c.heads) / BLOCK + 1;
            const int64_t room = job.parts * job.item.rows;
            if (tokens > 1 || job.parts == 1 || used + room > c.room || numbers == HS_ITEMS) {
                visit(job);
                continue;
            }
            job.number = numbers++;
            job.base = used;
            used += room;
            for (; job.first < job.parts; job.first++) {
                job.end = job.first + 1;
                visit(job);
            }
        }
    }
}

template <class T>
void attention(const hs_ctx* ctx, const hs_arg* a) {
    enum {
        LIVE, Q, KV, SEQ_START, SEQ_LEN, PAGE_TABLE, OUT, WORKSPACE,
        LAYER_OFFSET, PAGE_BYTES, HEADS, LATENT, ROTARY, COLUMNS, ROOM, SCALE
    };
    Call c;
    c.live = (const int32_t*)a[LIVE].p;
    c.seq_start = (const int32_t*)a[SEQ_START].p;
    c.seq_len = (const int32_t*)a[SEQ_LEN].p;
    c.pages = (const int32_t*)a[PAGE_TABLE].p;
    c.q = (const float*)a[Q].p;
    c.out = (float*)a[OUT].p;
    c.partial = (float*)a[WORKSPACE].p;
    c.room = a[ROOM].i;
    c.table = a[COLUMNS].i;
    c.heads = a[HEADS].i;
    c.latent = a[LATENT].i;
    c.width = a[LATENT].i + a[ROTARY].i;
    c.kv = (char*)a[KV].p + a[LAYER_OFFSET].i;
    c.page_bytes = a[PAGE_BYTES].i;
    c.scale = (float)a[SCALE].f;

    Buffers& b = *(Buffers*)scratch(sizeof(Buffers));
    hs_take_jobs(ctx, [&](auto visit) { each_job(c, visit); }, [&](const Job& job) { run<T>(ctx, c, job, b); });
}

}  // namespace

HS_EXPORT void hs_mla_kv_write_f32(const hs_ctx* ctx, const hs_arg* a) { kv_write<float>(ctx, a); }
HS_EXPORT void hs_mla_kv_write_bf16(const hs_ctx* ctx, const hs_arg* a) { kv_write<uint16_t>(ctx, a); }
HS_EXPORT void hs_mla_kv_write_e4m3(const hs_ctx* ctx, const hs_arg* a) { kv_write<E4M3>(ctx, a); }
HS_EXPORT void hs_mla_kv_write_e5m2(const hs_ctx* ctx, const hs_arg* a) { kv_write<E5M2>(ctx, a); }
HS_EXPORT void hs_mla_attention_f32(const hs_ctx* ctx, const hs_arg* a) { attention<float>(ctx, a); }
HS_EXPORT void hs_mla_attention_bf16(const hs_ctx* ctx, const hs_arg* a) { attention<uint16_t>(ctx, a); }
HS_EXPORT void hs_mla_attention_e4m3(const hs_ctx* ctx, const hs_arg* a) { attention<E4M3>(ctx, a); }
HS_EXPORT void hs_mla_attention_e5m2(const hs_ctx* ctx, const hs_arg* a) { attention<E5M2>(ctx, a); }
HS_EXPORT void hs_head_linear_f32(const hs_ctx* ctx, const hs_arg* a) { head_linear<F32>(ctx, a); }
HS_EXPORT void hs_head_linear_bf16(const hs_ctx* ctx, const hs_arg* a) { head_linear<BF16>(ctx, a); }
HS_EXPORT void hs_head_linear_int8(const hs_ctx* ctx, const hs_arg* a) { head_linear<INT8>(ctx, a); }
HS_EXPORT void hs_head_linear_int4(const hs_ctx* ctx, const hs_arg* a) { head_linear<INT4>(ctx, a); }
HS_EXPORT void hs_head_linear_bf16_widened(const hs_ctx* ctx, const hs_arg* a) { head_linear<WIDENED>(ctx, a); }
