// Softmax over keys block by block: scores to weights, and the merge of one block's result into a running one.
#pragma once
#include "vec.h"

namespace hs {

constexpr float LOWEST = -3e38f;  // below every score; finite, so that differences are never NaN

// What is read next: `bytes`, whole lines, or none.
struct Ahead {
    const char* p = nullptr;
    int64_t bytes = 0;
};

// Scores -> weights of the keys first..last-1 of `padded`, zero elsewhere; their largest score and their sum. Memory would rest
// meanwhile: `ahead` is prefetched, 256 bytes with each vector.
static __attribute__((noinline)) void soften(float* scores, int64_t padded, int first, int last, float* max, float* sum,
                                             Ahead ahead = {}) {
    int64_t fetched = 0;
    auto fetch = [&]() __attribute__((always_inline)) {
        if (fetched >= ahead.bytes) return;
        HS_UNROLL for (int i = 0; i < 4; i++) prefetch(ahead.p + fetched + i * 64);
        fetched += 256;
    };
    auto visible = [&](int64_t j, vf v, vf hidden) __attribute__((always_inline)) {
        if (first <= j && j + VL <= last) return v;
        vi lane;
        for (int i = 0; i < VL; i++) lane[i] = i;
        vi key = lane + (int32_t)j;
        return select((key >= first) & (key < last), v, hidden);
    };
    vf top = splat(LOWEST);
    for (int64_t j = 0; j < padded; j += VL) {
        top = vmax(visible(j, loadf(scores + j), splat(LOWEST)), top);
        fetch();
    }
    *max = hmax(top);
    top = splat(*max);
    vf total{};
    for (int64_t j = 0; j < padded; j += VL) {
        vf w = visible(j, vexp_bounded(loadf(scores + j) - top), vf{});
        store(scores + j, w);
        total += w;
        fetch();
    }
    *sum = hsum(total);
}

// total := total joined with one more block.
static __attribute__((noinline)) void merge(float* total, float* total_max, float* total_sum, const float* values, float max, float sum,
                         int64_t dim) {
    float top = max > *total_max ? max : *total_max;
    vf old = vexp_bounded(splat(*total_max - top)), add = vexp_bounded(splat(max - top));
    for (int64_t i = 0; i < dim; i += VL) store(total + i, fma(loadf(total + i), old, loadf(values + i) * add));
    *total_sum = *total_sum * old[0] + sum * add[0];
    *total_max = top;
}

}  // namespace hs
