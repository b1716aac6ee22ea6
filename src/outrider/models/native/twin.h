// The plain twin of the products with quantised weights: one value after the other, straight from the stored blocks. It is the
// definition of their results: every kernel gives these bits, for any rows beside it, any tile, any number of threads and any
// instructions.
#pragma once

#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "formats.h"

namespace outrider {

// q[0 : n] = x rounded to whole multiples of d, at most 127 of them; returns d. All zeros for a block of next to nothing; d is NaN,
// and so is all that follows, where x is not finite.
inline float round_block(const float* x, int n, int8_t* q) {
    float top = 0.0f;
    bool finite = true;
    for (int k = 0; k < n; ++k) finite = finite && std::isfinite(x[k]), top = std::fabs(x[k]) > top ? std::fabs(x[k]) : top;
    const float times = finite && top >= 1e-30f ? 127.0f / top : 0.0f;
    for (int k = 0; k < n; ++k) q[k] = times == 0.0f ? 0 : (int8_t)std::nearbyint(x[k] * times);
    return !finite ? std::nanf("") : times == 0.0f ? 0.0f : top / 127.0f;
}

// out[c] = weight row c . x over k values, for n rows of `bytes` bytes. Returns the largest magnitude that an integer sum had.
inline int64_t twin_product(Format f, const uint8_t* weight, int64_t bytes, int64_t n, int64_t k, const float* x, float* out) {
    const BlockSizes size = sizes_of(f);
    int64_t largest = 0;
    Block b;
    int8_t q[256];
    for (int64_t c = 0; c < n; ++c) {
        const uint8_t* row = weight + c * bytes;
        const uint8_t* block = row;
        float total = 0.0f, whole = 1.0f;
        if (f == INT8) std::memcpy(&whole, row, 4);
        for (int64_t at = 0; at < k; at += size.values, block += size.bytes) {
            const float dx = round_block(x + at, size.values, q);
            read_block(f, block, b);
            int64_t sum = 0, least = 0;
            for (int j = 0; j < size.values; ++j) sum += b.scale[j / 16] * b.code[j] * q[j], least += b.least[j / 32] * q[j];
            total = std::fma((float)sum, widen_scale(f, b.d) * dx, total);
            if (size.minimum) total = std::fma((float)least, widen_scale(f, b.m) * dx, total);
            for (const int64_t size : {std::abs(sum), std::abs(least)}) largest = size > largest ? size : largest;
        }
        out[c] = total * whole;
    }
    return largest;
}

}  // namespace outrider
