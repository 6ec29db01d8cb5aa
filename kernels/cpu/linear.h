// Packed weights of the linear kernels: what kernels/cpu/layout.py writes and every micro-kernel reads.
//
// W[N,K] is cut in tiles of 16 outputs, each contiguous along K; N is padded with zero rows to a whole tile.
//   float32   data f32 [N/16][K][16]
//   bfloat16  data u16 [N/16][Kp/2][16][2]            Kp = K rounded up to 32 (zeros)
//   int8gG    data u8  [N/16][K/4][16][4] (q + 128)    scale fp16 [N/16][K/G][16]
//   int4gG    data u8  [N/16][K/8][16][4]              byte j holds k = 8i+j in the low and k = 8i+4+j in the high nibble
//             (q + 8)                                  scale as int8
// Swiglu weights interleave gate and up by tiles: tile 2i holds gate rows 16i.., tile 2i+1 the up rows.
#pragma once
#include "vec.h"

namespace hs {

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int TILE = 16;

struct Weight {
    int format;
    int64_t k;      // logical K
    int64_t group;  // 0 for float formats
    const void* data;
    const uint16_t* scale;

    int64_t padded_k() const { return format == BF16 ? (k + 31) / 32 * 32 : k; }
    int64_t tile_bytes() const {
        switch (format) {
            case F32: return k * 64;
            case BF16: return padded_k() * 32;
            case INT8: return k * 16;
            default: return k * 8;
        }
    }
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
    } else if (w.format == BF16) {
        const uint16_t* p = (const uint16_t*)data + lane * 2;
        for (int64_t k = 0; k < w.k; k++) out[k] = bf16_to_float(p[k / 2 * 32 + k % 2]);
    } else {
        const uint16_t* scale = w.tile_scale(row / TILE) + lane;
        for (int64_t g = 0; g < w.k / w.group; g++) {
            float s = fp16_to_float(scale[g * TILE]);
            for (int64_t k = g * w.group; k < (g + 1) * w.group; k++) {
                if (w.format == INT8) {
                    out[k] = s * (float)(data[k / 4 * 64 + lane * 4 + k % 4] - 128);
                } else {
                    int byte = data[k / 8 * 64 + lane * 4 + k % 4];
                    out[k] = s * (float)((k % 8 < 4 ? byte & 15 : byte >> 4) - 8);
                }
            }
        }
    }
}

}  // namespace hs
