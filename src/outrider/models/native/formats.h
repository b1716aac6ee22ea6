// Block types of quantised weights as GGUF stores them (ggml's numbers and layouts), and a block taken apart, one value after
// the other: what the twin multiplies and what the packing starts from.
#pragma once

#include <cstdint>
#include <cstring>

namespace outrider {

enum Format : int32_t {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30, MXFP4 = 39,
    INT8 = 1000,  // ours: float32 d, the same in all blocks of a row; i8 q[32]
};

// values, bytes: of a block. bits: of a code. offset: what its code exceeds the
// value by. minimum: whether a second number m is added.
struct BlockSizes {
    int values, bytes, bits, offset;
    bool minimum;
};

constexpr BlockSizes sizes_of(Format f) {
    switch (f) {
        case Q4_0: return {32, 18, 4, 8, false};
        case Q4_1: return {32, 20, 4, 0, true};
        case Q5_0: return {32, 22, 5, 16, false};
        case Q5_1: return {32, 24, 5, 0, true};
        case Q8_0: return {32, 34, 8, 128, false};
        case Q4_K: return {256, 144, 4, 0, true};
        case Q5_K: return {256, 176, 5, 0, true};
        case Q6_K: return {256, 210, 6, 32, false};
        case MXFP4: return {32, 17, 4, 16, false};
        case INT8: return {32, 36, 8, 128, false};
        default: return {0, 0, 0, 0, false};
    }
}

constexpr bool is_quantised(Format f) { return sizes_of(f).values > 0; }
constexpr int UNIT = 32;  // values that kernels take at a time, whatever the block

inline uint16_t read16(const uint8_t* p) { return (uint16_t)(p[0] | p[1] << 8); }

// Half precision to float32, exactly.
inline float widen_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, low = h & 0x7fffu;
    float f;
    if (low >= 0x7c00u) {  // infinity and NaN
        const uint32_t u = sign | 0x7f800000u | (low & 0x3ffu) << 13;
        std::memcpy(&f, &u, 4);
        return f;
    }
    if (low < 0x400u) {  // denormal: an integer times 2^-24
        f = (float)low * 0x1p-24f;
        return sign ? -f : f;
    }
    const uint32_t u = sign | ((low << 13) + (112u << 23));
    std::memcpy(&f, &u, 4);
    return f;
}

// 2^(e - 128): half of what e8m0 says, since the table of MXFP4 holds doubles. Of bfloat16, exactly.
inline uint16_t half_power(uint8_t e) { return e < 2 ? (uint16_t)(0x20 << e) : (uint16_t)((e - 1) << 7); }

constexpr int8_t FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // twice the numbers of e2m1

// A block taken apart: value k is d * scale[k / 16] * code[k] + m * least[k / 32]. raw: what is stored, without the offset.
struct Block {
    uint16_t d, m;  // half precision (MXFP4: bfloat16); INT8 has none
    int8_t scale[16];
    uint8_t least[8];
    int8_t code[256];
    uint8_t raw[256];
};

inline void read_scales(const uint8_t* s, Block& b) {
    for (int j = 0; j < 8; ++j) {
        const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        b.least[j] = (uint8_t)(j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4);
        b.scale[2 * j] = b.scale[2 * j + 1] = (int8_t)scale;
    }
}

// The codes of a block of type F, which is known when this is compiled: a file of gigabytes goes through it when it is loaded.
template <Format F>
inline void read_codes(const uint8_t* p, Block& b) {
    constexpr BlockSizes size = sizes_of(F);
    constexpr bool super = size.values == 256;
    const uint8_t* bytes = p + (F == Q6_K ? 0 : F == MXFP4 ? 1 : super ? 16 : size.minimum || F == INT8 ? 4 : 2);
    const uint8_t* high = F == Q6_K ? p + 128 : bytes;
    if (F == Q5_0 || F == Q5_1) bytes += 4;
    if (F == Q5_K) bytes += 32;
    constexpr int span = F == Q6_K ? 64 : super ? 32 : 16;  // bytes whose low halves come before their high ones
    constexpr int run = span < 32 ? span : 32;  // neighbours that lie alike
    for (int from = 0; from < size.values; from += run) {
        const uint8_t* low = bytes + (size.bits == 8 ? from : from / (2 * span) * span + from % span);
        const uint8_t* more = high + (F == Q6_K ? from / 128 * 32 : 0);
        for (int i = 0; i < run; ++i) {
            int code = size.bits == 8 ? low[i] ^ 0x80 : low[i] >> from / span % 2 * 4 & 15;
            if (F == Q5_0 || F == Q5_1) code |= (high[(from + i) / 8] >> (from + i) % 8 & 1) << 4;
            if (F == Q5_K) code |= (more[i] >> from / 32 & 1) << 4;
            if (F == Q6_K) code |= (more[i] >> from % 128 / 32 * 2 & 3) << 4;
            b.raw[from + i] = (uint8_t)code;
        }
    }
    for (int k = 0; k < size.values; ++k) b.code[k] = (int8_t)(F == MXFP4 ? FP4[b.raw[k]] : b.raw[k] - size.offset);
}

inline void read_block(Format f, const uint8_t* p, Block& b) {
    const BlockSizes size = sizes_of(f);
    std::memset(b.scale, 1, sizeof b.scale), std::memset(b.least, 1, sizeof b.least);
    b.d = f == MXFP4 ? half_power(p[0]) : f == Q6_K ? read16(p + 208) : f == INT8 ? 0 : read16(p);
    b.m = size.minimum ? read16(p + 2) : 0;
    if (f == Q4_K || f == Q5_K) b.m ^= 0x8000u, read_scales(p + 4, b);  // there m is taken away
    if (f == Q6_K) std::memcpy(b.scale, p + 192, 16);
    switch (f) {
        case Q4_0: return read_codes<Q4_0>(p, b);
        case Q4_1: return read_codes<Q4_1>(p, b);
        case Q5_0: return read_codes<Q5_0>(p, b);
        case Q5_1: return read_codes<Q5_1>(p, b);
        case Q8_0: return read_codes<Q8_0>(p, b);
        case Q4_K: return read_codes<Q4_K>(p, b);
        case Q5_K: return read_codes<Q5_K>(p, b);
        case Q6_K: return read_codes<Q6_K>(p, b);
        case MXFP4: return read_codes<MXFP4>(p, b);
        case INT8: return read_codes<INT8>(p, b);
        default: return;
    }
}

inline float widen_scale(Format f, uint16_t bits) {
    if (f != MXFP4) return f == INT8 ? 1.0f : widen_half(bits);
    const uint32_t u = (uint32_t)bits << 16;
    float out;
    std::memcpy(&out, &u, 4);
    return out;
}

}  // namespace outrider
