// Threads of one forward: one OpenMP region, and the phases that they go through together.
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
#if defined(OUTRIDER_STRESS)
#include <functional>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace outrider {

// A stress test brings its own threads, and comes between one unit and the next.
#if defined(OUTRIDER_STRESS)
void between_units();
void in_threads(int threads, const std::function<void(int, int)>& body);
#else
inline void between_units() {}
#endif

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
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

// The units of a forward's phases, taken from shared counters. Nobody waits for a thread, only for units: one that does not get
// its core has taken none, the others do its share, and when it comes it goes on where they are.
//
// Each thread has a range of its own in every phase, the same in every forward, so that its weights stay in its cache. It takes
// from the front; who has finished takes from the back of another's. A counter carries its phase, so it needs no one to open
// it: an older one stands for the whole range, a newer one says that the phase is over.
class Phases {
   public:
    // Before the threads start. False when there is no memory.
    bool start(int threads) {
        if (!range_.reserve(threads)) return false;
        for (int i = 0; i < threads; ++i) range_[i].word.store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        return true;
    }

    // One thread's way through the phases. All call it with the same units in the same order.
    class Walk {
       public:
        Walk(Phases& phases, int thread, int threads) : phases_(phases), thread_(thread), threads_(threads) {}

        // Returns when body(0) ... body(units - 1) have each been called once, by whomever.
        template <class Body>
        void operator()(int64_t units, const Body& body) {
            if (threads_ == 1) {
                for (int64_t u = 0; u < units; ++u) body(u);
                return;
            }
            const int64_t grain = 1 + units / LIMIT, chunks = (units + grain - 1) / grain;
            ++phase_, goal_ += chunks;
            int64_t finished = 0;
            for (int i = 0; i < threads_ && !phases_.reached(goal_ - finished); ++i) {
                const int owner = thread_ + i < threads_ ? thread_ + i : thread_ + i - threads_;
                for (int64_t c; (c = phases_.take(owner, owner == thread_, phase_, chunks, threads_)) >= 0; ++finished)
                    for (int64_t u = c * grain; u < units && u < (c + 1) * grain; ++u) body(u);
            }
            phases_.finish(finished, goal_);
        }

       private:
        Phases& phases_;
        const int thread_, threads_;
        uint64_t phase_ = 0;
        int64_t goal_ = 0;
    };

   private:
    static constexpr int SPINS = 2000;
    static constexpr int BITS = 22;
    static constexpr int64_t LIMIT = (int64_t(1) << BITS) - 1;

    // Phase (20 bits), first and end of the units that are left (22 each).
    struct alignas(64) Range {
        std::atomic<uint64_t> word;
    };

    // A unit of the range of `owner`, or -1 if none is left.
    int64_t take(int owner, bool first, uint64_t phase, int64_t units, int threads) {
        std::atomic<uint64_t>& word = range_[owner].word;
        uint64_t seen = word.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t at = seen >> (2 * BITS);
            if (at > phase) return -1;
            int64_t begin = at == phase ? int64_t(seen >> BITS & LIMIT) : units * owner / threads;
            int64_t end = at == phase ? int64_t(seen & LIMIT) : units * (owner + 1) / threads;
            if (begin >= end) return -1;
            const int64_t unit = first ? begin++ : --end;
            const uint64_t next = phase << (2 * BITS) | uint64_t(begin) << BITS | uint64_t(end);
            if (word.compare_exchange_weak(seen, next, std::memory_order_relaxed)) {
                between_units();
                return unit;
            }
        }
    }

    bool reached(int64_t goal) const { return done_.load(std::memory_order_acquire) >= goal; }

    // Spins, since phases last microseconds; yields after a while, since a neighbour may hold the other core.
    void finish(int64_t units, int64_t goal) {
        if (units > 0 && done_.fetch_add(units, std::memory_order_acq_rel) + units >= goal) return;
        for (int spins = 0; !reached(goal); ++spins) {
            if (spins < SPINS)
                pause();
            else
                sched_yield();
        }
    }

    Buffer<Range> range_;
    alignas(64) std::atomic<int64_t> done_{0};
};

// Runs body(thread, threads) on up to `threads` threads and waits for all.
template <class Body>
inline void in_parallel(int threads, const Body& body) {
#if defined(OUTRIDER_STRESS)
    in_threads(threads, body);
    return;
#elif defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    body(0, 1);
}

}  // namespace outrider
