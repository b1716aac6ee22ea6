// What compiled chains hand to a compiled forward: two libraries read it (verify/chain.h, models/native/feed.h).
#pragma once

#include <cstdint>

namespace outrider {

// A level that is to be fed.
struct Feed {
    const void* chains;       // what all levels share, as the forward reads it
    int64_t depth, rows;      // depth: of its nodes, 1 for the first
    const int64_t* sequence;  // [rows] whose nodes they are, ascending
    const int64_t* token;     // [rows]
    float* logits;            // [rows, vocab] out
    const float* feature;     // [rows, hidden] the states of their parents; null: it reads none
    float* state;             // [rows, hidden] out, where it reads features
};

}  // namespace outrider
