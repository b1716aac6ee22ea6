// The forward of a decoder over flat rows, with a cache of type W (see cached.h).
//
// Residual stream and element-wise maths are float32; inputs of linears are rounded as their weights' types ask. Threads split
// outputs, never sums.
#pragma once

#include "crew.h"
#include "experts.h"
#include "joined.h"
#include "self_attention.h"

namespace outrider {

template <class W>
class Decoder {
    static constexpr int64_t BLOCK = 48;  // outputs of a linear that a thread takes at a time: whole tiles of 3, 4 and 2 rows
    static constexpr int64_t WIDE = 64;    // the same where weights are quantised: whole pairs of groups

   public:
    // Keeps pointers to all that it is given, the layers too. f: of a learned drafter.
    void build(const ModelPointers& m, const FeaturePointers& f = {}) {
        m_ = m;
        outputs_ = f.outputs ? f.outputs : m.vocab, support_ = f.support;
        features_.build(f, m.hidden, m.eps, m.layer[0].qkv->stores());
        normed_stores_ = m.head->stores(), inner_stores_ = 0;
        int down_stores = 0;
        for (int64_t i = 0; i < m.layers; ++i) {
            const LayerPointers& layer = m.layer[i];
            for (const Linear* reads : {layer.qkv, layer.gate_up, layer.router, layer.shared_gate_up, layer.shared_gate})
                normed_stores_ |= reads ? reads->stores() : 0;
            down_stores |= layer.down->stores();
            inner_stores_ |= layer.router ? 0 : layer.down->stores();
            posts_ = posts_ || layer.post1 || layer.post2;
        }
        attention_.build(m);
        block_ = (normed_stores_ | attention_.stores() | down_stores) & (STORE_32 | STORE_256) ? WIDE : BLOCK;
        mixture_.build(m_, block_);
    }

    Status forward(const CallPointers& call, const FeatureRows& rows = {}) {
        c_ = call, out_ = rows.out;
        const Status status = attention_.begin(c_, rows);
        if (status != OK) return status;
        if (!features_.begin(rows, c_.rows) || !make_room()) return NO_MEMORY;
        return crew_.run((int)c_.threads, c_.rows, phases_, [this](int thread, int count) { run(thread, count); }) ? OK : NO_MEMORY;
    }

   private:
    bool make_room() {
        x_size_ = (m_.hidden + 15) / 16 * 16;
        const int64_t widest = m_.head_dim > 2 * block_ ? m_.head_dim : 2 * block_;
        const int64_t widest_line = m_.hidden > m_.head_dim ? m_.hidden : m_.head_dim;
        const int64_t line = features_.line() > widest_line ? features_.line() : widest_line;
        tile_at_ = (line + 15) / 16 * 16;
        attention_at_ = tile_at_ + ((c_.rows > c_.scored ? c_.rows : c_.scored) * widest + 15) / 16 * 16;
        scratch_size_ = (attention_at_ + attention_.scratch_floats() + 31) / 16 * 16;
        return attention_.reserve() && mixture_.reserve(c_.rows, c_.touched) && x_.reserve(c_.rows * x_size_) &&
               part_.reserve(posts_ ? c_.rows * x_size_ : 0) &&
               normed_.reserve(c_.rows > c_.scored ? c_.rows : c_.scored, m_.hidden, normed_stores_) &&
               inner_.reserve(c_.rows, m_.inner, inner_stores_) && scratch_.reserve(c_.threads * scratch_size_);
    }

    void run(int thread, int threads) {
        Phases::Walk phase(phases_, thread, threads);
        float* const scratch = scratch_ + thread * scratch_size_;
        const auto round = [&](Input& input) {
            if (input.rounds()) phase(c_.rows * input.parts(), [&](int64_t u) { input.round(u / input.parts(), u % input.parts()); });
        };
        enter(phase, scratch);
        if (features_.alone()) {
            const int64_t each = 2 * m_.kv_heads;
            return phase(m_.layers * each, [&](int64_t u) {
                attention_.project(m_.layer[u / each], u / each, m_.heads + u % each, normed_, scratch + tile_at_);
            });
        }
        for (int64_t l = 0; l < m_.layers; ++l) {
            const LayerPointers& layer = m_.layer[l];
            const Input& read = l == 0 && features_.beside() ? features_.pair() : normed_;
            attention_.run(phase, layer, l, read, scratch + tile_at_, scratch + attention_at_);
            round(attention_.mixed());
            phase(blocks(m_.hidden), [&](int64_t u) { add_product(*layer.o, attention_.mixed(), layer.o_bias, layer.post1, u, scratch); });
            phase(c_.rows, [&](int64_t i) { add_part(layer.post1, i), normalise(i, i, layer.norm2, scratch); });
            if (layer.router) {
                mixture_.run(phase, layer, l, normed_, x_ + 0, x_size_, scratch + tile_at_);
            } else {
                phase(blocks(m_.inner), [&](int64_t u) { activate(layer, u, scratch); });
                round(inner_);
                phase(blocks(m_.hidden), [&](int64_t u) { add_product(*layer.down, inner_, nullptr, layer.post2, u, scratch); });
            }
            if (layer.post2) phase(c_.rows, [&](int64_t i) { add_part(layer.post2, i); });
            const bool last = l + 1 == m_.layers;
            phase(last && c_.scored > c_.rows ? c_.scored : c_.rows, [&](int64_t i) { finish_block(l + 1, i, scratch); });
        }
        phase(c_.scored > 0 ? blocks(outputs_) : 0, [&](int64_t u) { score(u, scratch); });
    }

    // Residuals of all rows, and what the first block reads.
    template <class Phase>
    void enter(Phase& phase, float* scratch) {
        if (!features_.present()) return phase(c_.rows, [&](int64_t i) { embed(i), finish_block(0, i, scratch); });
        if (features_.fuses()) {
            phase(c_.rows, [&](int64_t i) { features_.take(i, scratch); });
            phase(blocks(m_.hidden), [&](int64_t u) { features_.fuse(u * block_, block_size(u * block_, m_.hidden), c_.rows); });
        }
        phase(c_.rows, [&](int64_t i) {
            embed(i);
            features_.join(i, x_ + i * x_size_, scratch);
            if (features_.alone()) normalise(i, i, nullptr, scratch);
        });
        if (!features_.goes_through()) return;
        phase(blocks(m_.hidden), [&](int64_t u) { features_.through(u * block_, block_size(u * block_, m_.hidden), c_.rows, x_ + 0, x_size_); });
        phase(c_.rows, [&](int64_t i) { finish_block(0, i, scratch); });
    }

    int64_t blocks(int64_t outputs) const { return (outputs + block_ - 1) / block_; }
    int64_t block_size(int64_t from, int64_t outputs) const { return outputs - from < block_ ? outputs - from : block_; }

    // Token embedding and rotary angles of row i.
    void embed(int64_t i) {
        float* x = x_ + i * x_size_;
        m_.embedding->row(c_.token[i], x);
        if (m_.embed_scale != 1.0)
            for (int64_t j = 0; j < m_.hidden; ++j) x[j] *= (float)m_.embed_scale;
        attention_.turn(i);
    }

    // normed[to] = norm of row `from` (the row itself where there is no norm), packed as a linear's input.
    void normalise(int64_t from, int64_t to, const float* weight, float* line) {
        rms_norm(x_ + from * x_size_, weight, m_.hidden, (float)m_.eps, line);
        normed_.put(to, 0, line, m_.hidden);
        normed_.round_row(to);
    }

    // What follows block `done` (0: the embeddings) for row i: taps, and the next norm; for the last block the norm of scored row i.
    void finish_block(int64_t done, int64_t i, float* line) {
        for (int64_t t = 0; i < c_.rows && t < c_.taps; ++t)
            if (c_.tap[t] == done) tap(t, i);
        if (out_ != nullptr && done == m_.layers && i < c_.rows) std::memcpy(out_ + i * m_.hidden, x_ + i * x_size_, m_.hidden * sizeof(float));
        if (done < m_.layers)
            normalise(i, i, m_.layer[done].norm1, line);
        else if (i < c_.scored)
            normalise(c_.scored_row[i], i, m_.norm, line);
    }

    void tap(int64_t t, int64_t i) const {
        const float* x = x_ + i * x_size_;
        if (m_.half)
            narrow(x, m_.hidden, static_cast<bf16*>(c_.tap_out[t]) + i * m_.hidden);
        else
            narrow(x, m_.hidden, static_cast<float*>(c_.tap_out[t]) + i * m_.hidden);
    }

    // x += weight @ input (+ bias), block u of outputs; kept in part_ where a norm follows.
    void add_product(const Linear& weight, const Input& input, const float* bias, const float* post, int64_t u, float* scratch) {
        float* tile = scratch + tile_at_;
        const int64_t from = u * block_, n = block_size(from, m_.hidden);
        weight.product(from, n, input, 0, c_.rows, tile, block_);
        const float scale = (float)m_.residual_scale;
        for (int64_t i = 0; i < c_.rows; ++i) {
            float* x = x_ + i * x_size_ + from;
            if (bias)
                for (int64_t j = 0; j < n; ++j) tile[i * block_ + j] += bias[from + j];
            if (post)
                std::memcpy(part_ + i * x_size_ + from, tile + i * block_, n * sizeof(float));
            else
                for (int64_t j = 0; j < n; ++j) x[j] += scale * tile[i * block_ + j];
        }
    }

    // x += norm of what is kept of row i, if there is such a norm.
    void add_part(const float* post, int64_t i) {
        if (!post) return;
        float *x = x_ + i * x_size_, *part = part_ + i * x_size_;
        rms_norm(part, post, m_.hidden, (float)m_.eps, part);
        for (int64_t j = 0; j < m_.hidden; ++j) x[j] += (float)m_.residual_scale * part[j];
    }

    // inner = act(gate) * up, block u of outputs. GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
    void activate(const LayerPointers& layer, int64_t u, float* scratch) {
        float* gate = scratch + tile_at_;
        float* up = gate + c_.rows * block_;
        const int64_t from = u * block_, n = block_size(from, m_.inner);
        layer.gate_up->product(from, n, normed_, 0, c_.rows, gate, block_);
        layer.gate_up->product(m_.inner + from, n, normed_, 0, c_.rows, up, block_);
        for (int64_t i = 0; i < c_.rows; ++i) {
            float* g = gate + i * block_;
            for (int64_t j = 0; j < n; j += LANES) {  // a block is a multiple of LANES: what is behind n is not used
                const vf x = load<vf>(g + j);
                const vf bend = m_.gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
                store(g + j, x / (1.0f + exp_near(-bend)) * load<vf>(up + i * block_ + j));
            }
            inner_.put(i, from, g, n);
        }
    }

    // Logits of the scored rows, block u of the head's outputs.
    void score(int64_t u, float* scratch) {
        const int64_t from = u * block_, n = block_size(from, outputs_), stride = support_ ? block_ : m_.vocab;
        float* out = support_ ? scratch + tile_at_ : c_.logits + from;
        m_.head->product(from, n, normed_, 0, c_.scored, out, stride);
        for (int64_t i = 0; i < c_.scored && (m_.logit_scale != 1.0 || m_.logit_cap != 0.0); ++i) {
            float* logit = out + i * stride;
            for (int64_t j = 0; j < n; ++j) {
                logit[j] *= (float)m_.logit_scale;
                if (m_.logit_cap > 0.0) logit[j] = (float)m_.logit_cap * std::tanh(logit[j] / (float)m_.logit_cap);
            }
        }
        for (int64_t i = 0; i < c_.scored && support_; ++i)
            for (int64_t j = 0; j < n; ++j) c_.logits[i * m_.vocab + support_[from + j]] = out[i * stride + j];
    }

    ModelPointers m_;
    CallPointers c_;
    Crew crew_;
    Phases phases_;
    Features features_;
    float* out_ = nullptr;
    const int64_t* support_ = nullptr;
    int64_t block_ = BLOCK, outputs_ = 0;
    bool posts_ = false;
    int normed_stores_ = 0, inner_stores_ = 0;
    int64_t x_size_, scratch_size_, tile_at_, attention_at_;
    Buffer<float> x_, part_, scratch_;
    Input normed_, inner_;
    SelfAttention<W> attention_;
    Mixture mixture_;
};

}  // namespace outrider
