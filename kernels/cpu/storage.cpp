// Loading weights: a parallel read of a file range into memory and CRC-32C over many tensors, both run by the team.
// Called by the runtime's CPU device when it opens an artifact.
#include <fcntl.h>
#include <string.h>

#include "team.h"
#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

namespace {

constexpr int64_t PIECE = 4 << 20;

struct Read {
    int fd;
    int64_t file_offset;
    char* dst;
    int64_t bytes;
    std::atomic<int> error;
};

int read_range(int fd, char* dst, int64_t offset, int64_t bytes) {
    while (bytes > 0) {
        ssize_t got = pread(fd, dst, bytes, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return EIO;  // the file is shorter than asked for
        dst += got, offset += got, bytes -= got;
    }
    return 0;
}

void run_read(const hs_ctx* ctx, const hs_arg* arg) {
    Read* r = (Read*)arg;
    const int64_t pieces = (r->bytes + PIECE - 1) / PIECE;
    for (int64_t piece; (piece = hs_take(ctx, pieces)) >= 0 && !r->error.load(std::memory_order_relaxed);) {
        const int64_t at = piece * PIECE;
        int64_t n = r->bytes - at < PIECE ? r->bytes - at : PIECE;
        if (int error = read_range(r->fd, r->dst + at, r->file_offset + at, n)) r->error.store(error);
    }
}

// CRC-32C, reflected. The register of a byte string is linear in its start value, so pieces are computed apart and joined:
// crc(a b) = shift(crc(a), |b|) ^ crc(b), where shift multiplies by x^(8 |b|) modulo the polynomial.
constexpr uint32_t POLYNOMIAL = 0x82f63b78;

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int i = 31; i >= 0; i--) {
        if ((a >> i) & 1) product ^= b;
        b = (b >> 1) ^ (b & 1 ? POLYNOMIAL : 0);
    }
    return product;
}

struct Tables {
    uint32_t power[64];    // x^(8 * 2^k)
    uint32_t byte[8][256];  // slicing by 8
    constexpr Tables() : power(), byte() {
        power[0] = 1u << 23;
        for (int k = 1; k < 64; k++) power[k] = multiply(power[k - 1], power[k - 1]);
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (c & 1 ? POLYNOMIAL : 0);
            byte[0][i] = c;
        }
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++) byte[k][i] = (byte[k - 1][i] >> 8) ^ byte[0][byte[k - 1][i] & 255];
    }
};
constexpr Tables TABLES;

uint32_t shift(uint32_t crc, int64_t bytes) {
    for (int k = 0; bytes; k++, bytes >>= 1)
        if (bytes & 1) crc = multiply(crc, TABLES.power[k]);
    return crc;
}

inline uint64_t word(const uint8_t* p) {
    uint64_t w;
    memcpy(&w, p, 8);
    return w;
}

#if defined(__SSE4_2__)
inline uint64_t step8(uint64_t crc, uint64_t w) { return _mm_crc32_u64(crc, w); }
#else
inline uint64_t step8(uint64_t crc, uint64_t w) {  // little-endian machines
    w ^= (uint32_t)crc;
    uint32_t c = 0;
    for (int k = 0; k < 8; k++) c ^= TABLES.byte[7 - k][(w >> (8 * k)) & 255];
    return c;
}
#endif

// Register without the outer complements. Three streams hide the latency of the instruction.
uint32_t crc_register(uint32_t start, const uint8_t* p, int64_t bytes) {
    uint64_t a = start, b = 0, c = 0;
    int64_t third = bytes / 24 * 8;
    for (int64_t i = 0; i < third; i += 8) {
        a = step8(a, word(p + i));
        b = step8(b, word(p + third + i));
        c = step8(c, word(p + 2 * third + i));
    }
    uint32_t crc = shift(shift((uint32_t)a, third) ^ (uint32_t)b, third) ^ (uint32_t)c;
    for (int64_t i = 3 * third; i < bytes; i++) crc = (crc >> 8) ^ TABLES.byte[0][(crc ^ p[i]) & 255];
    return crc;
}

struct Crc {
    const uint8_t* base;
    const int64_t *offsets, *sizes;
    std::atomic<uint32_t>* out;
    int n;
};

// XOR makes the order in which pieces finish irrelevant.
void run_crc(const hs_ctx* ctx, const hs_arg* arg) {
    Crc* job = (Crc*)arg;
    struct Piece {
        int tensor;
        int64_t at;
    };
    auto each = [&](auto visit) {
        for (int t = 0; t < job->n; t++)
            for (int64_t at = 0; at < job->sizes[t]; at += PIECE) visit(Piece{t, at});
    };
    hs_take_jobs(ctx, each, [&](const Piece& piece) {
        const int64_t left = job->sizes[piece.tensor] - piece.at, bytes = left < PIECE ? left : PIECE;
        uint32_t crc = crc_register(piece.at ? 0 : ~0u, job->base + job->offsets[piece.tensor] + piece.at, bytes);
        job->out[piece.tensor].fetch_xor(shift(crc, left - bytes), std::memory_order_relaxed);
    });
}

}  // namespace

// File range -> memory; 0 or errno (EIO: the file ends early).
HS_EXPORT int hs_read(void* team, const char* path, int64_t file_offset, void* dst, int64_t bytes) {
    Read job{open(path, O_RDONLY | O_CLOEXEC), file_offset, (char*)dst, bytes, {0}};
    if (job.fd < 0) return errno;
    hs_run(team, run_read, &job);
    close(job.fd);
    return job.error.load();
}

// out[i] = CRC-32C of base[offsets[i]:][:sizes[i]].
HS_EXPORT void hs_crc32c(void* team, const void* base, const int64_t* offsets, const int64_t* sizes, uint32_t* out, int n) {
    static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);
    for (int i = 0; i < n; i++) out[i] = sizes[i] ? 0 : ~0u;  // the register of nothing; pieces are XORed into 0
    Crc job{(const uint8_t*)base, offsets, sizes, (std::atomic<uint32_t>*)out, n};
    hs_run(team, run_crc, &job);
    for (int i = 0; i < n; i++) out[i] = ~out[i];
}
