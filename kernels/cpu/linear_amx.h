// AMX: bf16 weights at every number of rows (activations are rounded to bf16, one path, so one result), and int8/int4 weights
// at more than a few rows (exact int32 dots, the same float steps as linear_int.h).
//
// Half a packed weight tile, 32 k of it (bf16 pairs), is an AMX operand as it lies in memory, its rows two lines apart.
#pragma once
#include "linear_int.h"

#if defined(HS_AMX)
#include <sys/syscall.h>
#include <unistd.h>

namespace hs {

constexpr int64_t AMX_AHEAD = 8192;  // prefetch distance, bytes
constexpr int64_t AMX_STEP = 16 * 2 * LINE;  // bytes of a bf16 tile at 32 k

// The kernel grants tile registers per process on request; threads started later and running ones are all covered.
static inline bool amx_permitted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

// The compiler does not know that tile loads and stores touch memory.
HS_INLINE void fence() { asm volatile("" ::: "memory"); }

// Tile registers: 0..3 sums (m rows of 16), 4..5 activations (m rows of `depth` bytes), 6..7 weights (depth/4 rows of 64 bytes).
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(int m, int depth) {
        for (int i = 0; i < 8; i++) {
            rows[i] = (uint8_t)(i < 6 ? m : depth / 4);
            row_bytes[i] = (uint16_t)(i < 4 || i >= 6 ? 64 : depth);
        }
        if (!amx_permitted()) abort();  // the loader chooses this library only where hs_amx() said yes
        asm volatile("ldtilecfg (%0)" : : "r"(this) : "memory");
    }
    ~TileShapes() { _tile_release(); }  // leaves nothing to save at a context switch
};

// ---- bf16 ----

// Rows as bf16 in AMX tiles: u16 [T/16][Kp/32][16][32].
static inline void round_rows(const Linear& c, int64_t begin, int64_t end, int64_t stop, uint16_t* to, float* buffer) {
    const int64_t k = c.w.k, steps = c.w.padded_k() / 32;
    for (int64_t r = begin; r < stop; r++) {
        uint16_t* q = to + r / 16 * steps * 512 + r % 16 * 32;
        int64_t i = 0;
        if (r < end) {
            const float* x = prologue(c, r, buffer);
            for (; i + 32 <= k; i += 32)
                for (int j = 0; j < 32; j += 16)
                    store(q + i * 16 + j, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i + j)));
            if (i < k) {
                for (int j = 0; j < 32; j += 16) {
                    int64_t left = k - i - j;
                    vf v = left >= 16 ? loadf(x + i + j) : load_part(x + i + j, left > 0 ? (int)left : 0);
                    store(q + i * 16 + j, (__m256i)_mm512_cvtneps_pbh((__m512)v));
                }
                i += 32;
            }
        }
        for (; i < steps * 32; i += 32) memset(q + i * 16, 0, 64);
    }
}

// What a block fetches for later while it computes: its output rows, and with many rows its share of the next weights.
struct Later {
    const uint8_t* weights = nullptr;
    int64_t lines = 0;  // per step
    const float* out = nullptr;
    int64_t stride = 0;

    HS_MEMBER void fetch(int64_t step, int64_t steps) const {
        const uint8_t* p = weights + step * lines * 64;
        for (int64_t l = 0; l < lines; l++) __builtin_prefetch(p + l * 64, 0, 2);
        for (int64_t r = step; out && r < 32; r += steps) {
            __builtin_prefetch(out + r * stride, 1, 3);
            __builtin_prefetch(out + r * stride + 16, 1, 3);
        }
    }
};

template <int BLOCKS>
HS_INLINE void bf16_begin(bool first, float (*acc)[TILE]) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, acc, 128);
        _tile_loadd(1, &acc[0][HALF], 128);
    }
    if (BLOCKS == 1) return;
    if (first) {
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(2, acc[16], 128);
        _tile_loadd(3, &acc[16][HALF], 128);
    }
}

template <int BLOCKS>
HS_INLINE void bf16_step(const uint16_t* a, int64_t block, const uint8_t* w) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, w, 2 * LINE);
    _tile_loadd(7, w + LINE, 2 * LINE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (BLOCKS == 2) {
        _tile_loadd(5, a + block, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

template <int BLOCKS>
HS_INLINE void bf16_end(float (*acc)[TILE]) {
    _tile_stored(0, acc, 128);
    _tile_stored(1, &acc[0][HALF], 128);
    if (BLOCKS == 2) {
        _tile_stored(2, acc[16], 128);
        _tile_stored(3, &acc[16][HALF], 128);
    }
    fence();
}

// A few rows: bound by the weight stream, fetched a fixed distance ahead.
static void bf16_stream(const uint16_t* a, const Stream& s, int64_t steps, float (*acc)[TILE]) {
    bf16_begin<1>(true, acc);
    const int64_t near = steps > AMX_AHEAD / AMX_STEP ? steps - AMX_AHEAD / AMX_STEP : 0;
    auto run = [&](int64_t begin, int64_t end, const uint8_t* ahead) __attribute__((always_inline)) {
        for (int64_t i = begin; i < end; i++) {
            HS_UNROLL for (int l = 0; l < 32; l++) prefetch(ahead + i * AMX_STEP + l * LINE);
            bf16_step<1>(a + i * 512, 0, s.tile + i * AMX_STEP);
        }
    };
    run(0, near, s.tile + AMX_AHEAD);
    run(near, steps, s.next - near * AMX_STEP);
    bf16_end<1>(acc);
}

// acc += one or two blocks of 16 rows (of many, `apart` elements from one to the next) times `steps` steps of a tile.
template <int BLOCKS>
static void bf16_block(const uint16_t* a, int64_t apart, const uint8_t* w, int64_t steps, bool first, const Later& later,
                       float (*acc)[TILE]) {
    bf16_begin<BLOCKS>(first, acc);
    for (int64_t i = 0; i < steps; i++) {
        later.fetch(i, steps);
        bf16_step<BLOCKS>(a + i * 512, apart, w + i * AMX_STEP);
    }
    bf16_end<BLOCKS>(acc);
}

static void bf16_many(const Linear& c, Range range, const uint16_t* a) {
    constexpr int64_t STEPS = 6;  // of a tile, a piece (12 KB) that stay in the first-level cache for all rows
    const int64_t kp = c.w.padded_k(), steps = kp / 32, pieces = (steps + STEPS - 1) / STEPS;
    const int64_t fitting = (1 << 20) / (kp * 2) / 32 * 32, chunk = fitting < 128 ? 128 : fitting > 1024 ? 1024 : fitting;
    float(*sums)[TILE] = (float(*)[TILE])scratch(chunk * TILE * 4);
    for (int64_t r0 = 0; r0 < c.t; r0 += chunk) {
        const int64_t stop = r0 + chunk < c.t ? r0 + chunk : c.t, blocks = (stop - r0 + 31) / 32;
        for (int64_t tile = range.begin; tile < range.end; tile++) {
            const Stream s = stream(c, tile, range.end);
            Later later;
            later.lines = (32 + blocks - 1) / blocks;
            later.weights = s.next;
            later.stride = c.out_stride;
            for (int64_t i = 0; i < pieces; i++) {
                const int64_t at = i * STEPS, count = steps - at < STEPS ? steps - at : STEPS;
                const uint8_t* w = s.tile + at * AMX_STEP;
                for (int64_t r = r0; r < stop; r += 32) {
                    const uint16_t* x = a + r / 16 * steps * 512 + at * 512;
                    float(*acc)[TILE] = sums + (r - r0);
                    if (i + 1 == pieces && !c.places) later.out = c.out + r * c.out_stride + tile * c.tile_columns();
                    if (stop - r > 16)
                        bf16_block<2>(x, steps * 512, w, count, i == 0, later, acc);
                    else
                        bf16_block<1>(x, steps * 512, w, count, i == 0, later, acc);
                    later.weights += count * later.lines * 64;
                    if (i + 1 == pieces)
                        for (int64_t j = 0; j < 32 && r + j < stop; j++) finish(c, r + j, tile, acc[j]);
                }
            }
        }
    }
}

static void bf16_few(const Linear& c, Range range, const uint16_t* a) {
    alignas(64) float acc[FEW_ROWS][TILE];
    for (int64_t tile = range.begin; tile < range.end; tile++) {
        bf16_stream(a, stream(c, tile, range.end), c.w.padded_k() / 32, acc);
        for (int64_t r = 0; r < c.t; r++) finish(c, r, tile, acc[r]);
    }
}

static void amx_bf16_prepare(const hs_ctx* ctx, const Linear& c) {
    float* buffer = (float*)scratch(c.w.padded_k() * 4);
    for (int64_t r = ctx->thread * 16; r < c.t; r += ctx->threads * 16)
        round_rows(c, r, r + 16 < c.t ? r + 16 : c.t, r + 16, (uint16_t*)c.work, buffer);
}

static void amx_bf16_product(const hs_ctx* ctx, const Linear& c) {
    const int64_t kp = c.w.padded_k();
    const bool few = c.t <= FEW_ROWS;
    uint8_t* own = few ? (uint8_t*)scratch(16 * kp * 2 + kp * 4) : nullptr;
    uint16_t* a = (uint16_t*)(few ? own : c.work);
    if (few) {
        fetch_rows(c);
        round_rows(c, 0, c.t, c.t, a, (float*)(own + 16 * kp * 2));
    }
    TileShapes shapes(few ? (int)c.t : 16, 64);
    Range range = split(c.tiles(), ctx);
    if (few)
        bf16_few(c, range, a);
    else
        bf16_many(c, range, a);
}

// ---- int8, int4 ----

// Half a tile as signed bytes [K/4][16][4] and its scales as float [K/G][16].
template <int FMT>
static void unpack_half(const Weight& w, int64_t tile, int half, int8_t* data, float* scale) {
    const uint8_t* p = w.tile(tile) + half * LINE;
    const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), high = _mm512_set1_epi8(-128);
    for (int64_t i = 0; i < w.tile_bytes() / 2; i += LINE, p += 2 * LINE) {
        __m512i v = _mm512_loadu_si512(p);
        prefetch_far(p + INT_FAR);
        if (FMT == INT8) {
            _mm512_store_si512(data + i, _mm512_xor_si512(v, high));
        } else {
            _mm512_store_si512(data + 2 * i, _mm512_sub_epi8(_mm512_and_si512(v, mask), eight));
            _mm512_store_si512(data + 2 * i + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(v, 4), mask), eight));
        }
    }
    const uint16_t* s = w.tile_scale(tile) + half * HALF;
    for (int64_t g = 0; g < w.k / w.group; g++) store(scale + g * HALF, fp16_to_float(load<vh>(s + g * TILE)));
}

// Sixteen rows times half an unpacked tile; DEPTH: k per tile operation. Two groups at a time, so that the second one's tile work
// runs while the first one's dots come back through memory.
template <int DEPTH>
static void int_half(const int8_t* a, const float* row_scale, const int8_t* data, const float* scale, int64_t groups,
                     int64_t per_group, float (*acc)[TILE]) {
    alignas(64) int32_t dots[2][16][16];
    fence();  // the tile was unpacked just now
    vf sum[16] = {};
    auto gather = [&](int64_t g) __attribute__((always_inline)) {
        vf s = loadf(scale + g * 16);
        HS_UNROLL for (int r = 0; r < 16; r++)
            sum[r] = fma(to_float(load<vi>(dots[g & 1][r])), s * row_scale[g * 16 + r], sum[r]);
    };
    for (int64_t g = 0; g < groups; g += 2) {
        const bool second = g + 1 < groups;
        const int64_t h = g * per_group;
        _tile_zero(0);
        for (int64_t j = h; j < h + per_group; j++) {
            _tile_loadd(4, a + j * DEPTH / 64 * 1024 + j * DEPTH % 64, 64);
            _tile_loadd(6, data + j * DEPTH * 16, 64);
            _tile_dpbssd(0, 4, 6);
        }
        _tile_stored(0, dots[0], 64);
        if (second) {
            _tile_zero(1);
            for (int64_t j = h + per_group; j < h + 2 * per_group; j++) {
                _tile_loadd(5, a + j * DEPTH / 64 * 1024 + j * DEPTH % 64, 64);
                _tile_loadd(7, data + j * DEPTH * 16, 64);
                _tile_dpbssd(1, 5, 7);
            }
            _tile_stored(1, dots[1], 64);
        }
        fence();
        gather(g);
        if (second) gather(g + 1);
        fence();
    }
    for (int r = 0; r < 16; r++) store(&acc[r][0], sum[r]);
}

template <int FMT>
static void amx_int(const hs_ctx* ctx, const Linear& c, const QuantizedRows& rows) {
    const int64_t k = c.w.k, groups = rows.groups;
    const int depth = c.w.group == 32 ? 32 : 64;
    const int64_t stride = k * 16 + groups * 64;
    int8_t* data = (int8_t*)scratch(2 * stride);  // the unpacked halves of a tile with their scales
    TileShapes shapes(16, depth);
    Range range = split(c.tiles(), ctx);
    const int64_t chunk = round_up((1 << 20) / k, 16);  // rows that stay in the second-level cache
    alignas(64) float acc[16][TILE];
    for (int64_t r0 = 0; r0 < c.t; r0 += chunk)
        for (int64_t tile = range.begin; tile < range.end; tile++) {
            for (int t = 0; t < 2; t++)
                unpack_half<FMT>(c.w, tile, t, data + t * stride, (float*)(data + t * stride + k * 16));
            for (int64_t r = r0; r < c.t && r < r0 + chunk; r += 16) {
                for (int t = 0; t < 2; t++) {
                    const int8_t* d = data + t * stride;
                    float(*out)[TILE] = (float(*)[TILE])(&acc[0][t * HALF]);
                    if (depth == 32)
                        int_half<32>(rows.row(r), rows.scale + rows.group_at(r), d, (const float*)(d + k * 16), groups, 1, out);
                    else
                        int_half<64>(rows.row(r), rows.scale + rows.group_at(r), d, (const float*)(d + k * 16), groups,
                                     c.w.group / 64, out);
                }
                for (int64_t i = 0; i < 16 && r + i < c.t; i++) finish(c, r + i, tile, acc[i]);
            }
        }
}

}  // namespace hs
#endif
