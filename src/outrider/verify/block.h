// Block verification of chains, all sequences in one call. Plain twin: block.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "noise.h"

namespace block {

struct Step {
    const void *p, *q;  // [sequences + nodes, size] anchors first; [any, size] or null
    const int64_t *counts, *token, *row;  // [sequences] nodes of each; [nodes]; [nodes] its distribution, -1: a point mass
    const uint64_t* seed;
    const int64_t* position;  // [sequences]
    int64_t* taken;   // out [sequences]: accepted nodes
    int64_t* next;    // out: the token behind them
    double *risk, *spread;  // out
    int64_t sequences, size;
    const double* coin;  // null, or given ones: for each sequence `accept` of depths 1 .. n, then `final` of 1 .. n + 1
};

constexpr double BELOW_ONE = 1.0 - 0x1p-53;

inline double clamp01(double x) { return x == x ? (x > 0.0 ? (x < 1.0 ? x : 1.0) : 0.0) : 1.0; }
inline bool is_positive(double x) { return x > 0.0 && x < INFINITY; }
inline bool is_drawable(double x) { return x > 1e-300 && x < INFINITY; }

// overlap(p, q, w) and draw(p, q, w, banned, u, &total) are the passes over a row. False: sequence `*broken` has no distribution.
template <class T, class Overlap, class Draw>
bool verify(const Step& s, int64_t* broken, const Overlap& overlap, const Draw& draw) {
    const T *p = static_cast<const T*>(s.p), *q = static_cast<const T*>(s.q);
    std::vector<double> keep, lost;
    int64_t first = 0;
    for (int64_t b = 0; b < s.sequences; first += s.counts[b++]) {
        const int64_t n = s.counts[b];
        const auto row = [&](int64_t i) { return p + (i == 0 ? b : s.sequences + first + i - 1) * s.size; };  // behind i accepted nodes
        const auto other = [&](int64_t i) { return s.row[first + i] < 0 ? nullptr : q + s.row[first + i] * s.size; };
        const auto chance = [&](int64_t i) { return s.row[first + i] < 0 ? 0.0 : (double)other(i)[s.token[first + i]]; };
        keep.assign(n, 0.0), lost.assign(n, 0.0);
        double w = 1.0, risk = 0.0, spread = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            const double above = w, px = (double)row(i)[s.token[first + i]], qx = chance(i);
            double variance = 0.0;
            w = keep[i] = is_positive(qx) ? clamp01(above * px / qx) : clamp01(above * px);
            lost[i] = above - w;
            if (is_positive(qx)) {
                const auto sums = overlap(row(i), other(i), above);
                lost[i] = clamp01(sums.rest);
                variance = sums.square - sums.common * sums.common;
                variance = variance > 0.0 ? variance : 0.0;
            }
            risk += lost[i], spread += variance;
        }
        const double whole = n ? keep[n - 1] : 1.0;
        s.risk[b] = risk, s.spread[b] = spread + whole * (1.0 - whole);
        const double* given = s.coin ? s.coin + 2 * first + b : nullptr;
        const auto coin = [&](noise::Lane lane, int64_t depth) {
            if (given) return given[lane == noise::ACCEPT ? depth - 1 : n + depth - 1];
            return noise::uniform(s.seed[b], lane, s.position[b], depth);
        };
        int64_t taken = n;
        for (; taken > 0; --taken) {
            const double here = keep[taken - 1], rest = taken < n ? lost[taken] : 0.0;
            const double top = taken == n ? here : rest, bottom = taken == n ? 1.0 : rest + 1.0 - here;
            if (coin(noise::ACCEPT, taken) * bottom < top || bottom <= 0.0) break;
        }
        s.taken[b] = taken;
        const double u = coin(noise::FINAL, taken + 1) < BELOW_ONE ? coin(noise::FINAL, taken + 1) : BELOW_ONE;
        double total = 0.0;
        const bool refused = taken < n, drawn = refused && is_positive(chance(taken));
        s.next[b] = draw(row(taken), drawn ? other(taken) : nullptr, drawn && taken ? keep[taken - 1] : 1.0,
            refused && !drawn ? s.token[first + taken] : -1, u, &total);
        if (!is_drawable(total)) s.next[b] = draw(row(taken), nullptr, 1.0, -1, u, &total);
        if (!is_drawable(total)) return *broken = b, false;
    }
    return true;
}

}  // namespace block
