// How many threads forwards run on, chosen by what they took. Clocks are the caller's: nothing here looks at the time.
#pragma once

#include <cstdint>

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

// Where threads are crowded out by other processes, a smaller crew is tried for some forwards and kept if it was faster; the
// whole one is tried again from time to time. Where none is, nothing is tried: on cores of its own a decoder loses nothing.
class Choice {
   public:
    Choice() = default;

    // Threads for a forward of `rows` rows that begins at `now` (seconds), `most` at most. `crowded(n)` of n threads are.
    template <class Crowded>
    int begin(int most, int64_t rows, double now, const Crowded& crowded) {
        if (most != most_) *this = Choice(most);
        bucket_ = bucket(rows);
        if (!trying_ && now >= next_) plan(size_ > 1 ? crowded(size_) : 0);
        return trying_ ? other_ : size_;
    }

    // The forward has taken `spent` seconds and ended at `now`. Whether the size has changed: who was crowded may not be now.
    bool end(double spent, double now) {
        if (most_ == 1) return false;
        (trying_ ? tried_ : usual_)[bucket_].add(spent, spent, MEMORY);
        if (!trying_) return false;
        trial_ += spent, ++forwards_;
        if (usual_[bucket_].known) compared_ += spent, expected_ += usual_[bucket_].value;
        const bool hopeless = compared_ > 1.5 * expected_ + SLICE;
        return (hopeless || (trial_ >= TRIAL && forwards_ >= FORWARDS)) && judge(now);
    }

    // What a forward like the one begun usually takes, in seconds; 0: not known.
    double usual() const { return usual_[bucket_].value; }

    static constexpr double MEMORY = 0.1;  // seconds of forwards that means are taken over

   private:
    static constexpr int BUCKETS = 64;
    static constexpr double SLICE = 4e-3;   // about what a scheduler gives to one thread before the next
    static constexpr double TRIAL = 6 * SLICE;
    static constexpr int FORWARDS = 3;      // that a trial has at least, unless it is hopeless
    static constexpr double FASTER = 0.95;  // what a trial must take of the usual time to be followed
    static constexpr double FIRST_PAUSE = 0.06, LAST_PAUSE = 1.0;  // seconds between trials
    static constexpr double PRICE = 0.03;   // part of the time that trials may cost: longer pauses where they cost more

    explicit Choice(int most) : most_(most), size_(most) {}

    // One for each number of rows up to 16, then one for each doubling: forwards of a bucket take about the same time.
    static int bucket(int64_t rows) {
        int at = (int)(rows < 16 ? rows : 16);
        for (int64_t top = 16; top < rows; top *= 2) ++at;
        return at < BUCKETS ? at : BUCKETS - 1;
    }

    void plan(int crowded) {
        const bool down = crowded > 0 && size_ > 1, up = size_ < most_;
        if (!down && !up) return;
        other_ = down && !(up && was_down_) ? (size_ > crowded ? size_ - crowded : 1) : most_;
        was_down_ = other_ < size_;
        trying_ = true, trial_ = compared_ = expected_ = 0.0, forwards_ = 0;
        for (Mean& m : tried_) m = Mean();
    }

    // Ends a trial. Pauses double with each failure. A larger crew that had to be given up again counts as one: its first
    // milliseconds flatter it, since threads that have slept are served first.
    bool judge(double now) {
        trying_ = false;
        const bool better = compared_ < FASTER * expected_, up = other_ > size_;
        if (better) {
            size_ = other_;
            for (int i = 0; i < BUCKETS; ++i) usual_[i] = tried_[i];
            if (up && now - changed_ > 8 * LAST_PAUSE) up_pause_ = FIRST_PAUSE;
            down_pause_ = FIRST_PAUSE, changed_ = now;
        }
        double& pause = up ? up_pause_ : down_pause_;
        if (better != up) pause = 2 * pause < LAST_PAUSE ? 2 * pause : LAST_PAUSE;
        const double cost = better ? 0.0 : (compared_ - expected_) / PRICE;
        const double wait = size_ < most_ ? up_pause_ : down_pause_;
        next_ = now + (cost > wait ? cost : wait);
        return better;
    }

    int most_ = 0, size_ = 0, other_ = 0, bucket_ = 0, forwards_ = 0;
    bool trying_ = false, was_down_ = false;
    double next_ = 0.0, changed_ = 0.0, down_pause_ = FIRST_PAUSE, up_pause_ = FIRST_PAUSE;
    double trial_ = 0.0, compared_ = 0.0, expected_ = 0.0;
    Mean usual_[BUCKETS], tried_[BUCKETS];
};

}  // namespace outrider
