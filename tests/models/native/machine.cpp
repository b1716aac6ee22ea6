// A simulated machine of two cores, and a decoder on one or two of its threads beside neighbours that never sleep.
//
//     machine THREADS NEIGHBOURS TOKENS SEED LEVELS PAUSE
//
// prints the seconds that texts of TOKENS took in all, each after a rest of PAUSE seconds, beside others of NEIGHBOURS each time: a
// digit for each way (0, 1, 2: so many in a group of their own; 3: two, each in a group of its own; 4: one in the decoder's group; 5:
// two there). THREADS: 1 or 2; 0: as Choice chooses; -1: as it chooses without counts; -2: as it chooses for the target and the
// draft model separately. LEVELS: forwards of a draft model before each of the target's; 0: plain decoding.
//
// The scheduler is what matters here of Linux': a core goes to the group that has had least for its weight, and within it to the thread
// that has; a tick of 4 ms ends a slice; a group's weight is split over the cores it runs on; an idle core takes a waiting thread, and
// every 16 ms loads are levelled. A forward ends when every thread has gone through all its phases, as an OpenMP region does.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "choice.h"

namespace {

using namespace outrider;

constexpr double STEP = 5e-6, SLICE = 1.4e-3, SPIN = 6e-3, SPREAD = 0.046;  // seconds
constexpr int TICK = 800, LEVEL = 3200, GROUPS = 4;                       // steps
constexpr double HOST = 0.35e-3, BOTH = 1.7;        // of a step: alone; what two threads are faster than one
constexpr double STEP_TOKENS = 2.5;                 // with drafts

// Of a forward: seconds on one thread, phases.
struct Work {
    double seconds;
    int phases;
};
constexpr Work PLAIN{2.4e-3, 40}, TARGET{3.2e-3, 40}, DRAFT{0.17e-3, 13};

struct Thread {
    int group = 0, core = 0;
    bool runnable = true;
    double share = 0.0, had = 0.0;  // seconds: for the order within a group; in all
};

class Machine {
   public:
    std::vector<Thread> thread{2};
    double now = 0.0;

    Machine() { thread[1].runnable = false, thread[1].core = 1; }

    bool runs(int i) const { return running_[0] == i || running_[1] == i; }
    int runnable() const { return (int)std::count_if(thread.begin(), thread.end(), [](const Thread& t) { return t.runnable; }); }

    void neighbours(const std::vector<int>& groups) {
        thread.resize(2), running_ = {-1, -1};
        for (const int group : groups) {
            Thread t;
            t.group = group, t.core = (int)thread.size() % 2, t.runnable = false;
            thread.push_back(t), wake((int)thread.size() - 1);
        }
        choose(0), choose(1);
    }

    void wake(int i) {
        Thread& t = thread[i];
        if (t.runnable) return;
        place(i, running_[t.core] >= 0 && running_[1 - t.core] < 0 ? 1 - t.core : t.core);
        t.runnable = true;
        if (running_[t.core] < 0 || (next(t.core) == i && now - since_[t.core] > SLICE)) choose(t.core);
    }

    void sleep(int i) {
        thread[i].runnable = false;
        if (running_[thread[i].core] == i) running_[thread[i].core] = -1, choose(thread[i].core);
    }

    void yield(int i) {
        const double others = least_share(i, thread[i].core);
        if (others < 1e300) thread[i].share = std::max(thread[i].share, others + SLICE);
        choose(thread[i].core);
    }

    void advance() {
        now += STEP, ++steps_;
        for (int c = 0; c < 2; ++c) {
            for (int g = 0; g < GROUPS; ++g) load_[c][g] += (count(c, g) - load_[c][g]) * (STEP / SPREAD);
            if (running_[c] < 0) pull(c);
            if (running_[c] < 0) continue;
            Thread& t = thread[running_[c]];
            t.share += STEP, t.had += STEP, group_share_[c][t.group] += STEP / weight(c, t.group);
        }
        for (int c = 0; c < 2; ++c)
            if ((steps_ + c * TICK / 2) % TICK == 0) choose(c);
        if (steps_ % LEVEL == 0) level();
    }

   private:
    bool waits(int i, int core) const { return thread[i].runnable && thread[i].core == core && running_[core] != i; }
    int count(int core, int group) const {
        return (int)std::count_if(thread.begin(), thread.end(), [=](const Thread& t) { return t.runnable && t.core == core && t.group == group; });
    }
    double weight(int core, int group) const {
        const double own = std::max((double)count(core, group), load_[core][group]), all = load_[1 - core][group] + own;
        return all > 0.0 ? std::max(own / all, 0.015) : 1.0;
    }
    double load(int core) const {
        double sum = 0.0;
        for (int g = 0; g < GROUPS; ++g) sum += count(core, g) > 0 ? weight(core, g) : 0.0;
        return sum;
    }

    int next(int core) const {
        int best = -1;
        for (int i = 0; i < (int)thread.size(); ++i) {
            if (!thread[i].runnable || thread[i].core != core) continue;
            const int g = thread[i].group, h = best < 0 ? g : thread[best].group;
            if (best < 0 || (g == h ? thread[i].share < thread[best].share : group_share_[core][g] < group_share_[core][h])) best = i;
        }
        return best;
    }

    void choose(int core) {
        const int i = next(core);
        if (i != running_[core]) running_[core] = i, since_[core] = now;
    }

    double least_share(int but, int core) const {
        double least = 1e300;
        for (int i = 0; i < (int)thread.size(); ++i)
            if (i != but && thread[i].runnable && thread[i].core == core && thread[i].group == thread[but].group)
                least = std::min(least, thread[i].share);
        return least;
    }

    // Who comes is neither ahead of those that are there nor far behind.
    void place(int i, int core) {
        Thread& t = thread[i];
        t.core = core;
        double& own = group_share_[core][t.group];
        double least = 1e300;
        for (int g = 0; g < GROUPS; ++g)
            if (g != t.group && count(core, g) > 0) least = std::min(least, group_share_[core][g]);
        if (count(core, t.group) == 0 && least < 1e300) own = std::clamp(own, least - SLICE, least);
        const double others = least_share(i, core);
        if (others < 1e300) t.share = std::clamp(t.share, others - SLICE, others);
    }

    void pull(int core) {
        for (int i = 0; i < (int)thread.size(); ++i)
            if (waits(i, 1 - core)) {
                place(i, core);
                break;
            }
        choose(core);
    }

    void level() {
        const double gap = std::fabs(load(0) - load(1));
        const int from = load(0) > load(1) ? 0 : 1;
        int found = -1;
        double most = 0.0;
        for (int i = 0; i < (int)thread.size(); ++i) {
            const double each = 1.0 / std::max(1.0, load_[0][thread[i].group] + load_[1][thread[i].group]);
            if (waits(i, from) && each < gap && each > most) found = i, most = each;
        }
        if (found < 0) return;
        place(found, 1 - from);
        if (running_[1 - from] < 0) choose(1 - from);
    }

    std::array<int, 2> running_{-1, -1};
    std::array<double, 2> since_{};
    double group_share_[2][GROUPS] = {}, load_[2][GROUPS] = {};
    long steps_ = 0;
};

// A target or a draft model: its times, and how long its threads were away.
struct Crew {
    Times times;
    Mean away[2];
    uint64_t changes = 0;
    Choice* choice = nullptr;
};

// Thread 0 of the machine does everything; thread 1 helps, and spins for a while after each forward.
class Decoding {
   public:
    Decoding(Machine& machine, int threads, int levels) : m_(machine), threads_(threads), levels_(levels) {
        target_.choice = &choice_[0], draft_.choice = &choice_[threads == -2];
    }

    double text(int tokens) {
        const double start = m_.now;
        for (double done = 0.0; done < tokens; done += levels_ > 0 ? STEP_TOKENS : 1.0) {
            alone(HOST);
            for (int i = 0; i < levels_; ++i) forward(draft_, DRAFT);
            forward(target_, levels_ > 0 ? TARGET : PLAIN);
        }
        return m_.now - start;
    }

    void stop() { m_.sleep(0), m_.sleep(1); }
    void go_on() { m_.wake(0), ended_ = m_.now; }

   private:
    void alone(double seconds) {
        for (const double until = m_.thread[0].had + seconds; m_.thread[0].had < until; m_.advance())
            if (m_.thread[1].runnable && m_.now > ended_ + SPIN) m_.sleep(1);
    }

    void forward(Crew& crew, const Work& work) {
        Choice& choice = *crew.choice;
        if (crew.changes != choice.changes()) crew.changes = choice.changes(), crew.away[0] = crew.away[1] = Mean();
        Forward f = choice.begin(1, crew.times);
        if (threads_ > 0) f.threads = threads_;
        const double start = m_.now, had[] = {m_.thread[0].had, m_.thread[1].had};
        if (f.threads == 1)
            alone(work.seconds);
        else
            together(work);
        if (threads_ <= 0) judge(crew, f, m_.now - start, had);
    }

    void together(const Work& work) {
        ended_ = 1e300, m_.wake(1);
        for (int p = 0; p < work.phases; ++p) phase(work.seconds / work.phases);
        while (!m_.runs(1)) m_.advance();
        while (!m_.runs(0)) m_.advance();
        ended_ = m_.now;
    }

    // A thread that loses its core has a unit; the other does the rest of the phase and waits for it.
    void phase(double left) {
        double waited = 0.0;
        std::array<bool, 2> holds{};
        for (;;) {
            const bool on[] = {m_.runs(0), m_.runs(1)};
            for (int i = 0; i < 2; ++i) holds[i] = on[i] ? left > 0.0 : holds[i];
            left -= STEP * (on[0] && on[1] ? BOTH : on[0] || on[1] ? 1.0 : 0.0);
            for (int i = 0; i < 2; ++i) holds[i] = holds[i] && !(on[i] && left <= 0.0);
            if (left <= 0.0 && !holds[0] && !holds[1] && on[0]) return;
            m_.advance();
            waited = left <= 0.0 ? waited + STEP : 0.0;
            for (int i = 0; i < 2 && waited > 80e-6; ++i)
                if (on[i] && holds[1 - i]) m_.yield(i), waited = 0.0;
        }
    }

    void judge(Crew& crew, const Forward& f, double spent, const double (&had)[2]) {
        bool waited = false;
        for (int i = 0; i < f.threads && f.threads > 1; ++i) {
            const double absent = spent - (m_.thread[i].had - had[i]), part = absent > 3e-4 ? absent / spent : 0.0;
            crew.away[i].add(std::min(part, 1.0), spent, Choice::MEMORY / 3), waited |= part > 0.0;
        }
        if (f.threads > 1) team_ = m_.now;
        const bool largest = f.threads > 1 || m_.now - team_ > 0.02, counts = threads_ != -1 && largest;
        if (counts && crew.choice->asks(waited, m_.now)) crew.choice->count(room_beside(m_.runnable(), f.threads, 2, 2), m_.now);
        const auto crowded = [&](int n, double part) { return (int)std::count_if(crew.away, crew.away + n, [=](const Mean& m) { return m.value > part; }); };
        crew.choice->end(f, crew.times, spent, m_.now, crowded);
    }

    Machine& m_;
    const int threads_, levels_;
    double ended_ = 0.0;  // the last forward: thread 1 spins since
    double team_ = -1.0;  // the last forward on two threads
    Choice choice_[2] = {Choice(2), Choice(2)};
    Crew target_, draft_;
};

}  // namespace

int main(int, char** arguments) {
    static const std::vector<int> WAYS[] = {{}, {1}, {1, 1}, {1, 2}, {0}, {0, 0}};
    const int way = std::atoi(arguments[2]), tokens = std::atoi(arguments[3]);
    std::mt19937 dice((unsigned)std::atoi(arguments[4]));
    const unsigned rest = (unsigned)(std::atof(arguments[6]) / STEP);
    Machine machine;
    Decoding decoding(machine, std::atoi(arguments[1]), std::atoi(arguments[5]));
    double seconds = 0.0;
    for (int i = 0; i < 6; ++i)
        for (const bool counts : {false, true}) {
            machine.neighbours(WAYS[counts ? way : (int)(dice() % 6)]);
            decoding.stop();
            for (unsigned pause = rest + dice() % 4000; pause > 0; --pause) machine.advance();
            decoding.go_on();
            decoding.text(16);
            seconds += counts ? decoding.text(tokens) : 0.0 * decoding.text(tokens);
        }
    std::printf("%.4f\n", seconds);
}
