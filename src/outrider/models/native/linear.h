// Products of a few rows with a row-major weight matrix [out, in], read once.
//
// Every dot product has ONE vector accumulator that walks along K in order and is summed by one fixed tree, whatever tile it is
// computed in: a row's result is the same bits alone or among many. Tiles only decide what is shared: M rows of x share
// a weight in registers, R rows of weights share an x.
//
// The R weight rows of a tile are not neighbours: each is the next one of a stream of its own, and the streams are equal parts of
// the rows at hand. Few lines of one stream are under way from memory at a time, so a core reads 4 to 8 long streams 1.3 to 1.8
// times as fast as one.
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

// Weight rows per tile: as many accumulators as the registers hold beside the weights, an x and a mask; for one row, more streams
// than that gains nothing.
template <class W>
constexpr int tile_rows(int m) {
    if (REGISTERS == 32) return m <= 2 ? 8 : m <= 4 ? 6 : m <= 6 ? 4 : 3;
    return m == 1 ? 8 : m == 2 ? 6 : m == 3 ? 4 : m == 4 ? 3 : 2;
}

// Whether accumulators, weights and an x are in registers all at once.
constexpr bool fits(int m, int r) { return m * r + r + 1 < REGISTERS; }

// One step along K: R weight rows times M packed rows.
template <int M, int R>
inline void step(vf (&acc)[M][R], const float* w, int64_t ldw, const float* x, int64_t ldx) {
    vf a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        a[r] = load<vf>(w + r * ldw);
        if (fits(M, R)) hold(a[r]);
    }
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
    for (int r = 0; r < R; ++r) {
        a[r] = load<__m512i>(w + r * ldw);
        if (fits(M, R)) hold(a[r]);
    }
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
    for (int r = 0; r < R; ++r) {
        a[r] = load<vu>(w + r * ldw) << 16;
        if (fits(M, R)) hold(a[r]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        vf b = load<vf>(x + m * ldx);
        if (fits(M, R)) hold(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[m][r] = fma((vf)a[r], b, acc[m][r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        a[r] = load<vu>(w + r * ldw) & 0xffff0000u;
        if (fits(M, R)) hold(a[r]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        vf b = load<vf>(x + m * ldx + LANES);
        if (fits(M, R)) hold(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[m][r] = fma((vf)a[r], b, acc[m][r]);
    }
#endif
}

// Asks for lines of the R streams, so many bytes ahead of what is read: hardware follows a stream within a page and begins anew at
// the next one. For one row of x, which waits for memory alone, into the second cache: see `ask_lines`.
template <class W, int M, int R>
inline void ask(const char* ahead, int64_t apart) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * apart * (int64_t)sizeof(W), 0, M == 1 ? 2 : 3);
}

// out[m * ldo + r * each] = w[r * each] . x[m] over k elements, for R streams that are `each` rows of `ldw` apart. next: rows from
// here to the row that follows in each stream.
template <class W, int M, int R>
inline void tile(
    const W* w, int64_t ldw, int64_t each, int64_t next, const typename Packing<W>::Item* x, int64_t ldx, int k, float* out, int64_t ldo
) {
    constexpr int STEP = Packing<W>::STEP;
    constexpr int LINE = 64 / (int)sizeof(W) > STEP ? 64 / (int)sizeof(W) : STEP;
    constexpr int MOST = (R >= 6 ? 512 : R >= 3 ? 1024 : 2048) / (int)sizeof(W);  // so that 3 to 4 KiB of all streams are under way
    const int ahead = MOST < k ? MOST : k;
    const int64_t apart = each * ldw;
    vf acc[M][R] = {};
    int i = 0;
    for (; i + LINE <= k; i += LINE) {
        ask<W, M, R>((const char*)w + (i + ahead < k ? i + ahead : next * ldw + (i + ahead - k)) * (int64_t)sizeof(W), apart);
#pragma GCC unroll 8
        for (int j = 0; j < LINE; j += STEP) step<M, R>(acc, w + i + j, apart, x + i + j, ldx);
    }
    for (; i + STEP <= k; i += STEP) step<M, R>(acc, w + i, apart, x + i, ldx);
    if (i < k) {  // the last step must not read behind the weights
        W last[R * STEP];
        std::memset((void*)last, 0, sizeof last);
        for (int r = 0; r < R; ++r) std::memcpy((void*)(last + r * STEP), w + r * apart + i, (k - i) * sizeof(W));
        step<M, R>(acc, last, STEP, x + i, ldx);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) out[m * ldo + r * each] = sum(acc[m][r]);
}

template <class W, int M>
inline void rows_times(const W* w, int64_t ldw, int n, const typename Packing<W>::Item* x, int64_t ldx, int k, float* out, int64_t ldo) {
    constexpr int R = tile_rows<W>(M);
    const int each = n / R;
    // Behind the last row of a stream comes the first one of those that follow the n: most likely they are the next ones to be read.
    for (int i = 0; i < each; ++i)
        tile<W, M, R>(w + i * ldw, ldw, each, i + 1 < each ? 1 : n - i, x, ldx, k, out + i, ldo);
    for (int r = each * R; r < n; ++r) tile<W, M, 1>(w + r * ldw, ldw, 1, 1, x, ldx, k, out + r, ldo);
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
