// Packed weights of the linear kernels: what kernels/cpu/layout.py writes and every micro-kernel reads.
//
// W[N,K] is cut in tiles of 32 outputs, each contiguous along K; N is padded with zero rows to a whole tile. So a thread reads one
// stream of memory (two where that is not enough work: linear_float.h) and has two sums of 16 lanes to add to in turn.
//   float32   data f32 [N/32][K][32]
//   bfloat16  data u16 [N/32][Kp/2][32][2]            Kp = K rounded up to 32 (zeros)
//   bfloat16_widened   the same; multiplied in float32 at every level, where bfloat16 may round the other operand
//   int8gG    data u8  [N/32][K/4][32][4] (q + 128)    scale fp16 [N/32][K/G][32]
//   int4gG    data u8  [N/32][K/8][32][4]              byte j holds k = 8i+j in the low and k = 8i+4+j in the high nibble
//             (q + 8)                                  scale as int8
// A tile of a gated weight holds 16 gate rows and the 16 up rows of the same outputs.
#pragma once
#include "vec.h"

namespace hs {

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, WIDENED = 4 };
constexpr bool in_bf16(int format) { return format == BF16 || format == WIDENED; }
constexpr int TILE = 32, HALF = 16;
constexpr int64_t LINE = 64;  // bytes of HALF outputs at one step along K; a tile has two such lines per step

struct Weight {
    int format;
    int64_t k;      // logical K
    int64_t group;  // 0 for float formats
    const void* data;
    const uint16_t* scale;

    int64_t padded_k() const { return in_bf16(format) ? (k + 31) / 32 * 32 : k; }
    int64_t tile_bytes() const {
        switch (format) {
            case F32: return k * 128;
            case BF16:
            case WIDENED: return padded_k() * 64;
            case INT8: return k * 32;
            default: return k * 16;
        }
    }
    int64_t steps() const { return tile_bytes() / (2 * LINE); }
    const uint8_t* tile(int64_t t) const { return (const uint8_t*)data + t * tile_bytes(); }
    const uint16_t* tile_scale(int64_t t) const { return scale + t * (k / group) * TILE; }
};

// One row of W as float32[K]: the embedding lookup on a table stored as a linear weight.
static inline void unpack_row(const Weight& w, int64_t row, float* out) {
    const uint8_t* data = w.tile(row / TILE);
    int64_t lane = row % TILE;
    if (w.format == F32) {
        const float* p = (const float*)data + lane;
        for (int64_t k = 0; k < w.k; k++) out[k] = p[k * TILE];
    } else if (in_bf16(w.format)) {
        const uint16_t* p = (const uint16_t*)data + lane * 2;
        for (int64_t k = 0; k < w.k; k++) out[k] = bf16_to_float(p[k / 2 * 2 * TILE + k % 2]);
    } else {
        const uint16_t* scale = w.tile_scale(row / TILE) + lane;
        for (int64_t g = 0; g < w.k / w.group; g++) {
            float s = fp16_to_float(scale[g * TILE]);
            for (int64_t k = g * w.group; k < (g + 1) * w.group; k++) {
                if (w.format == INT8) {
                    out[k] = s * (float)(data[k / 4 * 4 * TILE + lane * 4 + k % 4] - 128);
                } else {
                    int byte = data[k / 8 * 4 * TILE + lane * 4 + k % 4];
                    out[k] = s * (float)((k % 8 < 4 ? byte & 15 : byte >> 4) - 8);
                }
            }
        }
    }
}

}  // namespace hs
