// Threads of one forward: one OpenMP region, and barriers between its phases.
//
// The shared library names no OpenMP runtime. Its symbols are found in the one torch has already loaded, so both share one
// pool of threads; two pools would fight for the cores.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);  // declared here: clang ships without omp.h
extern "C" int omp_get_num_threads(void);
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace outrider {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins, since phases last microseconds; yields after a while, since a neighbour may hold the other core.
class Barrier {
   public:
    void wait(int threads) {
        if (threads == 1) return;
        const int before = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(before + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == before; ++spins) {
            if (spins < SPINS)
                pause();
            else
                sched_yield();
        }
    }

   private:
    static constexpr int SPINS = 2000;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
};

// Units begin : end of `thread` when `units` are split evenly.
struct Share {
    int64_t begin, end;
    Share(int64_t units, int thread, int threads) : begin(units * thread / threads), end(units * (thread + 1) / threads) {}
};

// Runs body(thread, threads) on up to `threads` threads and waits for all.
template <class Body>
inline void in_parallel(int threads, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    body(0, 1);
}

// Memory that only grows: zeroed when it grows, cache-line aligned, its contents forgotten.
template <class T>
class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // False when there is no memory.
    bool reserve(int64_t count) {
        if (count <= size_) return true;
        std::free(data_);
        size_ = 0;
        const size_t bytes = ((size_t)count * sizeof(T) + 127) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) return false;
        std::memset(static_cast<void*>(data_), 0, bytes);
        size_ = count;
        return true;
    }

    T* operator+(int64_t i) const { return data_ + i; }
    T& operator[](int64_t i) const { return data_[i]; }

   private:
    T* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace outrider
