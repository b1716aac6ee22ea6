// Passes of the rules over a whole vocabulary. Plain twins: `overlap_sums` in block.py, `best_choice` and `plain_choice` in transport.py.
//
// Everything runs in one thread and on one row: a verdict must not depend on the rest of the batch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t BLOCK = 1024;  // summed in the dtype of the distributions; blocks are added in double
constexpr double LEAST = 1e-12;  // as in transport.py
constexpr double MIN_MASS = 1e-300;
constexpr float TINY = 1e-37f;
constexpr int BANKS = 4;  // neighbours often meet in one piece: separate sums do not wait for each other

template <class T>
struct Lanes {
    static constexpr int N = 64 / sizeof(T);
    typedef T V __attribute__((vector_size(64)));
    static V load(const T* x) {
        V v;
        __builtin_memcpy(&v, x, sizeof v);
        return v;
    }
};

template <class V>
V least(V a, V b) {
    return a < b ? a : b;
}

struct Sums {
    double common = 0, rest = 0, square = 0;
};

// Sums of min(wp, q), max(wp - q, 0) and min(wp, q)^2 / q.
template <class T>
Sums overlap(const T* p, const T* q, T w, int64_t n) {
    using L = Lanes<T>;
    typename L::V zero{}, tiny = zero + std::numeric_limits<T>::min();
    Sums out;
    int64_t i = 0;
    while (i + L::N <= n) {
        typename L::V common = zero, rest = zero, square = zero;
        for (const int64_t end = std::min(n - L::N + 1, i + BLOCK); i < end; i += L::N) {
            typename L::V here = L::load(p + i) * w, other = L::load(q + i), both = least(here, other);
            common += both;
            rest += here - both;
            square += both * both / (other < tiny ? tiny : other);
        }
        for (int l = 0; l < L::N; ++l) out.common += common[l], out.rest += rest[l], out.square += square[l];
    }
    for (; i < n; ++i) {
        T here = p[i] * w, both = here < q[i] ? here : q[i];  // a NaN in q stays one, as in the loop above
        out.common += both, out.rest += here - both;
        out.square += both * both / std::max(q[i], std::numeric_limits<T>::min());
    }
    return out;
}

// Weights max(wp - q, 0) in double, or wp without q; zero for the token `banned`, if there is one.
template <class T>
struct Residual {
    const T *p, *q;
    double w;
    int64_t banned = -1;
    double operator[](int64_t i) const {
        const double x = i == banned ? 0.0 : static_cast<double>(p[i]) * w - (q ? static_cast<double>(q[i]) : 0.0);
        return x > 0 ? x : 0.0;
    }
    double sum(int64_t from, int64_t to) const {
        double lane[8] = {};
        int64_t i = from;
        for (; i + 8 <= to; i += 8)
            for (int l = 0; l < 8; ++l) lane[l] += (*this)[i + l];
        for (; i < to; ++i) lane[0] += (*this)[i];
        return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
};

// The column where the running sum passes u times the total. Never a column of weight zero while there is another.
template <class T>
int64_t draw(const Residual<T>& weight, int64_t size, double u, double* total) {
    std::vector<double> block;
    for (int64_t i = 0; i < size; i += BLOCK) block.push_back(weight.sum(i, std::min(size, i + BLOCK)));
    *total = 0.0;
    for (double x : block) *total += x;
    double left = u * *total;
    int64_t at = 0, found = 0;
    for (size_t b = 0; b < block.size(); ++b) {
        if (block[b] > 0) at = static_cast<int64_t>(b) * BLOCK;
        if (left < block[b]) break;
        left -= block[b];
    }
    for (int64_t i = at; i < std::min(size, at + BLOCK); ++i) {
        const double x = weight[i];
        if (x > 0) found = i;
        if (left < x) break;
        left -= x;
    }
    return found;
}

double power(double x, int k) {
    double out = 1.0;
    for (; k > 0; --k) out *= x;
    return out;
}

// The best m / q of every piece: twin of `_best_multiplier`.
std::vector<double> best_multiplier(const std::vector<double>& p, const std::vector<double>& q, int k) {
    const int n = static_cast<int>(p.size());
    std::vector<double> ratio(n), mass(n + 1, 0.0), wanted(n + 1, 0.0);
    int h = 0;
    double high = 0.0, least_cut = 0.0;
    for (int j = 0; j < n; ++j) {
        if (q[j] > 0) high = std::max(high, std::min(p[j], k * q[j]) / q[j]);
        ratio[j] = high;
        mass[j + 1] = mass[j] + q[j], wanted[j + 1] = wanted[j] + p[j];
        const double cut = wanted[j + 1] - power(mass[j + 1], k);
        if (cut < least_cut) least_cut = cut, h = j + 1;
    }
    const double inside = power(std::min(mass[h], 1.0), k);
    std::vector<double> out = ratio;
    for (int i = 0; i < h; ++i) {
        const double level = (inside - wanted[h] + wanted[i + 1]) / std::max(mass[i + 1], MIN_MASS);
        if (i + 1 < h && !(level <= ratio[i + 1] && mass[i + 1] > 0)) continue;
        for (int j = 0; j < h; ++j) out[j] = std::max(out[j], level);
        break;
    }
    for (int i = h; i < n; ++i) {
        const double above = 1.0 - mass[i], level = (1.0 - inside - wanted[i] + wanted[h]) / std::max(above, LEAST);
        if (!(above > LEAST && level <= ratio[i])) continue;
        for (int j = h; j < n; ++j) out[j] = std::min(out[j], std::max(level, 0.0));
        break;
    }
    return out;
}

// The kernels of `CandidateChoice`: slopes are runs of pieces with one multiplier.
struct Choice {
    std::vector<int> slope_of;
    std::vector<double> start, stop, ends, hand, cell, mean;
};

// Where the line of slope j through (start, done) leaves the region above t^k. `at` comes from the right and stays there.
double cut(double start, double done, double slope, int k, double at) {
    for (int i = 0; i < 60; ++i) {
        const double below = power(at, k - 1), over = below * at - slope * (at - start) - done, rise = k * below - slope;
        if (!(over > 0 && rise > 0)) break;
        const double step = over / rise;
        at -= step;
        if (step <= 1e-14) break;
    }
    return at;
}

Choice choose(const std::vector<double>& p, std::vector<double> q, int k) {
    const int pieces = static_cast<int>(p.size());
    double sum = 0.0;
    for (double x : q) sum += x;
    for (double& x : q) x /= sum;
    const std::vector<double> goal = best_multiplier(p, q, k);
    Choice out;
    out.slope_of.resize(pieces);
    std::vector<double> slope, done;
    double mass = 0.0, reached = 0.0, from = 0.0;
    for (int j = 0; j < pieces; ++j) {
        mass += q[j];
        out.slope_of[j] = static_cast<int>(slope.size());
        const bool last = j + 1 == pieces;
        if (!last && !(goal[j + 1] > goal[j])) continue;
        out.start.push_back(from), done.push_back(reached), slope.push_back(goal[j]);
        from = last ? 1.0 : mass;
        out.stop.push_back(from);
        reached += goal[j] * (from - out.start.back());
    }
    const int n = static_cast<int>(slope.size());
    out.ends.resize(n);
    for (int j = 0; j < n; ++j) out.ends[j] = std::max(cut(out.start[j], done[j], slope[j], k, 1.0), out.stop[j]);
    double before = 0.0, mean = 0.0;
    for (int j = 0; j < n; ++j) {
        out.ends[j] = std::min(std::max(before, out.ends[j]), 1.0);
        const double width = out.ends[j] - out.start[j];
        const bool empty = width <= 0;
        double hand = empty ? 1.0 : std::min(std::max((before - out.start[j]) / width, 0.0), 1.0);
        if (j == 0) hand = 0.0;
        const double cell = empty ? 0.0 : 1.0 / width;
        mean = (power(out.ends[j], k) - power(before, k)) * cell + hand * mean;
        out.hand.push_back(hand), out.cell.push_back(cell), out.mean.push_back(mean);
        before = out.ends[j];
    }
    return out;
}

// For each candidate the probability that its priority is the highest: `CandidateChoice.chances`, with the caller's Gauss-Legendre points.
void chances(const Choice& made, const std::vector<int>& slope, const double* at, const double* weight, int points, double* out) {
    const int k = static_cast<int>(slope.size()), n = static_cast<int>(made.ends.size());
    std::vector<double> rise(static_cast<size_t>(k) * n, 0.0), below(static_cast<size_t>(k) * n, 0.0);
    for (int c = 0; c < k; ++c) {
        double passed = 1.0;
        for (int i = slope[c]; i >= 0 && passed > 0; passed *= made.hand[i], --i)
            rise[c * n + i] = made.cell[i] * passed * (made.ends[i] - (i ? made.ends[i - 1] : 0.0));
        double sum = 0.0;
        for (int i = 0; i < n; ++i) below[c * n + i] = sum, sum += rise[c * n + i];
    }
    double total = 0.0;
    for (int c = 0; c < k; ++c) {
        out[c] = 0.0;
        for (int i = 0; i <= slope[c]; ++i) {
            if (rise[c * n + i] <= 0) continue;
            double mean = 0.0;
            for (int g = 0; g < points; ++g) {
                double others = 0.5 * weight[g];
                for (int o = 0; o < k; ++o)
                    if (o != c) others *= below[o * n + i] + rise[o * n + i] * (0.5 + 0.5 * at[g]);
                mean += others;
            }
            out[c] += rise[c * n + i] * mean;
        }
        total += out[c];
    }
    for (int c = 0; c < k; ++c) out[c] /= total;
}

struct Node {
    const void *p, *q;
    const int64_t* token;
    const double *at, *weight;  // points of the quadrature
    double *rest, *taken;
    int64_t size, k, pieces, points;
};

// Pieces of all tokens and their masses under p and q (q scaled to sum one).
template <class T>
void sort_into_pieces(const Node& node, double scale, int32_t* piece, std::vector<double>& wanted, std::vector<double>& weight) {
    const T *p = static_cast<const T*>(node.p), *q = static_cast<const T*>(node.q);
    // Single precision will do: which piece a token is in costs or gains acceptance only. Tokens without q may be anywhere.
    const float each = 1.0f / static_cast<float>(node.k), steps = static_cast<float>(node.pieces - 1);
    for (int64_t i = 0; i < node.size; ++i) {
        const float other = static_cast<float>(q[i] * scale), above = other > TINY ? other : TINY;
        const float ratio = static_cast<float>(p[i]) / above * each, capped = ratio < 1.0f ? ratio : 1.0f;
        piece[i] = static_cast<int32_t>(std::sqrt(capped) * steps);
    }
    std::vector<double> sums(static_cast<size_t>(2 * BANKS * node.pieces), 0.0);
    auto add = [&](int64_t i, int64_t bank) {
        double* at = sums.data() + 2 * (bank * node.pieces + piece[i]);
        at[0] += q[i] > 0 ? static_cast<double>(p[i]) : 0.0;
        at[1] += q[i] * scale;
    };
    int64_t i = 0;
    for (; i + BANKS <= node.size; i += BANKS)
        for (int64_t bank = 0; bank < BANKS; ++bank) add(i + bank, bank);
    for (; i < node.size; ++i) add(i, 0);
    for (int64_t j = 0; j < node.pieces; ++j)
        for (int b = 0; b < BANKS; ++b) {
            wanted[j] += sums[2 * (b * node.pieces + j)];
            weight[j] += sums[2 * (b * node.pieces + j) + 1];
        }
}

template <class T>
double judge(const Node& node) {
    const T *p = static_cast<const T*>(node.p), *q = static_cast<const T*>(node.q);
    const double scale = 1.0 / overlap<T>(q, q, T(1), node.size).common;
    static thread_local std::vector<int32_t> piece;  // kept: fresh pages cost more than the pass
    piece.resize(node.size);
    std::vector<double> wanted(node.pieces, 0.0), weight(node.pieces, 0.0), multiplier(node.pieces), share(node.k);
    sort_into_pieces<T>(node, scale, piece.data(), wanted, weight);
    const Choice made = choose(wanted, weight, static_cast<int>(node.k));
    for (int64_t j = 0; j < node.pieces; ++j) multiplier[j] = made.mean[made.slope_of[j]] * scale;
    std::vector<int> slope;
    for (int64_t j = 0; j < node.k; ++j) slope.push_back(made.slope_of[piece[node.token[j]]]);
    chances(made, slope, node.at, node.weight, static_cast<int>(node.points), share.data());
    for (int64_t j = 0; j < node.k; ++j) {  // of equal siblings the first is chosen, for all of them
        const int64_t x = node.token[j];
        double all = 0.0;
        for (int64_t i = 0; i < node.k; ++i) all += node.token[i] == x ? share[i] : 0.0;
        if (std::find(node.token, node.token + j, x) != node.token + j) all = 0.0;
        const double mixed = q[x] * multiplier[piece[x]];
        node.taken[j] = all * (p[x] >= mixed ? 1.0 : p[x] / mixed);
    }
    double left[4] = {};
    auto leave = [&](int64_t i) {
        const double weight = p[i] - q[i] * multiplier[piece[i]];
        return node.rest[i] = weight > 0 ? weight : 0.0;
    };
    int64_t i = 0;
    for (; i + 4 <= node.size; i += 4)
        for (int l = 0; l < 4; ++l) left[l] += leave(i + l);
    for (; i < node.size; ++i) left[0] += leave(i);
    return (left[0] + left[1]) + (left[2] + left[3]);
}

}  // namespace

// sums: [3] common, rest, square. wide: whether the distributions are float64.
EXPORT void outrider_overlap(const void* p, const void* q, double w, int64_t size, int wide, double* sums) {
    const Sums found = wide ? overlap(static_cast<const double*>(p), static_cast<const double*>(q), w, size)
                            : overlap(static_cast<const float*>(p), static_cast<const float*>(q), static_cast<float>(w), size);
    sums[0] = found.common, sums[1] = found.rest, sums[2] = found.square;
}

// A draw from max(wp - q, 0), or from p where there is no q; the total of the weights in *total.
EXPORT int64_t outrider_draw(const void* p, const void* q, double w, int64_t size, double u, int wide, double* total) {
    if (wide) return draw<double>({static_cast<const double*>(p), static_cast<const double*>(q), w}, size, u, total);
    return draw<float>({static_cast<const float*>(p), static_cast<const float*>(q), w}, size, u, total);
}

// The residual if no candidate is accepted: returns its total, and its weights in node->rest.
EXPORT double outrider_transport(const Node* node, int wide) { return wide ? judge<double>(*node) : judge<float>(*node); }

#include "block.h"
#include "chain.h"

// Twin: `verify_plain` in block.py. False: the sequence whose number is in *broken has no distribution to draw from.
template <class T>
bool verify_block(const block::Step& step, int64_t* broken) {
    return block::verify<T>(
        step, broken, [&](const T* p, const T* q, double w) { return overlap(p, q, (T)w, step.size); },
        [&](const T* p, const T* q, double w, int64_t banned, double u, double* total) { return draw<T>({p, q, w, banned}, step.size, u, total); }
    );
}

EXPORT int outrider_block(const block::Step* step, int wide, int64_t* broken) {
    return wide ? verify_block<double>(*step, broken) : verify_block<float>(*step, broken);
}

// The largest entry of each row, NaN if there is one in it.
EXPORT void outrider_peaks(const float* x, int64_t count, int64_t size, double* peak) {
    for (int64_t r = 0; r < count; ++r) peak[r] = rows::peak(x + r * size, size);
}

// Distributions of rows of logits at a temperature each.
EXPORT void outrider_distributions(const float* x, int64_t count, int64_t size, const float* temperature, float* out) {
    for (int64_t r = 0; r < count; ++r) rows::distribution(x + r * size, size, temperature[r], out + r * size);
}

// A status of `forward`; 0: all levels are there, or as many as their chains wanted.
EXPORT int outrider_chain(const chain::Chains* chains) { return chain::Growth(*chains).run(); }

#include "picks.h"
