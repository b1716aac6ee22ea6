// What a machine can do at most, for benchmarks/native.py: reading in several streams, and sums of products of bytes and of floats.
#include "weights.h"

using namespace outrider;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Reads `bytes` by `threads` threads, each its part in `streams` streams side by side.
EXPORT int64_t probe_read(const char* memory, int64_t bytes, int64_t threads, int64_t streams) {
    std::atomic<int64_t> sink{0};
    in_parallel((int)threads, [&](int thread, int count) {
        const int64_t each = bytes / count / streams / 64 * 64;
        const char* from = memory + thread * each * streams;
        vi sum[8] = {};
        for (int64_t at = 0; at < each; at += 64)
            for (int64_t s = 0; s < streams; ++s)
                for (int i = 0; i < 64; i += VECTOR) sum[s] ^= load<vi>(from + s * each + at + i);
        for (int64_t s = 1; s < streams; ++s) sum[0] ^= sum[s];
        sink += sum[0][0];
    });
    return sink;
}

// `units` units of 32 values times LANES columns and four rows, from the first cache. Returns the products done by each thread.
EXPORT int64_t probe_bytes(int64_t threads, int64_t units, int64_t* sink) {
    in_parallel((int)threads, [&](int thread, int) {
        alignas(64) int8_t x[4][UNIT] = {};
        vb w[8] = {};
        vi sum[4] = {};
        for (int64_t u = 0; u < units; ++u) {
            for (int r = 0; r < 4; ++r) sum[r] += dots<4, 8>(vi{}, w, x[r]);  // a new chain each time, as in a block
            asm volatile("" ::: "memory");
        }
        sink[thread] = sum[0][0] + sum[1][0] + sum[2][0] + sum[3][0];
    });
    return units * 4 * UNIT * LANES;
}

// The same with the products of plain weights: one tile of four weight rows and four rows of 512 values, again and again.
template <class W>
static int64_t plain(int64_t threads, int64_t tiles) {
    in_parallel((int)threads, [&](int, int) {
        alignas(64) static thread_local W w[4 * 512];
        alignas(64) static thread_local typename Packing<W>::Item x[4 * 576];
        float out[16];
        for (int64_t t = 0; t < tiles; ++t) {
            tile<W, 4, 4>(w, 512, 1, 4, x, 576, 512, out, 4);
            asm volatile("" ::"r"(out) : "memory");
        }
    });
    return tiles * 4 * 4 * 512;
}
EXPORT int64_t probe_bf16(int64_t threads, int64_t tiles) { return plain<bf16>(threads, tiles); }
EXPORT int64_t probe_float(int64_t threads, int64_t tiles) { return plain<float>(threads, tiles); }
