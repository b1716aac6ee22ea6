// Integer sums of products of bytes, one per lane, for each instruction set. All are exact, so all agree.
//
// A vector holds, for each of LANES columns, four neighbouring values of k. An x is four bytes of a row, the same for every column.
#pragma once

#include <cmath>

#include "formats.h"
#include "simd.h"

namespace outrider {

typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint8_t vb __attribute__((vector_size(LANES * 4)));
typedef uint8_t vq __attribute__((vector_size(LANES)));

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define OUTRIDER_DOTS 2  // four products and three sums at once, no saturation; unsigned times signed
#elif !defined(__AVX512F__) && defined(__AVXVNNI__) && defined(__AVX2__) && defined(__FMA__)
#define OUTRIDER_DOTS 2
#elif defined(__AVX512BW__) || (!defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__))
#define OUTRIDER_DOTS 1  // pairs in 16 bits, which must not overflow
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define OUTRIDER_DOTS 3  // signed times signed
#else
#define OUTRIDER_DOTS 0
#endif

// How codes of 8 bits are stored: where weights are unsigned factors, with 128 added, which a start value takes away again.
constexpr bool UNSIGNED_BYTES = OUTRIDER_DOTS == 2;
// Codes of 6 bits are signed; where one factor must be unsigned it is x, with 128 added, and a start value takes that away.
constexpr int X_OFFSET = OUTRIDER_DOTS == 1 || OUTRIDER_DOTS == 2 ? 128 : 0;

inline vb spread(const int8_t* x) {  // the four bytes at x for every column
    int32_t word;
    std::memcpy(&word, x, 4);
#if defined(__AVX512F__)
    return (vb)_mm512_set1_epi32(word);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vb)_mm256_set1_epi32(word);
#else
    return (vb)(vi{} + word);
#endif
}

inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

inline vf widen_halves(const uint8_t* p) {  // LANES numbers of half precision
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(load<float16x4_t>(p));
#else
    vf out;
    for (int i = 0; i < LANES; ++i) out[i] = widen_half(read16(p + 2 * i));
    return out;
#endif
}

// a * b + c, rounded once on every machine: results must not depend on whether it has the instruction.
inline vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || defined(__aarch64__)
    return fma(a, b, c);
#else
    vf out;
    for (int i = 0; i < LANES; ++i) out[i] = std::fma(a[i], b[i], c[i]);
    return out;
#endif
}

// acc + the sums of four products. One of the factors is unsigned where OUTRIDER_DOTS is 2: a.
inline vi dot4(vi acc, vb a, vb b) {
#if OUTRIDER_DOTS == 2 && defined(__AVX512F__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif OUTRIDER_DOTS == 2
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif OUTRIDER_DOTS == 3
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)a, (int8x16_t)b);
#else
    for (int j = 24; j >= 0; j -= 8) acc += ((vi)a << j >> 24) * ((vi)b << j >> 24);  // one byte of each lane, with its sign
    return acc;
#endif
}

#if OUTRIDER_DOTS == 1
typedef int16_t vs __attribute__((vector_size(LANES * 4)));
#if defined(__AVX512F__)
inline vs pairs(vb a, vb b) { return (vs)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
inline vi widen_pairs(vs a, vs b) { return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
inline vb magnitude(vb a) { return (vb)_mm512_abs_epi8((__m512i)a); }
inline vb with_sign(vb x, vb of) {
    return (vb)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)of), _mm512_setzero_si512(), (__m512i)x);
}
#else
inline vs pairs(vb a, vb b) { return (vs)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
inline vi widen_pairs(vs a, vs b) { return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline vb magnitude(vb a) { return (vb)_mm256_abs_epi8((__m256i)a); }
inline vb with_sign(vb x, vb of) { return (vb)_mm256_sign_epi8((__m256i)x, (__m256i)of); }
#endif
#endif

// start + the sums of the N vectors' products with x, N * 4 values. BITS: of unsigned weights; 8: signed bytes (see UNSIGNED_BYTES).
// DEPTH: as many sums of pairs fit into 16 bits: the largest weight times 127 times 2, so often.
template <int BITS, int N>
inline vi dots(vi start, const vb* w, const int8_t* x) {
#if OUTRIDER_DOTS == 1
    constexpr int DEPTH = BITS == 4 ? 8 : BITS == 5 ? 4 : 1;
    const vs ones = vs{} + (int16_t)1;
#pragma GCC unroll 8
    for (int j = 0; j < N; j += DEPTH) {
        vs sum = {};
#pragma GCC unroll 8
        for (int i = j; i < j + DEPTH && i < N; ++i) {
            const vb a = spread(x + 4 * i);
            const vs more = BITS == 8 ? pairs(magnitude(w[i]), with_sign(a, w[i])) : pairs(w[i], a);
            sum = i == j ? more : sum + more;
        }
        start += widen_pairs(sum, ones);
    }
#else
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) start = dot4(start, w[j], spread(x + 4 * j));
#endif
    return start;
}

// LANES bytes, widened. Compilers take such a conversion apart lane by lane where they are not told how.
template <class T>
inline vi widen_lanes(const uint8_t* p) {
    [[maybe_unused]] constexpr bool SIGNED = std::is_signed<T>::value;
#if defined(__AVX512F__)
    const __m128i v = load<__m128i>(p);
    return (vi)(SIGNED ? _mm512_cvtepi8_epi32(v) : _mm512_cvtepu8_epi32(v));
#elif defined(__AVX2__) && defined(__FMA__)
    const __m128i v = _mm_cvtsi64_si128(load<int64_t>(p));
    return (vi)(SIGNED ? _mm256_cvtepi8_epi32(v) : _mm256_cvtepu8_epi32(v));
#elif defined(__aarch64__)
    const uint8x8_t v = vcreate_u8(load<uint32_t>(p));
    return SIGNED ? (vi)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(v)))) : (vi)vmovl_u16(vget_low_u16(vmovl_u8(v)));
#else
    typedef T vt __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load<vt>(p), vi);
#endif
}

// The lowest bytes of the lanes, to p.
inline void store_bytes(int8_t* p, vi v) {
#if defined(__AVX512F__)
    store(p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__) && defined(__FMA__)
    const __m256i each = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    const int32_t half[2] = {_mm_cvtsi128_si32(_mm256_castsi256_si128(each)), _mm_cvtsi128_si32(_mm256_extracti128_si256(each, 1))};
    store(p, load<int64_t>(half));
#else
    store(p, __builtin_convertvector(v, vq));
#endif
}

// What multiplies the sum of one part of a super-block, for every lane, from LANES bytes.
template <class T>
inline vi widen_bytes(const uint8_t* p) {
    vi v = widen_lanes<T>(p);
#if OUTRIDER_DOTS == 1
    v = (v & 0xffff) | (v << 16);  // for pairs of 16 bits
#endif
    return v;
}

// acc + scale * the sums of the N vectors' products with x. BITS 6: the weights are signed, x has X_OFFSET added.
template <int BITS, int N>
inline vi scaled_dots(vi acc, vi scale, const vb* w, const int8_t* x) {
#if OUTRIDER_DOTS == 1
    constexpr int DEPTH = BITS == 4 ? 8 : BITS == 5 ? 4 : 2;
#pragma GCC unroll 8
    for (int j = 0; j < N; j += DEPTH) {
        vs sum = {};
#pragma GCC unroll 8
        for (int i = j; i < j + DEPTH && i < N; ++i) {
            const vb a = spread(x + 4 * i);
            const vs more = BITS == 6 ? pairs(a, w[i]) : pairs(w[i], a);
            sum = i == j ? more : sum + more;
        }
        acc += widen_pairs(sum, (vs)scale);
    }
    return acc;
#else
    vi sum = {};
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
        const vb a = spread(x + 4 * j);
        sum = BITS == 6 ? dot4(sum, a, w[j]) : dot4(sum, w[j], a);
    }
    return acc + sum * scale;
#endif
}

// LANES bytes and the LANES behind them, as pairs of 16 bits.
inline vi two_least(const uint8_t* p) {
    return widen_lanes<uint8_t>(p) | (widen_lanes<uint8_t>(p + LANES) << 16);
}

// acc + the sum of two products of 16 bits in every lane; pair: for every lane the same two numbers.
inline vi pair_dot(vi acc, vi least, int32_t pair) {
#if defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)least, _mm512_set1_epi32(pair));
#elif defined(__AVX2__) && defined(__FMA__)
    return acc + (vi)_mm256_madd_epi16((__m256i)least, _mm256_set1_epi32(pair));
#else
    return acc + (least & 0xffff) * (int32_t)(int16_t)pair + (least >> 16) * (pair >> 16);
#endif
}

}  // namespace outrider
