// Chains of drafts, all levels in one call: a level's logits become tokens, the forward of these gives the next level's logits.
// Plain twin: `Levels` of drafters/tree/growth.py, level by level.
#pragma once

#include <vector>

#include "noise.h"
#include "picks.h"
#include "rows.h"

namespace chain {

// One level. drafters/tree/chain.py mirrors these structs field by field.
struct Level {
    int64_t rows;
    const int64_t* sequence;  // [rows] whose token is drawn
    const int64_t* from;      // [rows] its row in the level before
    const float* logits;      // the rows `at` of them are read; written by the forward, if there is one
    const int64_t* at;        // [rows]
    int64_t* token;           // [rows] out; the vocabulary's size where a row gives none
    double* total;            // [rows] out: the sum of the distribution that was drawn from, 1 for a most likely token
    const void* call;         // the forward, null: the logits are there
    int64_t* fed;             // [rows] where that forward reads its tokens
    const float* above;       // the features of the level before; null: it reads none
    float* feature;           // [rows, hidden] where it reads them
    double* gain;             // [rows] out, where chains stop: the chance that was put on its token; ENDED if its chain had ended
};

constexpr double ENDED = -1.0;

// Chains that end where a further token is not expected to pay. Plain twin: `ByGain` of drafters/tree/gain.py, and `Belief` of chances.py.
struct Stops {
    double usual, least;  // acceptance of a token whose distribution is not there yet; tokens that a further one must bring
    const double* base;   // of each sequence, as `odds`: what is believed of its acceptance
    const double* odds;
    double* chance;       // of each sequence, 1 at first: that its path is accepted; ENDED: it gets no further token
};

struct Chains {
    int64_t levels, vocab, hidden;
    int (*forward)(void*, const void*);
    void* handle;
    const uint64_t* seed;      // of each sequence
    const int64_t* position;   // of its anchor
    const float* temperature;  // 0: its most likely tokens
    float* probs;              // out: the distributions that were drawn from, level by level
    const Level* level;
    const Stops* stops;        // null: all levels are made
    int64_t* made;             // out: levels that were made
};

inline int feed(const Chains& c, const Level& before, const Level& level) {
    for (int64_t j = 0; j < level.rows; ++j) {
        const int64_t token = before.token[level.from[j]];
        level.fed[j] = token < c.vocab ? token : 0;  // a draft that has ended goes on unseen
        if (level.above) std::memcpy(level.feature + j * c.hidden, level.above + level.from[j] * c.hidden, c.hidden * sizeof(float));
    }
    return c.forward(c.handle, level.call);
}

// The chance that a row's token is accepted. drawn: the distribution it is drawn from, null: the logits x whose largest is taken.
inline double acceptance(const Stops& stops, int64_t i, const float* x, const float* drawn, int64_t vocab) {
    if (drawn) return stops.base[i] + (1.0 - stops.base[i]) * std::min(rows::squares(drawn, vocab), 1.0);
    const double share = rows::share(x, vocab);
    if (!(0.0 < share && share < 1.0)) return share >= 1.0 ? 1.0 : 0.0;
    return 1.0 / (1.0 + (1.0 - share) / share * stops.odds[i]);
}

// Whether the next token of sequence i, of this chance if those above it are accepted, is in the draft: decided before it is drawn.
inline bool wanted(const Chains& c, int64_t l, int64_t i, double gain) {
    const bool there = l > 0 && !c.level[l].call;  // a token whose distribution cost no pass saves a row at most
    return c.stops->chance[i] * gain > (there ? c.stops->least : 0.0);
}

// Counts the token of sequence i, and ends its chain where the one behind it would not pay.
inline void count(const Chains& c, int64_t l, int64_t i, double gain) {
    double& chance = c.stops->chance[i];
    chance *= gain;
    const bool first = l == 0 && c.levels > 1 && !c.level[1].call;  // the second token's chance is seen before it is left out
    if (!(chance * c.stops->usual > (first ? 0.0 : c.stops->least))) chance = ENDED;
}

// Whether any row of this level belongs to a chain that goes on.
inline bool goes_on(const Chains& c, const Level& level) {
    if (!c.stops) return true;
    for (int64_t j = 0; j < level.rows; ++j)
        if (c.stops->chance[level.sequence[j]] != ENDED) return true;
    return false;
}

// Row j of level l: its token, and the distribution it was drawn from to `probs`, which moves on.
inline void pick(const Chains& c, int64_t l, int64_t j, float*& probs) {
    const Level& level = c.level[l];
    const int64_t i = level.sequence[j];
    const float* x = level.logits + level.at[j] * c.vocab;
    const bool drawn = c.temperature[i] > 0.0f;
    level.total[j] = 1.0, level.token[j] = c.vocab;
    if (c.stops) {
        level.gain[j] = ENDED;
        if (c.stops->chance[i] == ENDED) return;
    }
    float* own = probs;
    if (drawn) rows::soften(x, c.vocab, c.temperature[i], own), probs += c.vocab;
    if (c.stops) {
        level.gain[j] = acceptance(*c.stops, i, x, drawn ? own : nullptr, c.vocab);
        if (!wanted(c, l, i, level.gain[j])) return void(c.stops->chance[i] = ENDED);
    }
    if (drawn) {
        const double u = noise::uniform(c.seed[i], noise::DRAFT, c.position[i], l + 1);
        picks::draw(own, c.vocab, &u, 1, true, level.token + j, level.total + j);
    } else {
        const float most = rows::peak(x, c.vocab);
        if (most > -std::numeric_limits<float>::infinity()) level.token[j] = rows::place(x, c.vocab, most);
    }
    if (!c.stops) return;
    if (level.token[j] < c.vocab) count(c, l, i, level.gain[j]);
    else c.stops->chance[i] = ENDED;
}

inline int grow(const Chains& c) {
    float* probs = c.probs;
    for (int64_t l = 0; l < c.levels && goes_on(c, c.level[l]); ++l) {
        const Level& level = c.level[l];
        if (level.call)
            if (const int status = feed(c, c.level[l - 1], level)) return status;
        for (int64_t j = 0; j < level.rows; ++j) pick(c, l, j, probs);
        *c.made = l + 1;
    }
    return 0;
}

}  // namespace chain
