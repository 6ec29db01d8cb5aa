// The thread team: threads that run the shares of one phase after the other. Jobs run one after the other in the order of
// submission. Included by plan.cpp and storage.cpp alone.
//
// A phase is published with a new epoch. A share is taken for an epoch by its own thread, or by another that waits and finds
// it late; who finishes the last share alone publishes the next phase, or ends the job and starts the next one. So nobody
// waits for a thread that holds no share: what another process does to a core costs this core's share of the speed only.
#pragma once
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "abi.h"

struct hs_nodes {
    int count;
    const hs_kernel* fns;
    const hs_arg* const* args;
    const int* readers;  // of each node: the next one with an hs_reader, -1: none; NULL: of all of them
    double* seconds;  // per node, accumulated when asked for
};

// A job in the queue: copy in, run the nodes, copy out.
struct hs_job {
    const hs_nodes* nodes;
    void* io;
    const void* staging;
    int64_t upload_bytes;
    void* out;
    const void* out_from;
    int64_t out_bytes;
};

struct hs_team {
    static constexpr int QUEUE = 64;      // a submitter waits when the queue is full
    static constexpr int HISTORY = 1024;  // tickets whose run time can still be asked for

    static constexpr int MAX_THREADS = 1024;
    static_assert(HS_ITEMS >= MAX_THREADS, "a kernel may count parts by share, as rope.cpp does");
    enum Gate { SHUT, OPEN, CANCELLED };

    int threads = 0;
    pthread_t handles[MAX_THREADS];

    // Where the team is, in one word: the epoch (low half: the futex), phase (8 bits) and node (24 bits). Its line holds what
    // finishing a phase changes, and nothing else: cores that share no cache hand over one line, not several.
    alignas(64) std::atomic<uint64_t> position{0};
    std::atomic<int> finished{0};  // shares of this phase
    alignas(64) std::atomic<uint32_t> sleepers{0};  // whether who publishes needs a system call

    static uint32_t epoch_of(uint64_t position) { return (uint32_t)position; }
    static int node_of(uint64_t position) { return position >> 40; }
    static int phase_of(uint64_t position) { return position >> 32 & 255; }

    struct alignas(64) Share {
        std::atomic<uint32_t> taken{0};   // epoch it was last taken for
        std::atomic<uint64_t> pieces{0};  // epoch (high half), and how many of its range are taken in it
    };
    Share shares[MAX_THREADS];
    alignas(64) std::atomic<uint32_t> late{0};  // epoch in which a thread last took another's share
    alignas(64) std::atomic<uint32_t> again{0};  // epoch that is to be followed by another phase of its node
    alignas(64) std::atomic<int64_t> parts[HS_ITEMS] = {};  // done, of items that are not: zero between phases

    alignas(64) hs_job job;  // written by who finished the one before, ahead of the position; read by who took a share
    double begun = 0, node_begun = 0;
    std::atomic<bool> stop{false};  // also read by a thread that others made late for an epoch

    // Queue: tickets are 1, 2, 3, …; `done` is the last finished one. Guarded by `mutex`.
    alignas(64) pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
    pthread_cond_t done_changed = PTHREAD_COND_INITIALIZER;
    hs_job queue[QUEUE];
    double seconds[HISTORY];
    int64_t submitted = 0;
    int64_t done = 0;
    bool running = false;  // a job is at work
    int ready = 0;         // threads that reached the gate while hs_open starts the team
    Gate gate = SHUT;
};

// Runs `fn` with `argument` as the one node of a job after what is already queued, and waits for it; the seconds it ran (plan.cpp).
HS_EXPORT double hs_run(void* team, hs_kernel fn, const void* argument);
