// Attention of a few rows over their sequence's cached tokens and their own ancestors.
//
// A row's visible keys are one sequence: cached tokens in order, then its path. It is cut into parts of PART keys, counted from its
// start. Within a part scores are single dot products, sums of the softmax run in fixed lanes, values are added one by one along
// the keys; parts are folded in order. All of that depends on the row alone: verified as a node of a tree, or in any batch, on any
// number of threads, it gets the bits it would get if it were decoded alone.
//
// What all rows see is read once for all of them; what only some see (their own tokens, the rims of a window) is added row by row.
#pragma once

#include "layout.h"
#include "scores.h"
#include "weigh.h"

namespace outrider {

constexpr int SUM_LANES = 16;  // of a sum, whatever the CPU's vectors are
constexpr int PART = 512;      // visible keys of a part
constexpr int CHUNK = 16;      // of which it is told how much weight they got
constexpr int CHUNKS = PART / CHUNK;

// x[0 : n] = cap * tanh(scale * x / cap). Up to LANES - 1 floats behind are overwritten.
inline void bound_softly(float* x, int n, float scale, float cap) {
    const float twice = 2.0f * scale / cap;
    for (int i = 0; i < n; i += LANES) store(x + i, cap - 2.0f * cap / (exp_near(load<vf>(x + i) * twice) + 1.0f));
}

// Visible keys of one row in one layer: the numbers first : last of its sequence; number `cached` + i is its path's place i.
struct Visible {
    int64_t first, last;

    // A row at position t with a window w sees positions above t - w; a cached token's position is its number.
    Visible(const Segment& s, const Row& row, const int64_t* position, int64_t window) : first(0), last(s.cached + row.depth) {
        if (window == 0) return;
        const int64_t oldest = position[s.first + row.offset] - window + 1;
        first = oldest < 0 ? 0 : oldest < s.cached ? oldest : s.cached;
        while (first >= s.cached && first + 1 < last && position[s.first + row.path[first - s.cached]] < oldest) ++first;
    }
};

// A query's result over some parts, `size` floats: the largest score, the sum of exp(scale * (score - largest)) (0: nothing was
// seen), then from HEAD on that of exp * value.
struct Sums {
    static constexpr int64_t HEAD = 16;
    static int64_t size(int64_t width) { return HEAD + (width + 15) / 16 * 16; }

    // into = what both have seen.
    static void fold(float* into, const float* more, int64_t width, float scale) {
        if (more[1] == 0.0f) return;
        if (into[1] == 0.0f) {
            std::memcpy(into, more, size(width) * sizeof(float));
            return;
        }
        const float top = more[0] > into[0] ? more[0] : into[0];
        const float a = exp_near(vf{} + (into[0] - top) * scale)[0], b = exp_near(vf{} + (more[0] - top) * scale)[0];
        into[0] = top, into[1] = into[1] * a + more[1] * b;
        for (int64_t d = HEAD; d < HEAD + width; ++d) into[d] = into[d] * a + more[d] * b;
    }

    // out[c] += the softmax weight that some queries, `step` floats apart, give to the chunks of a part. more: their sums of the part;
    // mass: of it, see Attention::part; all: their sums of all parts, finished.
    static void add_weights(
        const float* more, const float* mass, const float* all, int64_t queries, int64_t step, float scale, float* out
    ) {
        for (int64_t q = 0; q < queries; ++q, more += step, mass += CHUNKS, all += step) {
            if (more[1] == 0.0f) continue;
            const float share = exp_near(vf{} + (more[0] - all[0]) * scale)[0] / all[1];
            for (int c = 0; c < CHUNKS; ++c) out[c] += share * mass[c];
        }
    }

    // The mean from the sums. sink: a score that takes weight and adds nothing, which then is in the largest score and the sum; null: none.
    static void finish(float* sums, int64_t width, const float* sink, float scale) {
        float a = 1.0f;
        if (sink) {
            const float top = sums[0] * scale, high = *sink > top ? *sink : top;
            a = exp_near(vf{} + (top - high))[0];
            sums[0] = high / scale, sums[1] = sums[1] * a + exp_near(vf{} + (*sink - high))[0];
        }
        for (int64_t d = HEAD; d < HEAD + width; ++d) sums[d] = sums[d] * a / sums[1];
    }
};

// line[from : to] -> exp(scale * (score - largest)), zeros around it within 0 : n; n is a multiple of SUM_LANES. Returns the sum;
// its lanes are counted from the start of the line.
inline float softmax_terms(float* line, int from, int to, int n, float scale, float* largest) {
    constexpr int S = SUM_LANES / LANES, SIDE = 4;  // vectors of a sum's lanes, and vectors whose terms are computed side by side
    float top = line[from];
    int i = from;
    if (to - from >= LANES) {
        vf tops = load<vf>(line + from);
        for (; i + LANES <= to; i += LANES) tops = larger(load<vf>(line + i), tops);
        for (int j = 0; j < LANES; ++j) top = tops[j] > top ? tops[j] : top;
    }
    for (; i < to; ++i) top = line[i] > top ? line[i] : top;
    vf total[S] = {};
    const auto terms = [&](int at, auto vectors) __attribute__((always_inline)) {
        constexpr int N = decltype(vectors)::value;
        vf x[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) x[j] = (load<vf>(line + at + j * LANES) - top) * scale;
        exp_falling(x);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) store(line + at + j * LANES, x[j]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) total[j % S] += x[j];
    };
    const auto rim = [&](int at) {  // SUM_LANES scores of which not all count
        float lanes[SUM_LANES] = {};
        for (int j = 0; j < SUM_LANES; j += LANES) {
            vf x[1] = {(load<vf>(line + at + j) - top) * scale};
            exp_falling(x);
            store(lanes + j, x[0]);
        }
        for (int j = 0; j < SUM_LANES; ++j) line[at + j] = at + j >= from && at + j < to ? lanes[j] : 0.0f;
        for (int j = 0; j < S; ++j) total[j] += load<vf>(line + at + j * LANES);
    };
    i = from / SUM_LANES * SUM_LANES;
    std::memset(line, 0, i * sizeof(float));
    if (i < from) rim(i), i += SUM_LANES;
    for (; i + SIDE * LANES <= to; i += SIDE * LANES) terms(i, std::integral_constant<int, SIDE>{});
    for (; i + SUM_LANES <= to; i += SUM_LANES) terms(i, std::integral_constant<int, S>{});
    if (i < to) rim(i), i += SUM_LANES;
    if (i < n) std::memset(line + i, 0, (n - i) * sizeof(float));
    *largest = top;
    for (int width = S / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) total[j] += total[j + width];
    return sum(total[0]);
}

// Neighbouring rows of a segment in one layer, for the `group` heads of one KV head: one task of attention, part by part.
template <class W>
class Attention {
    using Item = typename Query<W>::Item;

   public:
    // query: [count * group] packed queries, query_stride apart. keys, values: the places of the layer and KV head.
    struct Inputs {
        const Segment& segment;
        const Row* row;  // [count]
        int count, group;
        const int64_t* position;
        int64_t window, width;
        const Item* query;
        const W *keys, *values;
        float scale, cap;  // cap: soft bound of the scores, 0 for none
        // What the softmax multiplies scores by: bounded ones are scaled already.
        float factor() const { return cap > 0.0f ? 1.0f : scale; }
    };

    // Floats of scratch: turned keys, and for every query its scores of a part and of `rows` own rows.
    static int64_t scratch_floats(int64_t queries, int64_t rows, int64_t width) {
        return turned_floats(width) + queries * (line_size(PART) + line_size(rows));
    }

    Attention(const Inputs& in, float* scratch)
        : in_(in), s_(in.segment), queries_(in.count * in.group), cached_(s_.cached), entry_(entry_size<W>(in.width)),
          lines_(scratch), score_(scratch + turned_floats(in.width)), own_score_(score_ + queries_ * line_size(PART)) {
        const Row &head = in.row[0], &tail = in.row[in.count - 1];
        chain_ = true;
        for (int i = 0; i < in.count; ++i) chain_ = chain_ && in.row[i].depth == in.row[i].offset + 1;
        scored_ = chain_ ? cached_ + tail.offset + 1 : cached_;
        shared_ = chain_ ? cached_ + head.offset + 1 : cached_;
        least_ = most_ = Visible(s_, head, in.position, in.window).first;
        for (int i = 1; i < in.count; ++i) {
            const int64_t first = Visible(s_, in.row[i], in.position, in.window).first;
            least_ = first < least_ ? first : least_, most_ = first > most_ ? first : most_;
        }
    }

    // sums[q * Sums::size] = what each query sees of a part. mass[q * CHUNKS + c], if it is not null: the sum of exp(scale *
    // (score - largest of the part)) over the keys c * CHUNK : (c + 1) * CHUNK of the part.
    void part(int64_t index, float* sums, float* mass = nullptr) {
        const int64_t low = index * PART, high = low + PART, size = Sums::size(in_.width);
        const int64_t ld = line_size(PART);
        for (int q = 0; q < queries_; ++q) std::memset(sums + q * size, 0, size * sizeof(float));
        if (mass) std::memset(mass, 0, queries_ * CHUNKS * sizeof(float));
        score(low, high);
        // what all queries see of this part
        const int64_t from = most_ > low ? most_ : low, to = shared_ < high ? shared_ : high;
        const bool joint = from < to;
        for (int q = 0; q < queries_; ++q) {
            const Row& row = in_.row[q / in_.group];
            const Visible seen(s_, row, in_.position, in_.window);
            const int64_t a = seen.first > low ? seen.first : low, b = seen.last < high ? seen.last : high;
            float *line = score_ + q * ld, *mine = sums + q * size;
            if (a >= b) continue;
            if (!chain_)
                for (int64_t j = a > cached_ ? a : cached_; j < b; ++j)
                    line[j - low] = own_score_[q * line_size(s_.end()) + row.path[j - cached_]];
            const int n = (int)((b - low + SUM_LANES - 1) / SUM_LANES * SUM_LANES);
            if (in_.cap > 0.0f) bound_softly(line + (a - low), (int)(b - a), in_.scale, in_.cap);
            mine[1] = softmax_terms(line, (int)(a - low), (int)(b - low), n, in_.factor(), mine);
            for (int j = 0; mass && j < n; j += CHUNK)
                for (int i = 0; i < CHUNK; i += LANES) mass[q * CHUNKS + j / CHUNK] += sum(load<vf>(line + j + i));
            weigh_alone(row, line, low, a, joint && from < b ? from : b, mine + Sums::HEAD);
        }
        if (!joint) return;
        each_run(s_, from, to, [&](int64_t place, int64_t count, int64_t at) {
            const W *values = in_.values + at * entry_, *next = in_.keys + (at + PART) * entry_;  // most likely: of the next part
            weigh_values<W>(score_ + (place - low), ld, queries_, values, in_.width, count, sums + Sums::HEAD, size,
                place + PART < cached_ ? next : values);
        });
        for (int q = 0; q < queries_; ++q) {
            const Row& row = in_.row[q / in_.group];
            const int64_t last = Visible(s_, row, in_.position, in_.window).last;
            weigh_alone(row, score_ + q * ld, low, to, last < high ? last : high, sums + q * size + Sums::HEAD);
        }
    }

    static int64_t line_size(int64_t n) { return (n + 15) / 16 * 16 + 16; }

   private:
    // Scores of the keys low : high that lie in order, and of own rows where paths pick them.
    void score(int64_t low, int64_t high) {
        const int64_t from = least_ > low ? least_ : low, to = scored_ < high ? scored_ : high;
        const int64_t stride = query_stride<W>(in_.width);
        const W* few[KEY_BLOCK];  // keys of short runs, which are multiplied together
        int held = 0;
        const auto flush = [&](int64_t end) {
            if (held > 0)
                score_few<W>([&](int i) { return few[i]; }, in_.width, held, in_.query, stride, queries_, score_ + (end - held - low),
                    line_size(PART), lines_, reinterpret_cast<const W*>(lines_));  // values were asked for: what is at hand is again
            held = 0;
        };
        if (from < to)
            each_run(s_, from, to, [&](int64_t place, int64_t count, int64_t at) {
                const W *keys = in_.keys + at * entry_, *values = in_.values + at * entry_;
                for (int64_t i = 0; i < count;) {
                    if (held == 0 && count - i >= KEY_BLOCK) {
                        const int64_t whole = (count - i) / KEY_BLOCK * KEY_BLOCK;
                        score_keys<W>(keys + i * entry_, in_.width, whole, in_.query, stride, queries_, score_ + (place + i - low),
                            line_size(PART), lines_, values + i * entry_);
                        i += whole;
                        continue;
                    }
                    const int64_t room = KEY_BLOCK - held, more = count - i < room ? count - i : room;
                    for (int64_t j = i; j < i + more; ++j) {
                        const char* value = reinterpret_cast<const char*>(values + j * entry_);
                        for (int64_t b = 0; b < entry_ * (int64_t)sizeof(W); b += 64) ask<1>(value + b);
                        few[held++] = keys + j * entry_;
                    }
                    i += more;
                    if (held == KEY_BLOCK) flush(place + i);
                }
            });
        flush(to);
        if (chain_ || own_known_ || high <= cached_) return;
        own_known_ = true;
        const Row& tail = in_.row[in_.count - 1];
        each_run(s_, cached_, cached_ + tail.path[tail.depth - 1] + 1, [&](int64_t place, int64_t count, int64_t at) {
            score_keys<W>(in_.keys + at * entry_, in_.width, count, in_.query, stride, queries_,
                own_score_ + (place - cached_), line_size(s_.end()), lines_, in_.keys + at * entry_);
        });
    }

    // Adds the values of the numbers from : to that one query sees.
    void weigh_alone(const Row& row, const float* line, int64_t low, int64_t from, int64_t to, float* sums) const {
        const int64_t end = to < cached_ ? to : cached_;
        if (from < end)
            each_run(s_, from, end, [&](int64_t place, int64_t count, int64_t at) {
                const W* values = in_.values + at * entry_;
                weigh_values<W>(line + (place - low), 0, 1, values, in_.width, count, sums, 0, values);
            });
        for (int64_t j = from > cached_ ? from : cached_; j < to; ++j) {
            const W* value = in_.values + s_.own[row.path[j - cached_]] * entry_;
            weigh_values<W>(line + (j - low), 0, 1, value, in_.width, 1, sums, 0, value);
        }
    }

    const Inputs in_;
    const Segment& s_;
    const int queries_;
    const int64_t cached_, entry_;
    float *const lines_, *const score_, *const own_score_;
    bool chain_, own_known_ = false;
    int64_t scored_, shared_, least_, most_;  // ends of what lies in order and of what all see; first keys of the rows
};

}  // namespace outrider
