// What crosses from Python (runtime.py mirrors these structs field by field) and how it is looked at here.
#pragma once

#include <cstdint>

namespace outrider {

class Linear;

struct LayerPointers {
    const float *norm1, *qkv_bias, *q_norm, *k_norm, *o_bias, *norm2, *post1, *post2;  // null where there is none
    const Linear *qkv, *o, *gate_up, *down;
    int64_t window;    // 0: none
    int64_t turn;      // whose frequencies turn its heads: 0, 1, or -1: nobody's
    int64_t row_norm;  // 1: q_norm and k_norm are of all heads of a row together
};

struct ModelPointers {
    int64_t vocab, hidden, layers, heads, kv_heads, head_dim, inner;
    int64_t half;  // 1: the cache and the taps are bf16, 0: float32
    int64_t turned, frequencies;  // pairs of a head that are turned; tables of their frequencies
    int64_t gelu;  // 1: the activation is GELU by tanh, 0: SiLU
    double eps, rope_scale, attention_scale, attention_cap, embed_scale, residual_scale, logit_scale, logit_cap;  // caps: 0 for none
    const float* inv_freq;  // [frequencies, turned]
    const float* norm;
    const Linear *embedding, *head;
    const LayerPointers* layer;
};

// What crosses for a linear: `n` outputs of one type (a Format). Plain weights are row-major and read in place; others are whole
// blocks, row by row, and are copied.
struct SegmentPointers {
    int64_t format, n;
    const void* data;
};

struct CallPointers {
    int64_t rows, scored, segments, taps, threads;
    int64_t slots, capacity;  // most tokens of a slot
    int64_t page, pages;      // places of a page; pages of the cache
    const int64_t *token, *position, *scored_row;  // [rows], [rows], [scored]
    const int64_t* segment;  // per segment: slot, first, cached, prefix, nodes, ranges; parents of its nodes; from and to of ranges
    const int64_t* table;    // [slots, capacity / page rounded up] the pages of a slot's tokens, in order
    const int64_t* tap;      // [taps] 0: the embeddings, i: after block i
    void* const* tap_out;    // [taps] each [rows, hidden] of the cache's type
    void *k, *v;             // [layers, kv_heads, pages * page, head_dim]
    float* logits;           // [scored, vocab]
};

enum Status { OK = 0, BAD_TOKEN = 1, BAD_SEGMENT = 2, NO_ROOM = 3, NO_MEMORY = 4, BAD_ROW = 5 };

// Tokens of a sequence that lie side by side in the cache: those before `end` (and not in an earlier run), each at its number in the
// sequence plus `shift`.
struct Run {
    int64_t end, shift;
};

struct Segment {
    int64_t slot, first, cached, prefix, nodes, ranges;
    const int64_t* parent;
    const int64_t* range;  // [ranges] of the cached tokens it sees, in order; without ranges it sees all
    const Run* run;      // of the cached tokens and the rows
    const int64_t* own;  // [rows] where each row is in the cache
    int64_t rows() const { return prefix + nodes; }
};

// Calls body(place, count, at) for the tokens from : to of a sequence in order: `count` from `place` on lie at `at` and behind it.
template <class Body>
inline void each_run(const Segment& s, int64_t from, int64_t to, const Body& body) {
    const Run* run = s.run;
    for (int64_t place = from; place < to; ++run) {
        const int64_t end = run->end < to ? run->end : to;
        if (end <= place) continue;
        body(place, end - place, place + run->shift);
        place = end;
    }
}

// Where a row stands: its segment, its offset there, and its visible rows of this forward (itself last) as offsets.
struct Row {
    int32_t segment, offset, depth;
    const int32_t* path;  // [depth]
};

}  // namespace outrider
