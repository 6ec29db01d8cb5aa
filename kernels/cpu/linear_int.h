// int8 and int4 weights: every row is quantized to int8 per group of K (scale = largest magnitude / 127), the dot of a group is
// exact in int32, and y += dot * (weight scale * activation scale) runs over the groups in order. Exact dots make VNNI, AVX2,
// AMX and the plain version agree bit for bit.
#pragma once
#include "linear_call.h"

namespace hs {

// Prefetch distances in bytes (two threads, November 2026). On a Xeon with AMX the stream goes to the second-level cache early and
// moves up late: against one distance int8 is about a tenth faster, int4 a twentieth. On a Zen 5 one distance is the faster by
// about as much; 8192 is as good as 4096 while memory gives 70 GB/s and a sixth faster while it gives 120.
#if defined(HS_AMX)
constexpr int64_t INT_FAR = 8192, INT_NEAR = 1024;
#else
constexpr int64_t INT_FAR = 8192, INT_NEAR = 0;
#endif
#if defined(HS_AVX512)
constexpr int INT_ROWS = 8;
#else
constexpr int INT_ROWS = 4;
#endif

// Quantized rows, in blocks of 16 (the shape of an AMX tile):
//   q     int8  [T/16][K/64][16][64]
//   scale float [T/16][K/G][16]
//   zero  int32 [T/16][K/G][16]   -(sum of the group's q) * the zero point of the stored weight
struct QuantizedRows {
    int8_t* q;
    float* scale;
    int32_t* zero;
    int64_t k, groups, chunks;

    QuantizedRows(void* memory, int64_t rows, int64_t k, int64_t group)
        : k(k), groups(k / group), chunks((k + 63) / 64) {
        int64_t blocks = (rows + 15) / 16;
        q = (int8_t*)memory;
        scale = (float*)(q + blocks * chunks * 1024);
        zero = (int32_t*)(scale + blocks * groups * 16);
    }
    static int64_t bytes(int64_t rows, int64_t k, int64_t group) {
        return (rows + 15) / 16 * ((k + 63) / 64 * 1024 + k / group * 128);
    }
    int8_t* row(int64_t r) const { return q + r / 16 * chunks * 1024 + r % 16 * 64; }
    int64_t group_at(int64_t r) const { return r / 16 * groups * 16 + r % 16; }
};

// Groups g to the last of one row, N at a time and then fewer: one division and one tree of shuffles serve all N. GROUP: the
// group size where the compiler is to know it, else 0.
template <int N, int GROUP>
static void quantize_groups(const float* x, const QuantizedRows& to, int64_t r, int64_t any_group, int32_t zero_point, int64_t g) {
    constexpr int STEP = 32;  // divides every group
    const int64_t group = GROUP ? GROUP : any_group;
    int8_t* q = to.row(r);
    float* scale = to.scale + to.group_at(r);
    int32_t* zero = to.zero + to.group_at(r);
    for (; g + N <= to.groups; g += N) {
        vf top[N];
        const float* p = x + g * group;
        for (int n = 0; n < N; n++) {
            vf v{};
            for (int64_t i = 0; i < group; i += STEP, p += STEP)
                HS_UNROLL for (int j = 0; j < STEP; j += VL) v = vmax(v, vabs(loadf(p + j)));
            top[n] = v;
        }
        const vf largest = lane_maxima<N>(top);
        const vf inverse = select(largest > 0.0f, 127.0f / largest, vf{}), scales = largest * (1.0f / 127.0f);
        vi sum[N];
        uint64_t at = g * group;
        for (int n = 0; n < N; n++) {
            vi s{};
            for (int64_t i = 0; i < group; i += STEP, at += STEP) {
                int8_t* out = q + at / 64 * 1024 + at % 64;
                HS_UNROLL for (int j = 0; j < STEP; j += VL) {
                    vi v = round_even(loadf(x + at + j) * inverse[n]);
                    s += v;
                    store(out + j, __builtin_convertvector(v, vb));
                }
            }
            sum[n] = s;
        }
        const vi zeros = -lane_sums<N>(sum) * zero_point;
        for (int n = 0; n < N; n++) {
            scale[(g + n) * 16] = scales[n];
            zero[(g + n) * 16] = zeros[n];
        }
    }
    if constexpr (N > 1) quantize_groups<N < 4 ? 1 : N / 4, GROUP>(x, to, r, group, zero_point, g);
}

static inline void quantize_row(const float* x, const QuantizedRows& to, int64_t r, int64_t group, int32_t zero_point) {
    const auto run = group == 32 ? quantize_groups<VL, 32> : quantize_groups<VL, 0>;
    run(x, to, r, group, zero_point, 0);
}

// Sixteen outputs x four k of stored weights (W, `line` or `nibbles`), times the same four int8 activations, added to 16 int32.
template <int FMT>
struct Dot {
#if defined(HS_AVX512)
    typedef __m512i W;
    vi s;
    HS_INLINE W line(const uint8_t* p) { return _mm512_loadu_si512(p); }
    HS_INLINE void nibbles(const uint8_t* p, W& a, W& b) {
        W v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
        a = _mm512_and_si512(v, mask);
        b = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    }
    // The high nibbles stay where they are: `b` is 16 times what it stands for.
    HS_INLINE void nibbles_in_place(const uint8_t* p, W& a, W& b) {
        W v = _mm512_loadu_si512(p);
        asm("" : "+v"(v));  // one load, not one in each of the two operations
        a = _mm512_and_si512(v, _mm512_set1_epi8(15));
        b = _mm512_and_si512(v, _mm512_set1_epi8(-16));
    }
    HS_MEMBER void merge(const Dot& other) { s += FMT == INT4 ? other.s >> 4 : other.s; }
    HS_MEMBER void start(int32_t zero) { s = splati(zero); }
    HS_MEMBER void add(W w, const int8_t* a) {
        int32_t quad;
        memcpy(&quad, a, 4);
        s = (vi)_mm512_dpbusd_epi32((__m512i)s, w, _mm512_set1_epi32(quad));
    }
    HS_MEMBER vf value(int) const { return to_float(s); }
#elif defined(__AVX2__)
    // 16-bit pair sums must not saturate. int4: 15 * 127 * 2 fits. int8: |q| * (a with the sign of q), at most 128 * 127 * 2,
    // which is the signed dot at once, so the zero point drops out.
    struct W {
        __m256i magnitude[2], sign[2];
    };
    vi s[2];
    HS_INLINE W line(const uint8_t* p) {
        W w;
        for (int i = 0; i < 2; i++) {
            w.sign[i] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(p + 32 * i)), _mm256_set1_epi8(-128));
            w.magnitude[i] = _mm256_abs_epi8(w.sign[i]);
        }
        return w;
    }
    HS_INLINE void nibbles(const uint8_t* p, W& a, W& b) {
        __m256i mask = _mm256_set1_epi8(15);
        for (int i = 0; i < 2; i++) {
            __m256i v = _mm256_loadu_si256((const __m256i*)(p + 32 * i));
            a.magnitude[i] = _mm256_and_si256(v, mask);
            b.magnitude[i] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
        }
    }
    HS_MEMBER void start(int32_t zero) { s[0] = s[1] = splati(FMT == INT8 ? 0 : zero); }
    HS_MEMBER void add(const W& w, const int8_t* a) {
        int32_t quad;
        memcpy(&quad, a, 4);
        __m256i q = _mm256_set1_epi32(quad), one = _mm256_set1_epi16(1);
        for (int i = 0; i < 2; i++) {
            __m256i x = FMT == INT8 ? _mm256_sign_epi8(q, w.sign[i]) : q;
            s[i] += (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(w.magnitude[i], x), one);
        }
    }
    HS_MEMBER vf value(int i) const { return to_float(s[i]); }
#else
    // Products and sums of a group stay below 2^24: float arithmetic is exact, and every machine has it.
    struct W {
        vf v[4][16 / VL];
    };
    vf s[16 / VL];
    HS_INLINE void split(vu v, int i, W& w, uint32_t mask, int shift) {
        HS_UNROLL for (int j = 0; j < 4; j++) w.v[j][i] = to_float((vi)((v >> (8 * j + shift)) & mask));
    }
    HS_INLINE W line(const uint8_t* p) {
        W w;
        HS_UNROLL for (int i = 0; i < 16 / VL; i++) split(load<vu>(p + i * VL * 4), i, w, 255, 0);
        return w;
    }
    HS_INLINE void nibbles(const uint8_t* p, W& a, W& b) {
        HS_UNROLL for (int i = 0; i < 16 / VL; i++) {
            vu v = load<vu>(p + i * VL * 4);
            split(v, i, a, 15, 0);
            split(v, i, b, 15, 4);
        }
    }
    HS_MEMBER void start(int32_t zero) {
        HS_UNROLL for (int i = 0; i < 16 / VL; i++) s[i] = splat((float)zero);
    }
    HS_MEMBER void add(const W& w, const int8_t* a) {
        HS_UNROLL for (int j = 0; j < 4; j++) {
            vf x = splat((float)a[j]);
            HS_UNROLL for (int i = 0; i < 16 / VL; i++) s[i] = fma(x, w.v[j][i], s[i]);
        }
    }
    HS_MEMBER vf value(int i) const { return s[i]; }
#endif
};

// Dots of few rows wait for each other: they are two sums each, of int4 one of the low and one of the high nibbles.
#if defined(HS_AVX512)
template <int R>
constexpr int PARTS = R <= 2 ? 2 : 1;
#else
template <int R>
constexpr int PARTS = 1;
#endif

// Where a thread's tiles and their scales end, and how far from there to what it reads next: there its prefetch goes on.
struct Follow {
    const uint8_t *end, *scale_end;
    int64_t jump, scale_jump;

    Follow(const Linear& c, int64_t tile)
        : end(c.w.tile(tile)), scale_end((const uint8_t*)c.w.tile_scale(tile)), jump(-INT_FAR), scale_jump(-INT_FAR / 16) {
        if (c.then.tile) jump = c.then.tile - end;
        if (c.then.scale) scale_jump = c.then.scale - scale_end;
    }
    int64_t data(const uint8_t* p) const { return INT_FAR + (p + INT_FAR < end ? 0 : jump); }
    int64_t scale(const uint8_t* p) const { return INT_FAR / 16 + (p + INT_FAR / 16 < scale_end ? 0 : scale_jump); }
};

// acc[r] = rows r0 .. r0+R-1 times one tile. GROUP: the group size where the compiler is to know it, else 0.
template <int FMT, int GROUP, int R>
static void int_block(const Weight& w, int64_t tile, const QuantizedRows& rows, int64_t r0, const Follow& follow,
                      float (*acc)[TILE]) {
    constexpr int NV = HALF / VL, STEPS = FMT == INT8 ? 8 : 4;  // per 32 k
    constexpr int NT = VL == 16 || R * NV <= 4 ? 2 : 1;          // halves of the tile that go along together
    constexpr int PARTS = hs::PARTS<R>;
    const int8_t* q = rows.row(r0);
    const float* scale = rows.scale + rows.group_at(r0);
    const int32_t* zero = rows.zero + rows.group_at(r0);
    const uint8_t* data = w.tile(tile);
    const uint16_t* weight_scale = w.scale + tile * rows.groups * TILE;
    vf sum[2][R][NV] = {};
    const uint64_t per_group = (GROUP ? GROUP : w.group) / 32, groups = rows.groups;
    for (uint64_t g = 0; g < groups; g++, data += per_group * (STEPS * 2 * LINE), weight_scale += TILE) {
        const int64_t ahead = follow.data(data);
        prefetch((const uint8_t*)weight_scale + follow.scale((const uint8_t*)weight_scale));
        HS_UNROLL for (int t0 = 0; t0 < 2; t0 += NT) {
            Dot<FMT> dot[PARTS][NT][R];
            HS_UNROLL for (int part = 0; part < PARTS; part++)
                HS_UNROLL for (int t = 0; t < NT; t++)
                    HS_UNROLL for (int r = 0; r < R; r++) dot[part][t][r].start(part ? 0 : zero[g * 16 + r]);
            const uint8_t* p = data + t0 * LINE;
            for (uint64_t i = 0, h = g * per_group; i < per_group; i++, h++, p += STEPS * 2 * LINE) {
                const int8_t* a = q + h / 2 * 1024 + h % 2 * 32;
                HS_UNROLL for (int l = 0; l < STEPS; l++)
                    HS_UNROLL for (int t = 0; t < NT; t++) {
                        const uint8_t* line = p + (2 * l + t) * LINE;
                        if (INT_NEAR) {
                            prefetch_far(line + ahead);
                            prefetch(line + INT_NEAR);
                        } else {
                            prefetch(line + ahead);
                        }
                        if (FMT == INT8) {
                            auto v = Dot<FMT>::line(line);
                            HS_UNROLL for (int r = 0; r < R; r++) dot[l % PARTS][t][r].add(v, a + r * 64 + l * 4);
                        } else {
                            typename Dot<FMT>::W v0, v1;
                            if constexpr (PARTS == 2)
                                Dot<FMT>::nibbles_in_place(line, v0, v1);
                            else
                                Dot<FMT>::nibbles(line, v0, v1);
                            HS_UNROLL for (int r = 0; r < R; r++) dot[0][t][r].add(v0, a + r * 64 + l * 8);
                            HS_UNROLL for (int r = 0; r < R; r++) dot[PARTS - 1][t][r].add(v1, a + r * 64 + l * 8 + 4);
                        }
                    }
            }
            if constexpr (PARTS == 2)
                HS_UNROLL for (int t = 0; t < NT; t++)
                    HS_UNROLL for (int r = 0; r < R; r++) dot[0][t][r].merge(dot[1][t][r]);
            HS_UNROLL for (int t = 0; t < NT; t++)
                HS_UNROLL for (int v = 0; v < NV; v++) {
                    vf s = fp16_to_float(load<vh>(weight_scale + (t0 + t) * HALF + v * VL));
                    HS_UNROLL for (int r = 0; r < R; r++)
                        sum[t0 + t][r][v] = fma(dot[0][t][r].value(v), s * scale[g * 16 + r], sum[t0 + t][r][v]);
                }
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < 2; t++)
            for (int v = 0; v < NV; v++) store(&acc[r][t * HALF + v * VL], sum[t][r][v]);
}

template <int FMT, int GROUP>
static void int_rows(const Linear& c, const QuantizedRows& rows, const Follow& follow, int64_t tile, int64_t begin, int64_t end) {
    alignas(64) float acc[INT_ROWS][TILE];
    for (int64_t r = begin; r < end; r += INT_ROWS) {
        int live = end - r < INT_ROWS ? (int)(end - r) : INT_ROWS;
        if (live == 1)
            int_block<FMT, GROUP, 1>(c.w, tile, rows, r, follow, acc);
        else if (live == 2)
            int_block<FMT, GROUP, 2>(c.w, tile, rows, r, follow, acc);
        else if (live <= 4)
            int_block<FMT, GROUP, 4>(c.w, tile, rows, r, follow, acc);
        else
            int_block<FMT, GROUP, INT_ROWS>(c.w, tile, rows, r, follow, acc);
        for (int i = 0; i < live; i++) finish(c, r + i, tile, acc[i]);
    }
}

static inline void quantize_rows(const Linear& c, const QuantizedRows& rows, int64_t begin, int64_t end, float* buffer) {
    const int32_t zero_point = c.w.format == INT8 ? 128 : 8;
    for (int64_t r = begin; r < end; r++) quantize_row(prologue(c, r, buffer), rows, r, c.w.group, zero_point);
}

// Clears the scales from row `end` to the end of its block of 16, which AMX reads.
static inline void clear_scales(const QuantizedRows& rows, int64_t end) {
    for (int64_t r = end; r % 16; r++)
        for (int64_t g = 0; g < rows.groups; g++) {
            rows.scale[rows.group_at(r) + g * 16] = 0;
            rows.zero[rows.group_at(r) + g * 16] = 0;
        }
}

#if defined(HS_AMX)
template <int FMT>
static void amx_int(const hs_ctx* ctx, const Linear& c, const QuantizedRows& rows);
constexpr int64_t AMX_INT_ROWS = 28;  // from this many rows on AMX beats VNNI (measured: they meet at 24 to 32)
#endif

static inline void int_prepare(const hs_ctx* ctx, const Linear& c) {
    const QuantizedRows rows(c.work, c.t, c.w.k, c.w.group);
    float* buffer = (float*)scratch(c.w.k * 4);
    for (int64_t r = ctx->thread * 16; r < c.t; r += ctx->threads * 16)
        quantize_rows(c, rows, r, r + 16 < c.t ? r + 16 : c.t, buffer);
#if defined(HS_AMX)
    if (ctx->thread == 0) clear_scales(rows, c.t);
#endif
}

template <int FMT>
static void int_product(const hs_ctx* ctx, const Linear& c) {
    const int64_t k = c.w.k;
    const bool few = c.t <= FEW_ROWS;
    const int64_t bytes = QuantizedRows::bytes(FEW_ROWS, k, c.w.group);
    uint8_t* own = few ? (uint8_t*)scratch(bytes + k * 4) : nullptr;
    QuantizedRows rows(few ? own : c.work, few ? FEW_ROWS : c.t, k, c.w.group);
    if (few) {
        fetch_rows(c);
        quantize_rows(c, rows, 0, c.t, (float*)(own + bytes));
    }
#if defined(HS_AMX)
    if (c.t >= AMX_INT_ROWS) return amx_int<FMT>(ctx, c, rows);
#endif
    Range range = split(c.tiles(), ctx);
#if defined(HS_AVX512)
    const auto run = c.w.group == 32 ? int_rows<FMT, 32> : c.w.group == 64 ? int_rows<FMT, 64> : int_rows<FMT, 128>;
#else
    const auto run = int_rows<FMT, 0>;
#endif
    const Follow follow(c, range.end);
    const int64_t chunk = (1 << 20) / (k * INT_ROWS) * INT_ROWS + INT_ROWS;  // rows that stay in the second-level cache
    for (int64_t r = 0; r < c.t; r += chunk)
        for (int64_t tile = range.begin; tile < range.end; tile++)
            run(c, rows, follow, tile, r, r + chunk < c.t ? r + chunk : c.t);
}

}  // namespace hs
