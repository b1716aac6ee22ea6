// The threads of a decoder's forwards: how many, and on which cores.
//
// Other processes may want the same cores. A thread that has lost its core in the middle of a unit is waited for until the
// scheduler brings it back, for milliseconds, so fewer threads may be faster. A crew notices how long each thread was without a
// core and counts how many cores others leave, and a Choice, which all crews of the process share, chooses by both. Only speed
// depends on what is chosen here, never a bit of a result.
#pragma once

#include <time.h>

#include <chrono>
#include <mutex>
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

// What the crews of a process share: choices, and who ran last.
class Crews {
   public:
    static Crews& all() {
        static Crews crews;
        return crews;
    }

    // The choice for forwards on `most` threads at most. A process has few such numbers: further ones take turns.
    Choice& of(int most) {
        for (int i = 0; i < KINDS; ++i)
            if (most_[i] == most) return choice_[i];
        const int i = next_++ % KINDS;
        most_[i] = most;
        return choice_[i] = Choice(most);
    }

    // A crew's threads have ended a forward. Their runtime lets them spin for some milliseconds: they are runnable for that long.
    void ran(int threads, double now) {
        if (threads > 1 && largest(threads, now)) team_ = threads, ran_ = now;
    }
    bool largest(int threads, double now) const { return threads >= team_ || now - ran_ > REST; }

    std::mutex turn;  // for whoever calls any of these, or a choice

   private:
    static constexpr int KINDS = 4;
    static constexpr double REST = 0.02;  // seconds
    int most_[KINDS] = {}, team_ = 1;
    unsigned next_ = 0;
    double ran_ = 0.0;
    Choice choice_[KINDS];
};

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
        start_ = seconds_now(), most_ = most;
        {
            Crews& crews = Crews::all();
            const std::lock_guard<std::mutex> turn(crews.turn);
            Choice& choice = crews.of(most);
            if (choice.changes() != changes_) forget(choice.changes());
            forward_ = choice.begin(rows, times_);
        }
        const double usual = times_.usual[forward_.bucket].value;
        watched_ = forward_.threads > 1 && (usual == 0.0 || usual > SHORT || ++skipped_ >= SKIPS);
        if (watched_) skipped_ = 0;
        return forward_.threads;
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
        const int threads = forward_.threads;
        bool waited = false;
        for (int i = 0; watched_ && i < threads; ++i) waited |= member_[i].note(spent);
        Crews& crews = Crews::all();
        const std::lock_guard<std::mutex> turn(crews.turn);
        Choice& choice = crews.of(most_);
        crews.ran(threads, now);
        if (choice.asks(waited, now) && crews.largest(threads, now)) choice.count(room_now(threads, most_), now);
        choice.end(forward_, times_, spent, now, [this](int n, double part) { return crowded(n, part); });
    }

    // Who was crowded out by others may not be on other numbers of threads.
    void forget(uint64_t changes) {
        changes_ = changes;
        for (int i = 0; i < room_; ++i) member_[i].away = Mean();
    }

    static constexpr int SKIPS = 8;         // of so many short forwards one is watched: looking costs half a microsecond
    static constexpr double SHORT = 1e-4;   // seconds
    static constexpr double BRIEF = 3e-4;   // being away no longer than this is waking up

    struct alignas(64) Member {
        double on_core = 0.0, absent = 0.0;
        bool worked = false;  // an OpenMP runtime may give fewer threads than asked for
        std::atomic<int> cpu{-1};
        Mean away;  // part of the time

        // Whether it was away.
        bool note(double spent) {
            if (!worked) return false;
            const double part = absent > BRIEF ? absent / spent : 0.0;
            away.add(part < 1.0 ? part : 1.0, spent, Choice::MEMORY / 3);
            worked = false;
            return part > 0.0;
        }
    };

    bool grow(int most) {
        delete[] member_;
        member_ = new (std::nothrow) Member[most];
        room_ = member_ == nullptr ? 0 : most;
        return member_ != nullptr;
    }

    // Of `threads`, how many were away for more than that part of the time.
    int crowded(int threads, double part) const {
        int out = 0;
        for (int i = 0; i < threads; ++i) out += member_[i].away.value > part;
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
        for (int i = 0; i < forward_.threads; ++i) {
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

    int room_ = 0, most_ = 0, skipped_ = 0;
    bool watched_ = false;
    double start_ = 0.0;
    uint64_t changes_ = 0;
    Forward forward_;
    Times times_;
    std::atomic<double> spread_{0.0};  // when threads may be moved again
    Member* member_ = nullptr;
};

}  // namespace outrider
