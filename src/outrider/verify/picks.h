// Tokens for the nodes of a draft: draws from distributions, and the best of them. Plain twins: drafters/tree/draws.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "rows.h"

namespace picks {

constexpr int64_t STRIDE = 256;  // running sums are kept at every so many entries

// The first entry whose running sum exceeds u times the total, n if none does. Sums are sequential, in float64: never decreasing, and
// the same bits as the twin's. `taken` entries count as zero.
template <class T>
class Running {
   public:
    Running(const T* q, int64_t n) : q_(q), n_(n), at_(n / STRIDE + 1) {}

    double add_up(const std::vector<int64_t>& taken) {
        taken_ = &taken;
        double sum = 0.0;
        for (int64_t i = 0; i < n_; ++i) {
            if (i % STRIDE == 0) at_[i / STRIDE] = sum;
            sum += value(i);
        }
        return total_ = sum;
    }

    int64_t find(double u) const {
        const double level = total_ * u;
        if (!(total_ > level)) return n_;
        int64_t low = 0, high = (n_ - 1) / STRIDE;  // the last mark that is not above the level
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (at_[middle] > level) high = middle - 1;
            else low = middle;
        }
        double sum = at_[low];
        for (int64_t i = low * STRIDE; i < n_; ++i)
            if ((sum += value(i)) > level) return i;
        return n_;
    }

   private:
    double value(int64_t i) const {
        if (taken_->empty()) return (double)q_[i];
        return std::find(taken_->begin(), taken_->end(), i) == taken_->end() ? (double)q_[i] : 0.0;
    }

    const T* q_;
    int64_t n_;
    const std::vector<int64_t>* taken_ = nullptr;
    std::vector<double> at_;
    double total_ = 0.0;
};

template <class T>
void draw(const T* q, int64_t n, const double* u, int64_t count, bool replace, int64_t* token, double* total) {
    Running<T> running(q, n);
    std::vector<int64_t> taken;
    *total = running.add_up(taken);
    for (int64_t j = 0; j < count; ++j) {
        if (j > 0 && !replace) running.add_up(taken);
        token[j] = running.find(u[j]);
        if (!replace && token[j] < n) taken.push_back(token[j]);
    }
}

// The `count` largest entries, the largest first, the first of equal ones; never a NaN. What is missing has the value NaN.
template <class T>
void best(const T* x, int64_t n, int64_t count, int64_t* token, T* value) {
    typedef T V __attribute__((vector_size(64)));
    constexpr int64_t N = 64 / sizeof(T), BLOCK = 4 * N;
    int64_t held = 0;
    T least = -std::numeric_limits<T>::infinity();  // what a further entry must exceed
    const auto offer = [&](int64_t i) {
        const T here = x[i];
        if (!(here > least || (held < count && here == here))) return;
        int64_t at = held < count ? held++ : count - 1;
        for (; at > 0 && value[at - 1] < here; --at) value[at] = value[at - 1], token[at] = token[at - 1];
        value[at] = here, token[at] = i;
        if (held == count) least = value[count - 1];
    };
    int64_t i = 0;
    for (; i < n && held < count; ++i) offer(i);
    for (; i + BLOCK <= n; i += BLOCK) {
        auto any = V{} > V{};
        for (int64_t k = 0; k < BLOCK; k += N) {
            V v;
            __builtin_memcpy(&v, x + i + k, sizeof v);
            any |= v > least;
        }
        bool some = false;
        for (int64_t k = 0; k < N; ++k) some |= any[k] != 0;
        for (int64_t k = 0; some && k < BLOCK; ++k) offer(i + k);
    }
    for (; i < n; ++i) offer(i);
    for (; held < count; ++held) value[held] = std::numeric_limits<T>::quiet_NaN(), token[held] = 0;
}

}  // namespace picks

// For each of `rows` rows [size]: `count` draws by its uniforms, independent or without replacement (a draw without mass is `size`), and
// the row's sum.
EXPORT void outrider_draws(
    const void* q, int wide, int64_t rows, int64_t size, const double* u, int64_t count, int replace, int64_t* token, double* total
) {
    for (int64_t r = 0; r < rows; ++r) {
        const double* own = u + r * count;
        if (wide) picks::draw(static_cast<const double*>(q) + r * size, size, own, count, replace, token + r * count, total + r);
        else picks::draw(static_cast<const float*>(q) + r * size, size, own, count, replace, token + r * count, total + r);
    }
}

// For each of `rows` rows [size] the `count` largest entries and their values.
EXPORT void outrider_best(const void* x, int wide, int64_t rows, int64_t size, int64_t count, int64_t* token, void* value) {
    for (int64_t r = 0; r < rows; ++r) {
        if (wide) picks::best(static_cast<const double*>(x) + r * size, size, count, token + r * count, static_cast<double*>(value) + r * count);
        else picks::best(static_cast<const float*>(x) + r * size, size, count, token + r * count, static_cast<float*>(value) + r * count);
    }
}

// What a distribution says of its own acceptance: the sum of the squares of each row if tokens are drawn from it, otherwise, of rows of
// logits, the probability of the most likely token.
EXPORT void outrider_certainty(const float* x, int64_t count, int64_t size, int drawn, double* out) {
    for (int64_t r = 0; r < count; ++r) out[r] = drawn ? rows::squares(x + r * size, size) : rows::share(x + r * size, size);
}
