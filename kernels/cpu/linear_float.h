// float32 and bfloat16 weights: one accumulator per output, k ascending, whatever the number of rows. bfloat16 is widened for FMA,
// or, where the level has the dot of bfloat16 pairs, activations are rounded to bfloat16 (at every number of rows). What is widened
// gives the bits of the same numbers stored in float32.
//
// What one broadcast multiplies is a unit: a float, or two bfloat16 of neighbouring k in the same four bytes.
// A few rows are read where they are; more are repacked in panels [K][R] so that one pointer serves all R broadcasts.
#pragma once
#include <unistd.h>

#include "linear_call.h"

namespace hs {

constexpr int NV = HALF / VL;                // vectors per half of a tile
#if defined(HS_AVX512)
constexpr int PANEL = 12, DIRECT = 8;        // 24 accumulators of 32 registers
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int PANEL = 6, DIRECT = 4;
#else
constexpr int PANEL = 3, DIRECT = 2;
#endif
// The two sums of one row wait for each other, so float32 takes two tiles side by side: on a Zen 5 (November 2026, two threads) a
// fiftieth faster; bfloat16 is a fiftieth slower so. On a Xeon with AMX two streams cost a tenth of the bandwidth.
#if defined(HS_AVX512) && !defined(HS_AMX)
template <int FMT>
constexpr bool PAIRS = FMT == F32;
#else
template <int FMT>
constexpr bool PAIRS = false;
#endif
constexpr int64_t FLOAT_AHEAD = 8192;  // prefetch distance, bytes, of all tiles side by side
constexpr int64_t PANEL_AHEAD = 512;   // floats: panels come from the second-level cache
constexpr int64_t PIECE = 128;  // steps of a tile (16 KB) that stay in the first-level cache for all panels

#if defined(__AVX512BF16__)
template <int FMT>
constexpr bool DOT = FMT == BF16;
#else
template <int FMT>
constexpr bool DOT = false;
#endif
template <int FMT>
constexpr int STEP = in_bf16(FMT) && !DOT<FMT> ? 2 : 1;  // units per line

template <int FMT>
HS_INLINE int64_t units(const Weight& w) {
    return w.padded_k() / (DOT<FMT> ? 2 : 1);
}

template <int FMT>
HS_INLINE vf accumulate(const float* unit, vf w, vf sum) {
#if defined(__AVX512BF16__)
    if (DOT<FMT>) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)splati(load<int32_t>(unit)));
#endif
    return fma(splat(*unit), w, sum);
}

// Row r in units, padded with zeros: x itself where nothing changes it, else in `buffer` (padded_k floats).
template <int FMT>
static inline const float* unit_row(const Linear& c, int64_t r, float* buffer) {
    const int64_t k = c.w.k, kp = c.w.padded_k();
    const float* x = prologue(c, r, buffer);
#if defined(__AVX512BF16__)
    if (DOT<FMT>) {  // in place is fine: what is written lies behind what is still read
        for (int64_t i = 0; i < kp; i += VL) {
            const int64_t left = k - i;
            const vf v = left >= VL ? loadf(x + i) : load_part(x + i, left > 0 ? (int)left : 0);
            store((uint16_t*)buffer + i, _mm512_cvtneps_pbh((__m512)v));
        }
        return buffer;
    }
#endif
    if (kp == k) return x;
    if (x != buffer) memcpy(buffer, x, k * 4);
    memset(buffer + k, 0, (kp - k) * 4);
    return buffer;
}

// acc[n][r][0..31] += x[r] . W over `steps` steps of TILES tiles, for R rows. Unit (r,i) is panel[i*R + r] in a panel, row[r][i]
// otherwise. A sum that leaves the registers between two calls comes back as it was, so cutting K changes no bit.
template <int FMT, int R, bool IN_PANEL, int TILES = 1>
static void block(const float* const* row, const float* panel, const Stream* s, int64_t steps, bool first,
                  float (*acc)[R][TILE]) {
    constexpr int STEP = hs::STEP<FMT>;
    constexpr int NT = VL == 16 || R * 2 * NV <= 8 ? 2 : 1;  // halves of the tile whose sums fit the registers
    for (int t0 = 0; t0 < 2; t0 += NT) {
        vf sum[R][TILES][NT][NV] = {};
        if (!first)
            for (int r = 0; r < R; r++)
                for (int n = 0; n < TILES; n++)
                    for (int t = 0; t < NT; t++)
                        for (int v = 0; v < NV; v++) sum[r][n][t][v] = loadf(&acc[n][r][(t0 + t) * HALF + v * VL]);
        const float* x[IN_PANEL ? 1 : R];
        for (int r = 0; r < (IN_PANEL ? 1 : R); r++) x[r] = IN_PANEL ? panel : row[r];
        constexpr int64_t AHEAD = FLOAT_AHEAD / TILES;
        const int64_t near = steps > AHEAD / (2 * LINE) ? steps - AHEAD / (2 * LINE) : 0;
        const uint8_t *ahead[TILES], *next[TILES];
        for (int n = 0; n < TILES; n++) {
            ahead[n] = s[n].tile + AHEAD;
            next[n] = s[n].next - near * 2 * LINE;
        }
        auto run = [&](int64_t begin, int64_t end, const uint8_t* const* later) __attribute__((always_inline)) {
            for (int64_t i = begin; i < end; i++) {
                vf w[STEP][TILES][NT][NV];
                HS_UNROLL for (int n = 0; n < TILES; n++)
                    HS_UNROLL for (int t = 0; t < NT; t++) {
                        prefetch(later[n] + (2 * i + t0 + t) * LINE);
                        HS_UNROLL for (int v = 0; v < NV; v++) {
                            const uint8_t* p = s[n].tile + (2 * i + t0 + t) * LINE + v * VL * 4;
                            if (STEP == 2) {
                                vu pair = load<vu>(p);
                                w[0][n][t][v] = as_f(pair << 16);
                                w[STEP - 1][n][t][v] = as_f(pair & 0xffff0000u);
                            } else {
                                w[0][n][t][v] = load<vf>(p);
                            }
                        }
                    }
                if (IN_PANEL) prefetch(x[0] + i * STEP * R + PANEL_AHEAD);
                HS_UNROLL for (int j = 0; j < STEP; j++)
                    HS_UNROLL for (int r = 0; r < R; r++) {
                        const float* unit = IN_PANEL ? x[0] + (i * STEP + j) * R + r : x[r] + i * STEP + j;
                        HS_UNROLL for (int n = 0; n < TILES; n++)
                            HS_UNROLL for (int t = 0; t < NT; t++)
                                HS_UNROLL for (int v = 0; v < NV; v++)
                                    sum[r][n][t][v] = accumulate<FMT>(unit, w[j][n][t][v], sum[r][n][t][v]);
                    }
            }
        };
        run(0, near, ahead);
        run(near, steps, next);
        for (int r = 0; r < R; r++)
            for (int n = 0; n < TILES; n++)
                for (int t = 0; t < NT; t++)
                    for (int v = 0; v < NV; v++) store(&acc[n][r][(t0 + t) * HALF + v * VL], sum[r][n][t][v]);
    }
}

template <int FMT, int R, int TILES = 1>
static void direct(const Linear& c, int64_t r0, int64_t live, const float* const* row, int64_t tile, int64_t end) {
    alignas(64) float acc[TILES][R][TILE];
    Stream s[TILES];
    for (int n = 0; n < TILES; n++) s[n] = stream(c, tile + n, end, TILES);
    block<FMT, R, false, TILES>(row, nullptr, s, c.w.steps(), true, acc);
    for (int n = 0; n < TILES; n++)
        for (int r = 0; r < live; r++) finish(c, r0 + r, tile + n, acc[n][r]);
}

template <int FMT>
static void few_rows(const hs_ctx* ctx, const Linear& c) {
    const int64_t kp = c.w.padded_k();
    const float* rows[FEW_ROWS + DIRECT] = {};
    float* buffer = (float*)scratch(FEW_ROWS * kp * 4);
    fetch_rows(c);
    for (int64_t r = 0; r < c.t; r++) rows[r] = unit_row<FMT>(c, r, buffer + r * kp);
    for (int64_t r = c.t; r < FEW_ROWS + DIRECT; r++) rows[r] = rows[0];
    Range range = split(c.tiles(), ctx);
    int64_t tile = range.begin;
    if constexpr (PAIRS<FMT>)
        for (; c.t == 1 && tile + 2 <= range.end; tile += 2) direct<FMT, 1, 2>(c, 0, 1, rows, tile, range.end);
    for (; tile < range.end; tile++)
        for (int64_t r = 0; r < c.t; r += DIRECT) {
            int64_t live = c.t - r < DIRECT ? c.t - r : DIRECT;
            const float** x = rows + r;
            if (live == 1)
                direct<FMT, 1>(c, r, live, x, tile, range.end);
            else if (live == 2)
                direct<FMT, 2>(c, r, live, x, tile, range.end);
            else if (live <= DIRECT / 2)
                direct<FMT, DIRECT / 2>(c, r, live, x, tile, range.end);
            else
                direct<FMT, DIRECT>(c, r, live, x, tile, range.end);
        }
}

// Panels hold PANEL rows each; the last one a third, two thirds or all of it.
static inline int panel_height(int64_t rows) {
    return rows > PANEL * 2 / 3 ? PANEL : rows > PANEL / 3 ? PANEL * 2 / 3 : PANEL / 3;
}

// to[i * stride + j] = row[j][k + i] for i, j < 4.
HS_INLINE void transpose4(const float* const* row, int64_t k, float* to, int64_t stride) {
    typedef float v4 __attribute__((vector_size(16), aligned(4)));
    v4 a = *(const v4*)(row[0] + k), b = *(const v4*)(row[1] + k), c = *(const v4*)(row[2] + k), d = *(const v4*)(row[3] + k);
    v4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    v4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *(v4*)to = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
    *(v4*)(to + stride) = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
    *(v4*)(to + 2 * stride) = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5);
    *(v4*)(to + 3 * stride) = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}

template <int FMT>
static inline void fill_panel(const Linear& c, int64_t r0, float* panel) {
    const int64_t kp = c.w.padded_k(), count = units<FMT>(c.w);
    const int height = panel_height(c.t - r0);
    float* buffer = (float*)scratch((PANEL + 1) * kp * 4);
    const float* row[PANEL];
    for (int r = 0; r < height; r++) row[r] = r0 + r < c.t ? unit_row<FMT>(c, r0 + r, buffer + r * kp) : buffer + PANEL * kp;
    memset(buffer + PANEL * kp, 0, kp * 4);  // stands for the rows beyond the last
    constexpr int THIRD = PANEL / 3;
    for (int r = 0; r < height; r += THIRD) {
        float* to = panel + r;
        int64_t i = 0;
        if (THIRD == 4)
            for (; i + 4 <= count; i += 4, to += 4 * height) transpose4(row + r, i, to, height);
        for (; i < count; i++, to += height)
            HS_UNROLL for (int j = 0; j < THIRD; j++) memcpy(to + j, row[r + j] + i, 4);
    }
}

// Bytes of a core's second-level cache; a megabyte where the system does not say.
static inline int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const long told = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (told > 0) return told;
#endif
    return 1 << 20;
}

template <int FMT>
static inline void fill_panels(const hs_ctx* ctx, const Linear& c) {
    const int64_t count = units<FMT>(c.w), panels = (c.t + PANEL - 1) / PANEL;
    for (int64_t p = ctx->thread; p < panels; p += ctx->threads)
        fill_panel<FMT>(c, p * PANEL, (float*)c.work + p * PANEL * count);
}

template <int FMT>
static void many_rows(const hs_ctx* ctx, const Linear& c) {
    const int64_t row_units = units<FMT>(c.w), panels = (c.t + PANEL - 1) / PANEL;
    const float* work = (const float*)c.work;
    Range range = split(c.tiles(), ctx);
    const int64_t steps = c.w.steps(), pieces = (steps + PIECE - 1) / PIECE;
    // Panels that stay in the second-level cache beside the weights, and their sums.
    const int64_t fitting = second_level_cache() / 8 * 7 / (PANEL * row_units * 4), chunk = fitting < 8 ? 8 : fitting > 64 ? 64 : fitting;
    float(*sums)[TILE] = (float(*)[TILE])scratch(64 * PANEL * TILE * 4);
    for (int64_t p0 = 0; p0 < panels; p0 += chunk) {
        const int64_t stop = p0 + chunk < panels ? p0 + chunk : panels;
        for (int64_t tile = range.begin; tile < range.end; tile++) {
            const Stream whole = stream(c, tile, range.end);
            // With many panels the next tile is fetched while this one is in use, evenly.
            const uint8_t* later = whole.next;
            const int64_t share = stop - p0 > 3 ? 2 * PIECE / (stop - p0) + 1 : 0;
            for (int64_t i = 0; i < pieces; i++) {
                const int64_t at = i * PIECE, count = steps - at < PIECE ? steps - at : PIECE;
                const uint8_t* begin = whole.tile + at * 2 * LINE;
                const Stream s{begin, i + 1 < pieces ? begin + PIECE * 2 * LINE : whole.next};
                for (int64_t p = p0; p < stop; p++, later += share * LINE) {
                    for (int64_t l = 0; l < share; l++) prefetch_far(later + l * LINE);
                    const int64_t left = c.t - p * PANEL;
                    const int height = panel_height(left);
                    const float* x = work + p * PANEL * row_units + at * STEP<FMT> * height;
                    float(*acc)[TILE] = sums + (p - p0) * PANEL;
                    if (height == PANEL)
                        block<FMT, PANEL, true>(nullptr, x, &s, count, i == 0, (float(*)[PANEL][TILE])acc);
                    else if (height == PANEL * 2 / 3)
                        block<FMT, PANEL * 2 / 3, true>(nullptr, x, &s, count, i == 0, (float(*)[PANEL * 2 / 3][TILE])acc);
                    else
                        block<FMT, PANEL / 3, true>(nullptr, x, &s, count, i == 0, (float(*)[PANEL / 3][TILE])acc);
                    if (i + 1 == pieces)
                        for (int64_t r = 0; r < PANEL && r < left; r++) finish(c, p * PANEL + r, tile, acc[r]);
                }
            }
        }
    }
}

template <int FMT>
static void float_product(const hs_ctx* ctx, const Linear& c) {
    if (c.t <= FEW_ROWS)
        few_rows<FMT>(ctx, c);
    else
        many_rows<FMT>(ctx, c);
}

}  // namespace hs
