// Distributions over a vocabulary from logits, a row at a time. Plain twin: sampling/processors.py, up to rounding.
//
// Vectors are 64 bytes on every machine and nothing is fused, so a row has the same bits wherever it is computed, alone and among others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace rows {

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
constexpr int64_t N = 16, BLOCK = 1024;  // entries of a block are added in float32, blocks in float64

// N entries from x + i, -inf behind the last of n.
inline V entries(const float* x, int64_t i, int64_t n) {
    V v;
    if (i + N <= n) return std::memcpy(&v, x + i, sizeof v), v;
    v = V{} - std::numeric_limits<float>::infinity();
    std::memcpy(&v, x + i, (n - i) * sizeof(float));
    return v;
}

inline void put(float* out, V v, int64_t i, int64_t n) { std::memcpy(out + i, &v, (i + N <= n ? N : n - i) * sizeof(float)); }

// exp(x) for x <= 0 to about 2 units in the last place (Cephes' expf polynomial); 0 where that is below half the smallest float, NaN
// stays NaN.
inline V exp_of(V x) {
    const V least = V{} - 103.97f, y = x < least ? least : x;
    const V shifted = y * 1.44269504088896341f + 12582912.0f;  // adds 1.5 * 2^23: the low bits become the nearest integer
    const V n = shifted - 12582912.0f, r = y - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const I power = (I)shifted - 0x4b400000, half = power >> 1;  // in two steps: the smallest results have no power of their own
    p = p * (V)((half + 127) << 23) * (V)((power - half + 127) << 23);
    return x < least ? V{} : p;
}

// The largest entry, NaN if there is one among them.
inline float peak(const float* x, int64_t n) {
    V most = V{} - std::numeric_limits<float>::infinity();
    I broken = {};
    for (int64_t i = 0; i < n; i += N) {
        const V v = entries(x, i, n);
        broken |= v != v;
        most = v > most ? v : most;
    }
    float out = most[0];
    int32_t any = broken[0];
    for (int l = 1; l < N; ++l) out = most[l] > out ? most[l] : out, any |= broken[l];
    return any ? std::numeric_limits<float>::quiet_NaN() : out;
}

// The first entry of value `most`, n if there is none.
inline int64_t place(const float* x, int64_t n, float most) {
    for (int64_t i = 0; i < n; i += N) {
        const I same = entries(x, i, n) == V{} + most;
        int32_t any = 0;
        for (int l = 0; l < N; ++l) any |= same[l];
        for (int64_t j = i; any && j < std::min(n, i + N); ++j)
            if (x[j] == most) return j;
    }
    return n;
}

// The sum of the squares of a distribution.
inline double squares(const float* p, int64_t n) {
    double total = 0.0;
    for (int64_t from = 0; from < n; from += BLOCK) {
        V sum = {};
        for (int64_t i = from; i < std::min(n, from + BLOCK); i += N) {
            V v = {};
            std::memcpy(&v, p + i, (i + N <= n ? N : n - i) * sizeof(float));
            sum += v * v;
        }
        for (int l = 0; l < N; ++l) total += sum[l];
    }
    return total;
}

// softmax of x / temperature. A row without a finite maximum becomes NaN.
inline void soften(const float* x, int64_t n, float temperature, float* out) {
    const float most = peak(x, n);
    double total = 0.0;
    for (int64_t from = 0; from < n; from += BLOCK) {
        V sum = {};
        for (int64_t i = from; i < std::min(n, from + BLOCK); i += N) {
            const V e = exp_of(temperature == 1.0f ? entries(x, i, n) - most : (entries(x, i, n) - most) / temperature);
            put(out, e, i, n);
            sum += e;
        }
        for (int l = 0; l < N; ++l) total += sum[l];
    }
    const float scale = (float)(1.0 / total);
    int64_t i = 0;
    for (; i + N <= n; i += N) put(out, entries(out, i, n) * scale, i, n);
    for (; i < n; ++i) out[i] *= scale;
}

// The largest entry of softmax(x), the one that `soften` would write; NaN as there.
inline float share(const float* x, int64_t n) {
    const float most = peak(x, n);
    double total = 0.0;
    for (int64_t from = 0; from < n; from += BLOCK) {
        V sum = {};
        for (int64_t i = from; i < std::min(n, from + BLOCK); i += N) sum += exp_of(entries(x, i, n) - most);
        for (int l = 0; l < N; ++l) total += sum[l];
    }
    return (float)(1.0 / total);
}

// The distribution of a request: softmax, or at temperature 0 all mass on the first of the largest entries (a token of some kind where
// there is no largest one).
inline void distribution(const float* x, int64_t n, float temperature, float* out) {
    if (temperature > 0.0f) return soften(x, n, temperature, out);
    std::memset(out, 0, n * sizeof(float));
    const int64_t at = place(x, n, peak(x, n));
    out[at < n ? at : 0] = 1.0f;
}

}  // namespace rows
