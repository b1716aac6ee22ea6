// Products of a few rows with a row-major weight matrix [out, in], read once.
//
// Every dot product has ONE vector accumulator that walks along K in order and is summed by one fixed tree, whatever tile it is
// computed in: a row's result is the same bits alone or among many. Tiles only decide what is shared: M rows of x share
// a weight in registers, R rows of weights share an x.
#pragma once

#include "simd.h"

namespace outrider {

// How the inputs of a linear are stored for weights W, and how far one step goes along K. `pack` writes x[0 : n] at elements
// k0 : k0 + n of a row; elements behind the row's end stay zero (the buffer starts so).
template <class W>
struct Packing;

template <>
struct Packing<float> {
    using Item = float;
    static constexpr int STEP = LANES;
    static void pack(Item* row, int k0, const float* x, int n) { narrow(x, n, row + k0); }
};

template <>
struct Packing<bf16> {
    static constexpr int STEP = 2 * LANES;
#if OUTRIDER_BF16_DOT
    using Item = bf16;
    static void pack(Item* row, int k0, const float* x, int n) { narrow(x, n, row + k0); }
#else
    // Rounded to bf16 but kept as float32; each step holds its even elements, then its odd ones: one load of weights splits
    // into exactly these halves by a shift and a mask.
    using Item = float;
    static void pack(Item* row, int k0, const float* x, int n) {
        int i = 0;
        for (; k0 % STEP == 0 && i + STEP <= n; i += STEP) {
            bf16 pairs[STEP];
            narrow(x + i, STEP, pairs);
            store(row + k0 + i, load<vu>(pairs) << 16);
            store(row + k0 + i + LANES, load<vu>(pairs) & 0xffff0000u);
        }
        for (int k = k0 + i; i < n; ++i, ++k)
            row[k - k % STEP + k % 2 * LANES + k % STEP / 2] = widen(round_bf16(x[i]));
    }
#endif
};

// Floats or bf16s from one packed row to the next: whole steps, and a cache line more so that rows do not share L1 sets.
template <class W>
constexpr int64_t packed_stride(int64_t k) {
    return (k + Packing<W>::STEP - 1) / Packing<W>::STEP * Packing<W>::STEP + 64 / (int64_t)sizeof(typename Packing<W>::Item);
}

// Weight rows per tile: as many accumulators as the registers hold beside the weights, an x and a mask.
template <class W>
constexpr int tile_rows(int m) {
    if (REGISTERS == 32) return m <= 6 ? 4 : 3;
    return m <= 2 ? 4 : m == 3 || (m == 4 && sizeof(W) == 4) ? 3 : 2;
}

// Whether accumulators, weights and an x are in registers all at once.
constexpr bool fits(int m, int r) { return m * r + r + 1 < REGISTERS; }

// One step along K: R weight rows times M packed rows.
template <int M, int R>
inline void step(vf (&acc)[M][R], const float* w, int64_t ldw, const float* x, int64_t ldx) {
    vf a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load<vf>(w + r * ldw);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        vf b = load<vf>(x + m * ldx);
        if (fits(M, R)) hold(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[m][r] = fma(a[r], b, acc[m][r]);
    }
}

template <int M, int R>
inline void step(vf (&acc)[M][R], const bf16* w, int64_t ldw, const Packing<bf16>::Item* x, int64_t ldx) {
#if OUTRIDER_BF16_DOT
    __m512i a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load<__m512i>(w + r * ldw);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const __m512i b = load<__m512i>(x + m * ldx);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            acc[m][r] = (vf)_mm512_dpbf16_ps((__m512)acc[m][r], (__m512bh)a[r], (__m512bh)b);
    }
#else
    vu a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load<vu>(w + r * ldw) << 16;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        vf b = load<vf>(x + m * ldx);
        if (fits(M, R)) hold(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[m][r] = fma((vf)a[r], b, acc[m][r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load<vu>(w + r * ldw) & 0xffff0000u;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        vf b = load<vf>(x + m * ldx + LANES);
        if (fits(M, R)) hold(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[m][r] = fma((vf)a[r], b, acc[m][r]);
    }
#endif
}

// Asks for the lines at `w` of the R rows that the next tile reads. Hardware follows a row, but starts anew at each. Into the
// second cache (2): the first has few places for lines under way, and asking for more of them is waiting.
template <class W, int R>
inline void ask_ahead(const W* w, int64_t ldw) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(w + (R + r) * ldw, 0, 2);
}

// out[m * ldo + r] = w[r] . x[m] over k elements.
template <class W, int M, int R>
inline void tile(const W* w, int64_t ldw, const typename Packing<W>::Item* x, int64_t ldx, int k, float* out, int64_t ldo) {
    constexpr int STEP = Packing<W>::STEP;
    constexpr int LINE = 64 / (int)sizeof(W) > STEP ? 64 / (int)sizeof(W) : STEP;
    vf acc[M][R] = {};
    int i = 0;
    for (; i + LINE <= k; i += LINE) {
        ask_ahead<W, R>(w + i, ldw);
#pragma GCC unroll 8
        for (int j = 0; j < LINE; j += STEP) step<M, R>(acc, w + i + j, ldw, x + i + j, ldx);
    }
    for (; i + STEP <= k; i += STEP) step<M, R>(acc, w + i, ldw, x + i, ldx);
    if (i < k) {  // the last step must not read behind the weights
        W last[R * STEP];
        std::memset((void*)last, 0, sizeof last);
        for (int r = 0; r < R; ++r) std::memcpy((void*)(last + r * STEP), w + r * ldw + i, (k - i) * sizeof(W));
        step<M, R>(acc, last, STEP, x + i, ldx);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) out[m * ldo + r] = sum(acc[m][r]);
}

template <class W, int M>
inline void rows_times(const W* w, int64_t ldw, int n, const typename Packing<W>::Item* x, int64_t ldx, int k, float* out, int64_t ldo) {
    constexpr int R = tile_rows<W>(M);
    int r = 0;
    for (; r + R <= n; r += R) tile<W, M, R>(w + r * ldw, ldw, x, ldx, k, out + r, ldo);
    for (; r < n; ++r) tile<W, M, 1>(w + r * ldw, ldw, x, ldx, k, out + r, ldo);
}

// out[m * ldo + r] = w[r] . x[m] for n weight rows and any number of packed rows. Weights leave memory once: all rows of x
// meet a group of weight rows while it is in the cache.
template <class W>
inline void product(
    const W* w, int64_t ldw, int n, const typename Packing<W>::Item* x, int64_t ldx, int rows, int k, float* out, int64_t ldo
) {
    constexpr int GROUP = 12;
    const int group = rows <= MAX_TILE ? n : GROUP;
    for (int r = 0; r < n; r += group) {
        const int count = n - r < group ? n - r : group;
        each_tile(rows, [&](auto size, int m) {
            rows_times<W, size>(w + r * ldw, ldw, count, x + m * ldx, ldx, k, out + m * ldo + r, ldo);
        });
    }
}

}  // namespace outrider
