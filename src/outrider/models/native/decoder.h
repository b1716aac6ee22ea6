// The forward of a decoder over flat rows, with a cache of type W (see cached.h).
//
// Residual stream and element-wise maths are float32; inputs of linears are rounded as their weights' types ask. Threads split
// outputs, never sums.
#pragma once

#include "crew.h"
#include "experts.h"
#include "joined.h"
#include "plan.h"

namespace outrider {

template <class W>
class Decoder {
    using Item = typename Query<W>::Item;
    static constexpr int64_t BLOCK = 48;  // outputs of a linear that a thread takes at a time: whole tiles of 3, 4 and 2 rows
    static constexpr int64_t WIDE = 64;    // the same where weights are quantised: whole pairs of groups
    static constexpr int64_t QUERIES = 32;  // rows times heads that an attention task aims at

   public:
    // Keeps pointers to all that it is given, the layers too. f: of a learned drafter.
    void build(const ModelPointers& m, const FeaturePointers& f = {}) {
        m_ = m;
        outputs_ = f.outputs ? f.outputs : m.vocab, support_ = f.support;
        features_.build(f, m.hidden, m.eps, m.layer[0].qkv->stores());
        group_ = m.heads / m.kv_heads, half_ = m.turned;
        normed_stores_ = m.head->stores(), mixed_stores_ = inner_stores_ = 0;
        int down_stores = 0;
        for (int64_t i = 0; i < m.layers; ++i) {
            const LayerPointers& layer = m.layer[i];
            for (const Linear* reads : {layer.qkv, layer.gate_up, layer.router, layer.shared_gate_up, layer.shared_gate})
                normed_stores_ |= reads ? reads->stores() : 0;
            mixed_stores_ |= layer.o->stores(), down_stores |= layer.down->stores();
            inner_stores_ |= layer.router ? 0 : layer.down->stores();
            posts_ = posts_ || layer.post1 || layer.post2;
            row_norms_ = row_norms_ || layer.row_norm;
        }
        block_ = (normed_stores_ | mixed_stores_ | down_stores) & (STORE_32 | STORE_256) ? WIDE : BLOCK;
        mixture_.build(m_, block_);
    }

    Status forward(const CallPointers& call, const FeatureRows& rows = {}) {
        c_ = call, out_ = rows.out;
        const int64_t rows_per_task = group_ < QUERIES ? QUERIES / group_ : 1;
        const Status status = plan_.build(c_, m_.vocab, rows_per_task, group_, rows.skipped, rows.mutual);
        if (status != OK) return status;
        if (!features_.begin(rows, c_.rows) || !make_room()) return NO_MEMORY;
        return crew_.run((int)c_.threads, c_.rows, phases_, [this](int thread, int count) { run(thread, count); }) ? OK : NO_MEMORY;
    }

   private:
    bool make_room() {
        x_size_ = (m_.hidden + 15) / 16 * 16;
        query_size_ = query_stride<W>(m_.head_dim);
        sums_size_ = Sums::size(m_.head_dim);
        const int64_t widest = m_.head_dim > 2 * block_ ? m_.head_dim : 2 * block_;
        const int64_t widest_line = m_.hidden > m_.head_dim ? m_.hidden : m_.head_dim;
        const int64_t line = features_.line() > widest_line ? features_.line() : widest_line;
        tile_at_ = (line + 15) / 16 * 16;
        scores_at_ = tile_at_ + ((c_.rows > c_.scored ? c_.rows : c_.scored) * widest + 15) / 16 * 16;
        const int64_t queries = plan_.task_rows * group_;
        sums_at_ = scores_at_ + Attention<W>::scratch_floats(queries, plan_.own_rows, m_.head_dim);
        scratch_size_ = (sums_at_ + 2 * queries * sums_size_ + 31) / 16 * 16;
        const int64_t turns = c_.rows * half_ * m_.frequencies;
        return mixture_.reserve(c_.rows, c_.touched) && x_.reserve(c_.rows * x_size_) && cosine_.reserve(turns) && sine_.reserve(turns) &&
               part_.reserve(posts_ ? c_.rows * x_size_ : 0) &&
               heads_.reserve(row_norms_ ? c_.rows * (m_.heads + m_.kv_heads) * m_.head_dim : 0) &&
               normed_.reserve(c_.rows > c_.scored ? c_.rows : c_.scored, m_.hidden, normed_stores_) &&
               query_.reserve(c_.rows * m_.heads * query_size_) && kept_.reserve(m_.kv_heads * plan_.kept * sums_size_) &&
               mass_.reserve(c_.mass ? m_.kv_heads * plan_.kept * CHUNKS : 0) &&
               mixed_.reserve(c_.rows, m_.heads * m_.head_dim, mixed_stores_) &&
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
            return phase(m_.layers * each, [&](int64_t u) { project_head(m_.layer[u / each], u / each, m_.heads + u % each, scratch); });
        }
        for (int64_t l = 0; l < m_.layers; ++l) {
            const LayerPointers& layer = m_.layer[l];
            phase(m_.heads + 2 * m_.kv_heads, [&](int64_t u) { project_head(layer, l, u, scratch); });
            if (layer.row_norm) phase(c_.rows, [&](int64_t i) { norm_row(layer, l, i); });
            phase(m_.kv_heads * plan_.units, [&](int64_t u) { mix(layer, l, u, scratch); });
            if (plan_.kept > 0) phase(m_.kv_heads * plan_.tasks, [&](int64_t u) { fold(layer, u, scratch); });
            round(mixed_);
            phase(blocks(m_.hidden), [&](int64_t u) { add_product(*layer.o, mixed_, layer.o_bias, layer.post1, u, scratch); });
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
        const int64_t n = half_ * m_.frequencies;
        for (int64_t j = 0; j < n; ++j) {
            const float angle = (float)c_.position[i] * m_.inv_freq[j];
            cosine_[i * n + j] = std::cos(angle) * (float)m_.rope_scale;
            sine_[i * n + j] = std::sin(angle) * (float)m_.rope_scale;
        }
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

    // Query, key or value head u of all rows: product, bias, norm, rotation; queries are packed, keys and values cached.
    void project_head(const LayerPointers& layer, int64_t l, int64_t u, float* scratch) {
        const int64_t d = m_.head_dim;
        float* tile = scratch + tile_at_;
        layer.qkv->product(u * d, d, l == 0 && features_.beside() ? features_.pair() : normed_, 0, c_.rows, tile, d);
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
            scratch + scores_at_
        );
        if (task.kept >= 0) return attention.part(unit.from, kept(head, task, unit.from), mass(head, task, unit.from));
        float *sums = scratch + sums_at_, *more = sums + queries * sums_size_;
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
        float* sums = scratch + sums_at_;
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
    Plan plan_;
    Crew crew_;
    Phases phases_;
    Features features_;
    float* out_ = nullptr;
    const int64_t* support_ = nullptr;
    int64_t group_ = 1, half_ = 0, block_ = BLOCK, outputs_ = 0;
    bool posts_ = false, row_norms_ = false;
    int normed_stores_ = 0, mixed_stores_ = 0, inner_stores_ = 0;
    int64_t x_size_, query_size_, scratch_size_, tile_at_, scores_at_, sums_at_, sums_size_;
    Buffer<float> x_, part_, heads_, cosine_, sine_, scratch_, kept_, mass_;
    Buffer<Item> query_;
    Input normed_, mixed_, inner_;
    Mixture mixture_;
};

}  // namespace outrider
