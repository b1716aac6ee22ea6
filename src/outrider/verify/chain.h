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
};

inline int feed(const Chains& c, const Level& before, const Level& level) {
    for (int64_t j = 0; j < level.rows; ++j) {
        const int64_t token = before.token[level.from[j]];
        level.fed[j] = token < c.vocab ? token : 0;  // a draft that has ended goes on unseen
        if (level.above) std::memcpy(level.feature + j * c.hidden, level.above + level.from[j] * c.hidden, c.hidden * sizeof(float));
    }
    return c.forward(c.handle, level.call);
}

inline int grow(const Chains& c) {
    float* probs = c.probs;
    for (int64_t l = 0; l < c.levels; ++l) {
        const Level& level = c.level[l];
        if (level.call)
            if (const int status = feed(c, c.level[l - 1], level)) return status;
        for (int64_t j = 0; j < level.rows; ++j) {
            const int64_t i = level.sequence[j];
            const float* x = level.logits + level.at[j] * c.vocab;
            level.total[j] = 1.0;
            if (c.temperature[i] > 0.0f) {
                const double u = noise::uniform(c.seed[i], noise::DRAFT, c.position[i], l + 1);
                rows::soften(x, c.vocab, c.temperature[i], probs);
                picks::draw(probs, c.vocab, &u, 1, true, level.token + j, level.total + j);
                probs += c.vocab;
            } else {
                const float most = rows::peak(x, c.vocab);
                level.token[j] = most > -std::numeric_limits<float>::infinity() ? rows::place(x, c.vocab, most) : c.vocab;
            }
        }
    }
    return 0;
}

}  // namespace chain
