// The second half of a layer with a mixture of experts, for all rows of a forward.
//
// Rows that chose the same expert meet its weights together: they leave memory once per forward, whatever number of rows chose it.
// A row's sum goes over its experts in ascending order, so that its bits do not depend on the other rows, nor on threads.
#pragma once

#include <cmath>

#include "weights.h"

namespace outrider {

// gate[0 : n] = silu(gate) * up, in whole vectors.
inline void swish(float* gate, const float* up, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES) {
        const vf x = load<vf>(gate + j);
        store(gate + j, x / (1.0f + exp_near(-x)) * load<vf>(up + j));
    }
}

// gate[0 : n] = gate * sigmoid(gain * gate) * (up + 1) of bounded gates and ups, in whole vectors.
inline void bounded_swish(float* gate, float* up, int64_t n, float limit, float gain) {
    for (int64_t j = 0; j < n; ++j) {
        gate[j] = gate[j] > limit ? limit : gate[j];
        up[j] = up[j] > limit ? limit : up[j] < -limit ? -limit : up[j];
    }
    for (int64_t j = 0; j < n; j += LANES) {
        const vf x = load<vf>(gate + j);
        store(gate + j, x / (1.0f + exp_near(-gain * x)) * (load<vf>(up + j) + 1.0f));
    }
}

inline void add_bias(float* x, const float* bias, int64_t n) {
    for (int64_t j = 0; bias && j < n; ++j) x[j] += bias[j];
}

class Mixture {
   public:
    // Keeps the pointers of the layers. block: outputs of a linear that a thread takes at a time.
    void build(const ModelPointers& m, int64_t block) {
        m_ = m, block_ = block, in_stores_ = inner_stores_ = shared_stores_ = 0;
        for (int64_t i = 0; i < m.layers; ++i) {
            if (!m.layer[i].router) continue;
            in_stores_ |= m.layer[i].gate_up->stores(), inner_stores_ |= m.layer[i].down->stores();
            if (m.shared) shared_stores_ |= m.layer[i].shared_down->stores();
        }
    }

    // Before a forward: room for its rows. False when there is no memory. touched: [layers] what is told of them, or null.
    bool reserve(int64_t rows, int64_t* touched) {
        rows_ = rows, pairs_ = rows * m_.experts_used, told_ = touched;
        if (m_.experts == 0) return true;
        return logits_.reserve(rows * m_.experts) && chosen_.reserve(pairs_) && share_.reserve(pairs_) && count_.reserve(m_.layers) &&
               expert_.reserve(m_.experts) && next_.reserve(m_.experts) && first_.reserve(m_.experts + 1) && row_.reserve(pairs_) && weight_.reserve(pairs_) &&
               (!m_.shared || (common_.reserve(rows) && shared_.reserve(rows, m_.shared, shared_stores_))) &&
               (rows == 1 || gathered_.reserve(pairs_, m_.hidden, in_stores_)) && inner_.reserve(pairs_, m_.expert_inner, inner_stores_);
    }

    // x [rows, stride] += the mixture's outputs of `in`. tile: scratch of 2 * rows * block floats, a thread's own.
    template <class Walk>
    void run(Walk& phase, const LayerPointers& layer, int64_t l, const Input& in, float* x, int64_t stride, float* tile) {
        phase(blocks(m_.experts), [&](int64_t u) {
            const int64_t from = u * block_;
            layer.router->product(from, size(from, m_.experts), in, 0, rows_, logits_ + from, m_.experts);
        });
        phase(rows_, [&](int64_t i) {
            add_bias(logits_ + i * m_.experts, layer.router_bias, m_.experts), choose(i);
            if (m_.shared) weigh(layer, in, i);
        });
        phase(1, [&](int64_t) { group(l); });
        if (rows_ > 1) phase(pairs_, [&](int64_t p) { gather(p, in); });
        const Input& rows = rows_ > 1 ? gathered_ : in;
        // The number of units is kept for each layer: a thread that comes late reads it when others have gone on.
        const int64_t width = blocks(m_.expert_inner);
        const int64_t routed = count_[l] * width, units = routed + (m_.shared ? blocks(m_.shared) : 0);
        phase(units, [&](int64_t u) {
            if (u < routed) activate(layer, u / width, u % width, rows, tile);
            else activate_shared(layer, u - routed, in, tile);
        });
        if (inner_.rounds())
            phase(pairs_ * inner_.parts(), [&](int64_t u) { inner_.round(u / inner_.parts(), u % inner_.parts()); });
        if (m_.shared && shared_.rounds())
            phase(rows_ * shared_.parts(), [&](int64_t u) { shared_.round(u / shared_.parts(), u % shared_.parts()); });
        phase(blocks(m_.hidden), [&](int64_t u) { add(layer, u, count_[l], x, stride, tile); });
    }

   private:
    int64_t blocks(int64_t outputs) const { return (outputs + block_ - 1) / block_; }
    int64_t size(int64_t from, int64_t outputs) const { return outputs - from < block_ ? outputs - from : block_; }

    // The experts of row i, best first and of equals the lower one, then in ascending order, with their weights.
    void choose(int64_t i) {
        float* p = logits_ + i * m_.experts;
        int32_t* chosen = chosen_ + i * m_.experts_used;
        float* share = share_ + i * m_.experts_used;
        float top = p[0], total = 0.0f, kept = 0.0f;
        for (int64_t e = 1; e < m_.experts; ++e) top = p[e] > top ? p[e] : top;
        for (int64_t e = 0; e < m_.experts; ++e) total += p[e] = std::exp(p[e] - top);
        for (int64_t n = 0; n < m_.experts_used; ++n) {
            int64_t best = -1;  // of those that are left: with numbers that are none, too, no expert is chosen twice
            for (int64_t e = 0; e < m_.experts; ++e)
                if (!(p[e] < 0.0f) && (best < 0 || p[e] > p[best])) best = e;
            kept += p[best];
            int64_t at = n;
            for (; at > 0 && chosen[at - 1] > best; --at) chosen[at] = chosen[at - 1], share[at] = share[at - 1];
            chosen[at] = (int32_t)best, share[at] = p[best];
            p[best] = -1.0f;
        }
        for (int64_t n = 0; n < m_.experts_used; ++n) share[n] /= m_.normalised ? kept : total;
    }

    // Pairs of an expert and a row, by expert and then by row; the experts that any row chose.
    void group(int64_t l) {
        int64_t touched = 0, pairs = 0;
        for (int64_t e = 0; e < m_.experts; ++e) next_[e] = 0;
        for (int64_t p = 0; p < pairs_; ++p) ++next_[chosen_[p]];
        for (int64_t e = 0; e < m_.experts; ++e) {
            const int64_t before = pairs;
            if (next_[e] > 0) expert_[touched] = (int32_t)e, first_[touched++] = before;
            pairs += next_[e], next_[e] = (int32_t)before;
        }
        for (int64_t p = 0; p < pairs_; ++p) {
            const int64_t at = next_[chosen_[p]]++;
            row_[at] = (int32_t)(p / m_.experts_used), weight_[at] = share_[p];
        }
        first_[touched] = pairs, count_[l] = touched;
        if (told_) told_[l] = touched;
    }

    void gather(int64_t p, const Input& in) {
        gathered_.copy(p, in, row_[p]);
        gathered_.round_row(p);
    }

    // inner = silu(gate) * up (or the bounded one) of the rows that chose the t-th touched expert, block u of its outputs.
    void activate(const LayerPointers& layer, int64_t t, int64_t u, const Input& in, float* gate) {
        const int64_t first = first_[t], rows = first_[t + 1] - first, at = rows_ > 1 ? first : 0;
        const int64_t from = u * block_, n = size(from, m_.expert_inner), mine = expert_[t] * m_.expert_inner + from;
        float* up = gate + rows * block_;
        layer.gate_up->product(mine, n, in, at, rows, gate, block_);
        layer.gate_up->product(m_.experts * m_.expert_inner + mine, n, in, at, rows, up, block_);
        const float* bias = layer.gate_up_bias ? layer.gate_up_bias + mine : nullptr;
        for (int64_t i = 0; i < rows; ++i) {
            add_bias(gate + i * block_, bias, n);
            add_bias(up + i * block_, bias ? bias + m_.experts * m_.expert_inner : nullptr, n);
            if (m_.limit > 0.0) bounded_swish(gate + i * block_, up + i * block_, n, (float)m_.limit, (float)m_.gain);
            else swish(gate + i * block_, up + i * block_, n);
            inner_.put(first + i, from, gate + i * block_, n);
        }
    }

    // The weight of the expert that every row uses, of row i.
    void weigh(const LayerPointers& layer, const Input& in, int64_t i) {
        float gate = 0.0f;
        layer.shared_gate->product(0, 1, in, i, 1, &gate, 1);
        common_[i] = 1.0f / (1.0f + std::exp(-gate));
    }

    // Units of the expert that every row uses, block u of them.
    void activate_shared(const LayerPointers& layer, int64_t u, const Input& in, float* gate) {
        const int64_t from = u * block_, n = size(from, m_.shared);
        float* up = gate + rows_ * block_;
        layer.shared_gate_up->product(from, n, in, 0, rows_, gate, block_);
        layer.shared_gate_up->product(m_.shared + from, n, in, 0, rows_, up, block_);
        for (int64_t i = 0; i < rows_; ++i) {
            swish(gate + i * block_, up + i * block_, n);
            shared_.put(i, from, gate + i * block_, n);
        }
    }

    // x += weight * (down @ inner + bias) of every touched expert in turn, then of the one that every row uses, block u of outputs.
    void add(const LayerPointers& layer, int64_t u, int64_t touched, float* x, int64_t stride, float* tile) {
        const int64_t from = u * block_, n = size(from, m_.hidden);
        for (int64_t t = 0; t < touched; ++t) {
            const int64_t first = first_[t], rows = first_[t + 1] - first;
            layer.down->product(expert_[t] * m_.hidden + from, n, inner_, first, rows, tile, block_);
            for (int64_t i = 0; i < rows; ++i) {
                add_bias(tile + i * block_, layer.down_bias ? layer.down_bias + expert_[t] * m_.hidden + from : nullptr, n);
                float* to = x + row_[first + i] * stride + from;
                for (int64_t j = 0; j < n; ++j) to[j] += weight_[first + i] * tile[i * block_ + j];
            }
        }
        if (!m_.shared) return;
        layer.shared_down->product(from, n, shared_, 0, rows_, tile, block_);
        for (int64_t i = 0; i < rows_; ++i)
            for (int64_t j = 0; j < n; ++j) x[i * stride + from + j] += common_[i] * tile[i * block_ + j];
    }

    ModelPointers m_;
    int64_t block_ = 0, rows_ = 0, pairs_ = 0;
    int in_stores_ = 0, inner_stores_ = 0, shared_stores_ = 0;
    int64_t* told_ = nullptr;
    Buffer<float> logits_, share_, weight_;  // [rows, experts], [rows, used], [pairs]
    Buffer<int32_t> chosen_, expert_, row_, next_;  // [rows, used], [touched], [pairs], [experts] while pairs are sorted
    Buffer<int64_t> first_, count_;          // [touched + 1] pairs before an expert's, [layers] touched experts
    Buffer<float> common_;  // [rows] weights of the expert that every row uses
    Input gathered_, inner_, shared_;
};

}  // namespace outrider
