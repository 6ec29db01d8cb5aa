// The rotation of rope and of latent attention.
#pragma once
#include <cstdint>
#include <cstring>

namespace hs {

// x rotated by the table row (cos, then sin); dims beyond `rotary` pass through. `out` may be `x`.
static inline void rotate(const float* x, const float* table, int64_t rotary, bool interleaved, int64_t dim, float* out) {
    int64_t half = rotary / 2;
    const float *cos = table, *sin = table + half;
    int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i * step], b = x[i * step + apart];
        out[i * step] = a * cos[i] - b * sin[i];
        out[i * step + apart] = b * cos[i] + a * sin[i];
    }
    if (out != x) memcpy(out + rotary, x + rotary, (dim - rotary) * sizeof(float));
}

}  // namespace hs
