// The weights of a linear: segments of outputs, each of a type of its own, and what its inputs must be stored as.
#pragma once

#include <memory>
#include <new>

#include "blocks.h"
#include "layout.h"
#include "linear.h"

namespace outrider {

// Ways to store a linear's input; a set of them is their sum.
// STORE_TWICE: rows that are rounded have what rounding left of them in a second row, rounded again, so about 16 bits in all.
enum Store : int { STORE_FLOAT = 1, STORE_BF16 = 2, STORE_32 = 4, STORE_256 = 8, STORE_TWICE = 16 };

constexpr int store_of(Format f) {
    return f == F32 ? STORE_FLOAT : f == BF16 ? STORE_BF16 : sizes_of(f).values == 256 ? STORE_256 : STORE_32;
}

// Rows of inputs, in every way that the linears which read them need.
class Input {
   public:
    // Before a forward: `rows` rows of k values; `stores` is a set of Store. False when there is no memory.
    bool reserve(int64_t rows, int64_t k, int stores) {
        k_ = k, stores_ = stores, lines_ = (k + 15) / 16 * 16 + 16, each_ = stores & STORE_TWICE ? 2 : 1;
        return (!(stores & STORE_FLOAT) || full_.reserve(rows * packed_stride<float>(k))) &&
               (!(stores & STORE_BF16) || half_.reserve(rows * packed_stride<bf16>(k))) &&
               (!rounds() || line_.reserve(each_ * rows * lines_)) && (!(stores & STORE_32) || by32_.reserve(each_ * rows, k)) &&
               (!(stores & STORE_256) || by256_.reserve(each_ * rows, k));
    }

    // x[0 : n] at values k0 : k0 + n of a row.
    void put(int64_t row, int64_t k0, const float* x, int64_t n) {
        if (stores_ & STORE_FLOAT) Packing<float>::pack(full_ + row * packed_stride<float>(k_), (int)k0, x, (int)n);
        if (stores_ & STORE_BF16) Packing<bf16>::pack(half_ + row * packed_stride<bf16>(k_), (int)k0, x, (int)n);
        if (rounds()) std::memcpy(line(row) + k0, x, n * sizeof(float));
    }

    // A complete row of another input of as many values, which is stored in all of these ways too; before it is rounded here.
    void copy(int64_t row, const Input& from, int64_t other) {
        if (stores_ & STORE_FLOAT) copy_row<float>(full_, row, from.full_, other);
        if (stores_ & STORE_BF16) copy_row<bf16>(half_, row, from.half_, other);
        if (rounds()) std::memcpy(line(row), from.line(other), k_ * sizeof(float));
    }

    // Whether complete rows are still to be rounded, part by part, before they are read.
    bool rounds() const { return stores_ & (STORE_32 | STORE_256); }
    int64_t parts() const { return (k_ + PART - 1) / PART; }
    void round(int64_t row, int64_t part) {
        const float* x = line(row);
        const int64_t from = part * PART, to = from + PART < k_ ? from + PART : k_;
        if (stores_ & STORE_32) round_in(by32_, row, x, from, to);
        if (stores_ & STORE_256) round_in(by256_, row, x, from, to);
    }

    void round_row(int64_t row) {
        for (int64_t part = 0; rounds() && part < parts(); ++part) round(row, part);
    }

    const float* full(int64_t row) const { return full_ + row * packed_stride<float>(k_); }
    const Packing<bf16>::Item* half(int64_t row) const { return half_ + row * packed_stride<bf16>(k_); }
    // Rounded rows of each row: one, or two whose products are added.
    int64_t each() const { return each_; }
    Rounded32 by32(int64_t row) const { return by32_.rows(each_ * row); }
    Rounded256 by256(int64_t row) const { return by256_.rows(each_ * row); }

   private:
    static constexpr int64_t PART = 1024;  // a multiple of every block

    float* line(int64_t row) const { return line_ + each_ * row * lines_; }

    // Values from : to of a row, and then, where that is wanted, what is left of them.
    template <class Rounding>
    void round_in(Rounding& to_rows, int64_t row, const float* x, int64_t from, int64_t to) {
        to_rows.round(each_ * row, x, from, to);
        if (each_ == 1) return;
        float* rest = line(row) + lines_;
        to_rows.rest(each_ * row, x, from, to, rest);
        to_rows.round(each_ * row + 1, rest, from, to);
    }

    template <class W, class B>
    void copy_row(const B& to, int64_t row, const B& from, int64_t other) const {
        const int64_t n = packed_stride<W>(k_);
        std::memcpy((void*)(to + row * n), from + other * n, n * sizeof(typename Packing<W>::Item));
    }

    int stores_ = 0;
    int64_t k_ = 0, lines_ = 0, each_ = 1;
    Buffer<float> full_, line_;
    Buffer<Packing<bf16>::Item> half_;
    Rounding32 by32_;
    Rounding256 by256_;
};

class Linear {
   public:
    // Null when there is no memory, or for a type or a number of inputs that there are no kernels for.
    // twice: its inputs are rounded twice, see STORE_TWICE.
    static Linear* make(const SegmentPointers* from, int64_t count, int64_t k, bool twice = false) {
        std::unique_ptr<Linear> made(new (std::nothrow) Linear());
        if (made == nullptr) return nullptr;
        made->part_.reset(new (std::nothrow) Part[count]);
        if (made->part_ == nullptr) return nullptr;
        made->k_ = k, made->parts_ = count;
        for (int64_t i = 0; i < count; ++i)
            if (!made->part_[i].build(from[i], made->n_, k, made->stores_)) return nullptr;
            else made->n_ += from[i].n;
        if (twice && made->stores_ & (STORE_32 | STORE_256)) made->stores_ |= STORE_TWICE;
        return made.release();
    }

    int64_t inputs() const { return k_; }
    int64_t outputs() const { return n_; }
    int stores() const { return stores_; }

    // What packed parts take in all. It is the caller's memory, 64 bytes aligned, so that all weights of a model can lie together.
    int64_t bytes() const {
        int64_t total = 0;
        for (int64_t i = 0; i < parts_; ++i) total += part_[i].bytes();
        return total;
    }
    void place(uint8_t* memory) {
        for (int64_t i = 0; i < parts_; memory += part_[i++].bytes()) part_[i].packed = part_[i].bytes() ? memory : nullptr;
    }

    // Packs group `unit` of the whole; units are independent of each other.
    int64_t pack_units() const {
        int64_t units = 0;
        for (int64_t i = 0; i < parts_; ++i) units += part_[i].packed != nullptr ? part_[i].layout.groups() : 0;
        return units;
    }
    void pack(int64_t unit) {
        for (int64_t i = 0; i < parts_; ++i) {
            Part& p = part_[i];
            const int64_t groups = p.packed != nullptr ? p.layout.groups() : 0;
            if (unit < groups) return p.pack(unit);
            unit -= groups;
        }
    }

    // out[0 : k] = row c of the weights.
    void row(int64_t c, float* out) const {
        for (int64_t i = 0; i < parts_; ++i)
            if (c < part_[i].first + part_[i].layout.n) return part_[i].row(c - part_[i].first, k_, out);
    }

    // out[r * ldo + j] = weight row (from + j) . input row (row + r), for n outputs and `rows` rows.
    void product(int64_t from, int64_t n, const Input& x, int64_t row, int64_t rows, float* out, int64_t ldo) const {
        for (int64_t i = 0; i < parts_ && rows > 0; ++i) {
            const Part& p = part_[i];
            const int64_t begin = from > p.first ? from - p.first : 0, end = from + n - p.first < p.layout.n ? from + n - p.first : p.layout.n;
            if (begin < end) p.product(begin, end, k_, x, row, rows, out + (p.first + begin - from), ldo);
        }
    }

   private:
    struct Part {
        Layout layout{F32, 0, 0};
        int64_t first = 0;
        const void* data = nullptr;
        uint8_t* packed = nullptr;

        bool build(const SegmentPointers& from, int64_t at, int64_t k, int& stores) {
            const Format f = (Format)from.format;
            layout = Layout(f, from.n, k), first = at, data = from.data;
            stores |= store_of(f);
            return f == F32 || f == BF16 || (is_quantised(f) && k != 0 && k % layout.size.values == 0);
        }

        int64_t bytes() const { return layout.format == F32 || layout.format == BF16 ? 0 : layout.bytes(); }

        int64_t row_bytes() const { return layout.blocks() * layout.size.bytes; }
        void pack(int64_t group) {
            uint8_t* to = packed + group * layout.group_bytes();
            std::memset(to, 0, (size_t)layout.group_bytes());
            pack_group(layout, static_cast<const uint8_t*>(data), row_bytes(), group, to);
        }

        void row(int64_t c, int64_t k, float* out) const {
            if (layout.format == F32) std::memcpy(out, static_cast<const float*>(data) + c * k, k * sizeof(float));
            else if (layout.format == BF16)
                for (int64_t i = 0; i < k; ++i) out[i] = widen(static_cast<const bf16*>(data)[c * k + i]);
            else unpack_column(layout, packed, c, out);
        }

        void product(int64_t begin, int64_t end, int64_t k, const Input& x, int64_t row, int64_t rows, float* out, int64_t ldo) const {
            const int n = (int)(end - begin);
            if (layout.format == F32)
                outrider::product(plain<float>() + begin * k, k, n, x.full(row), packed_stride<float>(k), (int)rows, (int)k, out, ldo);
            else if (layout.format == BF16)
                outrider::product(plain<bf16>() + begin * k, k, n, x.half(row), packed_stride<bf16>(k), (int)rows, (int)k, out, ldo);
            else if (layout.super())
                quantised(kernels256(layout.format), begin, end, [&](int64_t at) { return x.by256(row + at); }, rows, x.each(), out, ldo);
            else
                quantised(kernels32(layout.format), begin, end, [&](int64_t at) { return x.by32(row + at); }, rows, x.each(), out, ldo);
        }

        template <class W>
        const W* plain() const {
            return static_cast<const W*>(data);
        }

        // Rows in even parts of 8 rounded ones at most, all of them against the same few groups while those are in the cache.
        template <class X, class From>
        void quantised(const Kernels<X>& run, int64_t begin, int64_t end, const From& from, int64_t rows, int64_t each, float* out,
                       int64_t ldo) const {
            const int64_t most = MOST_ROWS / each, tiles = (rows + most - 1) / most, last = (end + LANES - 1) / LANES;
            const int64_t step = MOST_GROUPS;  // few, so that they stay in the cache for the next rows
            alignas(64) float total[MOST_ROWS * LANES * MOST_GROUPS];
            for (int64_t g = begin / LANES; g < last; g += step) {
                const int64_t groups = last - g < step ? last - g : step;
                const uint8_t* weights = packed + g * layout.group_bytes();
                int64_t at = 0;
                for (int64_t t = 0; t < tiles; ++t) {
                    const int64_t size = (rows - at + tiles - t - 1) / (tiles - t);
                    const X x = from(at);
                    for (int64_t i = 0, count; i < groups; i += count) {
                        count = groups - i < MOST_GROUPS ? 1 : MOST_GROUPS;
                        const auto kernel = count > 1 ? run.many[each * size - 1] : run.one[each * size - 1];
                        kernel(layout, weights + i * layout.group_bytes(), x, total);
                        for (int64_t j = 0; j < count; ++j)
                            for (int64_t r = 0; r < size; ++r) {
                                float* sum = total + (j * size + r) * each * LANES;
                                for (int64_t c = 0; each > 1 && c < LANES; ++c) sum[c] += sum[LANES + c];
                                hand_out(sum, (g + i + j) * LANES, begin, end, out + (at + r) * ldo);
                            }
                    }
                    at += size;
                }
            }
        }

        // What lies between columns `begin` and `end` of a group that begins at `column`.
        static void hand_out(const float* total, int64_t column, int64_t begin, int64_t end, float* out) {
            if (column >= begin && column + LANES <= end) {
                std::memcpy(out + (column - begin), total, LANES * sizeof(float));
                return;
            }
            for (int64_t j = column < begin ? begin - column : 0; j < LANES && column + j < end; ++j) out[column + j - begin] = total[j];
        }
    };

    Linear() = default;
    int64_t k_ = 0, n_ = 0, parts_ = 0;
    int stores_ = 0;
    std::unique_ptr<Part[]> part_;
};

}  // namespace outrider
