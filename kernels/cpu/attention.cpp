// Attention over paged keys and values for one ragged batch of decode rows and prefill chunks. Slots: kernels/cpu/attention.py.
//
// A query row's result is defined block by block: keys are cut at absolute positions 0, 128, 256, …; each block gives (max, sum,
// weighted values) from scratch, and blocks are merged in order. No other split exists, so a row has the same bits whatever
// chunk, batch or thread it is computed in, and blocks of one long sequence can be computed by different threads.
//
// Work items: (sequence, KV head, up to 24 query rows), where the rows of a sequence are its tokens times the query heads of the
// KV head: keys and values are read once for all of them. Where threads would wait for a long one, a sequence with a single such item
// is split by block; who finishes the last piece merges them.
#include "abi.h"
#include "kv_page.h"
#include "softmax.h"

namespace {

using namespace hs;

constexpr int BLOCK = 128;                // keys
constexpr int PAGES = BLOCK / PAGE;       // pages of a block
constexpr int ROWS = 24;                  // query rows of a work item
constexpr int WHOLE = 4;                  // items of a thread from which on none is split

// Register tiles: MR rows x (KP pages of keys | NV vectors of values). 32 vector registers with AVX-512, 16 elsewhere.
constexpr int MR = VL == 16 ? 6 : VL == 8 ? 6 : 3;
constexpr int KP = VL == 16 ? 4 : 1;
constexpr int NV = VL == 16 ? 4 : VL == 8 ? 2 : 4;
constexpr int W = PAGE / VL;  // vectors per 16 keys

struct Call {
    const int32_t *live, *seq_start, *seq_len, *pages;
    const float* q;
    float* out;
    float* partial;          // room for `room` partial results
    int64_t room, table;     // table: columns of `pages`
    int64_t heads, kv_heads, group, window;
    int64_t dim, v_dim;               // of queries and keys, of values
    char* kv;
    int64_t page_bytes;
    float scale, softcap;             // softcap 0: none
    const float *sinks, *alibi;       // [H], or NULL
    bool causal;                      // a query sees no later key; otherwise every key of its sequence
    int64_t logn;                     // queries beyond that many tokens are scaled by ln(n) / ln(logn); 0: none

    int64_t partial_size() const { return v_dim + 2; }  // values, max, sum
};

// Query rows of one item: row r is token first_token + (first_row + r) / group, head (first_row + r) % group of the KV head.
struct Item {
    int64_t seq, kv_head, first_row, rows;
    int64_t first_position;  // of the sequence's first token in this step
    int64_t length;          // of the sequence after this step

    int64_t position(int64_t r, int64_t group) const { return first_position + (first_row + r) / group; }
    // Keys before this one are visible to row r.
    int64_t end(int64_t r, const Call& c) const { return c.causal ? position(r, c.group) + 1 : length; }
};

struct alignas(64) Buffers {
    float q[ROWS * MAX_DIM];
    float scores[ROWS * BLOCK];
    float values[ROWS * MAX_DIM];  // of one block
    float total[ROWS * MAX_DIM];   // merged so far
    float max[ROWS], sum[ROWS], total_max[ROWS], total_sum[ROWS];
};

// Element of row r in an array of all heads, `dim` each.
HS_INLINE int64_t row_of(const Call& c, const Item& item, int64_t r, int64_t dim) {
    int64_t f = item.first_row + r;
    return ((c.seq_start[item.seq] + f / c.group) * c.heads + item.kv_head * c.group + f % c.group) * dim;
}

HS_INLINE int64_t head_of(const Call& c, const Item& item, int64_t r) {
    return item.kv_head * c.group + (item.first_row + r) % c.group;
}

// scores[r][key] = q[r] . k[key] for R rows and KP pages. AHEAD: also prefetch `ahead`, as many bytes as are read here.
template <class T, int R, bool AHEAD>
void score_tile(const float* q, int64_t dim, const T* const* k, const T* const* ahead, float* scores) {
    constexpr int STEP = sizeof(T) == 2 ? 2 : 1;  // dims that share a row of a page
    vf acc[R][KP * W] = {};
    for (int64_t e = 0; e < dim; e += STEP) {
        vf keys[STEP][KP * W];
        HS_UNROLL
        for (int j = 0; j < KP * W; j++) {
            const T* p = k[j / W] + e * PAGE + j % W * VL * STEP;
            if (AHEAD && j % W == 0) prefetch(ahead[j / W] + e * PAGE);
            if constexpr (STEP == 1) {
                keys[0][j] = widen(p);
            } else {
                vu pair = load<vu>(p);
                keys[0][j] = as_f(pair << 16);
                keys[STEP - 1][j] = as_f(pair & 0xffff0000u);
            }
        }
        HS_UNROLL
        for (int s = 0; s < STEP; s++) {
            HS_UNROLL
            for (int r = 0; r < R; r++) {
                vf x = splat(q[r * dim + e + s]);
                HS_UNROLL
                for (int j = 0; j < KP * W; j++) acc[r][j] = fma(x, keys[s][j], acc[r][j]);
            }
        }
    }
    HS_UNROLL
    for (int r = 0; r < R; r++) {
        HS_UNROLL
        for (int j = 0; j < KP * W; j++) store(scores + r * BLOCK + j * VL, acc[r][j]);
    }
}

// values[r][0:N*VL] = sum over keys of weights[r][key] * v[key][0:N*VL], in key order.
template <class T, int R, int N, bool AHEAD>
void value_tile(const float* weights, int64_t keys, const T* const* v, const T* const* ahead, int64_t column, int64_t dim,
                float* values) {
    // Two bfloat16 vectors are widened at once into even and odd columns, and put in order at the end.
    constexpr bool PAIRS = sizeof(T) == 2 && N % 2 == 0;
    vf acc[R][N] = {};
    for (int64_t first = 0; first < keys; first += PAGE) {
        const T* p = v[first / PAGE] + column;
        const T* next = ahead[first / PAGE] + column;
        int64_t n = keys - first < PAGE ? keys - first : PAGE;
        for (int64_t i = 0; i < n; i++) {
            vf x[N];
            HS_UNROLL
            for (int j = 0; j < N; j++)
                if (AHEAD && j * VL * sizeof(T) % 64 == 0) prefetch(next + i * dim + j * VL);
            HS_UNROLL
            for (int j = 0; j < N; j += PAIRS ? 2 : 1) {
                if (PAIRS) {
                    vu pair = load<vu>(p + i * dim + j * VL);
                    x[j] = as_f(pair << 16);
                    x[j + PAIRS] = as_f(pair & 0xffff0000u);
                } else {
                    x[j] = widen(p + i * dim + j * VL);
                }
            }
            HS_UNROLL
            for (int r = 0; r < R; r++) {
                vf w = splat(weights[r * BLOCK + first + i]);
                HS_UNROLL
                for (int j = 0; j < N; j++) acc[r][j] = fma(w, x[j], acc[r][j]);
            }
        }
    }
    HS_UNROLL
    for (int r = 0; r < R; r++) {
        HS_UNROLL
        for (int j = 0; j < N; j += PAIRS ? 2 : 1) {
            float* out = values + r * dim + j * VL;
            if (PAIRS) {
                store(out, interleave<0>(acc[r][j], acc[r][j + PAIRS]));
                store(out + VL, interleave<VL / 2>(acc[r][j], acc[r][j + PAIRS]));
            } else {
                store(out, acc[r][j]);
            }
        }
    }
}

template <class T, int R, bool AHEAD>
void score_rows(const float* q, int64_t dim, int64_t rows, const T* const* k, const T* const* ahead, float* scores) {
    if constexpr (R > 1)
        if (rows < R) return score_rows<T, R - 1, AHEAD>(q, dim, rows, k, ahead, scores);
    score_tile<T, R, AHEAD>(q, dim, k, ahead, scores);
}

template <class T, int R, int N, bool AHEAD>
void value_rows(const float* weights, int64_t rows, int64_t keys, const T* const* v, const T* const* ahead, int64_t column,
                int64_t dim, float* values) {
    if constexpr (R > 1)
        if (rows < R) return value_rows<T, R - 1, N, AHEAD>(weights, rows, keys, v, ahead, column, dim, values);
    value_tile<T, R, N, AHEAD>(weights, keys, v, ahead, column, dim, values);
}

template <class T, int N>
void value_columns(const float* weights, int64_t rows, int64_t keys, const T* const* v, const T* const* ahead, int64_t column,
                   int64_t dim, float* values) {
    for (int64_t r = 0; r < rows; r += MR) {
        const float* w = weights + r * BLOCK;
        float* out = values + r * dim + column;
        int64_t n = rows - r < MR ? rows - r : MR;
        if (r == 0)
            value_rows<T, MR, N, true>(w, n, keys, v, ahead, column, dim, out);
        else
            value_rows<T, MR, N, false>(w, n, keys, v, ahead, column, dim, out);
    }
}

// Softcap and alibi on the scores of one row: key j of the block is `distance` + j positions after the query.
__attribute__((noinline)) void bend(float* scores, int64_t padded, float cap, float slope, int64_t distance) {
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    for (int64_t j = 0; j < padded; j += VL) {
        vf s = loadf(scores + j);
        if (cap != 0.0f) s = cap * vtanh(s / cap);
        if (slope != 0.0f) s = fma(splat(slope), to_float(lane + (int32_t)(distance + j)), s);
        store(scores + j, s);
    }
}

// A sink is one more key of a row, without a value: it joins the sum only.
void finish(const Call& c, const Item& item, int64_t r, const float* total, float max, float sum) {
    float* out = c.out + row_of(c, item, r, c.v_dim);
    float kept = 1;
    if (c.sinks) {
        float sink = c.sinks[head_of(c, item, r)], top = sink > max ? sink : max;
        kept = vexp(splat(max - top))[0];
        sum = sum * kept + vexp(splat(sink - top))[0];
    }
    for (int64_t i = 0; i < c.v_dim; i += VL) store(out + i, loadf(total + i) * kept / sum);
}

// Key blocks first..end-1 of an item, the work of one thread at a time.
struct Job {
    Item item;
    int64_t first, end;
    int64_t number = -1;  // among the items that are split; -1: this one is whole
    int64_t parts, base;  // blocks of the item; where in `partial` their results begin, `rows` for each
    int64_t part = 0;     // of which this is one
};

// Keys of a block that the last row of an item sees.
int64_t keys_of(const Call& c, const Item& item, int64_t block) {
    int64_t keys = item.end(item.rows - 1, c) - block * BLOCK;
    return keys < BLOCK ? keys : BLOCK;
}

// One key block for all rows of an item: b.values, b.max, b.sum. `next`: the item and block this thread reads after it, or NULL.
template <class T>
void run_block(const Call& c, const Item& item, int64_t block, const Item* next, int64_t next_block, Buffers& b) {
    const KvLayer<T> layer{c.kv, c.page_bytes, c.dim, c.v_dim};
    const int32_t* table = c.pages + item.seq * c.table;
    int64_t start = block * BLOCK, keys = keys_of(c, item, block), pages = (keys + PAGE - 1) / PAGE;

    // Pages in the order they are read (keys, values, keys of the next block); each prefetches the one `AHEAD` places on.
    constexpr int AHEAD = PAGES / 2;
    const T* stream[2 * PAGES + AHEAD];
    const T *k[PAGES], *k_ahead[PAGES];
    for (int64_t i = 0; i < pages; i++) {
        int32_t page = table[start / PAGE + i];
        stream[i] = k[i] = layer.k(page, item.kv_head);
        stream[pages + i] = layer.v(page, item.kv_head);
    }
    int64_t next_pages = next ? (keys_of(c, *next, next_block) + PAGE - 1) / PAGE : 0;
    for (int64_t i = 0; i < AHEAD; i++)
        stream[2 * pages + i] = i < next_pages
                                    ? layer.k(c.pages[next->seq * c.table + next_block * PAGES + i], next->kv_head)
                                    : stream[2 * pages - 1];
    for (int64_t i = 0; i < PAGES; i++) {  // a tile reads whole groups of pages: repeat the last one, its scores are masked
        int64_t at = i < pages ? i : pages - 1;
        k[i] = stream[at];
        k_ahead[i] = stream[at + AHEAD];
    }

    for (int64_t p = 0; p < pages; p += KP)
        for (int64_t r = 0; r < item.rows; r += MR) {
            int64_t n = item.rows - r < MR ? item.rows - r : MR;
            float* scores = b.scores + r * BLOCK + p * PAGE;
            if (r == 0)
                score_rows<T, MR, true>(b.q, c.dim, n, k + p, k_ahead + p, scores);
            else
                score_rows<T, MR, false>(b.q + r * c.dim, c.dim, n, k + p, k_ahead + p, scores);
        }

    int64_t padded = (pages + KP - 1) / KP * KP * PAGE;
    for (int64_t r = 0; r < item.rows; r++) {
        int64_t position = item.position(r, c.group);
        int64_t last = item.end(r, c) - start, first = c.window ? position - c.window + 1 - start : 0;
        last = last < 0 ? 0 : last < BLOCK ? last : BLOCK;
        first = first < 0 ? 0 : first < BLOCK ? first : BLOCK;
        if (c.softcap != 0.0f || c.alibi)
            bend(b.scores + r * BLOCK, padded, c.softcap, c.alibi ? c.alibi[head_of(c, item, r)] : 0, start - position);
        Ahead ahead;
        if (AHEAD + r < pages) ahead = {(const char*)stream[pages + AHEAD + r], PAGE * c.v_dim * (int64_t)sizeof(T)};
        soften(b.scores + r * BLOCK, padded, (int)first, (int)last, b.max + r, b.sum + r, ahead);
    }

    const T* const* v = stream + pages;
    int64_t column = 0;
    for (; column + NV * VL <= c.v_dim; column += NV * VL)
        value_columns<T, NV>(b.scores, item.rows, keys, v, v + AHEAD, column, c.v_dim, b.values);
    if constexpr (NV > 1)
        for (; column < c.v_dim; column += VL)
            value_columns<T, 1>(b.scores, item.rows, keys, v, v + AHEAD, column, c.v_dim, b.values);
}

void load_queries(const Call& c, const Item& item, Buffers& b) {
    for (int64_t r = 0; r < item.rows; r++) {
        const float* q = c.q + row_of(c, item, r, c.dim);
        float scale = c.scale;
        if (int64_t n = item.position(r, c.group) + 1; c.logn && n > c.logn)
            scale *= std::log((float)n) / std::log((float)c.logn);
        for (int64_t i = 0; i < c.dim; i += VL) store(b.q + r * c.dim + i, loadf(q + i) * scale);
    }
}

void merge_parts(const Call& c, const Job& job, Buffers& b) {
    const Item& item = job.item;
    for (int64_t r = 0; r < item.rows; r++) {
        float max = LOWEST, sum = 0;
        memset(b.total, 0, c.v_dim * sizeof(float));
        for (int64_t i = 0; i < job.parts; i++) {
            const float* p = c.partial + (job.base + i * item.rows + r) * c.partial_size();
            merge(b.total, &max, &sum, p, p[c.v_dim], p[c.v_dim + 1], c.v_dim);
        }
        finish(c, item, r, b.total, max, sum);
    }
}

template <class T>
void run_part(const hs_ctx* ctx, const Call& c, const Job& job, const Job* next, Buffers& b) {
    const Item& item = job.item;
    run_block<T>(c, item, job.first, next ? &next->item : nullptr, next ? next->first : 0, b);
    for (int64_t r = 0; r < item.rows; r++) {
        float* part = c.partial + (job.base + job.part * item.rows + r) * c.partial_size();
        memcpy(part, b.values + r * c.v_dim, c.v_dim * sizeof(float));
        part[c.v_dim] = b.max[r];
        part[c.v_dim + 1] = b.sum[r];
    }
    if (hs_last(ctx, job.number, job.parts)) merge_parts(c, job, b);
}

template <class T>
void run_whole(const Call& c, const Job& job, const Job* next, Buffers& b) {
    const Item& item = job.item;
    for (int64_t r = 0; r < item.rows; r++) b.total_max[r] = LOWEST, b.total_sum[r] = 0;
    memset(b.total, 0, item.rows * c.v_dim * sizeof(float));
    for (int64_t block = job.first; block < job.end; block++) {
        bool last = block + 1 == job.end;
        run_block<T>(c, item, block, !last ? &item : next ? &next->item : nullptr, !last ? block + 1 : next ? next->first : 0, b);
        for (int64_t r = 0; r < item.rows; r++)
            merge(b.total + r * c.v_dim, b.total_max + r, b.total_sum + r, b.values + r * c.v_dim, b.max[r], b.sum[r], c.v_dim);
    }
    for (int64_t r = 0; r < item.rows; r++) finish(c, item, r, b.total + r * c.v_dim, b.total_max[r], b.total_sum[r]);
}

template <class T>
void run(const hs_ctx* ctx, const Call& c, const Job& job, const Job* next, Buffers& b) {
    load_queries(c, job.item, b);
    if (job.number < 0)
        run_whole<T>(c, job, next, b);
    else
        run_part<T>(ctx, c, job, next, b);
}

// Calls visit(job) for every (sequence, KV head, rows), one key block at a time for those that are split. Every thread walks the
// same list.
template <class F>
void each_job(const Call& c, int threads, F visit) {
    int64_t used = 0, numbers = 0, all = 0;  // all: blocks of every sequence and KV head
    for (int64_t s = 0; s < c.live[1]; s++) {
        const int64_t seen = c.window + c.seq_start[s + 1] - c.seq_start[s];  // keys at most, where there is a window
        const int64_t keys = c.window && seen < c.seq_len[s] ? seen : c.seq_len[s];
        all += (keys + BLOCK - 1) / BLOCK * c.kv_heads;
    }
    for (int64_t s = 0; s < c.live[1]; s++) {
        int64_t tokens = c.seq_start[s + 1] - c.seq_start[s], rows = tokens * c.group;
        for (int64_t row = 0; row < rows; row += ROWS) {
            Job job;
            job.item = {s, 0, row, rows - row < ROWS ? rows - row : ROWS, c.seq_len[s] - tokens, c.seq_len[s]};
            int64_t low = c.window ? job.item.position(0, c.group) - c.window + 1 : 0;
            const int64_t first = (low > 0 ? low : 0) / BLOCK, end = (job.item.end(job.item.rows - 1, c) - 1) / BLOCK + 1;
            job.parts = end - first;
            const int64_t room = job.parts * job.item.rows;
            const bool split = rows <= ROWS && job.parts > 1 && job.parts * threads * WHOLE > all &&
                               used + room * c.kv_heads <= c.room && numbers + c.kv_heads <= HS_ITEMS;
            for (; job.item.kv_head < c.kv_heads; job.item.kv_head++) {
                job.first = first, job.end = end;
                if (!split) {
                    visit(job);
                    continue;
                }
                job.number = numbers++;
                job.base = used;
                used += room;
                for (job.part = 0; job.part < job.parts; job.part++) {
                    job.first = first + job.part, job.end = job.first + 1;
                    visit(job);
                }
            }
        }
    }
}

template <class T>
void attention(const hs_ctx* ctx, const hs_arg* a) {
    enum {
        LIVE, Q, KV, SEQ_START, SEQ_LEN, PAGE_TABLE, SINKS, ALIBI, OUT, WORKSPACE,
        LAYER_OFFSET, PAGE_BYTES, HEADS, KV_HEADS, HEAD_DIM, V_HEAD_DIM, CAUSAL, WINDOW, LOGN, COLUMNS, ROOM, SCALE, SOFTCAP
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
    c.kv_heads = a[KV_HEADS].i;
    c.group = c.heads / c.kv_heads;
    c.dim = a[HEAD_DIM].i;
    c.v_dim = a[V_HEAD_DIM].i;
    c.causal = a[CAUSAL].i;
    c.window = a[WINDOW].i;
    c.kv = (char*)a[KV].p + a[LAYER_OFFSET].i;
    c.page_bytes = a[PAGE_BYTES].i;
    c.scale = (float)a[SCALE].f;
    c.softcap = (float)a[SOFTCAP].f;
    c.sinks = (const float*)a[SINKS].p;
    c.alibi = (const float*)a[ALIBI].p;
    c.logn = a[LOGN].i;

    Buffers b;
    Job held;  // ours, but run only when the one after it is known, so that its first keys can be prefetched
    bool holding = false;
    hs_take_jobs(ctx, [&](auto visit) { each_job(c, ctx->threads, visit); }, [&](const Job& job) {
        if (holding) run<T>(ctx, c, held, &job, b);
        held = job;
        holding = true;
    });
    if (holding) run<T>(ctx, c, held, nullptr, b);
}

}  // namespace

HS_EXPORT void hs_attention_f32(const hs_ctx* ctx, const hs_arg* a) { attention<float>(ctx, a); }
HS_EXPORT void hs_attention_bf16(const hs_ctx* ctx, const hs_arg* a) { attention<uint16_t>(ctx, a); }
HS_EXPORT void hs_attention_e4m3(const hs_ctx* ctx, const hs_arg* a) { attention<E4M3>(ctx, a); }
HS_EXPORT void hs_attention_e5m2(const hs_ctx* ctx, const hs_arg* a) { attention<E5M2>(ctx, a); }
