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

// Whether two numbers of a key are multiplied at once, and how many a turned line holds of each.
template <class W>
constexpr bool PAIRS = OUTRIDER_BF16_DOT && !std::is_same<W, float>::value;
template <class W>
constexpr int PER_LINE = PAIRS<W> || std::is_same<W, bf16>::value ? 2 : 1;

// Items from one packed query to the next, with a cache line more so that queries do not share sets of the first cache.
template <class W>
constexpr int64_t query_stride(int64_t width) {
    using Item = typename Query<W>::Item;
    return (width * (int64_t)sizeof(Item) + 63) / 64 * (64 / (int64_t)sizeof(Item)) + 64 / (int64_t)sizeof(Item);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// half[4 * j + i]: words 4 * j : 4 * j + 4 of key i, then those of key 4 + i -> x[w]: word w of all keys.
inline void turn_halves(const __m256i (&half)[8], vu (&x)[8]) {
#pragma GCC unroll 16
    for (int j = 0; j < 8; j += 4) {
        const __m256i a = _mm256_unpacklo_epi32(half[j], half[j + 1]), b = _mm256_unpackhi_epi32(half[j], half[j + 1]);
        const __m256i c = _mm256_unpacklo_epi32(half[j + 2], half[j + 3]), d = _mm256_unpackhi_epi32(half[j + 2], half[j + 3]);
        x[j] = (vu)_mm256_unpacklo_epi64(a, c), x[j + 1] = (vu)_mm256_unpackhi_epi64(a, c);
        x[j + 2] = (vu)_mm256_unpacklo_epi64(b, d), x[j + 3] = (vu)_mm256_unpackhi_epi64(b, d);
    }
}
#endif

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
    __m256i half[8];
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        half[i] = _mm256_permute2x128_si256((__m256i)x[i], (__m256i)x[4 + i], 0x20);
        half[4 + i] = _mm256_permute2x128_si256((__m256i)x[i], (__m256i)x[4 + i], 0x31);
    }
    turn_halves(half, x);
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

// x[w]: word w of LANES keys that lie `step` bytes apart.
inline void turned_words(const char* key, int64_t step, vu (&x)[LANES]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i half[8];  // as `turn`, with half of the exchange done by the loads
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < 2; ++j) {
            const __m128i low = load<__m128i>(key + i * step + 16 * j);
            const __m128i high = load<__m128i>(key + (4 + i) * step + 16 * j);
            half[4 * j + i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        }
    turn_halves(half, x);
#else
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = load<vu>(key + i * step);
    turn(x);
#endif
}

// Lines that a word of turned keys becomes.
template <class W>
constexpr int LINES_PER_WORD = 4 / (int)sizeof(W) / PER_LINE<W>;

// A word of LANES turned keys to its lines.
template <class W>
inline void put_lines(vu word, float* lines) {
    if constexpr (CODED<W>)
        spread_codes(word, lines);
    else
        store(lines, word);
}

// Turned lines of LANES keys: for each number a vector, for each two where keys are bf16 or multiplied in pairs. at[i]: where key
// i < count lies.
template <class W>
inline void turn_keys(const char* const (&at)[LANES], int64_t width, int count, float* lines) {
    const int words = (int)(width * (int)sizeof(W) / 4);
    for (int w = 0; w < words; w += LANES) {
        vu x[LANES];
        const int n = words - w < LANES ? words - w : LANES;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) x[i] = i < count ? load_words(at[i] + 4 * w, n) : vu{};
        turn(x);
        for (int t = 0; t < n; ++t, lines += LINES_PER_WORD<W> * LANES) put_lines<W>(x[t], lines);
    }
}

// The same for `groups` times LANES keys that lie `step` bytes apart, of whole vectors of words.
template <class W>
__attribute__((noinline)) void turn_near(const char* key, int64_t step, int64_t words, int groups, float* lines) {
    for (int g = 0; g < groups; ++g, key += LANES * step)
        for (int64_t w = 0; w < words; w += LANES, lines += LINES_PER_WORD<W> * LANES * LANES) {
            vu x[LANES];
            turned_words(key + 4 * w, step, x);
#pragma GCC unroll 16
            for (int t = 0; t < LANES; ++t) put_lines<W>(x[t], lines + t * LINES_PER_WORD<W> * LANES);
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

// acc[m][g] += key[g] * number t of query m.
template <class W, int M, int G>
inline void meet(vf (&acc)[M][G], const vf (&key)[G], const typename Query<W>::Item* query, int64_t stride, int t) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) acc[m][g] = multiply_add<W>(acc[m][g], key[g], query + m * stride, t);
    if constexpr (REGISTERS == 16 && M * G > 8) {
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
    const int64_t entry = entry_size<W>(width), words = width * (int64_t)sizeof(W) / 4;
    for (int64_t i = 0; i < count; i += KEY_BLOCK) {
        const int n = (int)(count - i < KEY_BLOCK ? count - i : KEY_BLOCK);
        const auto key = [=](int j) { return keys + (i + j) * entry; };
        if (n % LANES == 0 && words % LANES == 0) {
            turn_near<W>(reinterpret_cast<const char*>(key(0)), entry * (int64_t)sizeof(W), words, n / LANES, lines);
            score_turned<W>(key, width, n, query, stride, queries, scores + i, lds, lines, soon + i * entry);
        } else {
            score_few<W>(key, width, n, query, stride, queries, scores + i, lds, lines, soon + i * entry);
        }
    }
}

}  // namespace outrider
