// Where a key or value lives. The pool is page-major; a page holds every layer; one layer of a page is, per KV head:
//   K  float32, fp8 [E][16]      bfloat16 [E/2][16][2]      16 keys side by side, so that one vector holds one dim of 16 keys
//   V  [16][V]                   every dtype; V may differ from E
// kernels/cpu/layout.py (pack_kv, unpack_kv) writes the same in numpy.
#pragma once
#include "fp8.h"

namespace hs {

constexpr int PAGE = 16;  // tokens
constexpr int MAX_DIM = 256;  // of a head

enum KvDtype { KV_F32, KV_BF16, KV_E4M3, KV_E5M2 };  // as KV_SUFFIXES in kernels/cpu/rope.py

template <class T>
struct KvLayer {
    char* base;  // pool + layer offset
    int64_t page_bytes;
    int64_t dim, v_dim;  // E and V

    T* k(int64_t page, int64_t head) const { return (T*)(base + page * page_bytes) + head * PAGE * (dim + v_dim); }
    T* v(int64_t page, int64_t head) const { return k(page, head) + PAGE * dim; }
};

HS_INLINE void narrow(float x, float* out) { *out = x; }
HS_INLINE void narrow(float x, uint16_t* out) {  // bfloat16, nearest even; NaN stays NaN
    uint32_t u;
    memcpy(&u, &x, 4);
    *out = x != x ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

template <class T>
HS_INLINE int64_t k_index(const T*, int64_t e, int64_t key) { return e * PAGE + key; }
HS_INLINE int64_t k_index(const uint16_t*, int64_t e, int64_t key) { return (e / 2 * PAGE + key) * 2 + e % 2; }

HS_INLINE vf widen(const float* p) { return loadf(p); }
HS_INLINE vf widen(const uint16_t* p) { return bf16_to_float(load<vh>(p)); }
HS_INLINE float widen_one(const float* p) { return *p; }
HS_INLINE float widen_one(const uint16_t* p) { return bf16_to_float(*p); }

HS_INLINE void narrow(vf v, float* out) { store(out, v); }
HS_INLINE void narrow(vf v, uint16_t* out) { store(out, float_to_bf16(v)); }

template <class T>
HS_INLINE void narrow(const float* x, int64_t count, T* out) {
    int64_t e = 0;
    if constexpr (sizeof(T) > 1)
        for (; e + VL <= count; e += VL) narrow(loadf(x + e), out + e);
    for (; e < count; e++) narrow(x[e], out + e);
}

// Dims first.. of the key, and the value, of one head of one token, into slot = page * 16 + offset.
template <class T>
HS_INLINE void kv_store_k(const KvLayer<T>& layer, int64_t slot, int64_t head, const float* x, int64_t first, int64_t count) {
    T *k = layer.k(slot / PAGE, head), row[MAX_DIM];
    narrow(x, count, row);
    for (int64_t e = 0; e < count; e++) {
        k[k_index(k, first + e, slot % PAGE)] = row[e];
        asm("" : "+r"(k));  // keeps vectors away, which would be taken apart again by several times the code
    }
}
template <class T>
HS_INLINE void kv_store_v(const KvLayer<T>& layer, int64_t slot, int64_t head, const float* x) {
    narrow(x, layer.v_dim, layer.v(slot / PAGE, head) + slot % PAGE * layer.v_dim);
}

}  // namespace hs
