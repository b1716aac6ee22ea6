// The forward of a decoder over flat rows, with keys, values and taps of type W.
//
// Residual stream and element-wise maths are float32; inputs of linears are rounded as their weights' types ask. Threads split
// outputs, never sums.
#pragma once

#include <cmath>

#include "crew.h"
#include "experts.h"
#include "plan.h"
#include "weights.h"

namespace outrider {

// out[0 : n] = x / rms(x) * weight; out may be x.
inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    float lanes[SUM_LANES] = {};
    int64_t i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
        for (int j = 0; j < SUM_LANES; ++j) lanes[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < n; ++j) lanes[j] += x[i + j] * x[i + j];
    for (int width = SUM_LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    const float scale = 1.0f / std::sqrt(lanes[0] / (float)n + eps);
    for (i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// Rotates the pairs (x[i], x[half + i]) by the row's angles.
inline void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

template <class W>
class Decoder {
    using Item = typename Packing<W>::Item;
    static constexpr int64_t BLOCK = 48;  // outputs of a linear that a thread takes at a time: whole tiles of 3, 4 and 2 rows
    static constexpr int64_t WIDE = 64;    // the same where weights are quantised: whole pairs of groups
    static constexpr int64_t QUERIES = 8;  // rows times heads that an attention task aims at

   public:
    // Keeps pointers to all that it is given, the layers too.
    void build(const ModelPointers& m) {
        m_ = m;
        group_ = m.heads / m.kv_heads;
        half_ = m.head_dim / 2;
        normed_stores_ = m.head->stores(), mixed_stores_ = inner_stores_ = 0;
        int block_stores = 0;
        for (int64_t i = 0; i < m.layers; ++i) {
            const LayerPointers& layer = m.layer[i];
            normed_stores_ |= layer.qkv->stores() | layer.gate_up->stores() | (layer.router ? layer.router->stores() : 0);
            mixed_stores_ |= layer.o->stores(), inner_stores_ |= layer.router ? 0 : layer.down->stores();
            block_stores |= layer.down->stores();
        }
        block_ = (normed_stores_ | mixed_stores_ | block_stores) & (STORE_32 | STORE_256) ? WIDE : BLOCK;
        mixture_.build(m_, block_);
    }

    Status forward(const CallPointers& call) {
        c_ = call;
        const int64_t rows_per_task = group_ < QUERIES ? QUERIES / group_ : 1;
        const Status status = plan_.build(c_, m_.vocab, rows_per_task, group_);
        if (status != OK) return status;
        if (!make_room()) return NO_MEMORY;
        const int threads = crew_.begin((int)c_.threads, c_.rows);
        if (threads == 0 || !phases_.start(threads)) return NO_MEMORY;
        in_parallel(threads, [this](int thread, int count) {
            crew_.enter(thread);
            run(thread, count);
            crew_.leave(thread);
        });
        crew_.end();
        return OK;
    }

   private:
    bool make_room() {
        x_size_ = (m_.hidden + 15) / 16 * 16;
        query_size_ = packed_stride<W>(m_.head_dim);
        const int64_t widest = m_.head_dim > 2 * block_ ? m_.head_dim : 2 * block_;
        const int64_t line = m_.hidden > m_.head_dim ? m_.hidden : m_.head_dim;
        tile_at_ = (line + 15) / 16 * 16;
        scores_at_ = tile_at_ + (c_.rows * widest + 15) / 16 * 16;
        scratch_size_ = scores_at_ + (plan_.score_floats + 31) / 16 * 16;
        return mixture_.reserve(c_.rows, c_.touched) && (!m_.wide_norm || wide_.reserve(c_.rows * wide_size())) && x_.reserve(c_.rows * x_size_) && cosine_.reserve(c_.rows * half_) && sine_.reserve(c_.rows * half_) &&
               normed_.reserve(c_.rows > c_.scored ? c_.rows : c_.scored, m_.hidden, normed_stores_) &&
               query_.reserve(c_.rows * m_.heads * query_size_) && mixed_.reserve(c_.rows, m_.heads * m_.head_dim, mixed_stores_) &&
               inner_.reserve(c_.rows, m_.inner, inner_stores_) && scratch_.reserve(c_.threads * scratch_size_);
    }

    void run(int thread, int threads) {
        Phases::Walk phase(phases_, thread, threads);
        float* const scratch = scratch_ + thread * scratch_size_;
        const auto round = [&](Input& input) {
            if (input.rounds()) phase(c_.rows * input.parts(), [&](int64_t u) { input.round(u / input.parts(), u % input.parts()); });
        };
        phase(c_.rows, [&](int64_t i) { embed(i), finish_block(0, i, scratch); });
        for (int64_t l = 0; l < m_.layers; ++l) {
            const LayerPointers& layer = m_.layer[l];
            phase(m_.heads + 2 * m_.kv_heads, [&](int64_t u) { project_head(layer, l, u, scratch); });
            if (m_.wide_norm) phase(c_.rows, [&](int64_t i) { place_heads(layer, l, i); });
            phase(m_.kv_heads * plan_.tasks, [&](int64_t u) { mix(layer, l, u, scratch); });
            round(mixed_);
            phase(blocks(m_.hidden), [&](int64_t u) { add_product(*layer.o, mixed_, layer.o_bias, u, scratch); });
            phase(c_.rows, [&](int64_t i) { normalise(i, i, layer.norm2, scratch); });
            if (layer.router) {
                mixture_.run(phase, layer, l, normed_, x_ + 0, x_size_, scratch + tile_at_);
            } else {
                phase(blocks(m_.inner), [&](int64_t u) { activate(layer, u, scratch); });
                round(inner_);
                phase(blocks(m_.hidden), [&](int64_t u) { add_product(*layer.down, inner_, nullptr, u, scratch); });
            }
            const bool last = l + 1 == m_.layers;
            phase(last && c_.scored > c_.rows ? c_.scored : c_.rows, [&](int64_t i) { finish_block(l + 1, i, scratch); });
        }
        phase(c_.scored > 0 ? blocks(m_.vocab) : 0, [&](int64_t u) { score(u); });
    }

    int64_t blocks(int64_t outputs) const { return (outputs + block_ - 1) / block_; }
    int64_t block_size(int64_t from, int64_t outputs) const { return outputs - from < block_ ? outputs - from : block_; }

    // Token embedding and rotary angles of row i.
    void embed(int64_t i) {
        m_.embedding->row(c_.token[i], x_ + i * x_size_);
        for (int64_t j = 0; j < half_; ++j) {
            const float angle = (float)c_.position[i] * m_.inv_freq[j];
            cosine_[i * half_ + j] = std::cos(angle) * (float)m_.rope_scale;
            sine_[i * half_ + j] = std::sin(angle) * (float)m_.rope_scale;
        }
    }

    // normed[to] = norm of row `from`, packed as a linear's input.
    void normalise(int64_t from, int64_t to, const float* weight, float* line) {
        rms_norm(x_ + from * x_size_, weight, m_.hidden, (float)m_.eps, line);
        normed_.put(to, 0, line, m_.hidden);
        for (int64_t part = 0; normed_.rounds() && part < normed_.parts(); ++part) normed_.round(to, part);
    }

    // What follows block `done` (0: the embeddings) for row i: taps, and the next norm; for the last block the norm of scored row i.
    void finish_block(int64_t done, int64_t i, float* line) {
        for (int64_t t = 0; i < c_.rows && t < c_.taps; ++t)
            if (c_.tap[t] == done) narrow(x_ + i * x_size_, m_.hidden, static_cast<W*>(c_.tap_out[t]) + i * m_.hidden);
        if (done < m_.layers)
            normalise(i, i, m_.layer[done].norm1, line);
        else if (i < c_.scored)
            normalise(c_.scored_row[i], i, m_.norm, line);
    }

    // Query, key or value head u of all rows: product and bias, then its place, unless norms wait for all heads.
    void project_head(const LayerPointers& layer, int64_t l, int64_t u, float* scratch) {
        const int64_t d = m_.head_dim;
        float* tile = scratch + tile_at_;
        layer.qkv->product(u * d, d, normed_, 0, c_.rows, tile, d);
        const float* norm = u < m_.heads ? layer.q_norm : u < m_.heads + m_.kv_heads ? layer.k_norm : nullptr;
        for (int64_t i = 0; i < c_.rows; ++i) {
            float* head = tile + i * d;
            if (layer.qkv_bias)
                for (int64_t j = 0; j < d; ++j) head[j] += layer.qkv_bias[u * d + j];
            if (m_.wide_norm) {
                std::memcpy(wide_ + i * wide_size() + u * d, head, d * sizeof(float));
                continue;
            }
            if (norm) rms_norm(head, norm, d, (float)m_.eps, head);
            place_head(l, u, i, head);
        }
    }

    // The heads of row i: norms over all queries and over all keys, then their places.
    void place_heads(const LayerPointers& layer, int64_t l, int64_t i) {
        const int64_t d = m_.head_dim, queries = m_.heads * d, keys = m_.kv_heads * d;
        float* line = wide_ + i * wide_size();
        if (layer.q_norm) rms_norm(line, layer.q_norm, queries, (float)m_.eps, line);
        if (layer.k_norm) rms_norm(line + queries, layer.k_norm, keys, (float)m_.eps, line + queries);
        for (int64_t u = 0; u < m_.heads + 2 * m_.kv_heads; ++u) place_head(l, u, i, line + u * d);
    }

    int64_t wide_size() const { return ((m_.heads + 2 * m_.kv_heads) * m_.head_dim + 15) / 16 * 16; }

    // Head u of row i after its norm: bounded, turned; a query is packed, keys and values are cached.
    void place_head(int64_t l, int64_t u, int64_t i, float* head) {
        const int64_t d = m_.head_dim;
        const bool is_query = u < m_.heads, is_value = u >= m_.heads + m_.kv_heads;
        const float clip = (float)m_.clip;
        for (int64_t j = 0; clip > 0.0f && j < d; ++j) head[j] = head[j] > clip ? clip : head[j] < -clip ? -clip : head[j];
        if (!is_value) rotate(head, cosine_ + i * half_, sine_ + i * half_, half_);
        if (is_query) {
            Packing<W>::pack(query_ + (u / group_ * c_.rows * group_ + i * group_ + u % group_) * query_size_, 0, head, (int)d);
            return;
        }
        const Row& row = plan_.row(i);
        const Segment& s = plan_.segment(row.segment);
        W* places = cache(is_value ? c_.v : c_.k, l, s.slot, (u - m_.heads) % m_.kv_heads);
        narrow(head, d, places + (s.cached + row.offset) * d);
    }

    W* cache(void* base, int64_t l, int64_t slot, int64_t head) const {
        return static_cast<W*>(base) + ((l * c_.slots + slot) * m_.kv_heads + head) * c_.capacity * m_.head_dim;
    }

    // Attention: one task of one KV head.
    void mix(const LayerPointers& layer, int64_t l, int64_t u, float* scratch) {
        const int64_t d = m_.head_dim, head = u / plan_.tasks;
        const float scale = 1.0f / std::sqrt((float)d);
        const Task& task = plan_.task(u % plan_.tasks);
        const Segment& s = plan_.segment(task.segment);
        const int64_t row = s.first + task.offset;
        attend<W>(
            s, &plan_.row(row), task.count, c_.position, layer.window, (int)group_,
            query_ + (head * c_.rows + row) * group_ * query_size_, query_size_, cache(c_.k, l, s.slot, head),
            cache(c_.v, l, s.slot, head), (int)d, scale, scratch + scores_at_, scratch, [&](int i, int g, const float* out) {
                mixed_.put(row + i, (head * group_ + g) * d, out, d);
            }
        );
    }

    // x += weight @ input (+ bias), block u of outputs.
    void add_product(const Linear& weight, const Input& input, const float* bias, int64_t u, float* scratch) {
        float* tile = scratch + tile_at_;
        const int64_t from = u * block_, n = block_size(from, m_.hidden);
        weight.product(from, n, input, 0, c_.rows, tile, block_);
        for (int64_t i = 0; i < c_.rows; ++i) {
            float* x = x_ + i * x_size_ + from;
            if (bias)
                for (int64_t j = 0; j < n; ++j) tile[i * block_ + j] += bias[from + j];
            for (int64_t j = 0; j < n; ++j) x[j] += tile[i * block_ + j];
        }
    }

    // inner = silu(gate) * up, block u of outputs.
    void activate(const LayerPointers& layer, int64_t u, float* scratch) {
        float* gate = scratch + tile_at_;
        float* up = gate + c_.rows * block_;
        const int64_t from = u * block_, n = block_size(from, m_.inner);
        layer.gate_up->product(from, n, normed_, 0, c_.rows, gate, block_);
        layer.gate_up->product(m_.inner + from, n, normed_, 0, c_.rows, up, block_);
        for (int64_t i = 0; i < c_.rows; ++i) {
            swish(gate + i * block_, up + i * block_, n);
            inner_.put(i, from, gate + i * block_, n);
        }
    }

    // Logits of the scored rows, block u of the vocabulary.
    void score(int64_t u) {
        const int64_t from = u * block_, n = block_size(from, m_.vocab);
        m_.head->product(from, n, normed_, 0, c_.scored, c_.logits + from, m_.vocab);
    }

    ModelPointers m_;
    CallPointers c_;
    Plan plan_;
    Crew crew_;
    Phases phases_;
    int64_t group_ = 1, half_ = 0, block_ = BLOCK;
    int normed_stores_ = 0, mixed_stores_ = 0, inner_stores_ = 0;
    int64_t x_size_, query_size_, scratch_size_, tile_at_, scores_at_;
    Buffer<float> x_, cosine_, sine_, scratch_;
    Buffer<Item> query_;
    Input normed_, mixed_, inner_;
    Buffer<float> wide_;  // all heads of a row, where norms go over them
    Mixture mixture_;
};

}  // namespace outrider
