// The rotation of rope and of latent attention.
#pragma once
#include "vec.h"

namespace hs {

// Pairs i.. of `rotate`, one at a time; `step` from one pair to the next, `apart` within one. Out of line: most calls have none.
static __attribute__((noinline)) void rotate_pairs(const float* x, const float* table, int64_t i, int64_t half, int64_t step,
                                                   int64_t apart, float* out) {
    for (; i < half; i++) {
        const float a = x[i * step], b = x[i * step + apart], cos = table[i], sin = table[half + i];
        out[i * step] = a * cos - b * sin;
        out[i * step + apart] = b * cos + a * sin;
    }
}

// x rotated by the table row (cos, then sin); dims beyond `rotary` pass through. `out` may be `x`.
static inline void rotate(const float* x, const float* table, int64_t rotary, bool interleaved, int64_t dim, float* out) {
    const int64_t half = rotary / 2;
    int64_t i = 0;
    for (; !interleaved && i + VL <= half; i += VL) {
        const vf a = loadf(x + i), b = loadf(x + half + i), cos = loadf(table + i), sin = loadf(table + half + i);
        store(out + i, a * cos - b * sin);
        store(out + half + i, b * cos + a * sin);
    }
    if (i < half) rotate_pairs(x, table, i, half, interleaved ? 2 : 1, interleaved ? 1 : half, out);
    if (out != x && rotary < dim) memcpy(out + rotary, x + rotary, (dim - rotary) * sizeof(float));
}

}  // namespace hs
