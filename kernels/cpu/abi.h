// The CPU plan's binary interface: what the plan loop (plan.cpp) and every kernel agree on.
//
// A plan node is (kernel, argument array). Every thread of the team calls the kernel with the same
// arguments and its own hs_ctx; kernels split their work by ctx->thread / ctx->threads or take pieces
// with hs_next. The loop puts one barrier after every node; a kernel with phases calls hs_barrier itself.
#pragma once
#include <cstdint>

#define HS_ABI_VERSION 1
#define HS_EXPORT extern "C" __attribute__((visibility("default")))

// One argument slot is eight bytes, whatever it holds: the parameter layout of a kernel is the ordered
// list `Kernel.params` of its Python registration.
union hs_arg {
    void* p;      // Address(arena, offset), relocated at load
    int64_t i;
    double f;
};

struct hs_team;   // threads and their barrier; defined in team.h

struct hs_ctx {
    int32_t thread;    // 0 .. threads-1
    int32_t threads;
    hs_team* team;
};

typedef void (*hs_kernel)(const hs_ctx*, const hs_arg*);

// All threads of the team arrive before any leaves (acquire/release).
void hs_barrier(const hs_ctx*);

// The next piece nobody has taken yet: 0, 1, 2, … counted from the last barrier. A thread whose core is
// shared with another process then holds up only the piece it works on.
int64_t hs_next(const hs_ctx*);
