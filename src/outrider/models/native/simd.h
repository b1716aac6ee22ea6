// One vector type per instruction set. Everything above this file is written once.
//
// The file is compiled with -ffp-contract=off and without -ffast-math: plain C++ arithmetic is exactly what is written,
// vectorised or not, and a fused multiply-add happens only where `fma` is called. That is what makes results independent of
// tile sizes, of neighbours and of the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace outrider {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define OUTRIDER_BF16_DOT 1
#else
#define OUTRIDER_BF16_DOT 0
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

template <class V>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__) && defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// Keeps what was loaded in a register: compilers like to fold the load into every multiplication that uses it, or to load again for
// each, and loads then limit.
template <class Vector>
inline void hold(Vector& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#else
    (void)v;
#endif
}

// Sum of the lanes; always the same tree.
inline float sum(vf v) {
#if defined(__AVX512F__)
    const __m512 x = (__m512)v;
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), high);
#elif defined(__AVX2__) && defined(__FMA__)
    const __m256 h = (__m256)v;
#endif
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

inline float widen(bf16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline float widen(float x) { return x; }

// Round to nearest even; NaN stays NaN.
inline bf16 round_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return bf16{(uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : even)};
}

inline vh round_bf16(vf x) {
    const vu u = (vu)x, nan = (vu)(x != x);
    const vu even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return __builtin_convertvector((nan & 0x7fc0u) | (even & ~nan), vh);
}

inline void narrow(const float* x, int64_t n, float* out) { std::memcpy(out, x, n * sizeof(float)); }
inline void narrow(const float* x, int64_t n, bf16* out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, round_bf16(load<vf>(x + i)));
    for (; i < n; ++i) out[i] = round_bf16(x[i]);
}

// LANES consecutive numbers, in order.
inline vf load_wide(const float* p) { return load<vf>(p); }
inline vf load_wide(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#elif defined(__aarch64__) && defined(__ARM_NEON)
    return (vf)vshll_n_u16(load<uint16x4_t>(p), 16);
#else
    vf out = {};
    for (int i = 0; i < LANES; ++i) out[i] = widen(p[i]);
    return out;
#endif
}

inline vf select(vu mask, vf yes, vf no) { return (vf)(((vu)yes & mask) | ((vu)no & ~mask)); }

// The larger or smaller of each pair; b where one is NaN.
inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select((vu)(a > b), a, b);
#endif
}
inline vf smaller(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select((vu)(a < b), a, b);
#endif
}

// exp to about 2 units in the last place (Cephes' expf polynomial, Cody and Waite's two-part ln 2) of N vectors side by side, step by
// step for all: one alone waits for itself in every step. Arguments below -87 are taken for that, NaN stays NaN. Above 87: not for.
template <int N>
__attribute__((always_inline)) inline void exp_falling(vf (&x)[N]) {
    vf shifted[N], p[N];
    const auto all = [](const auto& step) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) step(i);
    };
    all([&](int i) { x[i] = larger(vf{} - 87.0f, x[i]); });
    // adds 1.5 * 2^23: the low bits become the nearest integer
    all([&](int i) { shifted[i] = fma(x[i], vf{} + 1.44269504088896341f, vf{} + 12582912.0f); });
    all([&](int i) { p[i] = shifted[i] - 12582912.0f; });
    all([&](int i) { x[i] = fma(p[i], vf{} - 0.693359375f, x[i]); });
    all([&](int i) { x[i] = fma(p[i], vf{} + 2.12194440e-4f, x[i]); });
    all([&](int i) { p[i] = fma(vf{} + 1.9875691500e-4f, x[i], vf{} + 1.3981999507e-3f); });
    all([&](int i) { p[i] = fma(p[i], x[i], vf{} + 8.3334519073e-3f); });
    all([&](int i) { p[i] = fma(p[i], x[i], vf{} + 4.1665795894e-2f); });
    all([&](int i) { p[i] = fma(p[i], x[i], vf{} + 1.6666665459e-1f); });
    all([&](int i) { p[i] = fma(p[i], x[i], vf{} + 5.0000001201e-1f); });
    all([&](int i) { p[i] = fma(p[i] * x[i], x[i], x[i] + 1.0f); });
    all([&](int i) { x[i] = p[i] * (vf)(((vu)shifted[i] - 0x4b400000u + 127u) << 23); });
}

// The same of any argument: those above 87 are taken for that.
inline vf exp_near(vf x) {
    vf one[1] = {smaller(vf{} + 87.0f, x)};
    exp_falling(one);
    return one[0];
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int MAX_TILE = REGISTERS == 32 ? 8 : 6;  // rows that meet the same vectors at once

// body(size, first) for `count` rows in as few tiles as possible, of nearly equal sizes; a size is a constant.
template <class Body>
inline void each_tile(int count, const Body& body) {
    const int tiles = (count + MAX_TILE - 1) / MAX_TILE;
    int m = 0;
    for (int t = 0; t < tiles; ++t) {
        const int size = (count - m + tiles - t - 1) / (tiles - t);
        switch (size) {
            case 1: body(std::integral_constant<int, 1>{}, m); break;
            case 2: body(std::integral_constant<int, 2>{}, m); break;
            case 3: body(std::integral_constant<int, 3>{}, m); break;
            case 4: body(std::integral_constant<int, 4>{}, m); break;
            case 5: body(std::integral_constant<int, 5>{}, m); break;
            case 6: body(std::integral_constant<int, 6>{}, m); break;
#if defined(__AVX512F__) || defined(__aarch64__)
            case 7: body(std::integral_constant<int, 7>{}, m); break;
            case 8: body(std::integral_constant<int, 8>{}, m); break;
#endif
        }
        m += size;
    }
}

}  // namespace outrider
