// Heads on one hidden state: residual blocks x + silu(A x + b) on its norm, then outputs over a vocabulary. Every level has its own.
#pragma once

#include "crew.h"
#include "vectors.h"
#include "weights.h"

namespace outrider {

struct HeadsPointers {
    int64_t hidden, levels, layers, vocab, outputs, shared;  // shared: one output matrix for all levels
    double eps;
    const float* norm;            // null: none
    const Linear* const* block;   // [levels * layers] each [hidden, hidden]
    const float* const* bias;     // [levels * layers]
    const Linear* const* head;    // [levels], or one that is shared
    const int64_t* support;       // [outputs] tokens of the outputs; null: token i is output i
};

struct HeadsCall {
    int64_t rows, levels, threads;
    const float* state;  // [rows, hidden]
    float* logits;       // [levels, rows, vocab]
};

class Heads {
    static constexpr int64_t BLOCK = 48, WIDE = 64;  // outputs that a thread takes at a time, see Decoder

   public:
    // Keeps pointers to all that it is given.
    void build(const HeadsPointers& h) {
        h_ = h, stores_ = 0;
        for (int64_t i = 0; i < h.levels * h.layers; ++i) stores_ |= h.block[i]->stores();
        for (int64_t i = 0; i < (h.shared ? 1 : h.levels); ++i) stores_ |= h.head[i]->stores();
        block_ = stores_ & (STORE_32 | STORE_256) ? WIDE : BLOCK;
    }

    Status forward(const HeadsCall& call) {
        c_ = call;
        if (c_.rows < 1 || c_.levels < 1 || c_.levels > h_.levels) return BAD_ROW;
        const int64_t all = c_.rows * c_.levels;
        scratch_size_ = (h_.hidden + 15) / 16 * 16 + (all * block_ + 31) / 16 * 16;
        const bool room = x_.reserve(all * h_.hidden) && normed_.reserve(c_.rows, h_.hidden, stores_) &&
                          inner_.reserve(all, h_.hidden, stores_) && scratch_.reserve(c_.threads * scratch_size_);
        if (!room) return NO_MEMORY;
        return crew_.run((int)c_.threads, all, phases_, [this](int thread, int count) { run(thread, count); }) ? OK : NO_MEMORY;
    }

   private:
    void run(int thread, int threads) {
        Phases::Walk phase(phases_, thread, threads);
        float* const scratch = scratch_ + thread * scratch_size_;
        const int64_t all = c_.rows * c_.levels, blocks = count(h_.hidden);
        phase(c_.rows, [&](int64_t i) { enter(i, scratch); });
        for (int64_t j = 0; j < h_.layers; ++j) {
            phase(c_.levels * blocks, [&](int64_t u) { add_block(j, u / blocks, u % blocks * block_, scratch); });
            phase(all, [&](int64_t u) { inner_.put(u, 0, x_ + u * h_.hidden, h_.hidden), inner_.round_row(u); });
        }
        const int64_t outputs = count(h_.outputs), units = h_.shared ? outputs : c_.levels * outputs;
        phase(units, [&](int64_t u) { score(u / outputs, u % outputs * block_, scratch); });
    }

    int64_t count(int64_t outputs) const { return (outputs + block_ - 1) / block_; }
    int64_t size(int64_t from, int64_t outputs) const { return outputs - from < block_ ? outputs - from : block_; }

    // The norm of row i, the same for every level.
    void enter(int64_t i, float* line) {
        rms_norm(c_.state + i * h_.hidden, h_.norm, h_.hidden, (float)h_.eps, line);
        for (int64_t level = 0; level < c_.levels; ++level) std::memcpy(x_ + (level * c_.rows + i) * h_.hidden, line, h_.hidden * sizeof(float));
        normed_.put(i, 0, line, h_.hidden), normed_.round_row(i);
    }

    // x += silu(A x + b) of layer j of a level, outputs from `from`.
    void add_block(int64_t j, int64_t level, int64_t from, float* scratch) {
        float* tile = scratch + (h_.hidden + 15) / 16 * 16;
        const int64_t n = size(from, h_.hidden), at = level * h_.layers + j;
        h_.block[at]->product(from, n, j == 0 ? normed_ : inner_, j == 0 ? 0 : level * c_.rows, c_.rows, tile, block_);
        for (int64_t i = 0; i < c_.rows; ++i) {
            float* x = x_ + (level * c_.rows + i) * h_.hidden + from;
            float* y = tile + i * block_;
            for (int64_t k = 0; k < n; ++k) y[k] += h_.bias[at][from + k];
            for (int64_t k = 0; k < n; k += LANES) {  // a block is a multiple of LANES: what is behind n is not used
                const vf v = load<vf>(y + k);
                store(y + k, v / (1.0f + exp_near(-v)));
            }
            for (int64_t k = 0; k < n; ++k) x[k] += y[k];
        }
    }

    // Logits of all levels, or of one if each has an output matrix of its own.
    void score(int64_t level, int64_t from, float* scratch) {
        const int64_t n = size(from, h_.outputs), first = level * c_.rows, rows = h_.shared ? c_.rows * c_.levels : c_.rows;
        const bool plain = h_.layers == 0;  // then all levels read the same
        const int64_t again = plain && h_.shared ? c_.levels : 1, each = rows / again;
        for (int64_t t = 0; t < again; ++t) {
            float* out = c_.logits + (first + t * each) * h_.vocab;
            const Input& input = plain ? normed_ : inner_;
            float* tile = h_.support ? scratch + (h_.hidden + 15) / 16 * 16 : out + from;
            h_.head[level]->product(from, n, input, plain ? 0 : first, each, tile, h_.support ? block_ : h_.vocab);
            for (int64_t i = 0; h_.support && i < each; ++i)
                for (int64_t k = 0; k < n; ++k) out[i * h_.vocab + h_.support[from + k]] = tile[i * block_ + k];
        }
    }

    HeadsPointers h_{};
    HeadsCall c_{};
    int stores_ = 0;
    int64_t block_ = BLOCK, scratch_size_ = 0;
    Crew crew_;
    Phases phases_;
    Buffer<float> x_, scratch_;
    Input normed_, inner_;
};

}  // namespace outrider
