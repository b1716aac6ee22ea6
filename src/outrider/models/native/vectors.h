// What happens to single rows between the products: norms and rotations.
#pragma once

#include <cmath>
#include <cstring>

#include "attention.h"

namespace outrider {

// out[0 : n] = x / rms(x) * weight; x itself without a weight; out may be x.
inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    if (weight == nullptr) {
        if (out != x) std::memcpy(out, x, n * sizeof(float));
        return;
    }
    float lanes[SUM_LANES] = {};
    int64_t i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
        for (int j = 0; j < SUM_LANES; ++j) lanes[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < n; ++j) lanes[j] += x[i + j] * x[i + j];
    for (int width = SUM_LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    const float scale = 1.0f / std::sqrt(lanes[0] / (float)n + eps);
    for (i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// Rotates the pairs (x[i], x[half + i]) by the row's angles.
inline void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

}  // namespace outrider
