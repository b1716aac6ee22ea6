// Quantised weights as the kernels read them: groups of LANES columns side by side, so that a sum never crosses lanes.
//
// A group is one run of codes and one run of what goes with them, each in order of k. For every 32 values of k (a unit) the codes of
// the group are vectors of LANES x 4 bytes; byte 4c + i of vector j belongs to column c and to value 4j + i:
//
//   8 bits   8 vectors
//   4 bits   4 vectors: the low halves are vectors 0 to 3, the high halves 4 to 7
//   5 bits   the same, then a vector of fifth bits: bit j is that of vector j
//   6 bits   the same, then two vectors of upper bits: bits 2j and 2j + 1 of the first are vector j's, of the second vector j + 4's
//
// Beside a block: d [LANES] and, where the type has one, m [LANES], in half precision (MXFP4: bfloat16); for a super-block the
// factors of its parts, a byte each, [parts][LANES]. Columns behind the last are zeros.
#pragma once

#include "dots.h"
#include "parallel.h"

namespace outrider {

constexpr int VECTOR = LANES * 4;  // bytes

struct Layout {
    Format format;
    BlockSizes size;
    int64_t n, k;

    Layout(Format f, int64_t columns, int64_t inputs) : format(f), size(sizes_of(f)), n(columns), k(inputs) {}
    bool super() const { return size.values == 256; }
    int64_t groups() const { return (n + LANES - 1) / LANES; }
    int64_t blocks() const { return k / size.values; }
    static constexpr int vectors(int bits) { return bits == 8 ? 8 : bits; }
    int64_t unit_bytes() const { return vectors(size.bits) * VECTOR; }
    int64_t side_bytes() const {  // beside one block
        if (format == INT8) return 0;
        if (format == Q6_K) return LANES * (2 + 16 + 4);
        return LANES * (size.minimum ? 4 : 2) + (super() ? LANES * 16 : 0);
    }
    int64_t codes_bytes() const { return (k / UNIT * unit_bytes() + 63) / 64 * 64; }
    int64_t group_bytes() const { return codes_bytes() + (blocks() * side_bytes() + (format == INT8 ? LANES * 4 : 0) + 63) / 64 * 64; }
    int64_t bytes() const { return groups() * group_bytes(); }
};

// One block of one column into its place.
class Place {
   public:
    Place(const Layout& layout, uint8_t* group, int lane) : l_(layout), group_(group), lane_(lane) {}

    void put(int64_t block, const Block& b) {
        switch (l_.size.bits) {
            case 4: put_codes<4>(block, b); break;
            case 5: put_codes<5>(block, b); break;
            case 6: put_codes<6>(block, b); break;
            default: put_codes<8>(block, b);
        }
        uint8_t* side = group_ + l_.codes_bytes() + block * l_.side_bytes();
        if (l_.format != INT8) std::memcpy(side + 2 * lane_, &b.d, 2);
        if (l_.size.minimum) std::memcpy(side + 2 * LANES + 2 * lane_, &b.m, 2);
        if (!l_.super()) return;
        if (l_.format == Q6_K) {
            for (int j = 0; j < 16; ++j) side[(2 + j) * LANES + lane_] = (uint8_t)b.scale[j];
            int32_t start = 0;  // see X_OFFSET
            for (int j = 0; j < 16; ++j) {
                int32_t sum = 0;
                for (int i = 0; i < 16; ++i) sum += b.code[16 * j + i];
                start -= X_OFFSET * b.scale[j] * sum;
            }
            std::memcpy(side + 18 * LANES + 4 * lane_, &start, 4);
            return;
        }
        for (int j = 0; j < 8; ++j) {
            side[(4 + j) * LANES + lane_] = (uint8_t)b.scale[2 * j];
            side[(12 + j) * LANES + lane_] = b.least[j];
        }
    }

    // Value v of the unit at `at`, as it was before: with the offset, if the type has one.
    int code(const uint8_t* at, int v) const {
        const int j = v / 4, i = v % 4;
        if (l_.size.bits == 8) return at[j * VECTOR + i] ^ (UNSIGNED_BYTES ? 0 : 0x80);
        int c = j < 4 ? at[j * VECTOR + i] & 15 : at[(j - 4) * VECTOR + i] >> 4;
        if (l_.size.bits == 5) c |= (at[4 * VECTOR + i] >> j & 1) << 4;
        if (l_.size.bits == 6) c |= (at[(4 + j / 4) * VECTOR + i] >> 2 * (j % 4) & 3) << 4;
        return c;
    }

   private:
    // Codes four at a time, a byte each of a word: no shift below crosses a byte.
    template <int BITS>
    void put_codes(int64_t block, const Block& b) const {
        for (int u = 0; u < l_.size.values / UNIT; ++u) {
            uint8_t* at = group_ + (block * (l_.size.values / UNIT) + u) * l_.unit_bytes() + 4 * lane_;
            uint32_t four[8], upper[2] = {0, 0};
            std::memcpy(four, b.raw + u * UNIT, sizeof four);
            for (int j = 0; BITS == 8 && j < 8; ++j) put_word(at + j * VECTOR, four[j] ^ (UNSIGNED_BYTES ? 0u : 0x80808080u));
            for (int j = 0; BITS < 8 && j < 4; ++j) put_word(at + j * VECTOR, (four[j] & 0x0f0f0f0fu) | (four[j + 4] & 0x0f0f0f0fu) << 4);
            for (int j = 0; BITS == 5 && j < 8; ++j) upper[0] |= (four[j] >> 4 & 0x01010101u) << j;
            for (int j = 0; BITS == 6 && j < 8; ++j) upper[j / 4] |= (four[j] >> 4 & 0x03030303u) << 2 * (j % 4);
            for (int i = 0; BITS < 8 && i < BITS - 4; ++i) put_word(at + (4 + i) * VECTOR, upper[i]);
        }
    }

    static void put_word(uint8_t* to, uint32_t word) { std::memcpy(to, &word, 4); }

    const Layout& l_;
    uint8_t* group_;
    int lane_;
};

// Group g of rows `raw` (whole blocks, `row_bytes` each) into zeroed memory.
inline void pack_group(const Layout& l, const uint8_t* raw, int64_t row_bytes, int64_t g, uint8_t* out) {
    Block block;
    for (int lane = 0; lane < LANES && g * LANES + lane < l.n; ++lane) {
        const uint8_t* row = raw + (g * LANES + lane) * row_bytes;
        if (l.format == INT8) std::memcpy(out + l.codes_bytes() + 4 * lane, row, 4);
        Place place(l, out, lane);
        for (int64_t b = 0; b < l.blocks(); ++b) {
            read_block(l.format, row + b * l.size.bytes, block);
            place.put(b, block);
        }
    }
}

// out[0 : k] = the values of column c: d * code (+ m), as float32.
inline void unpack_column(const Layout& l, uint8_t* packed, int64_t c, float* out) {
    uint8_t* group = packed + c / LANES * l.group_bytes();
    const int lane = (int)(c % LANES), units = l.size.values / UNIT;
    const Place place(l, group, lane);
    for (int64_t b = 0; b < l.blocks(); ++b) {
        const uint8_t* side = group + l.codes_bytes() + b * l.side_bytes();
        float d, m = l.size.minimum ? widen_scale(l.format, read16(side + 2 * LANES + 2 * lane)) : 0.0f;
        if (l.format == INT8)
            std::memcpy(&d, group + l.codes_bytes() + 4 * lane, 4);
        else
            d = widen_scale(l.format, read16(side + 2 * lane));
        for (int k = 0; k < l.size.values; ++k) {
            const int raw = place.code(group + (b * units + k / UNIT) * l.unit_bytes() + 4 * lane, k % UNIT);
            const float code = (float)(l.format == MXFP4 ? FP4[raw] : raw - l.size.offset);
            float scale = d, least = m;
            if (l.format == Q6_K) scale = d * (float)(int8_t)side[(2 + k / 16) * LANES + lane];
            if (l.super() && l.size.minimum) {
                scale = d * (float)side[(4 + k / 32) * LANES + lane];
                least = m * (float)side[(12 + k / 32) * LANES + lane];
            }
            *out++ = l.size.minimum ? scale * code + least : scale * code;
        }
    }
}

}  // namespace outrider
