// Chains of drafts, all levels in one call: a level's logits become tokens, the forward of these gives the next level's logits.
// Plain twin: `Levels` of drafters/tree/growth.py, level by level.
#pragma once

#include <vector>

#include "fed.h"
#include "noise.h"
#include "picks.h"
#include "rows.h"

namespace chain {

using outrider::Feed;

constexpr double ENDED = -1.0;

// Chains that end where a further token is not expected to pay. Plain twin: `ByGain` of drafters/tree/gain.py, and `Belief` of chances.py.
struct Stops {
    double usual, least;  // acceptance of a token whose distribution is not there yet; tokens that a further one must bring
    const double* base;   // of each sequence, as `odds`: what is believed of its acceptance
    const double* odds;
    double* chance;       // of each sequence, 1 at first: that its path is accepted; ENDED: it gets no further token
};

// Rows stand level by level; a level has one of every sequence with so many levels. drafters/tree/chain.py mirrors it field by field.
struct Chains {
    int64_t sequences, vocab, hidden;
    const int64_t* depth;       // [sequences] levels of each
    const float* first;         // [sequences, vocab] logits of the first level
    float* further;             // of the rows of all others; without a forward they are there, each level for all sequences
    int (*forward)(void*, const Feed*);  // null: all logits are there
    void* handle;
    const void* chains;         // see `Feed`
    const float* const* state;  // [sequences] of the anchors; null: the forward reads no features
    const uint64_t* seed;       // of each sequence
    const int64_t* position;    // of its anchor
    const float* temperature;   // 0: its most likely tokens
    float* probs;               // out: the distributions that were drawn from
    const Stops* stops;         // null: all levels are made
    int64_t* token;             // [rows] out; the vocabulary's size where a row gives none
    double* total;              // [rows] out: the sum of the distribution that was drawn from, 1 for a most likely token
    double* gain;               // [rows] out, where chains stop: the chance that was put on its token; ENDED if its chain had ended
    int64_t* made;              // out: levels that were made
};

class Growth {
   public:
    explicit Growth(const Chains& c)
        : c_(c), probs_(c.probs), sequence_(c.sequences), at_(c.sequences), token_(c.sequences), feature_(c.state ? c.sequences * c.hidden : 0),
          state_(feature_.size()) {}

    int run() {
        for (; next(); ++level_) {
            if (level_ > 0 && c_.forward)
                if (const int status = feed()) return status;
            for (int64_t j = 0; j < rows_; ++j) pick(j);
            *c_.made = level_ + 1;
        }
        return 0;
    }

   private:
    // The rows of this level; false: there are none, or none of a chain that goes on.
    bool next() {
        before_ = first_, first_ += rows_, rows_ = 0;
        bool goes_on = false;
        for (int64_t i = 0; i < c_.sequences; ++i) {
            if (c_.depth[i] <= level_) continue;
            sequence_[rows_++] = i;
            goes_on |= !c_.stops || c_.stops->chance[i] != ENDED;
        }
        return goes_on;
    }

    int feed() {
        for (int64_t j = 0; j < rows_; ++j) {
            const int64_t i = sequence_[j], token = c_.token[at_[i]];
            token_[j] = token < c_.vocab ? token : 0;  // a draft that has ended goes on unseen
            if (!c_.state) continue;
            const float* above = level_ == 1 ? c_.state[i] : state_.data() + (at_[i] - before_) * c_.hidden;
            std::memcpy(feature_.data() + j * c_.hidden, above, c_.hidden * sizeof(float));
        }
        float* const logits = c_.further + (first_ - c_.sequences) * c_.vocab;
        const Feed level{c_.chains, level_, rows_, sequence_.data(), token_.data(), logits, feature_.data(), state_.data()};
        return c_.forward(c_.handle, &level);
    }

    const float* logits_of(int64_t j) const {
        if (level_ == 0) return c_.first + sequence_[j] * c_.vocab;
        return c_.further + (c_.forward ? first_ - c_.sequences + j : (level_ - 1) * c_.sequences + sequence_[j]) * c_.vocab;
    }

    // The token of row j, and the distribution it was drawn from.
    void pick(int64_t j) {
        const int64_t i = sequence_[j], at = at_[i] = first_ + j;
        const float* x = logits_of(j);
        const bool drawn = c_.temperature[i] > 0.0f;
        c_.total[at] = 1.0, c_.token[at] = c_.vocab;
        if (c_.stops) {
            c_.gain[at] = ENDED;
            if (c_.stops->chance[i] == ENDED) return;
        }
        float* own = probs_;
        if (drawn) rows::soften(x, c_.vocab, c_.temperature[i], own), probs_ += c_.vocab;
        if (c_.stops) {
            c_.gain[at] = acceptance(i, x, drawn ? own : nullptr);
            if (!wanted(i, c_.gain[at])) return void(c_.stops->chance[i] = ENDED);
        }
        if (drawn) {
            const double u = noise::uniform(c_.seed[i], noise::DRAFT, c_.position[i], level_ + 1);
            picks::draw(own, c_.vocab, &u, 1, true, c_.token + at, c_.total + at);
        } else {
            const float most = rows::peak(x, c_.vocab);
            if (most > -std::numeric_limits<float>::infinity()) c_.token[at] = rows::place(x, c_.vocab, most);
        }
        if (!c_.stops) return;
        if (c_.token[at] < c_.vocab) count(i, c_.gain[at]);
        else c_.stops->chance[i] = ENDED;
    }

    // The chance that a row's token is accepted. drawn: the distribution it is drawn from, null: the logits x whose largest is taken.
    double acceptance(int64_t i, const float* x, const float* drawn) const {
        const Stops& stops = *c_.stops;
        if (drawn) return stops.base[i] + (1.0 - stops.base[i]) * std::min(rows::squares(drawn, c_.vocab), 1.0);
        const double share = rows::share(x, c_.vocab);
        if (!(0.0 < share && share < 1.0)) return share >= 1.0 ? 1.0 : 0.0;
        return 1.0 / (1.0 + (1.0 - share) / share * stops.odds[i]);
    }

    // Whether the next token of sequence i, of this chance if those above it are accepted, is in the draft: decided before it is drawn.
    bool wanted(int64_t i, double gain) const {
        const bool there = level_ > 0 && !c_.forward;  // a token whose distribution cost no pass saves a row at most
        return c_.stops->chance[i] * gain > (there ? c_.stops->least : 0.0);
    }

    // Counts the token of sequence i, and ends its chain where the one behind it would not pay.
    void count(int64_t i, double gain) const {
        double& chance = c_.stops->chance[i];
        chance *= gain;
        const bool first = level_ == 0 && !c_.forward;  // the second token's chance is seen before it is left out
        if (!(chance * c_.stops->usual > (first ? 0.0 : c_.stops->least))) chance = ENDED;
    }

    const Chains& c_;
    int64_t level_ = 0, rows_ = 0, first_ = 0, before_ = 0;  // rows of this level; those before it, and before the level above it
    float* probs_;
    std::vector<int64_t> sequence_, at_, token_;  // of each row; of each sequence its newest row; of each row what it is fed
    std::vector<float> feature_, state_;
};

}  // namespace chain
