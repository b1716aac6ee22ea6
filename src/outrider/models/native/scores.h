// Scores of a few queries with many keys: keys lie in the lanes of vectors, so that a score needs no sum across lanes.
//
// Keys are read once and turned (rows to lanes) in blocks that stay in the first cache, where all queries meet them. A score is one
// chain of multiply-adds along the head, in order: its bits depend on its own query and key only.
#pragma once

#include "cached.h"

namespace outrider {

// How a query is stored, and how many numbers of a key a turned line holds for each of LANES keys.
template <class W>
struct Query {
    using Item = float;
    static void pack(Item* row, const float* x, int64_t n) { narrow(x, n, row); }
};

template <>
struct Query<bf16> {
#if OUTRIDER_BF16_DOT
    using Item = bf16;
    static void pack(Item* row, const float* x, int64_t n) { narrow(x, n, row); }
#else
    using Item = float;  // rounded to bf16, kept as float32
    static void pack(Item* row, const float* x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) row[i] = widen(round_bf16(x[i]));
    }
#endif
};

// Beside codes too a query is rounded to bf16, which holds a code exactly.
template <>
struct Query<coded> : Query<bf16> {};

// Whether two numbers of a key are multiplied at once.
template <class W>
constexpr bool PAIRS = OUTRIDER_BF16_DOT && !std::is_same<W, float>::value;

// Items from one packed query to the next, with a cache line more so that queries do not share sets of the first cache.
template <class W>
constexpr int64_t query_stride(int64_t width) {
    using Item = typename Query<W>::Item;
    return (width * (int64_t)sizeof(Item) + 63) / 64 * (64 / (int64_t)sizeof(Item)) + 64 / (int64_t)sizeof(Item);
}

// LANES words of LANES keys -> the same with rows and columns exchanged.
inline void turn(vu (&x)[LANES]) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32((__m512i)x[2 * i], (__m512i)x[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)x[2 * i], (__m512i)x[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) {
            b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
            b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
        }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {  // b[i], b[4 + i], b[8 + i], b[12 + i]: words i, 4 + i, 8 + i, 12 + i of four keys each
        const __m512i low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        const __m512i low2 = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd), high2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        x[i] = (vu)_mm512_shuffle_i32x4(low, high, 0x88);
        x[8 + i] = (vu)_mm512_shuffle_i32x4(low, high, 0xdd);
        x[4 + i] = (vu)_mm512_shuffle_i32x4(low2, high2, 0x88);
        x[12 + i] = (vu)_mm512_shuffle_i32x4(low2, high2, 0xdd);
    }
#elif defined(__AVX2__) && defined(__FMA__)
    __m256i a[8], b[8];
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_epi32((__m256i)x[2 * i], (__m256i)x[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)x[2 * i], (__m256i)x[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) {
            b[4 * i + 2 * j] = _mm256_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
            b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
        }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        x[i] = (vu)_mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        x[4 + i] = (vu)_mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
#elif defined(__aarch64__) && defined(__ARM_NEON)
    const uint32x4_t a = vtrn1q_u32((uint32x4_t)x[0], (uint32x4_t)x[1]), b = vtrn2q_u32((uint32x4_t)x[0], (uint32x4_t)x[1]);
    const uint32x4_t c = vtrn1q_u32((uint32x4_t)x[2], (uint32x4_t)x[3]), d = vtrn2q_u32((uint32x4_t)x[2], (uint32x4_t)x[3]);
    x[0] = (vu)vtrn1q_u64((uint64x2_t)a, (uint64x2_t)c), x[1] = (vu)vtrn1q_u64((uint64x2_t)b, (uint64x2_t)d);
    x[2] = (vu)vtrn2q_u64((uint64x2_t)a, (uint64x2_t)c), x[3] = (vu)vtrn2q_u64((uint64x2_t)b, (uint64x2_t)d);
#else
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < i; ++j) {
            const uint32_t kept = x[i][j];
            x[i][j] = x[j][i], x[j][i] = kept;
        }
#endif
}

// The first `n` words at p, zeros behind them; nothing behind them is read.
inline vu load_words(const void* p, int n) {
    if (n >= LANES) return load<vu>(p);
#if defined(__AVX512F__)
    return (vu)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
#else
    vu out = {};
    std::memcpy((void*)&out, p, n * 4);
    return out;
#endif
}

// Words of four codes -> the turned lines of these four numbers.
inline void spread_codes(vu word, float* lines) {
    const vi codes = (vi)word;
    const vf a = to_float(codes << 24 >> 24), b = to_float(codes << 16 >> 24), c = to_float(codes << 8 >> 24), d = to_float(codes >> 24);
    if constexpr (PAIRS<coded>) {
        store(lines, ((vu)a >> 16) | (vu)b);  // the low halves of whole numbers this small are empty
        store(lines + LANES, ((vu)c >> 16) | (vu)d);
    } else {
        store(lines, a), store(lines + LANES, b), store(lines + 2 * LANES, c), store(lines + 3 * LANES, d);
    }
}

// Turned lines of LANES keys: for each pair of numbers (bf16 where the CPU has its products) or each number (else) a vector. key(i):
// where key i < count lies.
template <class W, class Key>
inline void turn_keys(const Key& key, int64_t width, int count, float* lines) {
    constexpr int PER_WORD = 4 / (int)sizeof(W);
    const int words = (int)(width / PER_WORD);
    for (int w = 0; w < words; w += LANES) {
        vu x[LANES];
        const int n = words - w < LANES ? words - w : LANES;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) x[i] = i < count ? load_words(key(i) + w * PER_WORD, n) : vu{};
        turn(x);
        for (int t = 0; t < n; ++t) {
            if constexpr (CODED<W>)
                spread_codes(x[t], lines + (PAIRS<W> ? 2 : 4) * (w + t) * LANES);
            else if constexpr (sizeof(W) == 4 || PAIRS<W>)
                store(lines + (w + t) * LANES, x[t]);
            else {
                store(lines + 2 * (w + t) * LANES, x[t] << 16);
                store(lines + (2 * (w + t) + 1) * LANES, x[t] & 0xffff0000u);
            }
        }
    }
}

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

// scores[m * lds + i] = key i . query m, for M queries and a turned block of G vectors of keys.
template <class W, int M, int G>
inline void score_tile(
    const float* lines, int64_t line_count, const typename Query<W>::Item* query, int64_t stride, float* scores, int64_t lds
) {
    vf acc[M][G] = {};
    for (int t = 0; t < line_count; ++t) {
        vf key[G];
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) key[g] = load<vf>(lines + (g * line_count + t) * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) acc[m][g] = multiply_add<W>(acc[m][g], key[g], query + m * stride, t);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) store(scores + m * lds + g * LANES, acc[m][g]);
}

template <class W, int M>
inline void score_block(
    const float* lines, int64_t line_count, int groups, const typename Query<W>::Item* query, int64_t stride, float* scores,
    int64_t lds
) {
    constexpr int G = key_vectors(M);
    int g = 0;
    for (; g + G <= groups; g += G)
        score_tile<W, M, G>(lines + g * line_count * LANES, line_count, query, stride, scores + g * LANES, lds);
    for (; g < groups; ++g)
        score_tile<W, M, 1>(lines + g * line_count * LANES, line_count, query, stride, scores + g * LANES, lds);
}

// Floats of scratch for a turned block, and the scales of its keys.
inline int64_t turned_floats(int64_t width) { return KEY_BLOCK * (width + 1); }

// scores[m * lds + i] = key i . query m for `count` <= KEY_BLOCK keys of `width` numbers, each at key(i), and any number of queries.
// Up to LANES - 1 scores behind each row's last are overwritten.
template <class W, class Key>
inline void score_few(
    const Key& key, int64_t width, int count, const typename Query<W>::Item* query, int64_t stride, int queries, float* scores,
    int64_t lds, float* lines
) {
    const int64_t line_count = PAIRS<W> ? width / 2 : width;
    const int groups = (count + LANES - 1) / LANES;
    for (int g = 0; g < groups; ++g) {
        const int left = count - g * LANES;
        turn_keys<W>([&](int i) { return key(g * LANES + i); }, width, left < LANES ? left : LANES, lines + g * line_count * LANES);
    }
    each_tile(queries, [&](auto size, int m) {
        score_block<W, size>(lines, line_count, groups, query + m * stride, stride, scores + m * lds, lds);
    });
    if constexpr (CODED<W>) {
        float* scale = lines + KEY_BLOCK * width;
        for (int i = 0; i < groups * LANES; ++i) scale[i] = i < count ? scale_of(key(i), width) : 0.0f;
        for (int m = 0; m < queries; ++m)
            for (int i = 0; i < groups * LANES; i += LANES)
                store(scores + m * lds + i, load<vf>(scores + m * lds + i) * load<vf>(scale + i));
    }
}

// The same for any number of keys side by side. ahead(i, n): called before keys i : i + n are read.
template <class W, class Ahead>
inline void score_keys(
    const W* keys, int64_t width, int64_t count, const typename Query<W>::Item* query, int64_t stride, int queries,
    float* scores, int64_t lds, float* lines, const Ahead& ahead
) {
    for (int64_t i = 0; i < count; i += KEY_BLOCK) {
        const int n = (int)(count - i < KEY_BLOCK ? count - i : KEY_BLOCK);
        ahead(i, n);
        score_few<W>([=](int j) { return keys + (i + j) * entry_size<W>(width); }, width, n, query, stride, queries, scores + i, lds, lines);
    }
}

}  // namespace outrider
