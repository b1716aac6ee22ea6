// Rows rounded to bytes, block by block: what is multiplied with quantised weights. The vector twin of `round_block`.
#pragma once

#include "dots.h"
#include "parallel.h"
#include "twin.h"

namespace outrider {

// x[0 : n] as whole multiples of what is returned, for n a multiple of 32: see `round_block`, whose bits these are.
inline float round_block_fast(const float* x, int n, int8_t* q) {
    vu top = {};
    for (int k = 0; k < n; k += LANES) {
        const vu size = load<vu>(x + k) & 0x7fffffffu, more = (vu)(size > top);
        top = (size & more) | (top & ~more);
    }
    uint32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = top[i] > most ? top[i] : most;
    float a;
    std::memcpy(&a, &most, 4);
    const bool finite = most < 0x7f800000u;
    if (!finite || a < 1e-30f) {
        std::memset(q, 0, n);
        return finite ? 0.0f : std::nanf("");
    }
    const float times = 127.0f / a;
    for (int k = 0; k < n; k += LANES) {  // adding 1.5 * 2^23 rounds to the nearest integer, to even between two
        const vi whole = (vi)((vu)(load<vf>(x + k) * times + 12582912.0f) - 0x4b400000u);
        store_bytes(q + k, whole);
    }
    return a / 127.0f;
}

// Rows of k values, rounded in blocks of 32.
struct Rounded32 {
    const int8_t* q;        // [k], rows `ldq` apart
    const float* d;         // [k / 32], rows `ldb` apart, as all below
    const float* sum;       // of a block's q
    const int32_t* start[3];  // -8, -16 and -128 times that sum
    int64_t ldq, ldb;
};

// The same in blocks of 256.
struct Rounded256 {
    const int8_t *q, *moved;  // moved: with X_OFFSET added
    const float* d;           // [k / 256]
    const int16_t* sum;       // [k / 32]: of every 32 of q
    int64_t ldq, ldd, lds;
};

inline int sum_of(const int8_t* q) {
    int sum = 0;
    for (int j = 0; j < UNIT; ++j) sum += q[j];
    return sum;
}

// Memory of rows in one of these forms. Rows do not share sets of the first cache.
class Rounding32 {
   public:
    bool reserve(int64_t rows, int64_t k) {
        ldq_ = k + 64, ldb_ = k / UNIT + 16, rows_ = rows;
        return q_.reserve(rows * ldq_) && d_.reserve(rows * ldb_) && sum_.reserve(rows * ldb_) && start_.reserve(3 * rows * ldb_);
    }
    // Blocks of x[from : to] of a row.
    void round(int64_t row, const float* x, int64_t from, int64_t to) {
        constexpr int OFFSET[3] = {8, 16, 128};
        for (int64_t k = from; k < to; k += UNIT) {
            int8_t* q = q_ + row * ldq_ + k;
            const int64_t at = row * ldb_ + k / UNIT;
            d_[at] = round_block_fast(x + k, UNIT, q);
            const int sum = sum_of(q);
            sum_[at] = (float)sum;
            for (int i = 0; i < 3; ++i) start_[i * rows_ * ldb_ + at] = -OFFSET[i] * sum;
        }
    }
    // rest[from : to] = what rounding left of x in those blocks of a row.
    void rest(int64_t row, const float* x, int64_t from, int64_t to, float* rest) const {
        for (int64_t k = from; k < to; ++k) rest[k] = rest_of(x[k], d_[row * ldb_ + k / UNIT], q_[row * ldq_ + k]);
    }
    Rounded32 rows(int64_t from) const {
        const int64_t at = from * ldb_, all = rows_ * ldb_;
        return {q_ + from * ldq_, d_ + at, sum_ + at, {start_ + at, start_ + (all + at), start_ + (2 * all + at)}, ldq_, ldb_};
    }

   private:
    int64_t ldq_ = 0, ldb_ = 0, rows_ = 0;
    Buffer<int8_t> q_;
    Buffer<float> d_, sum_;
    Buffer<int32_t> start_;
};

class Rounding256 {
   public:
    bool reserve(int64_t rows, int64_t k) {
        ldq_ = k + 64, ldd_ = k / 256 + 16, lds_ = k / UNIT + 32;
        return q_.reserve(rows * ldq_) && moved_.reserve(rows * ldq_) && d_.reserve(rows * ldd_) && sum_.reserve(rows * lds_);
    }
    void round(int64_t row, const float* x, int64_t from, int64_t to) {
        for (int64_t k = from; k < to; k += 256) {
            int8_t *q = q_ + row * ldq_ + k, *moved = moved_ + row * ldq_ + k;
            d_[row * ldd_ + k / 256] = round_block_fast(x + k, 256, q);
            for (int j = 0; j < 256; ++j) moved[j] = (int8_t)(uint8_t)(q[j] + X_OFFSET);
            for (int j = 0; j < 8; ++j) sum_[row * lds_ + k / UNIT + j] = (int16_t)sum_of(q + j * UNIT);
        }
    }
    void rest(int64_t row, const float* x, int64_t from, int64_t to, float* rest) const {
        for (int64_t k = from; k < to; ++k) rest[k] = rest_of(x[k], d_[row * ldd_ + k / 256], q_[row * ldq_ + k]);
    }
    Rounded256 rows(int64_t from) const {
        return {q_ + from * ldq_, moved_ + from * ldq_, d_ + from * ldd_, sum_ + from * lds_, ldq_, ldd_, lds_};
    }

   private:
    int64_t ldq_ = 0, ldd_ = 0, lds_ = 0;
    Buffer<int8_t> q_, moved_;
    Buffer<float> d_;
    Buffer<int16_t> sum_;
};

}  // namespace outrider
