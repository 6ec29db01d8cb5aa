// Kernels that tell what the team gave them; linked with plan.cpp and storage.cpp by test_team.py.
#include <sched.h>
#include <time.h>

#include "abi.h"

extern "C" int hs_amx(void) { return 1; }

namespace {

int add(void* p, int64_t i, int value) { return __atomic_add_fetch((int32_t*)p + i, value, __ATOMIC_ACQ_REL); }

// Ten seconds at most.
void wait_for(void* number, int64_t least) {
    for (const time_t start = time(nullptr); add(number, 0, 0) < least && time(nullptr) < start + 10;) sched_yield();
}

}  // namespace

// In each of PHASES phases: takes pieces of 0 .. COUNT-1 and writes who took each and how often it was taken. A share that has
// taken MOST[share] of them waits until all others are taken, and all shares but FIRST (-1: none) begin when that one has a piece.
HS_EXPORT void probe_take(const hs_ctx* ctx, const hs_arg* a) {
    enum { COUNT, PHASES, FIRST, MOST, TIMES, BY, TOTAL };
    const int64_t count = a[COUNT].i, all = count * (ctx->phase + 1);
    int64_t mine = 0;
    if (a[FIRST].i >= 0 && a[FIRST].i != ctx->thread) wait_for(a[TOTAL].p, 1);
    for (int64_t piece; (piece = hs_take(ctx, count)) >= 0;) {
        add(a[TIMES].p, piece, 1);
        ((int32_t*)a[BY].p)[piece] = ctx->thread;
        add(a[TOTAL].p, 0, 1);
        if (++mine == ((const int64_t*)a[MOST].p)[ctx->thread]) wait_for(a[TOTAL].p, all);
    }
    if (ctx->phase + 1 < a[PHASES].i) hs_again(ctx);
}

// Writes what the share may prefetch after its own work, and the scale beside it.
HS_EXPORT void probe_then(const hs_ctx* ctx, const hs_arg* a) {
    ((const uint8_t**)a[0].p)[2 * ctx->thread] = ctx->then.tile;
    ((const uint8_t**)a[0].p)[2 * ctx->thread + 1] = ctx->then.scale;
}

// The same of a kernel that reads weights: share s begins at a[1] + s.
HS_EXPORT void probe_reader(const hs_ctx* ctx, const hs_arg* a) { probe_then(ctx, a); }
static const hs_reader reader(probe_reader, [](const hs_ctx* ctx, const hs_arg* a) {
    return hs_stream{(const uint8_t*)a[1].p + ctx->thread, (const uint8_t*)a[1].p, 64};
});
