// Sums of values, weighed, for a few queries: every value is read and widened once for all of them.
//
// A sum adds value after value in order, whatever it is computed beside, and may be taken up again where it was left.
#pragma once

#include "cached.h"

namespace outrider {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int weigh_vectors(int m) { return m <= 2 ? 8 : m <= 6 ? 4 : 3; }
#else
constexpr int weigh_vectors(int m) { return m == 1 ? 6 : m <= 3 ? 3 : 2; }
#endif
// Values that all queries meet while they are in the first cache.
template <class W>
constexpr int value_block(int64_t width) {
    return entry_size<W>(width) * (int64_t)sizeof(W) <= 64 ? 128 : 64;
}

// out[m * ldo + 0 : C * LANES] += sum over values i < count of p[m * ldp + i] * value i, from its number `d` on. soon: so many keys or
// values that are asked for meanwhile.
template <class W, int M, int C>
__attribute__((noinline)) void weigh_tile(
    const float* p, int64_t ldp, const W* values, const W* soon, int64_t width, int64_t d, int count, float* out, int64_t ldo
) {
    constexpr int BYTES = C * LANES * (int)sizeof(W), ASKED = CODED<W> && BYTES >= 64 ? BYTES + 64 : BYTES;  // with the scale behind
    vf acc[M][C];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[m][c] = load<vf>(out + m * ldo + c * LANES);
    for (int i = 0; i < count; ++i) {
        vf value[C];
        ask<ASKED>(reinterpret_cast<const char*>(soon + i * entry_size<W>(width) + d));
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) value[c] = load_wide(values + i * entry_size<W>(width) + d + c * LANES);
        if constexpr (CODED<W>) {
            const vf scale = scale_of(values + i * entry_size<W>(width), width) - vf{};
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) value[c] *= scale;
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const vf weight = p[m * ldp + i] - vf{};
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[m][c] = fma(weight, value[c], acc[m][c]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) store(out + m * ldo + c * LANES, acc[m][c]);
}

template <class W, int M>
inline void weigh_block(const float* p, int64_t ldp, const W* values, const W* soon, int64_t width, int count, float* out, int64_t ldo) {
    constexpr int C = weigh_vectors(M);
    int64_t d = 0;
    for (; d + C * LANES <= width; d += C * LANES) weigh_tile<W, M, C>(p, ldp, values, soon, width, d, count, out + d, ldo);
    if constexpr (C > 4)
        for (; d + 4 * LANES <= width; d += 4 * LANES) weigh_tile<W, M, 4>(p, ldp, values, soon, width, d, count, out + d, ldo);
    if constexpr (C > 3)
        for (; d + 3 * LANES <= width; d += 3 * LANES) weigh_tile<W, M, 3>(p, ldp, values, soon, width, d, count, out + d, ldo);
    if constexpr (C > 2)
        for (; d + 2 * LANES <= width; d += 2 * LANES) weigh_tile<W, M, 2>(p, ldp, values, soon, width, d, count, out + d, ldo);
    for (; d + LANES <= width; d += LANES) weigh_tile<W, M, 1>(p, ldp, values, soon, width, d, count, out + d, ldo);
    for (int m = 0; m < M; ++m)
        for (int64_t e = d; e < width; ++e) {
            float total = out[m * ldo + e];
            for (int i = 0; i < count; ++i) {
                const W* value = values + i * entry_size<W>(width);
                float x = widen(value[e]);
                if constexpr (CODED<W>) x *= scale_of(value, width);
                total += p[m * ldp + i] * x;
            }
            out[m * ldo + e] = total;
        }
}

// out[m * ldo + d] += sum over `count` values side by side, for any number of queries. soon: so many keys or values that are read next.
template <class W>
inline void weigh_values(
    const float* p, int64_t ldp, int queries, const W* values, int64_t width, int64_t count, float* out, int64_t ldo, const W* soon
) {
    const int64_t entry = entry_size<W>(width), block = value_block<W>(width);
    for (int64_t i = 0; i < count; i += block) {
        const int n = (int)(count - i < block ? count - i : block);
        each_tile(queries, [&](auto size, int m) {
            weigh_block<W, size>(p + m * ldp + i, ldp, values + i * entry, soon + i * entry, width, n, out + m * ldo, ldo);
        });
    }
}

}  // namespace outrider
