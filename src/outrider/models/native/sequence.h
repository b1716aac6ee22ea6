// Heads that follow one another: residual blocks on a token's row plus a state (of hidden states of the target, or of the level
// above), then outputs over a vocabulary. One forward is one level.
#pragma once

#include "crew.h"
#include "experts.h"
#include "joined.h"

namespace outrider {

struct SequenceBlock {
    const float* norm;
    const Linear *gate_up, *down;
};

struct SequencePointers {
    int64_t hidden, inner, layers, vocab;
    double eps;
    const Linear *token, *head;  // token: [vocab, hidden] the row of each
    const float* norm;
    const SequenceBlock* block;  // [layers]
    FeaturePointers features;    // `fuse` alone: the state before the first level
};

struct SequenceCall {
    int64_t rows, threads;
    const int64_t* token;
    float* logits;         // [rows, vocab]
    FeatureRows features;  // hidden states, or states of the level above; out: states of these rows
};

class Sequence {
    static constexpr int64_t BLOCK = 48, WIDE = 64;  // outputs of a linear that a thread takes at a time, see Decoder

   public:
    // Keeps pointers to all that it is given.
    void build(const SequencePointers& s) {
        s_ = s, stores_ = s.head->stores(), inner_stores_ = 0;
        for (int64_t i = 0; i < s.layers; ++i) stores_ |= s.block[i].gate_up->stores(), inner_stores_ |= s.block[i].down->stores();
        features_.build(s.features, s.hidden, s.eps, 0);
        block_ = (stores_ | inner_stores_) & (STORE_32 | STORE_256) ? WIDE : BLOCK;
    }

    Status forward(const SequenceCall& call) {
        c_ = call;
        if (c_.rows < 1) return BAD_ROW;
        for (int64_t i = 0; i < c_.rows; ++i)
            if (c_.token[i] < 0 || c_.token[i] >= s_.vocab) return BAD_TOKEN;
        if (!features_.begin(c_.features, c_.rows)) return NO_MEMORY;
        if (!features_.present()) return BAD_ROW;
        tile_at_ = (features_.line() + 15) / 16 * 16;
        scratch_size_ = (tile_at_ + 2 * c_.rows * block_ + 31) / 16 * 16;
        const bool room = x_.reserve(c_.rows * s_.hidden) && normed_.reserve(c_.rows, s_.hidden, stores_) &&
                          inner_.reserve(c_.rows, s_.inner, inner_stores_) && scratch_.reserve(c_.threads * scratch_size_);
        if (!room) return NO_MEMORY;
        return crew_.run((int)c_.threads, c_.rows, phases_, [this](int thread, int count) { run(thread, count); }) ? OK : NO_MEMORY;
    }

   private:
    void run(int thread, int threads) {
        Phases::Walk phase(phases_, thread, threads);
        float* const scratch = scratch_ + thread * scratch_size_;
        if (features_.fuses()) {
            phase(c_.rows, [&](int64_t i) { features_.take(i, scratch); });
            phase(blocks(s_.hidden), [&](int64_t u) { features_.fuse(u * block_, size(u * block_, s_.hidden), c_.rows); });
        }
        phase(c_.rows, [&](int64_t i) { enter(i, scratch); });
        for (int64_t l = 0; l < s_.layers; ++l) {
            const SequenceBlock& block = s_.block[l];
            phase(blocks(s_.inner), [&](int64_t u) { activate(block, u * block_, scratch + tile_at_); });
            if (inner_.rounds()) phase(c_.rows, [&](int64_t i) { inner_.round_row(i); });
            phase(blocks(s_.hidden), [&](int64_t u) { add(block, u * block_, scratch + tile_at_); });
            phase(c_.rows, [&](int64_t i) { finish_block(l + 1, i, scratch); });
        }
        phase(blocks(s_.vocab), [&](int64_t u) {
            s_.head->product(u * block_, size(u * block_, s_.vocab), normed_, 0, c_.rows, c_.logits + u * block_, s_.vocab);
        });
    }

    int64_t blocks(int64_t outputs) const { return (outputs + block_ - 1) / block_; }
    int64_t size(int64_t from, int64_t outputs) const { return outputs - from < block_ ? outputs - from : block_; }

    // x = the state of row i plus its token's row.
    void enter(int64_t i, float* line) {
        float* x = x_ + i * s_.hidden;
        features_.join(i, x, line);
        s_.token->row(c_.token[i], line);
        for (int64_t j = 0; j < s_.hidden; ++j) x[j] += line[j];
        finish_block(0, i, line);
    }

    // What follows `done` blocks for row i: the next norm, the last one's before the outputs.
    void finish_block(int64_t done, int64_t i, float* line) {
        const float* x = x_ + i * s_.hidden;
        const bool last = done == s_.layers;
        if (last && c_.features.out) std::memcpy(c_.features.out + i * s_.hidden, x, s_.hidden * sizeof(float));
        rms_norm(x, last ? s_.norm : s_.block[done].norm, s_.hidden, (float)s_.eps, line);
        normed_.put(i, 0, line, s_.hidden), normed_.round_row(i);
    }

    // inner = silu(gate) * up, outputs from `from`.
    void activate(const SequenceBlock& block, int64_t from, float* gate) {
        float* up = gate + c_.rows * block_;
        const int64_t n = size(from, s_.inner);
        block.gate_up->product(from, n, normed_, 0, c_.rows, gate, block_);
        block.gate_up->product(s_.inner + from, n, normed_, 0, c_.rows, up, block_);
        for (int64_t i = 0; i < c_.rows; ++i) {
            swish(gate + i * block_, up + i * block_, n);
            inner_.put(i, from, gate + i * block_, n);
        }
    }

    // x += down @ inner, outputs from `from`.
    void add(const SequenceBlock& block, int64_t from, float* tile) {
        const int64_t n = size(from, s_.hidden);
        block.down->product(from, n, inner_, 0, c_.rows, tile, block_);
        for (int64_t i = 0; i < c_.rows; ++i)
            for (int64_t j = 0; j < n; ++j) x_[i * s_.hidden + from + j] += tile[i * block_ + j];
    }

    SequencePointers s_{};
    SequenceCall c_{};
    int stores_ = 0, inner_stores_ = 0;
    int64_t block_ = BLOCK, tile_at_ = 0, scratch_size_ = 0;
    Crew crew_;
    Phases phases_;
    Features features_;
    Buffer<float> x_, scratch_;
    Input normed_, inner_;
};

}  // namespace outrider
