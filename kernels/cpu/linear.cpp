// Entries of the linear kernels, one per storage format. Slots: kernels/cpu/linear.py.
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define HS_AMX 1
#endif
#include "linear_amx.h"
#include "linear_float.h"
#include "linear_int.h"

namespace hs {

// Without dots of bfloat16 pairs both formats of them are the same product.
template <int FMT>
constexpr int PRODUCT = FMT == WIDENED && !DOT<BF16> ? BF16 : FMT;

template <int FMT>
void prepare(const hs_ctx* ctx, const Linear& c) {
    if constexpr (FMT == INT8 || FMT == INT4)
        int_prepare(ctx, c);
#if defined(HS_AMX)
    else if constexpr (FMT == BF16)
        amx_bf16_prepare(ctx, c);
#endif
    else
        fill_panels<PRODUCT<FMT>>(ctx, c);
}

template <int FMT>
void product(const hs_ctx* ctx, const Linear& c) {
    if constexpr (FMT == INT8 || FMT == INT4)
        int_product<FMT>(ctx, c);
#if defined(HS_AMX)
    else if constexpr (FMT == BF16)
        amx_bf16_product(ctx, c);
#endif
    else
        float_product<PRODUCT<FMT>>(ctx, c);
}

#define HS_FORMAT(FMT)                                       \
    template void prepare<FMT>(const hs_ctx*, const Linear&); \
    template void product<FMT>(const hs_ctx*, const Linear&);
HS_FORMAT(F32)
HS_FORMAT(BF16)
HS_FORMAT(INT8)
HS_FORMAT(INT4)
HS_FORMAT(WIDENED)

}  // namespace hs

namespace {

using namespace hs;

enum Slot {
    LIVE, X, ROWS, BIAS, NORM, RESIDUAL, RESIDUAL_ROWS, OUT, WORK, LIVE_INDEX,
    K, N, GATED, ACT, EPS, PRODUCT_SCALE, SOFTCAP, DATA
};

Linear bind(int format, const hs_arg* a) {
    Linear c;
    c.t = ((const int32_t*)a[LIVE].p)[a[LIVE_INDEX].i];
    c.x = (const float*)a[X].p;
    c.rows = (const int32_t*)a[ROWS].p;
    c.bias = (const float*)a[BIAS].p;
    c.norm = (const float*)a[NORM].p;
    c.residual = (const float*)a[RESIDUAL].p;
    c.residual_rows = (const int32_t*)a[RESIDUAL_ROWS].p;
    c.out = (float*)a[OUT].p;
    c.work = (uint8_t*)a[WORK].p;
    c.n = c.out_stride = a[N].i;
    c.x_stride = a[K].i;
    c.gated = a[GATED].i != 0;
    c.act = a[ACT].i;
    c.eps = (float)a[EPS].f;
    c.scale = (float)a[PRODUCT_SCALE].f;
    c.softcap = (float)a[SOFTCAP].f;
    c.w = bind_weight(format, a[K].i, a + DATA);
    return c;
}

template <int FMT>
void linear(const hs_ctx* ctx, const hs_arg* a) {
    Linear c = bind(FMT, a);
    if (c.t <= 0) return;
    c.then = ctx->then;
    if (c.t > FEW_ROWS && ctx->phase == 0) {
        prepare<FMT>(ctx, c);
        return hs_again(ctx);
    }
    product<FMT>(ctx, c);
}

}  // namespace

// Whether this build may run here: 1, or 0 when it needs AMX and the system refuses the tile registers.
HS_EXPORT int hs_amx(void) {
#if defined(HS_AMX)
    return amx_permitted();
#else
    return 1;
#endif
}

HS_LINEAR(hs_linear_f32, linear, F32)
HS_LINEAR(hs_linear_bf16, linear, BF16)
HS_LINEAR(hs_linear_int8, linear, INT8)
HS_LINEAR(hs_linear_int4, linear, INT4)
HS_LINEAR(hs_linear_bf16_widened, linear, WIDENED)
