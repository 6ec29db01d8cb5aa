// Entries of the linear kernels, one per storage format. Slots: kernels/cpu/linear.py.
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define HS_AMX 1
#endif
#include "linear_amx.h"
#include "linear_float.h"
#include "linear_int.h"

namespace {

using namespace hs;

enum Slot { LIVE, X, ROWS, BIAS, NORM, RESIDUAL, OUT, WORK, LIVE_INDEX, K, N, GATED, ACT, EPS, PRODUCT_SCALE, SOFTCAP, DATA, GROUP, SCALE };

Linear bind(int format, const hs_arg* a) {
    Linear c;
    c.t = ((const int32_t*)a[LIVE].p)[a[LIVE_INDEX].i];
    c.x = (const float*)a[X].p;
    c.rows = (const int32_t*)a[ROWS].p;
    c.bias = (const float*)a[BIAS].p;
    c.norm = (const float*)a[NORM].p;
    c.residual = (const float*)a[RESIDUAL].p;
    c.out = (float*)a[OUT].p;
    c.work = (uint8_t*)a[WORK].p;
    c.n = a[N].i;
    c.gated = a[GATED].i != 0;
    c.act = a[ACT].i;
    c.eps = (float)a[EPS].f;
    c.scale = (float)a[PRODUCT_SCALE].f;
    c.softcap = (float)a[SOFTCAP].f;
    const bool grouped = format == INT8 || format == INT4;
    c.w = {format, a[K].i, grouped ? a[GROUP].i : 0, a[DATA].p, grouped ? (const uint16_t*)a[SCALE].p : nullptr};
    return c;
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

HS_EXPORT void hs_linear_f32(const hs_ctx* ctx, const hs_arg* a) {
    Linear c = bind(F32, a);
    if (c.t > 0) linear_float<F32>(ctx, c);
}

HS_EXPORT void hs_linear_bf16(const hs_ctx* ctx, const hs_arg* a) {
    Linear c = bind(BF16, a);
    if (c.t <= 0) return;
#if defined(HS_AMX)
    amx_bf16(ctx, c);
#else
    linear_float<BF16>(ctx, c);
#endif
}

HS_EXPORT void hs_linear_int8(const hs_ctx* ctx, const hs_arg* a) {
    Linear c = bind(INT8, a);
    if (c.t > 0) linear_int<INT8>(ctx, c);
}

HS_EXPORT void hs_linear_int4(const hs_ctx* ctx, const hs_arg* a) {
    Linear c = bind(INT4, a);
    if (c.t > 0) linear_int<INT4>(ctx, c);
}
