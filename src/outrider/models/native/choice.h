// How many threads the forwards of a process run on, chosen by what they took and by the cores that others leave. Clocks are the
// caller's: nothing here looks at the time.
#pragma once

#include <cstdint>

#include "others.h"

namespace outrider {

// A mean over the last `window` seconds of what is added.
struct Mean {
    double value = 0.0;
    bool known = false;
    void add(double x, double seconds, double window) {
        value = known ? value + (x - value) * (seconds < window ? seconds / window : 1.0) : x;
        known = true;
    }
};

// The last counts of the cores that others leave: what all of them say.
class Counts {
   public:
    void add(const Room& room, double now) {
        if (now - last_ > FRESH) known_ = 0;
        room_[at_] = room, at_ = (at_ + 1) % WANTED, last_ = now;
        if (known_ < WANTED) ++known_;
    }
    void forget() { known_ = 0; }
    bool due(double now) const { return now - last_ >= APART; }

    // Whether there were as many cores as that in all of them, or in none.
    bool surely(int threads) const { return agree([=](const Room& r) { return r.least >= threads; }); }
    bool hardly(int threads) const { return agree([=](const Room& r) { return r.most < threads; }); }
    // Cores that there were at most in the last one.
    int most() const { return room_[(at_ + WANTED - 1) % WANTED].most; }

   private:
    static constexpr int WANTED = 3;
    static constexpr double APART = 2e-3;  // seconds between counts
    static constexpr double FRESH = 2.0;   // that older ones are forgotten after

    template <class Says>
    bool agree(const Says& says) const {
        for (int i = 0; i < WANTED; ++i)
            if (known_ < WANTED || !says(room_[i])) return false;
        return true;
    }

    Room room_[WANTED];
    int at_ = 0, known_ = 0;
    double last_ = -1.0;
};

// What forwards of one decoder take, by their number of rows: usually, and in a trial.
struct Times {
    static constexpr int BUCKETS = 64;
    Mean usual[BUCKETS], tried[BUCKETS];
    uint64_t size = 0, trial = 0;  // which size and which trial they are of
};

// A forward that has begun.
struct Forward {
    int threads = 1, bucket = 0;
    bool tried = false;
    uint64_t size = 0, trial = 0;
};

// Where threads are crowded out by other processes, fewer are chosen: at once where the count of runnable threads leaves no core
// for them, otherwise if some forwards on fewer were faster. All are taken again at once where the count leaves cores for all;
// otherwise they are tried from time to time. Where no thread is crowded out, nothing is tried or counted: on cores of its own a
// decoder loses nothing.
//
// One choice holds for all decoders that take turns, a target and its draft model: a thread that helps one of them is there, awake
// and in need of a core, while the other runs, so what it costs and gains shows in the forwards of both alone.
class Choice {
   public:
    Choice() = default;
    explicit Choice(int most) : most_(most), size_(most) {}

    // A forward of `rows` rows of the decoder with these times.
    Forward begin(int64_t rows, Times& times) const {
        const bool changed = times.size != changes_, begun = trying_ && times.trial != trials_;
        const bool follows = changed && followed_ && times.size + 1 == changes_ && times.trial == trials_;
        for (int i = 0; changed && i < Times::BUCKETS; ++i) times.usual[i] = follows ? times.tried[i] : Mean();
        for (int i = 0; begun && i < Times::BUCKETS; ++i) times.tried[i] = Mean();
        if (begun) times.trial = trials_;
        times.size = changes_;
        return {trying_ ? other_ : size_, bucket(rows), trying_, changes_, trials_};
    }

    // Whether a forward should end with a count. crowded: some thread of it was left waiting.
    bool asks(bool crowded, double now) const { return most_ > 1 && (size_ < most_ || crowded) && counts_.due(now); }
    void count(const Room& room, double now) { counts_.add(room, now); }

    // A forward has taken `spent` seconds and ended at `now`. Of n threads `crowded(n, part)` were without a core for more than
    // that part of the time. Whether the size has changed: who was crowded may not be now.
    template <class Crowded>
    bool end(const Forward& f, Times& times, double spent, double now, const Crowded& crowded) {
        if (most_ == 1 || f.size != changes_ || f.tried != trying_ || f.trial != trials_) return false;
        (trying_ ? times.tried : times.usual)[f.bucket].add(spent, spent, MEMORY);
        worked_ += spent;
        if (trying_) {
            const Mean& usual = times.usual[f.bucket];
            trial_ += spent, ++forwards_;
            if (usual.known) compared_ += spent, expected_ += usual.value;
            const bool hopeless = compared_ > 1.5 * expected_ + SLICE;
            return (hopeless || (trial_ >= (against_ ? 4 * TRIAL : TRIAL) && forwards_ >= FORWARDS)) && judge(now);
        }
        if (size_ < most_ && counts_.surely(most_) && now >= rise_) return rise(now);
        if (size_ > 1 && counts_.hardly(size_) && now >= doubted_ && crowded(size_, 2 * AWAY) > 0) return fall(counts_.most(), now);
        if (worked_ >= next_) plan(size_ > 1 ? crowded(size_, AWAY) : 0);
        return false;
    }

    uint64_t changes() const { return changes_; }

    static constexpr double MEMORY = 0.1;  // seconds of forwards that means are taken over

   private:
    static constexpr double SLICE = 4e-3;   // about what a scheduler gives to one thread before the next
    static constexpr double TRIAL = 6 * SLICE;
    static constexpr double AWAY = 0.15;    // a thread that is away for more of the time is crowded out
    static constexpr int FORWARDS = 3;      // that a trial has at least, unless it is hopeless
    static constexpr double FASTER = 0.95;  // what a trial must take of the usual time to be followed
    static constexpr double FIRST_PAUSE = 0.06, LAST_PAUSE = 1.0;  // seconds of forwards between trials
    static constexpr double LASTING = 8 * LAST_PAUSE;  // a change that lasts so long was right
    static constexpr double PRICE = 0.03;   // part of the time that trials may cost: longer pauses where they cost more
    static constexpr double PRICE_AGAINST = 0.005;  // the same where the count leaves no core: neighbours may be of low priority

    // One for each number of rows up to 16, then one for each doubling: forwards of a bucket take about the same time.
    static int bucket(int64_t rows) {
        int at = (int)(rows < 16 ? rows : 16);
        for (int64_t top = 16; top < rows; top *= 2) ++at;
        return at < Times::BUCKETS ? at : Times::BUCKETS - 1;
    }

    // All threads, without a trial.
    bool rise(double now) {
        if (now - rose_ > LASTING) rise_pause_ = FIRST_PAUSE;
        rose_ = now;
        return change(most_, now);
    }

    // Fewer threads, without a trial: there are cores left for so many.
    bool fall(int left, double now) {
        if (size_ <= left) return false;
        if (next_ < worked_ + LAST_PAUSE) next_ = worked_ + LAST_PAUSE;
        return change(left, now);
    }

    bool change(int size, double now) {
        size_ = size, changed_ = now, ++changes_, followed_ = false;
        counts_.forget();
        return true;
    }

    // The count left cores for all, and they were crowded out without its saying so: it does not see everything.
    void misled(double now) {
        rise_ = now + rise_pause_;
        rise_pause_ = 2 * rise_pause_ < LASTING ? 2 * rise_pause_ : LASTING;
    }

    void plan(int crowded) {
        const bool down = crowded > 0 && size_ > 1, up = size_ < most_;
        if (!down && !up) return;
        other_ = down && !(up && was_down_) ? (size_ > crowded ? size_ - crowded : 1) : most_;
        was_down_ = other_ < size_;
        trying_ = true, trial_ = compared_ = expected_ = 0.0, forwards_ = 0, ++trials_;
        against_ = other_ > size_ && counts_.hardly(other_);
    }

    // Ends a trial. Pauses double with each failure. A larger crew that had to be given up again counts as one: its first
    // milliseconds flatter it, since threads that have slept are served first.
    bool judge(double now) {
        trying_ = false;
        const bool better = compared_ < FASTER * expected_, up = other_ > size_;
        if (better) {
            if (up && now - changed_ > LASTING) up_pause_ = FIRST_PAUSE;
            down_pause_ = FIRST_PAUSE;
            doubted_ = against_ ? now + LASTING : now;
            if (!up && now - rose_ < LASTING && !counts_.hardly(size_)) misled(now);
            change(other_, now);
            followed_ = true;
        }
        double& pause = up ? up_pause_ : down_pause_;
        if (better != up) pause = 2 * pause < LAST_PAUSE ? 2 * pause : LAST_PAUSE;
        const double cost = better ? 0.0 : (compared_ - expected_) / (against_ ? PRICE_AGAINST : PRICE);
        const double wait = size_ < most_ ? up_pause_ : down_pause_;
        next_ = worked_ + (cost > wait ? cost : wait);
        return better;
    }

    int most_ = 0, size_ = 0, other_ = 0, forwards_ = 0;
    uint64_t changes_ = 1, trials_ = 0;
    bool trying_ = false, was_down_ = false, followed_ = false;  // followed: the last change was to what had been tried
    bool against_ = false;  // what is tried, the count
    double changed_ = 0.0, rose_ = -LASTING, rise_ = 0.0, rise_pause_ = FIRST_PAUSE;  // of threads taken again without a trial
    double doubted_ = 0.0;  // until when the count is not believed: a trial has contradicted it
    double worked_ = 0.0;  // seconds of forwards: a decoder that rests does not try more than one that works
    double next_ = 0.0, down_pause_ = FIRST_PAUSE, up_pause_ = FIRST_PAUSE;
    double trial_ = 0.0, compared_ = 0.0, expected_ = 0.0;
    Counts counts_;
};

}  // namespace outrider
