// The plan loop: opens the thread team and executes submitted plans node by node. Called by the runtime's CPU device
// through ctypes; a submit returns at once.
#include <stdlib.h>
#include <string.h>

#include <new>

#include "team.h"

// Whether this build may run here (linear.cpp): 0 when it needs tile registers and the system refuses them.
extern "C" int hs_amx(void);

void hs_barrier(const hs_ctx* ctx) {
    hs_team* team = ctx->team;
    if (ctx->threads == 1) {
        team->next.store(0, std::memory_order_relaxed);
        return;
    }
    uint32_t epoch = team->epoch.load(std::memory_order_relaxed);
    if (team->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < (uint32_t)ctx->threads) {
        hs_await(team, epoch);
        return;
    }
    team->arrived.store(0, std::memory_order_relaxed);
    team->next.store(0, std::memory_order_relaxed);
    team->epoch.store(epoch + 1);
    if (team->sleepers.load()) syscall(SYS_futex, &team->epoch, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

int64_t hs_next(const hs_ctx* ctx) { return ctx->team->next.fetch_add(1, std::memory_order_relaxed); }

namespace {

struct Plan {
    int nodes;
    const hs_kernel* fns;
    const hs_arg* const* args;
    double* seconds;  // per node, accumulated when asked for
};

void run_plan(const hs_ctx* ctx, void* arg) {
    // A copy: once the last barrier opens, the plan may be freed while a worker is still on its way out.
    const Plan plan = *(const Plan*)arg;
    bool timed = plan.seconds && ctx->thread == 0;
    double start = timed ? hs_now() : 0;
    for (int i = 0; i < plan.nodes; i++) {
        plan.fns[i](ctx, plan.args[i]);
        hs_barrier(ctx);
        if (timed) {
            double now = hs_now();
            plan.seconds[i] += now - start;
            start = now;
        }
    }
}

struct Start {
    hs_team* team;
    int thread;
};

// Reports this thread ready, then waits until hs_open knows whether all of them came up.
bool pass_gate(hs_team* team) {
    pthread_mutex_lock(&team->mutex);
    team->ready++;
    pthread_cond_broadcast(&team->done_changed);
    while (team->gate == hs_team::SHUT) pthread_cond_wait(&team->submitted_changed, &team->mutex);
    bool open = team->gate == hs_team::OPEN;
    pthread_mutex_unlock(&team->mutex);
    return open;
}

void* worker(void* arg) {
    Start start = *(Start*)arg;
    hs_ctx ctx{start.thread, start.team->threads, start.team};
    if (!pass_gate(start.team)) return nullptr;
    for (;;) {
        hs_barrier(&ctx);
        if (start.team->stop) return nullptr;
        start.team->job.run(&ctx, start.team->job.arg);
    }
}

void* driver(void* arg) {
    Start start = *(Start*)arg;
    hs_team* team = start.team;
    hs_ctx ctx{0, team->threads, team};
    if (!pass_gate(team)) return nullptr;
    pthread_mutex_lock(&team->mutex);
    for (;;) {
        while (team->done == team->submitted && !team->closing) pthread_cond_wait(&team->submitted_changed, &team->mutex);
        if (team->done == team->submitted) break;
        int64_t ticket = team->done + 1;
        team->job = team->queue[ticket % hs_team::QUEUE];
        pthread_mutex_unlock(&team->mutex);

        const hs_job& job = team->job;
        double begin = hs_now();
        if (job.upload_bytes) memcpy(job.io, job.staging, job.upload_bytes);
        hs_barrier(&ctx);
        job.run(&ctx, job.arg);
        if (job.out_bytes) memcpy(job.out, job.out_from, job.out_bytes);
        double took = hs_now() - begin;

        pthread_mutex_lock(&team->mutex);
        team->seconds[ticket % hs_team::HISTORY] = took;
        team->done = ticket;
        pthread_cond_broadcast(&team->done_changed);
    }
    pthread_mutex_unlock(&team->mutex);
    team->stop = true;
    hs_barrier(&ctx);
    return nullptr;
}

int64_t enqueue(hs_team* team, const hs_job& job) {
    pthread_mutex_lock(&team->mutex);
    while (team->submitted - team->done >= hs_team::QUEUE) pthread_cond_wait(&team->done_changed, &team->mutex);
    int64_t ticket = ++team->submitted;
    team->queue[ticket % hs_team::QUEUE] = job;
    pthread_cond_signal(&team->submitted_changed);
    pthread_mutex_unlock(&team->mutex);
    return ticket;
}

double await_ticket(hs_team* team, int64_t ticket) {
    pthread_mutex_lock(&team->mutex);
    double seconds = -1.0;
    if (ticket >= 1 && ticket <= team->submitted) {
        while (team->done < ticket) pthread_cond_wait(&team->done_changed, &team->mutex);
        seconds = team->seconds[ticket % hs_team::HISTORY];
    }
    pthread_mutex_unlock(&team->mutex);
    return seconds;
}

}  // namespace

HS_EXPORT int hs_abi(void) { return HS_ABI_VERSION; }

// A team of `threads` threads (the driver is one of them); NULL when threads or tile registers are refused.
HS_EXPORT void* hs_open(int threads) {
    if (threads < 1 || threads > hs_team::MAX_THREADS || !hs_amx()) return nullptr;
    hs_team* team = new (std::nothrow) hs_team;
    if (!team) return nullptr;
    team->threads = threads;
    Start starts[hs_team::MAX_THREADS];
    // Signals belong to the host's threads: ours are born with all of them blocked.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int created = 0;
    for (; created < threads; created++) {
        starts[created] = Start{team, created};
        if (pthread_create(&team->handles[created], nullptr, created ? worker : driver, &starts[created])) break;
        pthread_setname_np(team->handles[created], created ? "hs-worker" : "hs-driver");
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_mutex_lock(&team->mutex);
    while (team->ready < created) pthread_cond_wait(&team->done_changed, &team->mutex);
    bool ok = created == threads;
    team->gate = ok ? hs_team::OPEN : hs_team::CANCELLED;
    pthread_cond_broadcast(&team->submitted_changed);
    pthread_mutex_unlock(&team->mutex);
    if (ok) return team;
    for (int i = 0; i < created; i++) pthread_join(team->handles[i], nullptr);
    delete team;
    return nullptr;
}

// Finishes what was submitted, then ends the threads.
HS_EXPORT void hs_close(void* handle) {
    hs_team* team = (hs_team*)handle;
    pthread_mutex_lock(&team->mutex);
    team->closing = true;
    pthread_cond_signal(&team->submitted_changed);
    pthread_mutex_unlock(&team->mutex);
    for (int i = 0; i < team->threads; i++) pthread_join(team->handles[i], nullptr);
    delete team;
}

// A plan of `nodes` calls. The two pointer arrays are copied; the argument slots stay the caller's and must outlive the plan.
HS_EXPORT void* hs_plan(void*, int nodes, const hs_kernel* fns, const hs_arg* const* args) {
    Plan* plan = (Plan*)malloc(sizeof(Plan) + nodes * (sizeof *fns + sizeof *args));
    if (!plan) return nullptr;
    hs_kernel* own_fns = (hs_kernel*)(plan + 1);
    const hs_arg** own_args = (const hs_arg**)(own_fns + nodes);
    memcpy(own_fns, fns, nodes * sizeof *fns);
    memcpy(own_args, args, nodes * sizeof *args);
    *plan = Plan{nodes, own_fns, own_args, nullptr};
    return plan;
}

HS_EXPORT void hs_plan_free(void* plan) { free(plan); }

// From now on add each node's seconds to `seconds[nodes]` (NULL: no longer). Only between steps.
HS_EXPORT void hs_plan_profile(void* plan, double* seconds) { ((Plan*)plan)->seconds = seconds; }

// Queues: staging -> io[0:upload_bytes], the plan, io[out_offset:][:out_bytes] -> out. Returns the ticket.
HS_EXPORT int64_t hs_submit(void* team, void* plan, void* io, const void* staging, int64_t upload_bytes, void* out,
                            int64_t out_offset, int64_t out_bytes) {
    return enqueue((hs_team*)team,
                   hs_job{run_plan, plan, io, staging, upload_bytes, out, (char*)io + out_offset, out_bytes});
}

// Blocks until the ticket's step is done; the seconds it ran, -1 for a ticket never issued.
HS_EXPORT double hs_wait(void* team, int64_t ticket) { return await_ticket((hs_team*)team, ticket); }

// Runs `run` on every thread of the team after what is already queued, and waits for it.
void hs_run(hs_team* team, void (*run)(const hs_ctx*, void*), void* arg) {
    hs_job job{};
    job.run = run;
    job.arg = arg;
    await_ticket(team, enqueue(team, job));
}
