// The first half of a layer, for all rows of a forward: heads are made of its input, turned and cached; each row's queries look at
// what the row sees (plan.h); what they saw is the input of the layer's next linear.
#pragma once

#include <cmath>

#include "plan.h"
#include "weights.h"

namespace outrider {

template <class W>
class SelfAttention {
    using Item = typename Query<W>::Item;
    static constexpr int64_t QUERIES = 32;  // rows times heads that an attention task aims at

   public:
    // Keeps the pointers of the layers.
    void build(const ModelPointers& m) {
        m_ = m, group_ = m.heads / m.kv_heads, half_ = m.turned, stores_ = 0, row_norms_ = false;
        for (int64_t i = 0; i < m.layers; ++i) {
            stores_ |= m.layer[i].o->stores();
            row_norms_ = row_norms_ || m.layer[i].row_norm;
        }
    }

    int stores() const { return stores_; }
    Input& mixed() { return mixed_; }  // [rows, heads * head_dim] what the queries saw: not rounded yet

    // Before a forward: who sees what in it.
    Status begin(const CallPointers& call, const FeatureRows& rows) {
        c_ = call;
        query_size_ = query_stride<W>(m_.head_dim);
        sums_size_ = Sums::size(m_.head_dim);
        const int64_t rows_per_task = group_ < QUERIES ? QUERIES / group_ : 1;
        return plan_.build(c_, m_.vocab, rows_per_task, group_, rows.skipped, rows.mutual);
    }

    // Room for what `begin` has planned; false when there is no memory.
    bool reserve() {
        const int64_t turns = c_.rows * half_ * m_.frequencies;
        return cosine_.reserve(turns) && sine_.reserve(turns) &&
               heads_.reserve(row_norms_ ? c_.rows * (m_.heads + m_.kv_heads) * m_.head_dim : 0) &&
               query_.reserve(c_.rows * m_.heads * query_size_) && kept_.reserve(m_.kv_heads * plan_.kept * sums_size_) &&
               mass_.reserve(c_.mass ? m_.kv_heads * plan_.kept * CHUNKS : 0) &&
               mixed_.reserve(c_.rows, m_.heads * m_.head_dim, stores_);
    }

    // Floats of scratch that `run` needs: scores, then two sets of sums.
    int64_t scratch_floats() const { return score_floats() + 2 * plan_.task_rows * group_ * sums_size_; }

    // Rotary angles of row i.
    void turn(int64_t i) {
        const int64_t n = half_ * m_.frequencies;
        for (int64_t j = 0; j < n; ++j) {
            const float angle = (float)c_.position[i] * m_.inv_freq[j];
            cosine_[i * n + j] = std::cos(angle) * (float)m_.rope_scale;
            sine_[i * n + j] = std::sin(angle) * (float)m_.rope_scale;
        }
    }

    // mixed = what the rows of layer l see. in: the layer's input; tile, scratch: a thread's own.
    template <class Walk>
    void run(Walk& phase, const LayerPointers& layer, int64_t l, const Input& in, float* tile, float* scratch) {
        phase(m_.heads + 2 * m_.kv_heads, [&](int64_t u) { project(layer, l, u, in, tile); });
        if (layer.row_norm) phase(c_.rows, [&](int64_t i) { norm_row(layer, l, i); });
        phase(m_.kv_heads * plan_.units, [&](int64_t u) { mix(layer, l, u, scratch); });
        if (plan_.kept > 0) phase(m_.kv_heads * plan_.tasks, [&](int64_t u) { fold(layer, u, scratch); });
    }

    // Query, key or value head u of all rows: product, bias, norm, rotation; queries are packed, keys and values cached.
    // tile: [rows, head_dim] a thread's own.
    void project(const LayerPointers& layer, int64_t l, int64_t u, const Input& in, float* tile) {
        const int64_t d = m_.head_dim;
        layer.qkv->product(u * d, d, in, 0, c_.rows, tile, d);
        const bool is_query = u < m_.heads, is_value = u >= m_.heads + m_.kv_heads;
        const float* norm = is_query ? layer.q_norm : layer.k_norm;
        for (int64_t i = 0; i < c_.rows; ++i) {
            float* head = tile + i * d;
            if (layer.qkv_bias)
                for (int64_t j = 0; j < d; ++j) head[j] += layer.qkv_bias[u * d + j];
            if (layer.row_norm && !is_value) {
                std::memcpy(heads_ + (i * (m_.heads + m_.kv_heads) + u) * d, head, d * sizeof(float));
                continue;
            }
            if (norm && !is_value) rms_norm(head, norm, d, (float)m_.eps, head);
            place_head(layer, l, u, i, head);
        }
    }

   private:
    int64_t score_floats() const { return Attention<W>::scratch_floats(plan_.task_rows * group_, plan_.own_rows, m_.head_dim); }

    // The queries of row i normed together, its keys likewise, and put in their places.
    void norm_row(const LayerPointers& layer, int64_t l, int64_t i) {
        const int64_t d = m_.head_dim, queries = m_.heads * d, keys = m_.kv_heads * d;
        float* row = heads_ + i * (queries + keys);
        rms_norm(row, layer.q_norm, queries, (float)m_.eps, row);
        rms_norm(row + queries, layer.k_norm, keys, (float)m_.eps, row + queries);
        for (int64_t u = 0; u < m_.heads + m_.kv_heads; ++u) place_head(layer, l, u, i, row + u * d);
    }

    // Head u of row i to its place: turned and packed if it is a query's, turned and cached if a key's, cached if a value's.
    void place_head(const LayerPointers& layer, int64_t l, int64_t u, int64_t i, float* head) {
        const int64_t d = m_.head_dim;
        const bool is_query = u < m_.heads, is_value = u >= m_.heads + m_.kv_heads;
        const float clip = (float)m_.clip;
        for (int64_t j = 0; clip > 0.0f && j < d; ++j) head[j] = head[j] > clip ? clip : head[j] < -clip ? -clip : head[j];
        if (!is_value && layer.turn >= 0) {
            const int64_t at = (i * m_.frequencies + layer.turn) * half_;
            rotate(head, cosine_ + at, sine_ + at, half_);
        }
        if (is_query) {
            Query<W>::pack(query_ + (u / group_ * c_.rows * group_ + i * group_ + u % group_) * query_size_, head, d);
            return;
        }
        const Row& row = plan_.row(i);
        const Segment& s = plan_.segment(row.segment);
        W* places = cache(is_value ? c_.v : c_.k, l, (u - m_.heads) % m_.kv_heads);
        narrow(head, d, places + s.own[row.offset] * entry_size<W>(d));
    }

    W* cache(void* base, int64_t l, int64_t head) const {
        return static_cast<W*>(base) + (l * m_.kv_heads + head) * c_.pages * c_.page * entry_size<W>(m_.head_dim);
    }

    // Attention: one unit of one KV head.
    void mix(const LayerPointers& layer, int64_t l, int64_t u, float* scratch) {
        const int64_t head = u / plan_.units;
        const Unit& unit = plan_.unit(u % plan_.units);
        const Task& task = plan_.task(unit.task);
        const Segment& s = plan_.segment(task.segment);
        const int64_t row = s.first + task.offset, queries = task.count * group_;
        Attention<W> attention(
            {s, &plan_.row(row), task.count, (int)group_, c_.position, layer.window, m_.head_dim,
             query_ + (head * c_.rows + row) * group_ * query_size_, cache(c_.k, l, head), cache(c_.v, l, head),
             (float)m_.attention_scale, (float)m_.attention_cap},
            scratch
        );
        if (task.kept >= 0) return attention.part(unit.from, kept(head, task, unit.from), mass(head, task, unit.from));
        float *sums = scratch + score_floats(), *more = sums + queries * sums_size_;
        for (int64_t part = unit.from; part < unit.to; ++part) {
            attention.part(part, part == unit.from ? sums : more);
            for (int64_t q = 0; part > unit.from && q < queries; ++q)
                Sums::fold(sums + q * sums_size_, more + q * sums_size_, m_.head_dim, score_scale());
        }
        finish(layer, head, task, sums);
    }

    // Folds the kept results of a task of one KV head.
    void fold(const LayerPointers& layer, int64_t u, float* scratch) {
        const int64_t head = u / plan_.tasks;
        const Task& task = plan_.task(u % plan_.tasks);
        if (task.kept < 0) return;
        float* sums = scratch + score_floats();
        const int64_t size = task.count * group_ * sums_size_;
        std::memcpy(sums, kept(head, task, 0), size * sizeof(float));
        for (int64_t part = 1; part < task.parts; ++part)
            for (int64_t at = 0; at < size; at += sums_size_)
                Sums::fold(sums + at, kept(head, task, part) + at, m_.head_dim, score_scale());
        finish(layer, head, task, sums);
        if (task.mass) tell(head, task, sums);
    }

    // Adds the softmax weights of a task's queries to the call's `mass`: one task of a segment and KV head does. sums: finished.
    void tell(int64_t head, const Task& task, const float* sums) {
        float* out = c_.mass + (head * c_.segments + task.segment) * c_.chunks;
        for (int64_t part = 0; part < task.parts; ++part)
            Sums::add_weights(kept(head, task, part), mass(head, task, part), sums, task.count * group_, sums_size_, score_scale(),
                out + part * CHUNKS);
    }

    void finish(const LayerPointers& layer, int64_t head, const Task& task, float* sums) {
        const int64_t d = m_.head_dim, row = plan_.segment(task.segment).first + task.offset;
        for (int64_t q = 0; q < task.count * group_; ++q) {
            Sums::finish(sums + q * sums_size_, d, layer.sinks ? layer.sinks + head * group_ + q % group_ : nullptr, score_scale());
            mixed_.put(row + q / group_, (head * group_ + q % group_) * d, sums + q * sums_size_ + Sums::HEAD, d);
        }
    }

    float* kept(int64_t head, const Task& task, int64_t part) const {
        return kept_ + place(head, task, part) * sums_size_;
    }
    float* mass(int64_t head, const Task& task, int64_t part) const {
        return task.mass ? mass_ + place(head, task, part) * CHUNKS : nullptr;
    }
    int64_t place(int64_t head, const Task& task, int64_t part) const {
        return head * plan_.kept + task.kept + part * task.count * group_;
    }

    float score_scale() const { return m_.attention_cap > 0.0 ? 1.0f : (float)m_.attention_scale; }

    ModelPointers m_;
    CallPointers c_;
    Plan plan_;
    int64_t group_ = 1, half_ = 0, query_size_ = 0, sums_size_ = 0;
    int stores_ = 0;
    bool row_norms_ = false;
    Buffer<float> heads_, cosine_, sine_, kept_, mass_;
    Buffer<Item> query_;
    Input mixed_;
};

}  // namespace outrider
