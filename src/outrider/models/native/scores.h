// Scores of a few queries with many keys: keys lie in the lanes of vectors, so that a score needs no sum across lanes.
//
// Keys are read once and turned (rows to lanes) in blocks that stay in the first cache, where all queries meet them. A score is one
// chain of multiply-adds along the head, in order: its bits depend on its own query and key only.
#pragma once

#include "turned.h"

namespace outrider {

constexpr int KEY_GROUPS = 4;  // vectors of keys in a block
constexpr int KEY_BLOCK = KEY_GROUPS * LANES;

// Vectors of keys that m queries meet at once.
constexpr int key_vectors(int m) { return m <= 2 || (MAX_TILE == 8 && m <= 6) ? 4 : 2; }

template <class W>
inline vf multiply_add(vf acc, vf key, const typename Query<W>::Item* query, int t) {
#if OUTRIDER_BF16_DOT
    if constexpr (PAIRS<W>) {
        uint32_t pair;
        std::memcpy(&pair, query + 2 * t, 4);
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)key, (__m512bh)_mm512_set1_epi32((int)pair));
    } else
#endif
        return fma(key, query[t] - vf{}, acc);
}

// acc[m][g] += key[g] * number t of query m.
template <class W, int M, int G>
inline void meet(vf (&acc)[M][G], const vf (&key)[G], const typename Query<W>::Item* query, int64_t stride, int t) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) acc[m][g] = multiply_add<W>(acc[m][g], key[g], query + m * stride, t);
    if constexpr (REGISTERS == 16 && M * G > 8) {  // or sums wait in memory while two numbers of a word are mixed
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) hold(acc[m][g]);
    }
}

// scores[m * lds + i] = key i . query m, for M queries and a turned block of G vectors of keys. soon: keys or values that are asked
// for meanwhile, as many.
template <class W, int M, int G>
__attribute__((noinline)) void score_tile(
    const float* lines, int64_t line_count, const typename Query<W>::Item* query, int64_t stride, float* scores, int64_t lds,
    const W* soon
) {
    constexpr int ASKED = G * LANES * PER_LINE<W> * (int)sizeof(W) * (CODED<W> ? 9 : 8) / 8;  // bytes; with a scale behind 32 codes
    vf acc[M][G] = {};
    for (int t = 0; t < line_count; ++t) {
        vf key[G];
        ask<ASKED>(reinterpret_cast<const char*>(soon) + t * ASKED);
        if constexpr (PER_LINE<W> == 1 || PAIRS<W>) {
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) key[g] = load<vf>(lines + (g * line_count + t) * LANES);
            meet<W>(acc, key, query, stride, t);
        } else {
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) key[g] = (vf)(load<vu>(lines + (g * line_count + t) * LANES) << 16);
            meet<W>(acc, key, query, stride, 2 * t);
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) key[g] = (vf)(load<vu>(lines + (g * line_count + t) * LANES) & 0xffff0000u);
            meet<W>(acc, key, query, stride, 2 * t + 1);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) store(scores + m * lds + g * LANES, acc[m][g]);
}

template <class W, int M>
inline void score_block(
    const float* lines, int64_t line_count, int groups, const typename Query<W>::Item* query, int64_t stride, float* scores,
    int64_t lds, const W* soon, int64_t entry
) {
    constexpr int G = key_vectors(M);
    int g = 0;
    for (; g + G <= groups; g += G)
        score_tile<W, M, G>(
            lines + g * line_count * LANES, line_count, query, stride, scores + g * LANES, lds, soon + g * LANES * entry
        );
    for (; g < groups; ++g)
        score_tile<W, M, 1>(
            lines + g * line_count * LANES, line_count, query, stride, scores + g * LANES, lds, soon + g * LANES * entry
        );
}

// Floats of scratch for a turned block, and the scales of its keys.
inline int64_t turned_floats(int64_t width) { return KEY_BLOCK * (width + 1); }

// scores[m * lds + i] = key i . query m for a turned block of `count` keys and any number of queries. Up to LANES - 1 scores behind
// each row's last are overwritten. soon: so many keys or values that are read next. key(i): where key i lies.
template <class W, class Key>
inline void score_turned(
    const Key& key, int64_t width, int count, const typename Query<W>::Item* query, int64_t stride, int queries, float* scores,
    int64_t lds, float* lines, const W* soon
) {
    const int64_t line_count = width / PER_LINE<W>;
    const int groups = (count + LANES - 1) / LANES;
    each_tile(queries, [&](auto size, int m) {
        score_block<W, size>(
            lines, line_count, groups, query + m * stride, stride, scores + m * lds, lds, soon, entry_size<W>(width)
        );
    });
    if constexpr (CODED<W>) {
        float* scale = lines + KEY_BLOCK * width;
        for (int i = 0; i < groups * LANES; ++i) scale[i] = i < count ? scale_of(key(i), width) : 0.0f;
        for (int m = 0; m < queries; ++m)
            for (int i = 0; i < groups * LANES; i += LANES)
                store(scores + m * lds + i, load<vf>(scores + m * lds + i) * load<vf>(scale + i));
    }
}

// The same for `count` <= KEY_BLOCK keys, each at key(i).
template <class W, class Key>
inline void score_few(
    const Key& key, int64_t width, int count, const typename Query<W>::Item* query, int64_t stride, int queries, float* scores,
    int64_t lds, float* lines, const W* soon
) {
    for (int i = 0; i < count; i += LANES) {
        const int left = count - i < LANES ? count - i : LANES;
        const char* at[LANES];
        for (int j = 0; j < LANES; ++j) at[j] = reinterpret_cast<const char*>(key(i + (j < left ? j : 0)));
        turn_keys<W>(at, width, left, lines + i * (width / PER_LINE<W>));
    }
    score_turned<W>(key, width, count, query, stride, queries, scores, lds, lines, soon);
}

// The same for any number of keys side by side.
template <class W>
inline void score_keys(
    const W* keys, int64_t width, int64_t count, const typename Query<W>::Item* query, int64_t stride, int queries,
    float* scores, int64_t lds, float* lines, const W* soon
) {
    const int64_t entry = entry_size<W>(width);
    for (int64_t i = 0; i < count; i += KEY_BLOCK) {
        const int n = (int)(count - i < KEY_BLOCK ? count - i : KEY_BLOCK);
        const auto key = [=](int j) { return keys + (i + j) * entry; };
        if (n % LANES == 0) {
            // what is read next is asked for where most of the time goes: with few queries while keys are turned
            const W *here = key(0), *next = soon + i * entry, *first = queries <= 2 ? next : here, *then = queries <= 2 ? here : next;
            const auto bytes = [](const W* p) { return reinterpret_cast<const char*>(p); };
            turn_near<W>(bytes(here), entry * (int64_t)sizeof(W), width, n / LANES, lines, bytes(first));
            score_turned<W>(key, width, n, query, stride, queries, scores + i, lds, lines, then);
        } else {
            score_few<W>(key, width, n, query, stride, queries, scores + i, lds, lines, soon + i * entry);
        }
    }
}

}  // namespace outrider
