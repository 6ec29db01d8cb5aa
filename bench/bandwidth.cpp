// Reads a buffer with all threads of a team, each its own contiguous share, as a weight-streaming kernel does: wide loads, a
// software prefetch a fixed distance ahead, huge pages. Compiled by bandwidth.py, called through the team (kernels/cpu/abi.h).
#include <sys/mman.h>

#include <cstddef>

#include "abi.h"

namespace {

typedef int32_t vec __attribute__((vector_size(64)));
constexpr size_t LINE = 64, BLOCK = 4 * LINE, HUGE_PAGE = size_t(2) << 20;

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

// A huge-page buffer of `bytes` (rounded up to 2 MiB, plus room for the prefetch), written once. NULL when there is no memory.
HS_EXPORT void* bandwidth_open(size_t bytes) {
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

HS_EXPORT void bandwidth_close(void* p, size_t bytes) {
    munmap(p, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE);
}

// One pass over the buffer; `kept` takes what was read.
HS_EXPORT void bandwidth_pass(const hs_ctx* ctx, const hs_arg* a) {
    enum { BASE, BYTES, AHEAD, KEPT };
    const int64_t blocks = a[BYTES].i / BLOCK;
    const int64_t begin = blocks * ctx->thread / ctx->threads, end = blocks * (ctx->thread + 1) / ctx->threads;
    int32_t read = read_share(static_cast<const char*>(a[BASE].p) + begin * BLOCK, (end - begin) * BLOCK, a[AHEAD].i);
    __atomic_fetch_xor(static_cast<int32_t*>(a[KEPT].p), read, __ATOMIC_RELAXED);
}
