// What crosses from Python (runtime.py mirrors these structs field by field) and how it is looked at here.
#pragma once

#include <algorithm>
#include <cstdint>

namespace outrider {

class Linear;

struct LayerPointers {
    const float *norm1, *qkv_bias, *q_norm, *k_norm, *o_bias, *norm2, *post1, *post2;  // null where there is none
    const float *sinks, *router_bias, *gate_up_bias, *down_bias;  // the same
    const Linear *qkv, *o, *gate_up, *down, *router;  // router: null for a dense layer
    const Linear *shared_gate_up, *shared_down, *shared_gate;  // of the expert that every row uses; null where there is none
    int64_t window;    // 0: none
    int64_t turn;      // whose frequencies turn its heads: 0, 1, or -1: nobody's
    int64_t row_norm;  // 1: q_norm and k_norm are of all heads of a row together
};

struct ModelPointers {
    int64_t vocab, hidden, layers, heads, kv_heads, head_dim, inner;
    int64_t half;  // 1: the taps are bf16, 0: float32
    int64_t turned, frequencies;  // pairs of a head that are turned; tables of their frequencies
    int64_t gelu;  // 1: the activation is GELU by tanh, 0: SiLU
    double eps, rope_scale, attention_scale, attention_cap, embed_scale, residual_scale, logit_scale, logit_cap;  // caps: 0 for none
    const float* inv_freq;  // [frequencies, turned]
    const float* norm;
    const Linear *embedding, *head;
    const LayerPointers* layer;
    double clip;  // bound of queries, keys and values, 0: none
    int64_t experts, experts_used, expert_inner, normalised;  // 0: no layer has experts
    int64_t shared;  // units of the expert that every row uses, 0: there is none
    int64_t cache;  // a Stored: of keys and values
    double limit, gain;  // of experts: bound of gates and ups, 0: plain SwiGLUs; see Experts in decoder.py
};

enum Stored : int64_t { FLOAT32 = 0, BFLOAT16 = 1, CODES = 2 };

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
    void* const* tap_out;    // [taps] each [rows, hidden]
    void *k, *v;             // [layers, kv_heads, pages * page, entry_size]
    float* logits;           // [scored, vocab]
    int64_t* touched;        // [layers] out: experts that some row chose; null: not asked for
    float* mass;             // [kv_heads, segments, chunks] see Attention::part, added up over layers; null: not wanted
    int64_t chunks;
};

// What a learned drafter puts in front of a decoder's first block; all zero for a decoder of tokens. See joined.h.
struct FeaturePointers {
    int64_t taps, width;        // hidden states of the target that make a row's feature, and their width
    const Linear* fuse;         // [hidden, taps * width]; null: the one tap is the feature
    const float* fused_norm;    // of the feature; null: none
    int64_t join;               // a Join
    const float *token_norm, *feature_norm;  // of token and feature: BESIDE, and THROUGH of MTP heads; null: none
    int64_t normed_residual;    // BESIDE: 1: the residual is the normed feature
    const Linear* joint;        // THROUGH: [hidden, 2 * hidden]
    const float* joint_bias;    // [hidden]
    int64_t outputs;            // of the head
    const int64_t* support;     // [outputs] tokens of the head's outputs; null: token i is output i
};

enum Join : int64_t {
    ALONE = 0,    // the feature is what all blocks' keys and values are made of, and nothing else is
    BESIDE = 1,   // the first block reads [token, feature], both normed; the residual is the feature (EAGLE-3)
    THROUGH = 2,  // `joint` of [token, feature] is the residual (EAGLE-1; MTP heads, where both are normed)
};

// What a forward of a learned drafter has beside rows; all zero for others.
struct FeatureRows {
    const int64_t* skipped;      // [segments] see Segment; null: none
    int64_t mutual;              // 1: rows see all rows of their segment
    const void* const* tap;      // [taps] hidden states of the target's forward, each [any, width]
    const int64_t* tap_row;      // [rows] the row of them that is read
    int64_t tap_half;            // 1: they are bf16, 0: float32
    const float* feature;        // [rows, hidden], where no taps are read; both null: tokens alone are
    float* out;                  // [rows, hidden] the last block's output; null: not wanted
};

enum Status { OK = 0, BAD_TOKEN = 1, BAD_SEGMENT = 2, NO_ROOM = 3, NO_MEMORY = 4, BAD_ROW = 5 };

// Tokens of a sequence that lie side by side in the cache: those before `end` (and not in an earlier run), each at its number in the
// sequence plus `shift`.
struct Run {
    int64_t end, shift;
};

// `skipped`: so many of its first nodes are in the cache already, from an earlier forward. They stand behind `cached` like all others.
struct Segment {
    int64_t slot, first, cached, prefix, nodes, ranges;
    const int64_t* parent;
    const int64_t* range;  // [ranges] of the cached tokens it sees, in order; without ranges it sees all
    const Run* run;      // [runs] of the cached tokens and the rows
    const int64_t* own;  // [end] where each row is in the cache, skipped ones too
    int64_t skipped;
    int64_t runs = 0;
    int64_t end() const { return prefix + nodes; }
    int64_t rows() const { return end() - skipped; }
};

// Calls body(place, count, at) for the tokens from : to of a sequence in order: `count` from `place` on lie at `at` and behind it.
template <class Body>
inline void each_run(const Segment& s, int64_t from, int64_t to, const Body& body) {
    const Run* run = std::partition_point(s.run, s.run + s.runs, [=](const Run& r) { return r.end <= from; });
    for (int64_t place = from; place < to; ++run) {
        const int64_t end = run->end < to ? run->end : to;
        body(place, end - place, place + run->shift);
        place = end;
    }
}

// Where a row stands: its segment, its offset there, and its visible rows behind the cached ones as offsets, ascending.
struct Row {
    int32_t segment, offset, depth;
    const int32_t* path;  // [depth]
};

}  // namespace outrider
