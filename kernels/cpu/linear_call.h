// One linear call as every micro-kernel sees it: arguments, the epilogue of a finished piece of a row, per-thread scratch
// and the split of output tiles over the threads.
#pragma once
#include <cstdlib>

#include "abi.h"
#include "linear.h"

namespace hs {

// A weight of `format` from the slots DATA and, for groups, GROUP and SCALE, which stand in this order in every kernel.
static inline Weight bind_weight(int format, int64_t k, const hs_arg* slots) {
    const bool grouped = format == INT8 || format == INT4;
    return {format, k, grouped ? slots[1].i : 0, slots[0].p, grouped ? (const uint16_t*)slots[2].p : nullptr};
}

// y[r, :] = epilogue(W prologue(x[rows ? rows[r] / shared : r, :])) for r < t.
struct Linear {
    int64_t t = 0;  // live rows
    const float* x = nullptr;
    int64_t x_stride = 0;  // floats from one row to the next
    const int32_t* rows = nullptr;    // optional gather
    int64_t shared = 1;               // so many rows read one row of x
    const float* bias = nullptr;      // optional [N], or cat(gate, up) [2N] when gated
    const float* norm = nullptr;      // optional RMSNorm weight [K]
    const float* residual = nullptr;  // optional [T,N]; may be `out`
    const int32_t* residual_rows = nullptr;  // optional gather of the residual
    float* out = nullptr;             // [T,N]
    int64_t out_stride = 0;
    const int32_t* places = nullptr;  // optional scatter: the row of `out` where row r goes
    uint8_t* work = nullptr;
    int64_t n = 0;  // columns of out
    bool gated = false;
    int64_t act = 0;  // Activation of the product, or of the gate; 0: none
    float eps = 0, scale = 1, softcap = 0;
    Weight w;
    hs_stream then = {};  // where this thread reads on after its tiles

    const float* row(int64_t r) const { return x + (rows ? rows[r] / shared : r) * x_stride; }
    float* out_row(int64_t r) const { return out + (places ? places[r] : r) * out_stride; }
    int64_t tile_columns() const { return gated ? HALF : TILE; }  // of out
    int64_t tiles() const { return (n + tile_columns() - 1) / tile_columns(); }
    hs_stream from(int64_t tile) const {
        return {w.tile(tile), w.scale ? (const uint8_t*)w.tile_scale(tile) : nullptr, w.tile_bytes()};
    }
};

// Contiguous tile range of a thread: its weight stream is one piece of memory.
struct Range {
    int64_t begin, end;
};
static inline Range split(int64_t count, const hs_ctx* ctx) {
    return {count * ctx->thread / ctx->threads, count * (ctx->thread + 1) / ctx->threads};
}

static inline hs_stream first_tile(const hs_ctx* ctx, const Linear& c) {
    return c.t > 0 ? c.from(split(c.tiles(), ctx).begin) : hs_stream{};
}

// The entry NAME that runs RUN<FMT>, and where a share of it begins to read: `bind(FMT, a)` is the including file's.
#define HS_LINEAR(NAME, RUN, FMT)                                               \
    HS_EXPORT void NAME(const hs_ctx* ctx, const hs_arg* a) { RUN<FMT>(ctx, a); } \
    static const hs_reader NAME##_reader(NAME, [](const hs_ctx* ctx, const hs_arg* a) { return first_tile(ctx, bind(FMT, a)); });

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Scratch of the calling thread, reused by every call; grows to the largest request and then stays.
struct Scratch {
    void* p = nullptr;
    size_t size = 0;
    ~Scratch() { free(p); }
    void* get(size_t bytes) {
        if (bytes > size) {
            free(p);
            size = round_up(bytes, 4096);
            p = aligned_alloc(4096, size);
            if (!p) abort();  // a few hundred kilobytes: nothing sensible is left to do
        }
        return p;
    }
};
static inline void* scratch(size_t bytes) {
    static thread_local Scratch buffer;
    return buffer.get(bytes);
}

HS_INLINE vf load_bias(const float* bias, int64_t column, int64_t n) {
    int64_t left = n - column;
    return left >= VL ? loadf(bias + column) : load_part(bias + column, left > 0 ? (int)left : 0);
}
HS_INLINE void put(float* p, vf v, int64_t left) {
    if (left >= VL)
        store(p, v);
    else if (left > 0)
        store_part(p, v, (int)left);
}

// Activation, scale and softcap of a finished product. Out of line: most calls have none of them.
static __attribute__((noinline)) vf adjust(const Linear& c, vf v) {
    if (c.act && !c.gated) v = activate(c.act, v);
    v *= c.scale;
    if (c.softcap != 0.0f) v = c.softcap * vtanh(v / c.softcap);
    return v;
}

// `acc` holds the dot products of row r with a tile.
HS_INLINE void finish(const Linear& c, int64_t r, int64_t tile, const float* acc) {
    const bool adjusted = (c.act && !c.gated) || c.scale != 1.0f || c.softcap != 0.0f;
    int64_t column = tile * c.tile_columns();
    if (c.gated) {
        float* y = c.out_row(r) + column;
        for (int i = 0; i < HALF; i += VL) {
            vf g = loadf(acc + i), u = loadf(acc + HALF + i);
            if (c.bias) {
                g += load_bias(c.bias, column + i, c.n);
                u += load_bias(c.bias + c.n, column + i, c.n);
            }
            if (c.act == SILU_CLAMPED) u = vmax(vmin(u, splat(7.0f)), splat(-7.0f)) + 1.0f;
            vf v = (c.act == SILU ? silu(g) : activate(c.act, g)) * u;
            put(y + i, adjusted ? adjust(c, v) : v, c.n - column - i);
        }
        return;
    }
    for (int i = 0; i < TILE; i += VL) {
        int64_t left = c.n - column - i;
        if (left <= 0) return;
        vf v = loadf(acc + i);
        if (c.bias) v += load_bias(c.bias, column + i, c.n);
        if (adjusted) v = adjust(c, v);
        if (c.residual) {
            const float* p = c.residual + (c.residual_rows ? c.residual_rows[r] : r) * c.n + column + i;
            v += left >= VL ? loadf(p) : load_part(p, (int)left);
        }
        put(c.out_row(r) + column + i, v, left);
    }
}

// out = x / sqrt(mean(x^2) + eps) * w
static inline void rms_norm(const float* x, const float* w, float eps, int64_t k, float* out) {
    vf sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * VL <= k; i += 4 * VL)
        for (int j = 0; j < 4; j++) {
            vf v = loadf(x + i + j * VL);
            sum[j] = fma(v, v, sum[j]);
        }
    float total = hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (int64_t j = i; j < k; j++) total += x[j] * x[j];
    float inverse = 1.0f / std::sqrt(total / (float)k + eps);
    for (i = 0; i + VL <= k; i += VL) store(out + i, loadf(x + i) * inverse * loadf(w + i));
    for (; i < k; i++) out[i] = x[i] * inverse * w[i];
}

// out = (x - mean) / sqrt(var + eps) * w + bias; `bias` may be NULL, `out` may be x. Two passes: no cancellation.
static inline void layer_norm(const float* x, const float* w, const float* bias, float eps, int64_t k, float* out) {
    vf sum{};
    int64_t i = 0;
    for (; i + VL <= k; i += VL) sum += loadf(x + i);
    float total = hsum(sum);
    for (int64_t j = i; j < k; j++) total += x[j];
    const float mean = total / (float)k;
    vf square{};
    for (i = 0; i + VL <= k; i += VL) {
        vf v = loadf(x + i) - mean;
        square = fma(v, v, square);
    }
    total = hsum(square);
    for (int64_t j = i; j < k; j++) total += (x[j] - mean) * (x[j] - mean);
    const float inverse = 1.0f / std::sqrt(total / (float)k + eps);
    for (i = 0; i + VL <= k; i += VL) {
        vf v = (loadf(x + i) - mean) * inverse * loadf(w + i);
        store(out + i, bias ? v + loadf(bias + i) : v);
    }
    for (; i < k; i++) out[i] = (x[i] - mean) * inverse * w[i] + (bias ? bias[i] : 0.0f);
}

// Row r after the prologue: x itself, or its norm written to `buffer`.
HS_INLINE const float* prologue(const Linear& c, int64_t r, float* buffer) {
    const float* x = c.row(r);
    if (!c.norm) return x;
    rms_norm(x, c.norm, c.eps, c.w.k, buffer);
    return buffer;
}

// Asks for all of the few rows at once: other cores have just written half of them, and the loops over a row wait line by line.
static inline void fetch_rows(const Linear& c) {
    for (int64_t r = 0; r < c.t; r++)
        for (int64_t i = 0; i < c.w.k; i += LINE / 4) prefetch(c.row(r) + i);
}

// A tile, and where its thread reads on after its end (for the prefetch): `step` tiles later, or what comes after its tiles.
struct Stream {
    const uint8_t* tile;
    const uint8_t* next;
};

static inline Stream stream(const Linear& c, int64_t tile, int64_t end, int64_t step = 1) {
    const uint8_t* own = c.w.tile(tile);
    if (tile + step < end) return {own, c.w.tile(tile + step)};
    return {own, c.then.tile ? c.then.tile + (tile + step - end) * c.then.tile_bytes : own};
}

// Rows up to this many are prepared by every share for itself: cheaper than a phase. More are prepared together, in
// c.work, by prepare<FMT>(ctx, c); in the next phase product<FMT>(ctx, c) computes this share's tiles of all rows.
constexpr int64_t FEW_ROWS = 8;

// Defined in linear.cpp for every Format.
template <int FMT>
void prepare(const hs_ctx* ctx, const Linear& c);
template <int FMT>
void product(const hs_ctx* ctx, const Linear& c);

// Bytes of a prepared row, of which c.work holds whole blocks of 16: the most any level needs, as in kernels/cpu/linear.py.
template <int FMT>
HS_INLINE int64_t prepared_bytes(const Weight& w) {
    if (FMT == INT8 || FMT == INT4) return round_up(w.k, 64) + 8 * (w.k / w.group);
    return round_up(w.k, 32) * 4;
}

}  // namespace hs
