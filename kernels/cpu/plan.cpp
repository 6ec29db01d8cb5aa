// The plan loop: opens the thread team and executes submitted plans node by node (team.h). Called by the runtime's CPU device
// through ctypes; a submit returns at once.
#include <stdlib.h>
#include <string.h>

#include <new>

#include "team.h"

// Whether this build may run here (linear.cpp): 0 when it needs tile registers and the system refuses them.
extern "C" int hs_amx(void);

void hs_again(const hs_ctx* ctx) { ctx->team->again.store(ctx->epoch, std::memory_order_relaxed); }

int64_t hs_take(const hs_ctx* ctx, int64_t count) {
    const uint64_t epoch = ctx->epoch;
    for (int i = 0; i < ctx->threads; i++) {
        const int64_t share = (ctx->thread + i) % ctx->threads;
        const int64_t begin = count * share / ctx->threads, end = count * (share + 1) / ctx->threads;
        std::atomic<uint64_t>& pieces = ctx->team->shares[share].pieces;
        for (uint64_t seen = pieces.load(std::memory_order_relaxed);;) {
            const int64_t piece = begin + (seen >> 32 == epoch ? (uint32_t)seen : 0);
            if (piece >= end) break;
            if (pieces.compare_exchange_weak(seen, epoch << 32 | (uint32_t)(piece + 1 - begin), std::memory_order_relaxed))
                return piece;
        }
    }
    return -1;
}

bool hs_last(const hs_ctx* ctx, int64_t item, int64_t parts) {
    std::atomic<int64_t>& done = ctx->team->parts[item];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < parts) return false;
    done.store(0, std::memory_order_relaxed);
    return true;
}

namespace {

struct Reader {
    hs_kernel kernel;
    hs_reads reads;
};
Reader readers[32];
int reader_count = 0;

hs_reads reads_of(hs_kernel kernel) {
    for (int i = 0; i < reader_count; i++)
        if (readers[i].kernel == kernel) return readers[i].reads;
    return nullptr;
}

}  // namespace

hs_reader::hs_reader(hs_kernel kernel, hs_reads reads) {
    if (reader_count == sizeof readers / sizeof *readers) abort();  // this library has more: no input brings it about
    readers[reader_count++] = {kernel, reads};
}

namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// ---- phases ----

void publish(hs_team* team, int node, int phase) {
    team->finished.store(0, std::memory_order_relaxed);
    const uint32_t epoch = hs_team::epoch_of(team->position.load(std::memory_order_relaxed)) + 1;
    team->position.store((uint64_t)node << 40 | (uint64_t)phase << 32 | epoch);
    if (team->sleepers.load()) syscall(SYS_futex, &team->position, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// Starts `team->job`, whose nodes are at least one.
void begin(hs_team* team) {
    const hs_job& job = team->job;
    team->begun = now();
    if (job.upload_bytes) memcpy(job.io, job.staging, job.upload_bytes);
    if (job.nodes->seconds) team->node_begun = now();
    publish(team, 0, 0);
}

// The job's last share is done: its results, then the next job. Whoever waits is woken last: it may take this core at once.
void end(hs_team* team) {
    const hs_job& job = team->job;
    if (job.out_bytes) memcpy(job.out, job.out_from, job.out_bytes);
    double took = now() - team->begun;
    pthread_mutex_lock(&team->mutex);
    int64_t ticket = ++team->done;
    team->seconds[ticket % hs_team::HISTORY] = took;
    team->running = team->done < team->submitted;
    if (team->running) team->job = team->queue[(ticket + 1) % hs_team::QUEUE];
    bool more = team->running;
    pthread_mutex_unlock(&team->mutex);
    if (more) begin(team);
    pthread_cond_broadcast(&team->done_changed);
}

// Every share of the phase at `position` is done and no other thread is in it.
void advance(hs_team* team, uint64_t position) {
    const hs_nodes& nodes = *team->job.nodes;
    const int node = hs_team::node_of(position);
    if (team->again.load(std::memory_order_relaxed) == hs_team::epoch_of(position))
        return publish(team, node, hs_team::phase_of(position) + 1);
    if (nodes.seconds) {
        double time = now();
        nodes.seconds[node] += time - team->node_begun;
        team->node_begun = time;
    }
    if (node + 1 == nodes.count) return end(team);
    publish(team, node + 1, 0);
}

// Runs a share of the phase at `position` unless somebody has taken it.
bool run_share(hs_team* team, int share, uint64_t position) {
    const uint32_t epoch = hs_team::epoch_of(position);
    uint32_t last = epoch - 1;
    if (!team->shares[share].taken.compare_exchange_strong(last, epoch, std::memory_order_acq_rel)) return false;
    // From here to the count below the phase cannot end.
    const hs_nodes& nodes = *team->job.nodes;
    const int node = hs_team::node_of(position);
    hs_ctx ctx{share, team->threads, team, hs_team::phase_of(position), epoch, {}};
    const int reader = nodes.readers ? nodes.readers[node] : -1;
    if (reader >= 0) ctx.then = reads_of(nodes.fns[reader])(&ctx, nodes.args[reader]);
    nodes.fns[node](&ctx, nodes.args[node]);
    if (team->finished.fetch_add(1, std::memory_order_acq_rel) + 1 == team->threads) advance(team, position);
    return true;
}

// Runs the shares of others that nobody has taken.
void help(hs_team* team, int self, uint64_t position) {
    const uint32_t epoch = hs_team::epoch_of(position);
    for (int i = 1; i < team->threads; i++) {
        const int other = (self + i) % team->threads;
        if (team->shares[other].taken.load(std::memory_order_relaxed) != epoch - 1) continue;
        if (run_share(team, other, position)) team->late.store(epoch, std::memory_order_relaxed);
    }
}

// Waits for a position after `position`. Spinning is worth it when the others are microseconds away, giving the core up when it is
// shared with another process, sleeping when there is nothing to do between steps.
uint64_t await_position(hs_team* team, int self, uint64_t position) {
    constexpr double LATE = 2e-6, SPIN = 30e-6, YIELD = 300e-6;
    uint64_t found;
    // Who was late in the phase before probably still is: no wait for that.
    bool helped = team->late.load(std::memory_order_relaxed) == hs_team::epoch_of(position) - 1;
    if (helped) help(team, self, position);
    const double start = now();
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if ((found = team->position.load(std::memory_order_acquire)) != position) return found;
            pause();
        }
        double waited = now() - start;
        if (waited > YIELD) break;
        if (waited > LATE && !helped) {
            helped = true;
            help(team, self, position);
        }
        if (waited > SPIN) sched_yield();
    }
    team->sleepers.fetch_add(1);
    while ((found = team->position.load()) == position)
        syscall(SYS_futex, &team->position, FUTEX_WAIT_PRIVATE, hs_team::epoch_of(position), nullptr, nullptr, 0);
    team->sleepers.fetch_sub(1);
    return found;
}

// ---- threads ----

struct Start {
    hs_team* team;
    int thread;
};

// Reports this thread ready, then waits until hs_open knows whether all of them came up.
bool pass_gate(hs_team* team) {
    pthread_mutex_lock(&team->mutex);
    team->ready++;
    pthread_cond_broadcast(&team->done_changed);
    while (team->gate == hs_team::SHUT) pthread_cond_wait(&team->gate_changed, &team->mutex);
    bool open = team->gate == hs_team::OPEN;
    pthread_mutex_unlock(&team->mutex);
    return open;
}

void* worker(void* arg) {
    Start start = *(Start*)arg;
    hs_team* team = start.team;
    if (!pass_gate(team)) return nullptr;
    for (uint64_t position = 0;;) {
        position = await_position(team, start.thread, position);
        if (team->stop.load(std::memory_order_relaxed)) return nullptr;
        run_share(team, start.thread, position);
    }
}

int64_t enqueue(hs_team* team, const hs_job& job) {
    pthread_mutex_lock(&team->mutex);
    while (team->submitted - team->done >= hs_team::QUEUE) pthread_cond_wait(&team->done_changed, &team->mutex);
    int64_t ticket = ++team->submitted;
    team->queue[ticket % hs_team::QUEUE] = job;
    bool idle = !team->running;
    if (idle) {
        team->running = true;
        team->job = job;
    }
    pthread_mutex_unlock(&team->mutex);
    if (idle) begin(team);
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

// A team of `threads` threads; NULL when threads or tile registers are refused.
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
        if (pthread_create(&team->handles[created], nullptr, worker, &starts[created])) break;
        pthread_setname_np(team->handles[created], "hs-worker");
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_mutex_lock(&team->mutex);
    while (team->ready < created) pthread_cond_wait(&team->done_changed, &team->mutex);
    bool ok = created == threads;
    team->gate = ok ? hs_team::OPEN : hs_team::CANCELLED;
    pthread_cond_broadcast(&team->gate_changed);
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
    while (team->done < team->submitted) pthread_cond_wait(&team->done_changed, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
    team->stop.store(true, std::memory_order_relaxed);
    publish(team, 0, 0);
    for (int i = 0; i < team->threads; i++) pthread_join(team->handles[i], nullptr);
    delete team;
}

// A plan of `nodes` calls, 1 .. 2^24 - 1 (NULL for others). The two pointer arrays are copied; the argument slots stay the caller's
// and must outlive the plan.
HS_EXPORT void* hs_plan(void*, int nodes, const hs_kernel* fns, const hs_arg* const* args) {
    if (nodes < 1 || nodes >= 1 << 24) return nullptr;
    hs_nodes* plan = (hs_nodes*)malloc(sizeof(hs_nodes) + nodes * (sizeof *fns + sizeof *args + sizeof(int)));
    if (!plan) return nullptr;
    hs_kernel* own_fns = (hs_kernel*)(plan + 1);
    const hs_arg** own_args = (const hs_arg**)(own_fns + nodes);
    memcpy(own_fns, fns, nodes * sizeof *fns);
    memcpy(own_args, args, nodes * sizeof *args);
    int* own_readers = (int*)(own_args + nodes);
    for (int i = nodes - 1, reader = -1; i >= 0; i--) {
        own_readers[i] = reader;
        if (reads_of(fns[i])) reader = i;
    }
    *plan = hs_nodes{nodes, own_fns, own_args, own_readers, nullptr};
    return plan;
}

HS_EXPORT void hs_plan_free(void* plan) { free(plan); }

// From now on add each node's seconds to `seconds[nodes]` (NULL: no longer). Only between steps.
HS_EXPORT void hs_plan_profile(void* plan, double* seconds) { ((hs_nodes*)plan)->seconds = seconds; }

// Queues: staging -> io[0:upload_bytes], the plan, io[out_offset:][:out_bytes] -> out. Returns the ticket.
HS_EXPORT int64_t hs_submit(void* team, void* plan, void* io, const void* staging, int64_t upload_bytes, void* out,
                            int64_t out_offset, int64_t out_bytes) {
    return enqueue((hs_team*)team,
                   hs_job{(const hs_nodes*)plan, io, staging, upload_bytes, out, (char*)io + out_offset, out_bytes});
}

// Blocks until the ticket's step is done; the seconds it ran, -1 for a ticket never issued.
HS_EXPORT double hs_wait(void* team, int64_t ticket) { return await_ticket((hs_team*)team, ticket); }

HS_EXPORT double hs_run(void* handle, hs_kernel fn, const void* argument) {
    hs_team* team = (hs_team*)handle;
    const hs_arg* args = (const hs_arg*)argument;
    const hs_nodes nodes{1, &fn, &args, nullptr, nullptr};
    hs_job job{};
    job.nodes = &nodes;
    return await_ticket(team, enqueue(team, job));
}
