// The threads of a decoder's forwards: how many, and on which cores.
//
// Other processes may want the same cores. A thread that has lost its core in the middle of a unit is waited for until the
// scheduler brings it back, for milliseconds, so fewer threads may be faster. A crew notices how long each thread was without a
// core, and Choice chooses by it. Only speed depends on what is chosen here, never a bit of a result.
#pragma once

#include <time.h>

#include <chrono>
#include <new>

#include "choice.h"
#include "parallel.h"

namespace outrider {

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds that this thread has spent on a core.
inline double seconds_on_core() {
    timespec t;
    return clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0 ? (double)t.tv_sec + 1e-9 * (double)t.tv_nsec : 0.0;
}

class Crew {
   public:
    Crew() = default;
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;
    ~Crew() { delete[] member_; }

    // Runs body(thread, threads) of a forward of `rows` rows on `most` threads at most, which go through `phases`. False, and nothing
    // has run, when there is no memory.
    template <class Body>
    bool run(int most, int64_t rows, Phases& phases, const Body& body) {
        const int threads = begin(most, rows);
        if (threads == 0 || !phases.start(threads)) return false;
        in_parallel(threads, [&](int thread, int count) {
            enter(thread);
            body(thread, count);
            leave(thread);
        });
        end();
        return true;
    }

   private:
    // Threads for a forward of `rows` rows, `most` at most; 0 when there is no memory. To be followed by `end`.
    int begin(int most, int64_t rows) {
        if (most > room_ && !grow(most)) return 0;
        start_ = seconds_now();
        running_ = choice_.begin(most, rows, start_, [this](int threads) { return crowded(threads); });
        watched_ = running_ > 1 && (choice_.usual() == 0.0 || choice_.usual() > SHORT || ++skipped_ >= SKIPS);
        if (watched_) skipped_ = 0;
        return running_;
    }

    // Around each thread's work in the forward.
    void enter(int thread) {
        if (!watched_) return;
        Member& m = member_[thread];
        m.on_core = seconds_on_core();
        m.worked = true;
#if defined(__linux__)
        m.cpu.store(sched_getcpu(), std::memory_order_relaxed);
        if (thread > 0 && start_ >= spread_.load(std::memory_order_relaxed) && shares_core(thread)) move_away(thread);
#endif
    }

    void leave(int thread) {
        if (!watched_) return;
        Member& m = member_[thread];
        m.absent = seconds_now() - start_ - (seconds_on_core() - m.on_core);
    }

    void end() {
        const double now = seconds_now(), spent = now - start_;
        for (int i = 0; watched_ && i < running_; ++i) member_[i].note(spent);
        if (!choice_.end(spent, now)) return;
        for (int i = 0; i < room_; ++i) member_[i].away = Mean();
    }

    static constexpr int SKIPS = 8;         // of so many short forwards one is watched: looking costs half a microsecond
    static constexpr double SHORT = 1e-4;   // seconds
    static constexpr double BRIEF = 3e-4;   // being away no longer than this is waking up
    static constexpr double AWAY = 0.15;    // a thread that is away for more of the time is crowded out

    struct alignas(64) Member {
        double on_core = 0.0, absent = 0.0;
        bool worked = false;  // an OpenMP runtime may give fewer threads than asked for
        std::atomic<int> cpu{-1};
        Mean away;  // part of the time

        void note(double spent) {
            if (!worked) return;
            const double part = absent > BRIEF ? absent / spent : 0.0;
            away.add(part < 1.0 ? part : 1.0, spent, Choice::MEMORY / 3);
            worked = false;
        }
    };

    bool grow(int most) {
        delete[] member_;
        member_ = new (std::nothrow) Member[most];
        room_ = member_ == nullptr ? 0 : most;
        return member_ != nullptr;
    }

    int crowded(int threads) const {
        int out = 0;
        for (int i = 0; i < threads; ++i) out += member_[i].away.value > AWAY;
        return out;
    }

#if defined(__linux__)
    bool shares_core(int thread) const {
        const int cpu = member_[thread].cpu.load(std::memory_order_relaxed);
        for (int i = 0; i < thread; ++i)
            if (member_[i].cpu.load(std::memory_order_relaxed) == cpu) return true;
        return false;
    }

    // Two threads of a crew on one core wait for each other's time slices, and schedulers may leave them there for seconds. One
    // goes to a core without another; it stays free to be moved again, since a fixed core may be someone else's fixed core too.
    void move_away(int thread) {
        cpu_set_t allowed, left, one;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
        left = allowed;
        for (int i = 0; i < running_; ++i) {
            const int cpu = member_[i].cpu.load(std::memory_order_relaxed);
            if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_CLR(cpu, &left);
        }
        int cpu = 0;
        while (cpu < CPU_SETSIZE && !CPU_ISSET(cpu, &left)) ++cpu;
        if (cpu == CPU_SETSIZE) return;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if (sched_setaffinity(0, sizeof one, &one) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
        member_[thread].cpu.store(cpu, std::memory_order_relaxed);
        spread_.store(start_ + Choice::MEMORY, std::memory_order_relaxed);
    }
#endif

    int room_ = 0, running_ = 0, skipped_ = 0;
    bool watched_ = false;
    double start_ = 0.0;
    Choice choice_;
    std::atomic<double> spread_{0.0};  // when threads may be moved again
    Member* member_ = nullptr;
};

}  // namespace outrider
