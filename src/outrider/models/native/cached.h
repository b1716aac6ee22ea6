// How keys and values lie in the cache: as float32, as bf16, or as codes of 8 bits with a scale behind those of each token and head.
#pragma once

#include <cfloat>
#include <limits>

#include "dots.h"

namespace outrider {

// A code of an entry [width codes][scale, float32]; number d of the entry is code d * scale.
struct coded {
    int8_t code;
};

template <class K>
constexpr bool CODED = std::is_same<K, coded>::value;

// Items from one key or value to the next.
template <class K>
constexpr int64_t entry_size(int64_t width) {
    return CODED<K> ? width + (int64_t)sizeof(float) : width;
}

inline float scale_of(const coded* entry, int64_t width) {
    float scale;
    std::memcpy(&scale, entry + width, sizeof scale);
    return scale;
}

// Asks for the cache lines of what is read soon. Asked for one by one between computations they come meanwhile; many at once are
// more than are under way at a time, and hold up what follows.
template <int BYTES>
inline void ask(const char* p) {
#pragma GCC unroll 8
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i, 0, 2);
}

inline float widen(coded x) { return (float)x.code; }
inline vf load_wide(const coded* p) { return to_float(widen_lanes<int8_t>(reinterpret_cast<const uint8_t*>(p))); }

// The entry of x [n]: codes are rounded to nearest even, the largest is 127. With a number that is not finite all of it is NaN.
// Its twin is `Coded.pack` of nn/stored.py.
inline void narrow(const float* x, int64_t n, coded* out) {
    constexpr float LEAST = 1e-30f, MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    float top = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
        const float size = x[i] < 0.0f ? -x[i] : x[i];
        top = size > top ? size : top, finite = finite && size <= FLT_MAX;
    }
    const bool any = finite && top > LEAST;
    const float scale = any ? top / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    const float inverse = any ? 127.0f / top : 0.0f;
    for (int64_t i = 0; i < n; ++i) out[i].code = any ? (int8_t)(int32_t)((x[i] * inverse + MAGIC) - MAGIC) : (int8_t)0;
    std::memcpy(out + n, &scale, sizeof scale);
}

}  // namespace outrider
