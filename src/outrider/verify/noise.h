// The noise of noise.py, number for number.
#pragma once

#include <cstdint>

namespace noise {

enum Lane : uint64_t { ACCEPT = 1, FINAL = 2, DRAFT = 3 };

inline uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// One number of (0, 1) for the anchor at `position` of a sequence, `depth` below it; see `Noise.uniform`.
inline double uniform(uint64_t seed, Lane lane, int64_t position, int64_t depth, uint64_t index = 0) {
    uint64_t key = 0;
    for (const uint64_t part : {seed, (uint64_t)lane, (uint64_t)position, (uint64_t)depth, index}) key = mix(key ^ part);
    return ((double)(mix(key) >> 12) + 0.5) * 0x1p-52;
}

}  // namespace noise
