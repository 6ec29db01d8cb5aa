// The CPU plan's binary interface: what the plan loop (plan.cpp) and every kernel agree on.
//
// A plan node is (kernel, argument array), its work in as many shares as the team has threads. The kernel is called
// once per share with the same arguments; it splits its work by ctx->thread / ctx->threads or takes pieces
// with hs_take. A share is its thread's own, but when that is late (its core is shared with another process) any
// thread that waits runs it: a kernel may not wait for another share. The next node begins when all shares are done.
#pragma once
#include <cstdint>

#define HS_ABI_VERSION 3
#define HS_EXPORT extern "C" __attribute__((visibility("default")))

// One argument slot is eight bytes, whatever it holds: the parameter layout of a kernel is the ordered
// list `Kernel.params` of its Python registration.
union hs_arg {
    void* p;      // Address(arena, offset), relocated at load
    int64_t i;
    double f;
};

struct hs_team;   // threads and the state of the phase they work on; defined in team.h

// Where a share begins to read weights: its first tile, that tile's scales (NULL: none), and from one tile to the next.
struct hs_stream {
    const uint8_t *tile, *scale;
    int64_t tile_bytes;
};

struct hs_ctx {
    int32_t thread;    // the share: 0 .. threads-1
    int32_t threads;
    hs_team* team;
    int32_t phase;     // of the node: 0, and one more for every hs_again
    uint32_t epoch;    // number of the phase among all that the team runs
    hs_stream then;    // of this share in the next node with an hs_reader, for the prefetch to go on there; NULL: there is none
};

typedef void (*hs_kernel)(const hs_ctx*, const hs_arg*);

// Where a share of a kernel begins to read weights; asked while an earlier node of the plan runs, so it may look at nothing but
// the arguments and what was uploaded with the step.
typedef hs_stream (*hs_reads)(const hs_ctx*, const hs_arg*);

// Makes a kernel known as one that reads weights in tiles: one static object of each, made while the library is loaded.
struct hs_reader {
    hs_reader(hs_kernel, hs_reads);
};

// When all shares of this phase are done, the kernel is called again for every share, with the next phase.
// Asked for by any share. A node has at most 256 phases.
void hs_again(const hs_ctx*);

// A piece of 0 .. count-1 that nobody has taken yet, -1 when none is left: those of this share's own range in order, then what the
// shares after it have left of theirs, each in order, so that the pieces of a share ascend but for one step back. A thread whose
// core is shared with another process holds up only the piece it works on, and from step to step a core reads the same memory as
// long as none is late. All shares of a phase give the same `count`.
int64_t hs_take(const hs_ctx*, int64_t count);

// Runs the jobs that this share takes of all that `each(visit)` walks over, in an order every thread agrees on.
template <class Each, class Run>
void hs_take_jobs(const hs_ctx* ctx, Each each, Run run) {
    int64_t count = 0;
    each([&](const auto&) { count++; });
    for (int64_t mine = hs_take(ctx, count); mine >= 0;) {  // twice at most: what others left may lie before ours
        int64_t seen = 0;
        each([&](const auto& job) {
            if (seen++ != mine) return;
            mine = hs_take(ctx, count);
            run(job);
        });
    }
}

// Work in several parts, each done by whoever takes it: counts one more of `item` as done, and is true for the last of
// `parts`, who sees what the others wrote. All parts of an item belong to one phase; items are 0 .. HS_ITEMS-1.
#define HS_ITEMS 1024
bool hs_last(const hs_ctx*, int64_t item, int64_t parts);
