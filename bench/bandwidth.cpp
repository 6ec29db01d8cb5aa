// Reads a buffer with all threads, each its own contiguous share, as a weight-streaming kernel does: wide loads, a software
// prefetch a fixed distance ahead, huge pages. Compiled and called by bandwidth.py.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

typedef int32_t vec __attribute__((vector_size(64)));
constexpr size_t LINE = 64, BLOCK = 4 * LINE;

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Integer xor: nothing to round, no latency worth the name; the result is kept so that no load can be dropped.
int32_t read_share(const char* p, size_t bytes, size_t ahead) {
    vec a{}, b{}, c{}, d{};
    for (size_t i = 0; i < bytes; i += BLOCK) {
        const char* q = p + i;
        for (size_t line = 0; line < BLOCK; line += LINE) __builtin_prefetch(q + ahead + line, 0, 3);
        const vec* v = reinterpret_cast<const vec*>(q);
        a ^= v[0];
        b ^= v[1];
        c ^= v[2];
        d ^= v[3];
    }
    vec all = a ^ b ^ c ^ d;
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum ^= all[i];
    return sum;
}

}  // namespace

extern "C" {

// A huge-page buffer of `bytes` (rounded up to 2 MiB, plus room for the prefetch), written once. NULL when there is no memory.
void* hs_bandwidth_open(size_t bytes) {
    constexpr size_t HUGE_PAGE = size_t(2) << 20;
    size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + 2 * HUGE_PAGE;
    void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    char* p = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
#ifdef MADV_HUGEPAGE
    madvise(p, size - HUGE_PAGE, MADV_HUGEPAGE);
#endif
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) *reinterpret_cast<uint64_t*>(p + i) = i * 0x9E3779B97F4A7C15u;
    return p;
}

void hs_bandwidth_close(void* p, size_t bytes) {
    constexpr size_t HUGE_PAGE = size_t(2) << 20;
    munmap(p, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE);
}

// Seconds of each of `passes` reads of the whole buffer. Threads meet at a spin barrier before every pass, so that neither
// their start nor the caller is timed; a pass lasts until the slowest thread is done.
void hs_bandwidth_read(const void* base, size_t bytes, int threads, size_t ahead, int passes, double* seconds) {
    const char* p = static_cast<const char*>(base);
    size_t share = bytes / threads / BLOCK * BLOCK;
    std::atomic<int> arrived{0};
    std::atomic<int32_t> kept{0};
    auto meet = [&](int round) {
        arrived.fetch_add(1);
        while (arrived.load() < (round + 1) * threads) std::this_thread::yield();
    };
    auto body = [&](int thread) {
        for (int pass = 0; pass < passes; ++pass) {
            meet(2 * pass);
            double start = now();
            kept ^= read_share(p + thread * share, share, ahead);
            meet(2 * pass + 1);
            if (thread == 0) seconds[pass] = (now() - start) * (double(bytes) / (double(share) * threads));
        }
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
    body(0);
    for (auto& t : others) t.join();
}
}
