// Queries as they are stored, and keys turned so that they lie in the lanes of vectors.
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

// The last n < LANES words of LANES keys, of which `count` are there, from at[i] on, to their lines.
template <class W>
inline void turn_rest(const char* const (&at)[LANES], int n, int count, float* lines) {
    vu x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = i < count ? load_words(at[i], n) : vu{};
    turn(x);
    for (int t = 0; t < n; ++t) put_lines<W>(x[t], lines + t * LINES_PER_WORD<W> * LANES);
}

// Turned lines of LANES keys: for each number a vector, for each two where keys are bf16 or multiplied in pairs. at[i]: where key
// i < count lies.
template <class W>
inline void turn_keys(const char* const (&at)[LANES], int64_t width, int count, float* lines) {
    const int words = (int)(width * (int)sizeof(W) / 4);
    for (int w = 0; w < words; w += LANES, lines += LINES_PER_WORD<W> * LANES * LANES) {
        const char* from[LANES];
        for (int i = 0; i < LANES; ++i) from[i] = at[i] + 4 * w;
        turn_rest<W>(from, words - w < LANES ? words - w : LANES, count, lines);
    }
}

// The same for `groups` times LANES keys that lie `step` bytes apart. soon: as many keys or values, asked for meanwhile.
template <class W>
__attribute__((noinline)) void turn_near(const char* key, int64_t step, int64_t width, int groups, float* lines, const char* soon) {
    constexpr int FULL = LINES_PER_WORD<W> * LANES * LANES;                // floats of the lines of LANES words
    constexpr int ASKED = LANES * LANES * 4 * (CODED<W> ? 9 : 8) / 8;  // bytes; with a scale behind 32 codes
    const int64_t words = width * (int64_t)sizeof(W) / 4, whole = words / LANES * LANES;
    for (int g = 0; g < groups; ++g, key += LANES * step) {
        for (int64_t w = 0; w < whole; w += LANES, lines += FULL, soon += ASKED) {
            vu x[LANES];
            ask<ASKED>(soon);
            turned_words(key + 4 * w, step, x);
#pragma GCC unroll 16
            for (int t = 0; t < LANES; ++t) put_lines<W>(x[t], lines + t * LINES_PER_WORD<W> * LANES);
        }
        if (whole == words) continue;
        const char* at[LANES];
        for (int i = 0; i < LANES; ++i) at[i] = key + i * step + 4 * whole;
        for (int64_t i = 0; i < ASKED * (words - whole) / LANES; i += 64) ask<1>(soon + i);
        turn_rest<W>(at, (int)(words - whole), LANES, lines);
        soon += ASKED * (words - whole) / LANES, lines += FULL / LANES * (words - whole);
    }
}

}  // namespace outrider
