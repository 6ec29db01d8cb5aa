// The CPU plan's binary interface: what the plan loop (plan.cpp) and every kernel agree on.
//
// A plan node is (kernel, argument array). Every thread of the team calls the kernel with the same
// arguments and its own hs_ctx; kernels split their work by ctx->thread / ctx->threads. The loop puts
// one barrier after every node; a kernel with phases calls hs_barrier itself.
#pragma once
#include <cstdint>

#define HS_ABI_VERSION 1

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
