// The thread team: one driver and threads - 1 workers that meet at a barrier. Jobs run one after the other in the order
// of submission; every thread of the team executes every job. Included by plan.cpp and storage.cpp alone.
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

// A job in the queue: copy in, run on all threads, copy out. `run` ends with a barrier and touches nothing of `arg` after it:
// the submitter goes on as soon as the driver has passed.
struct hs_job {
    void (*run)(const hs_ctx*, void*);
    void* arg;
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
    enum Gate { SHUT, OPEN, CANCELLED };

    int threads = 0;
    pthread_t handles[MAX_THREADS];

    // Barrier. `epoch` grows when the last thread arrives; `sleepers` tells it whether a system call is needed.
    alignas(64) std::atomic<uint32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> epoch{0};
    std::atomic<uint32_t> sleepers{0};
    alignas(64) std::atomic<int64_t> next{0};

    // Queue: tickets are 1, 2, 3, …; `done` is the last finished one. Guarded by `mutex`.
    alignas(64) pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t submitted_changed = PTHREAD_COND_INITIALIZER;
    pthread_cond_t done_changed = PTHREAD_COND_INITIALIZER;
    hs_job queue[QUEUE];
    double seconds[HISTORY];
    int64_t submitted = 0;
    int64_t done = 0;
    bool closing = false;
    int ready = 0;  // threads that reached the gate while hs_open starts the team
    Gate gate = SHUT;

    // Written by the driver before a barrier, read by the workers after it.
    hs_job job;
    bool stop = false;
};

static inline double hs_now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static inline void hs_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Spinning is worth it when the others are microseconds away, giving the core up when it is shared with another process,
// sleeping when there is nothing to do between steps.
static inline void hs_await(hs_team* team, uint32_t epoch) {
    constexpr double SPIN = 30e-6, YIELD = 300e-6;
    double start = hs_now();
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (team->epoch.load(std::memory_order_acquire) != epoch) return;
            hs_pause();
        }
        double waited = hs_now() - start;
        if (waited > YIELD) break;
        if (waited > SPIN) sched_yield();
    }
    team->sleepers.fetch_add(1);
    while (team->epoch.load() == epoch)
        syscall(SYS_futex, &team->epoch, FUTEX_WAIT_PRIVATE, epoch, nullptr, nullptr, 0);
    team->sleepers.fetch_sub(1);
}

// Runs `run` on every thread of the team after what is already queued, and waits for it (plan.cpp).
void hs_run(hs_team* team, void (*run)(const hs_ctx*, void*), void* arg);
