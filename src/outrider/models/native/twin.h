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

// What is left of x that was rounded to q times d.
inline float rest_of(float x, float d, int8_t q) { return std::fma(-d, (float)q, x); }

// out[c] = weight row c . x over k values, for n rows of `bytes` bytes. twice: plus the product with what rounding left of x. Returns the largest magnitude that an integer sum had.
inline int64_t twin_product(Format f, const uint8_t* weight, int64_t bytes, int64_t n, int64_t k, const float* x, bool twice, float* out) {
    const BlockSizes size = sizes_of(f);
    int64_t largest = 0;
    Block b;
    int8_t q[256];
    for (int64_t c = 0; c < n; ++c) {
        const uint8_t* row = weight + c * bytes;
        const uint8_t* block = row;
        float total[2] = {0.0f, 0.0f}, rest[256], whole = 1.0f;
        if (f == INT8) std::memcpy(&whole, row, 4);
        for (int64_t at = 0; at < k; at += size.values, block += size.bytes) {
            read_block(f, block, b);
            const float* from = x + at;
            for (int turn = 0; turn <= (int)twice; ++turn) {
                const float dx = round_block(from, size.values, q);
                int64_t sum = 0, least = 0;
                for (int j = 0; j < size.values; ++j) sum += b.scale[j / 16] * b.code[j] * q[j], least += b.least[j / 32] * q[j];
                total[turn] = std::fma((float)sum, widen_scale(f, b.d) * dx, total[turn]);
                if (size.minimum) total[turn] = std::fma((float)least, widen_scale(f, b.m) * dx, total[turn]);
                for (const int64_t size : {std::abs(sum), std::abs(least)}) largest = size > largest ? size : largest;
                for (int j = 0; j < size.values; ++j) rest[j] = rest_of(from[j], dx, q[j]);
                from = rest;
            }
        }
        out[c] = twice ? total[0] * whole + total[1] * whole : total[0] * whole;
    }
    return largest;
}

}  // namespace outrider
