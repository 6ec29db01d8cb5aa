// fp8 as KV pages keep it: e4m3 (no infinity, NaN is all ones) and e5m2 (the upper byte of a float16). Written to nearest even,
// saturating at the largest finite value, NaN kept; read exactly, through float16.
#pragma once
#include "vec.h"

namespace hs {

struct E4M3 {
    uint8_t bits;
    static constexpr int MANTISSA = 3, BIAS = 7;
    static constexpr float LARGEST = 448;
};
struct E5M2 {
    uint8_t bits;
    static constexpr int MANTISSA = 2, BIAS = 15;
    static constexpr float LARGEST = 57344;
};

template <class F>
HS_INLINE uint8_t fp8_bits(float x) {
    uint32_t u, a;
    memcpy(&u, &x, 4);
    const uint8_t sign = u >> 24 & 0x80;
    if (x != x) return sign | 0x7f;
    float magnitude = std::fabs(x) < F::LARGEST ? std::fabs(x) : F::LARGEST;
    memcpy(&a, &magnitude, 4);
    constexpr uint32_t LEAST = 127 - F::BIAS + 1;  // exponent of the smallest normal number
    const uint32_t exponent = a >> 23 > LEAST ? a >> 23 : LEAST;
    // Units of the last place, counted by adding what has that last place itself: the addition rounds to nearest even.
    const uint32_t big_bits = (exponent + 23 - F::MANTISSA) << 23;
    float big;
    memcpy(&big, &big_bits, 4);
    const float sum = magnitude + big;
    uint32_t s;
    memcpy(&s, &sum, 4);
    return sign | (uint8_t)(((exponent - LEAST) << F::MANTISSA) + (s - big_bits));
}

HS_INLINE void narrow(float x, E4M3* out) { out->bits = fp8_bits<E4M3>(x); }
HS_INLINE void narrow(float x, E5M2* out) { out->bits = fp8_bits<E5M2>(x); }

typedef uint8_t vbytes __attribute__((vector_size(VL)));

HS_INLINE vf widen(const E5M2* p) {
    return fp16_to_float(__builtin_convertvector(load<vbytes>(p), vh) << 8);
}
// The float16 of the same exponent field is 2^8 too small.
HS_INLINE vf widen(const E4M3* p) {
    vh h = __builtin_convertvector(load<vbytes>(p), vh), magnitude = h & 0x7f;
    vh nan = (vh)(magnitude == 0x7f) & 0x7c00;
    return fp16_to_float((h & 0x80) << 8 | magnitude << 7 | nan) * 256.0f;
}
HS_INLINE float widen_one(const E5M2* p) { return fp16_to_float((uint16_t)(p->bits << 8)); }
HS_INLINE float widen_one(const E4M3* p) {
    uint16_t magnitude = p->bits & 0x7f, nan = magnitude == 0x7f ? 0x7c00 : 0;
    return fp16_to_float((uint16_t)((p->bits & 0x80) << 8 | magnitude << 7 | nan)) * 256.0f;
}

}  // namespace hs
