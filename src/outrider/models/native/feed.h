// Levels of chains of drafts, fed one behind the other: rows of which only the tokens are not known before.
#pragma once

#include "drafts.h"
#include "fed.h"

namespace outrider {

// What a `Feed` calls chains, for a decoder of tokens, which keeps the rows. call: what all levels share. runtime.py mirrors it.
struct TokenChains {
    CallPointers call;
    const int64_t *slot, *length;  // of each sequence; tokens in its cache before the first level
};

// The same for layers that read features; their rows are forgotten. nn/drafts.py mirrors it.
struct DraftChains {
    DraftCall call;
    const int64_t *slot, *cached, *position;  // position: of the node of depth 1
};

// The same for heads that follow one another. nn/sequential.py mirrors it.
struct HeadChains {
    int64_t threads;
};

template <class Made>
inline Status feed_tokens(Made& decoder, const Feed& f) {
    const TokenChains& of = *static_cast<const TokenChains*>(f.chains);
    Buffer<int64_t> numbers;
    if (!numbers.reserve(8 * f.rows)) return NO_MEMORY;
    int64_t *position = numbers + 0, *scored = numbers + f.rows, *segment = numbers + 2 * f.rows;
    for (int64_t j = 0; j < f.rows; ++j) {
        const int64_t i = f.sequence[j];
        position[j] = of.length[i] + f.depth - 1, scored[j] = j;
        for (const int64_t x : {of.slot[i], j, position[j], (int64_t)1, (int64_t)0, (int64_t)0}) *segment++ = x;
    }
    CallPointers call = of.call;
    call.rows = call.scored = call.segments = f.rows;
    call.token = f.token, call.position = position, call.scored_row = scored, call.segment = numbers + 2 * f.rows, call.logits = f.logits;
    return decoder.forward(call);
}

inline Status feed_layers(DraftLayers& layers, const Feed& f) {
    const DraftChains& of = *static_cast<const DraftChains*>(f.chains);
    Buffer<int64_t> numbers;
    if (!numbers.reserve(f.rows * (9 + f.depth))) return NO_MEMORY;
    int64_t *position = numbers + 0, *scored = numbers + f.rows, *skipped = numbers + 2 * f.rows, *segment = numbers + 3 * f.rows;
    for (int64_t j = 0; j < f.rows; ++j) {
        const int64_t i = f.sequence[j];
        position[j] = of.position[i] + f.depth - 1, scored[j] = j, skipped[j] = f.depth - 1;
        for (const int64_t x : {of.slot[i], j, of.cached[i], (int64_t)0, f.depth, (int64_t)0}) *segment++ = x;
        for (int64_t parent = -1; parent < f.depth - 1; ++parent) *segment++ = parent;
    }
    DraftCall call = of.call;
    call.rows = call.scored = call.segments = f.rows;
    call.token = f.token, call.position = position, call.scored_row = scored, call.segment = numbers + 3 * f.rows, call.logits = f.logits;
    call.features = FeatureRows{};
    call.features.skipped = skipped, call.features.feature = f.feature, call.features.out = f.state;
    return layers.forward(call);
}

inline Status feed_heads(DraftSequence& heads, const Feed& f) {
    SequenceCall call{};
    call.rows = f.rows, call.threads = static_cast<const HeadChains*>(f.chains)->threads, call.token = f.token, call.logits = f.logits;
    call.features.feature = f.feature, call.features.out = f.state;
    return heads.forward(call);
}

}  // namespace outrider
