// Attention of a few rows over their slot's cached tokens and their own ancestors.
//
// A row's visible keys are one sequence: cached tokens in order, then its path. Scores are single dot products, the softmax
// sums in blocks counted from the start of that sequence, values are added one by one along it. So a row that is verified as a
// node of a tree gets the bits it would get if it were decoded alone.
#pragma once

#include "layout.h"
#include "linear.h"

namespace outrider {

constexpr int SUM_LANES = 16;  // also the slack a score buffer needs behind its last score

// scores[0 : n] -> exp(scale * (score - max)); returns the sum. Up to SUM_LANES - 1 floats behind are overwritten.
inline float softmax_terms(float* scores, int n, float scale) {
    vf tops = vf{} + scores[0];
    int i = 0;
    for (; i + LANES <= n; i += LANES) tops = larger(load<vf>(scores + i), tops);
    float top = scores[0];
    for (; i < n; ++i) top = scores[i] > top ? scores[i] : top;
    for (int j = 0; j < LANES; ++j) top = tops[j] > top ? tops[j] : top;
    for (i = 0; i < n; i += LANES) store(scores + i, exp_near((load<vf>(scores + i) - top) * scale));
    for (i = n; i % SUM_LANES; ++i) scores[i] = 0.0f;
    float lanes[SUM_LANES] = {};
    for (i = 0; i < n; i += SUM_LANES)
        for (int j = 0; j < SUM_LANES; ++j) lanes[j] += scores[i + j];
    for (int width = SUM_LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    return lanes[0];
}

// x[0 : n] = cap * tanh(scale * x / cap). Up to LANES - 1 floats behind are overwritten.
inline void bound_softly(float* x, int n, float scale, float cap) {
    const float twice = 2.0f * scale / cap;
    for (int i = 0; i < n; i += LANES) store(x + i, cap - 2.0f * cap / (exp_near(load<vf>(x + i) * twice) + 1.0f));
}

// Visible keys of one row in one layer: places cached_from : cached, then `path`.
struct Visible {
    int64_t cached_from, cached;
    const int32_t* path;
    int32_t path_count;
    int count() const { return (int)(cached - cached_from) + path_count; }

    // A row at position t with a window w sees positions above t - w; a cached token's position is its place.
    Visible(const Segment& s, const Row& row, const int64_t* position, int64_t window)
        : cached_from(0), cached(s.cached), path(row.path), path_count(row.depth) {
        if (window == 0) return;
        const int64_t oldest = position[s.first + row.offset] - window + 1;
        cached_from = oldest < 0 ? 0 : oldest < cached ? oldest : cached;
        while (path_count > 1 && position[s.first + path[0]] < oldest) ++path, --path_count;
    }
};

// out[0 : BLOCKS * LANES] = sum over visible keys of p * value.
template <class W, int BLOCKS>
inline void weigh_block(const float* p, const W* values, int64_t width, const Visible& seen, float* out) {
    vf acc[BLOCKS] = {};
    const auto add = [&](float weight, const W* value) {
        const vf w = weight - vf{};
#pragma GCC unroll 8
        for (int b = 0; b < BLOCKS; ++b) acc[b] = fma(w, load_wide(value + b * LANES), acc[b]);
    };
    for (int64_t j = seen.cached_from; j < seen.cached; ++j) add(*p++, values + j * width);
    for (int32_t i = 0; i < seen.path_count; ++i) add(*p++, values + (seen.cached + seen.path[i]) * width);
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) store(out + b * LANES, acc[b]);
}

template <class W>
inline void weigh(const float* p, const W* values, int width, const Visible& seen, float* out) {
    int d = 0;
    for (; d + 8 * LANES <= width; d += 8 * LANES) weigh_block<W, 8>(p, values + d, width, seen, out + d);
    for (; d + 4 * LANES <= width; d += 4 * LANES) weigh_block<W, 4>(p, values + d, width, seen, out + d);
    for (; d + LANES <= width; d += LANES) weigh_block<W, 1>(p, values + d, width, seen, out + d);
    for (; d < width; ++d) {
        float total = 0.0f;
        const float* weight = p;
        for (int64_t j = seen.cached_from; j < seen.cached; ++j) total += *weight++ * widen(values[j * width + d]);
        for (int32_t i = 0; i < seen.path_count; ++i)
            total += *weight++ * widen(values[(seen.cached + seen.path[i]) * width + d]);
        out[d] = total;
    }
}

// Attention of `count` neighbouring rows of a segment for the `group` heads of one KV head.
//
// rows: their Row records. query: [count * group] packed queries, `stride` apart. keys, values: [capacity, width] of the slot
// and KV head. cap: soft bound of the scores, 0 for none. scores: scratch of count * group * (visible + SUM_LANES) floats. emit(i, g, out) receives the results in turn.
template <class W, class Emit>
inline void attend(
    const Segment& s, const Row* rows, int count, const int64_t* position, int64_t window, int group,
    const typename Packing<W>::Item* query, int64_t stride, const W* keys, const W* values, int width, float scale, float cap,
    float* scores, float* out, const Emit& emit
) {
    int64_t low = s.cached;
    for (int i = 0; i < count; ++i) {
        const int64_t from = Visible(s, rows[i], position, window).cached_from;
        low = from < low ? from : low;
    }
    const int span = (int)(s.cached - low) + rows[count - 1].offset + 1;
    const int64_t row_size = span + SUM_LANES;
    product<W>(keys + low * width, width, span, query, stride, count * group, width, scores, row_size);
    for (int i = 0; i < count; ++i) {
        const Visible seen(s, rows[i], position, window);
        for (int g = 0; g < group; ++g) {
            float* line = scores + (i * group + g) * row_size;
            float* own = line + (s.cached - low);
            for (int32_t d = 0; d < seen.path_count; ++d) own[d] = own[seen.path[d]];  // paths increase: nothing is overwritten
            float* first = line + (seen.cached_from - low);
            if (cap > 0.0f) bound_softly(first, seen.count(), scale, cap);
            const float total = softmax_terms(first, seen.count(), cap > 0.0f ? 1.0f : scale);
            weigh<W>(first, values, width, seen, out);
            for (int d = 0; d < width; ++d) out[d] /= total;
            emit(i, g, out);
        }
    }
}

}  // namespace outrider
