// Products of 1 to 8 rounded rows with packed weights: a unit is unpacked once for all of them.
//
// Inside a block sums are integers, so exact in any order; then one float step per block (two where the type has a minimum), blocks in
// order of k, one lane per column. So a result has the same bits whatever is computed beside it. See twin.h.
#pragma once

#include <utility>

#include "packed.h"
#include "rounded.h"

namespace outrider {

// The eight vectors of a unit. BITS as in packed.h; signed if they are 6, and where 8 are (see UNSIGNED_BYTES).
template <int BITS>
inline void unpack(const uint8_t* p, vb* w) {
    if (BITS == 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) w[j] = load<vb>(p + j * VECTOR);
        return;
    }
    typedef uint16_t vw __attribute__((vector_size(LANES * 4)));  // x86 shifts 16 bits at least; masks remove what comes over
    const auto up = [](vb v, int by) { return (vb)((vw)v << by); };
    const auto down = [](vb v, int by) { return (vb)((vw)v >> by); };
    const vb low = vb{} + (uint8_t)15;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const vb both = load<vb>(p + j * VECTOR);
        w[j] = both & low, w[j + 4] = down(both, 4) & low;
    }
    if (BITS == 5) {
        const vb fifth = load<vb>(p + 4 * VECTOR), bit = vb{} + (uint8_t)16;
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) w[j] |= (j < 4 ? up(fifth, 4 - j) : down(fifth, j - 4)) & bit;
    }
    if (BITS == 6) {
        const vb bits = vb{} + (uint8_t)0x30, middle = vb{} + (uint8_t)32;
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const vb upper = load<vb>(p + (4 + j / 4) * VECTOR);
            w[j] = (w[j] | ((j % 4 < 2 ? up(upper, 4 - 2 * (j % 4)) : down(upper, 2 * (j % 4) - 4)) & bits)) - middle;
        }
    }
}

// Codes of MXFP4 to their values, 16 added.
inline void look_up(vb* w) {
    alignas(16) static constexpr uint8_t TABLE[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};
#if defined(__AVX512BW__)
    const __m512i table = _mm512_broadcast_i32x4(load<__m128i>(TABLE));
    for (int j = 0; j < 8; ++j) w[j] = (vb)_mm512_shuffle_epi8(table, (__m512i)w[j]);
#elif !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__)
    const __m256i table = _mm256_broadcastsi128_si256(load<__m128i>(TABLE));
    for (int j = 0; j < 8; ++j) w[j] = (vb)_mm256_shuffle_epi8(table, (__m256i)w[j]);
#elif defined(__aarch64__)
    for (int j = 0; j < 8; ++j) w[j] = (vb)vqtbl1q_u8(load<uint8x16_t>(TABLE), (uint8x16_t)w[j]);
#else
    for (int j = 0; j < 8; ++j)
        for (int i = 0; i < VECTOR; ++i) w[j][i] = TABLE[w[j][i]];
#endif
}

template <Format F>
inline vf block_scales(const uint8_t* p) {
    if (F != MXFP4) return widen_halves(p);
    return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16);
}

// Groups are read side by side, each a stream, and lines are asked for ahead of their use: few lines of one stream are under way
// from memory at a time. They are asked into the second cache, which is a quarter faster on Zen 4: probably each that comes to the
// first holds one of its few places for misses until it is there. Behind a group's codes come those of the group that follows the C: most likely they are read next.
constexpr int64_t reach(int64_t at, int64_t ahead, int64_t size, int64_t next) {
    return at + ahead < size ? at + ahead : next + (at + ahead - size);
}

template <int BYTES>
inline void ask_lines(const uint8_t* p) {
#pragma GCC unroll 8
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i, 0, 2);
}

constexpr int FEW = 3;  // rows up to which what all groups and rows need fits into registers

// How many groups meet a row at once: two share what is read of it, where their weights fit into registers.
template <int R, int C>
constexpr int TOGETHER = REGISTERS == 32 && R > FEW && C % 2 == 0 ? 2 : 1;

// Weights stay in registers for all rows, and what rows of x hold is read anew for the groups that come next: compilers would rather
// load weights for each row and keep x for all groups, which are more than there are registers, and then loads take the time.
template <int R, int T>
inline void keep_apart(vb (&w)[T][8], const int8_t*& x) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
        for (int j = 0; R > FEW && j < 8; ++j) hold(w[t][j]);
    if (R > FEW) asm("" : "+r"(x));
}

// out[(c * R + r) * LANES] for C groups side by side and R rows of a type with blocks of 32.
template <Format F, int R, int C>
void small_blocks(const Layout& l, const uint8_t* group, const Rounded32& x, float* out) {
    vf total[C][R] = {};
    constexpr BlockSizes SIZE = sizes_of(F);
    constexpr int DEPTH = F == MXFP4 ? 5 : SIZE.bits, T = TOGETHER<R, C>;
    constexpr bool SIGNED = SIZE.offset == 0 || (SIZE.bits == 8 && !UNSIGNED_BYTES);
    const int64_t step = l.unit_bytes(), aside = l.side_bytes(), codes = l.codes_bytes(), apart = l.group_bytes(), blocks = l.blocks();
    constexpr int64_t FAR = R <= FEW ? 2048 : 4096;  // bytes of a stream: the more rows, the longer a line takes
    const int64_t ahead = codes < FAR ? codes : FAR;
    const int32_t* start = x.start[SIZE.offset == 8 ? 0 : SIZE.offset == 16 ? 1 : 2];
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t there = reach(b * step, ahead, codes, C * apart);
        const int64_t there_aside = codes + reach(b * aside, 256, blocks * aside, C * apart);
        const int8_t* q = x.q + b * UNIT;
        const auto take = [&](int c) __attribute__((always_inline)) {
            vb w[T][8];
            vf d[T], m[T];
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) {
                const uint8_t *at = group + (c + t) * apart, *side = at + codes + b * aside;
                ask_lines<Layout::vectors(SIZE.bits) * VECTOR>(at + there);
                ask_lines<1>(at + there_aside);
                unpack<SIZE.bits>(at + b * step, w[t]);
                if (F == MXFP4) look_up(w[t]);
                d[t] = F == INT8 ? vf{} + 1.0f : block_scales<F>(side);
                m[t] = SIZE.minimum ? widen_halves(side + 2 * LANES) : vf{};
            }
            keep_apart<R, T>(w, q);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const int64_t i = r * x.ldb + b;
                const vf dx = x.d[i] - vf{};
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t) {
                    const vi from = SIGNED ? vi{} : vi{} + start[i];
                    const vi sum = dots<DEPTH, 8>(from, w[t], q + r * x.ldq);
                    vf& all = total[c + t][r];
                    all = fused(to_float(sum), F == INT8 ? dx : d[t] * dx, all);
                    if (SIZE.minimum) all = fused(x.sum[i] - vf{}, m[t] * dx, all);
                }
            }
        };
        if (R <= FEW) {
#pragma GCC unroll 4
            for (int c = 0; c < C; c += T) take(c);
        } else {
#pragma GCC unroll 1
            for (int c = 0; c < C; c += T) take(c);
        }
    }
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r)
            store(out + (c * R + r) * LANES, F == INT8 ? total[c][r] * load<vf>(group + c * apart + codes) : total[c][r]);
}

// The sum over a super-block of minima times sums of inputs. pair: the minima of two units each; sums: of the inputs of every unit.
inline vi times_least(const vi (&pair)[4], const int16_t* sums) {
    vi total = {};
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
        int32_t two;
        std::memcpy(&two, sums + 2 * u, 4);
        total = pair_dot(total, pair[u], two);
    }
    return total;
}

// total[r] += block b of one group: its sums, and its minima, with what lies beside it.
template <Format F, int R>
__attribute__((always_inline)) inline void add_super_block(
    const uint8_t* side, const Rounded256& x, int64_t b, const vi (&sum)[R], vf (&total)[R]
) {
    constexpr bool MINIMUM = sizes_of(F).minimum;
    const vf d = widen_halves(side), m = MINIMUM ? widen_halves(side + 2 * LANES) : vf{};
    vi pair[4];
    for (int u = 0; MINIMUM && u < 4; ++u) pair[u] = two_least(side + (12 + 2 * u) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const vf dx = x.d[r * x.ldd + b] - vf{};
        total[r] = fused(to_float(sum[r]), d * dx, total[r]);
        if (!MINIMUM) continue;
        total[r] = fused(to_float(times_least(pair, x.sum + r * x.lds + b * 8)), m * dx, total[r]);
    }
}

// `small_blocks` with super-blocks of 256.
template <Format F, int R, int C>
void super_blocks(const Layout& l, const uint8_t* group, const Rounded256& x, float* out) {
    vf total[C][R] = {};
    constexpr BlockSizes SIZE = sizes_of(F);
    constexpr int T = TOGETHER<R, C>;
    const int64_t step = l.unit_bytes(), aside = l.side_bytes(), codes = l.codes_bytes(), apart = l.group_bytes(), blocks = l.blocks();
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t there = reach(b * 8 * step, 2 * 8 * step, codes, C * apart) - b * 8 * step;
        const int64_t there_aside = reach(b * aside, aside, blocks * aside, C * apart) - b * aside;
        const uint8_t* at = group + b * 8 * step;
        const uint8_t* side = group + codes + b * aside;
        vi sum[C][R];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            ask_lines<(F == Q6_K ? 22 : 20) * LANES>(side + c * apart + there_aside);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[c][r] = F == Q6_K ? load<vi>(side + c * apart + 18 * LANES) : vi{};
        }
        for (int u = 0; u < 8; ++u) {
            const int8_t* x_unit = (F == Q6_K ? x.moved : x.q) + b * 256 + u * UNIT;
#pragma GCC unroll 1
            for (int c = 0; c < C; c += T) {
                vb w[T][8];
                vi scale[T], second[T];
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t) {
                    const uint8_t* from = at + (c + t) * apart + u * step;
                    const uint8_t* factor = side + (c + t) * apart + (F == Q6_K ? 2 + 2 * u : 4 + u) * LANES;
                    ask_lines<Layout::vectors(SIZE.bits) * VECTOR>(from + there);
                    unpack<SIZE.bits>(from, w[t]);
                    scale[t] = F == Q6_K ? widen_bytes<int8_t>(factor) : widen_bytes<uint8_t>(factor);
                    second[t] = F == Q6_K ? widen_bytes<int8_t>(factor + LANES) : vi{};
                }
                keep_apart<R, T>(w, x_unit);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                    for (int t = 0; t < T; ++t) {
                        const int8_t* q = x_unit + r * x.ldq;
                        vi& all = sum[c + t][r];
                        if (F == Q6_K) {
                            all = scaled_dots<6, 4>(all, scale[t], w[t], q);
                            all = scaled_dots<6, 4>(all, second[t], w[t] + 4, q + 16);
                        } else {
                            all = scaled_dots<SIZE.bits, 8>(all, scale[t], w[t], q);
                        }
                    }
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) add_super_block<F>(side + c * apart, x, b, sum[c], total[c]);
    }
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) store(out + (c * R + r) * LANES, total[c][r]);
}

// Rows together, and groups side by side: where rows and groups have more totals than there are registers, spilling some costs less
// than fewer streams would. Where there are no sums of byte products nothing is gained by either; but inputs of 16 bits are two rows.
constexpr int MOST_ROWS = OUTRIDER_DOTS ? 8 : 2, MOST_GROUPS = OUTRIDER_DOTS ? 4 : 1;

// The kernels of a type, for 1, 2, ... rows: one group, and MOST_GROUPS.
template <class X>
struct Kernels {
    using Run = void (*)(const Layout&, const uint8_t*, const X&, float*);
    Run one[MOST_ROWS], many[MOST_ROWS];
};

template <Format F, int... R>
constexpr Kernels<Rounded32> small_kernels(std::integer_sequence<int, R...>) {
    return {{small_blocks<F, R + 1, 1>...}, {small_blocks<F, R + 1, MOST_GROUPS>...}};
}

template <Format F, int... R>
constexpr Kernels<Rounded256> super_kernels(std::integer_sequence<int, R...>) {
    return {{super_blocks<F, R + 1, 1>...}, {super_blocks<F, R + 1, MOST_GROUPS>...}};
}

using Each = std::make_integer_sequence<int, MOST_ROWS>;

inline const Kernels<Rounded32>& kernels32(Format f) {
    static constexpr Kernels<Rounded32> Q40 = small_kernels<Q4_0>(Each()), Q41 = small_kernels<Q4_1>(Each()), Q50 = small_kernels<Q5_0>(Each()),
                                        Q51 = small_kernels<Q5_1>(Each()), Q80 = small_kernels<Q8_0>(Each()), FP = small_kernels<MXFP4>(Each()),
                                        BYTE = small_kernels<INT8>(Each());
    switch (f) {
        case Q4_0: return Q40;
        case Q4_1: return Q41;
        case Q5_0: return Q50;
        case Q5_1: return Q51;
        case Q8_0: return Q80;
        case MXFP4: return FP;
        default: return BYTE;
    }
}

inline const Kernels<Rounded256>& kernels256(Format f) {
    static constexpr Kernels<Rounded256> Q4 = super_kernels<Q4_K>(Each()), Q5 = super_kernels<Q5_K>(Each()), Q6 = super_kernels<Q6_K>(Each());
    return f == Q4_K ? Q4 : f == Q5_K ? Q5 : Q6;
}

}  // namespace outrider
