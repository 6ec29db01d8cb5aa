// Vectors of the build's native width, written with GCC/clang vector extensions so that one source builds at every ISA
// level: 16 lanes with AVX-512, 8 with AVX2, 4 on the portable level (SSE2, NEON). Included by every CPU kernel.
//
// Batch invariance rests on two habits kept here: a reduction has one fixed order per level, and no helper depends on
// how many rows a kernel works on.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define HS_AVX512 1
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define HS_INLINE static inline __attribute__((always_inline))
#define HS_MEMBER inline __attribute__((always_inline))
#if defined(__clang__)
#define HS_UNROLL _Pragma("unroll")
#else
#define HS_UNROLL _Pragma("GCC unroll 32")
#endif

namespace hs {

#if defined(HS_AVX512)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));  // 16-bit storage: bf16 or fp16 bits
typedef int8_t vb __attribute__((vector_size(VL)));

template <class V>
HS_INLINE V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
HS_INLINE void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
}
HS_INLINE vf loadf(const float* p) { return load<vf>(p); }
HS_INLINE vf splat(float x) { return x - vf{}; }
HS_INLINE vi splati(int32_t x) { return x - vi{}; }
HS_INLINE vf as_f(vi v) { return (vf)v; }
HS_INLINE vf as_f(vu v) { return (vf)v; }

// One rounding where the level has FMA (GCC contracts a*b+c by itself; the name says what is meant).
HS_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
HS_INLINE vf vmax(vf a, vf b) {
#if defined(HS_AVX512)
    return (vf)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);  // of `a > b ? a : b` GCC makes masked copies
#else
    return a > b ? a : b;
#endif
}
HS_INLINE vf vmin(vf a, vf b) {
#if defined(HS_AVX512)
    return (vf)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}
HS_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
HS_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

// The first n lanes (n < VL), the others zero.
HS_INLINE vf load_part(const float* p, int n) {
    vf v{};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
}
HS_INLINE void store_part(float* p, vf v, int n) {
    for (int i = 0; i < n; i++) p[i] = v[i];
}

constexpr auto LANES = std::make_integer_sequence<int, VL>();

// Lane j: a[j without bit H], or b's where j has it; with SET, a[j with bit H], or b's.
template <int H, bool SET, class V, int... J>
HS_INLINE V pick(V a, V b, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(a, b, ((SET ? J | H : J & ~H) + (J & H ? VL : 0))...);
}

// a[FIRST], b[FIRST], a[FIRST + 1], b[FIRST + 1], …
template <int FIRST, int... J>
HS_INLINE vf interleave(vf a, vf b, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(a, b, (FIRST + J / 2 + J % 2 * VL)...);
}
template <int FIRST>
HS_INLINE vf interleave(vf a, vf b) {
    return interleave<FIRST>(a, b, LANES);
}

// Reduces the lanes of N vectors at once, pairwise: lane i with lane i + n/2, and so on. Lane j of the result is of v[j % N].
template <int N, int H = 1, class V, class F>
HS_INLINE V reduce_lanes(const V* v, F join) {
    if constexpr (H == VL) {
        return *v;
    } else {
        V a = reduce_lanes<N, 2 * H>(v, join), b = a;
        if constexpr (H < N) b = reduce_lanes<N, 2 * H>(v + H, join);
        return join(pick<H, false>(a, b, LANES), pick<H, true>(a, b, LANES));
    }
}
template <int N, class V>
HS_INLINE V lane_sums(const V* v) {
    return reduce_lanes<N>(v, [](V a, V b) __attribute__((always_inline)) { return a + b; });
}
template <int N>
HS_INLINE vf lane_maxima(const vf* v) {
    return reduce_lanes<N>(v, vmax);
}
HS_INLINE float hsum(vf v) { return lane_sums<1>(&v)[0]; }
HS_INLINE int32_t hsum(vi v) { return lane_sums<1>(&v)[0]; }
HS_INLINE float hmax(vf v) { return lane_maxima<1>(&v)[0]; }

HS_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
HS_INLINE vi round_even(vf v) {  // |v| < 2^22
#if defined(HS_AVX512)
    return (vi)_mm512_maskz_cvtps_epi32(-1, (__m512)v);  // maskz: GCC 12 warns about the plain form
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
    return (vi)_mm_cvtps_epi32((__m128)v);
#endif
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low mantissa bits
    return (vi)(v + magic) - 0x4b400000;
}
HS_INLINE vf bf16_to_float(vh v) { return as_f(__builtin_convertvector(v, vu) << 16); }
HS_INLINE vh float_to_bf16(vf v) {  // nearest even; NaN stays NaN
    vu u = (vu)v;
    vu r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = (u >> 16) | 0x40;
    vu is_nan = (vu)((u & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((is_nan & nan) | (~is_nan & r), vh);
}
HS_INLINE float bf16_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
HS_INLINE vf fp16_to_float(vh v) {
#if defined(HS_AVX512)
    return (vf)_mm512_maskz_cvtph_ps(-1, (__m256i)v);
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)v);
#else
    vu u = __builtin_convertvector(v, vu);
    vf magnitude = as_f((u & 0x7fff) << 13) * 0x1p112f;
    vu beyond = (vu)((u & 0x7c00) == 0x7c00) & 0x7f800000;  // infinity and NaN
    return as_f((vu)magnitude | beyond | ((u & 0x8000) << 16));
#endif
}
HS_INLINE float fp16_to_float(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    float f;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    memcpy(&u, &f, 4);
    u |= sign | ((h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
    memcpy(&f, &u, 4);
    return f;
}

// e^x within 2 ulp for x <= 88.3, or NaN, which stays NaN; below -87.3 it gives 0. Scores less their largest need no more.
HS_INLINE vf vexp_bounded(vf x) {
    vi exponent = round_even(vmax(x, splat(-90.0f)) * 1.44269504f);
    vf n = to_float(exponent);
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    return select(x < -87.3f, vf{}, p * as_f((exponent + 127) << 23));
}

// e^x for any x: above 88.3 it gives infinity.
HS_INLINE vf vexp(vf x) {
    vf e = select(x > 88.3f, splat(INFINITY), vexp_bounded(vmin(x, splat(90.0f))));
    return select(x != x, x, e);
}

HS_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
HS_INLINE vf silu(vf x) { return x / (1.0f + vexp(-x)); }

HS_INLINE vf vtanh(vf x) { return 1.0f - 2.0f / (1.0f + vexp(x + x)); }  // absolute error 1e-7

// x/2 (1 + erf(x / sqrt 2)); the tail of erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
HS_INLINE vf gelu(vf x) {
    vf z = vabs(x) * 0.70710678f;
    vf t = 1.0f / (1.0f + 0.3275911f * z);
    vf p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    vf tail = 0.5f * p * t * vexp(-z * z);  // of the normal distribution beyond |x|
    return x * select(x < 0.0f, tail, 1.0f - tail);
}

// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x times a sigmoid.
HS_INLINE vf gelu_tanh(vf x) { return x / (1.0f + vexp(-1.5957691f * (x + 0.044715f * x * x * x))); }

// Codes of kernels/cpu/activations.py.
enum Activation { SILU = 1, GELU, GELU_TANH, RELU, RELU2, SILU_CLAMPED };

// Out of line: the callers' loops stay as they are for the activation they were tuned with.
static __attribute__((noinline)) vf activate(int64_t activation, vf x) {
    switch (activation) {
        case GELU: return gelu(x);
        case GELU_TANH: return gelu_tanh(x);
        case RELU: return vmax(x, vf{});
        case RELU2: return vmax(x, vf{}) * vmax(x, vf{});
        case SILU_CLAMPED: return vmin(x, splat(7.0f)) * sigmoid(1.702f * vmin(x, splat(7.0f)));
        default: return silu(x);
    }
}

HS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
HS_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache

}  // namespace hs
