// The first block's input of a learned drafter: hidden states of the target, or what the drafter made of them, beside tokens.
#pragma once

#include "vectors.h"
#include "weights.h"

namespace outrider {

class Features {
   public:
    void build(const FeaturePointers& f, int64_t hidden, double eps, int stores) {
        f_ = f, hidden_ = hidden, eps_ = (float)eps, stores_ = f.joint ? f.joint->stores() : stores;
    }

    // Before a forward; false when there is no memory.
    bool begin(const FeatureRows& rows, int64_t count) {
        r_ = rows;
        return !present() || ((!fuses() || taps_.reserve(count, f_.taps * f_.width, f_.fuse->stores())) &&
                              fused_.reserve(count * hidden_) && (f_.join == ALONE || pair_.reserve(count, 2 * hidden_, stores_)));
    }

    bool present() const { return r_.tap != nullptr || r_.feature != nullptr; }
    bool fuses() const { return r_.tap != nullptr && f_.fuse != nullptr; }
    bool goes_through() const { return present() && f_.join == THROUGH; }
    bool beside() const { return present() && f_.join == BESIDE; }
    bool alone() const { return present() && f_.join == ALONE; }
    int64_t line() const { return f_.taps == 0 ? 0 : f_.width > 2 * hidden_ ? f_.width : 2 * hidden_; }  // floats that `take` and `join` need
    Input& taps() { return taps_; }
    Input& pair() { return pair_; }

    // The hidden states that row i reads, side by side.
    void take(int64_t i, float* line) {
        for (int64_t t = 0; t < f_.taps; ++t) read(t, i, line), taps_.put(i, t * f_.width, line, f_.width);
        taps_.round_row(i);
    }

    // Outputs from : from + n of `fuse`, for all rows.
    void fuse(int64_t from, int64_t n, int64_t rows) { f_.fuse->product(from, n, taps_, 0, rows, fused_ + from, hidden_); }

    // Row i: its feature; what the first block reads of it and of the token, whose embedding is in x; and the residual, to x.
    void join(int64_t i, float* x, float* line) {
        float* feature = fused_ + i * hidden_;
        if (r_.feature != nullptr) std::memcpy(feature, r_.feature + i * hidden_, hidden_ * sizeof(float));
        else if (!fuses()) read(0, i, feature);
        if (r_.tap != nullptr && f_.fused_norm) rms_norm(feature, f_.fused_norm, hidden_, eps_, feature);
        if (f_.token_norm) {
            rms_norm(x, f_.token_norm, hidden_, eps_, line);
            rms_norm(feature, f_.feature_norm, hidden_, eps_, line + hidden_);
        } else {
            std::memcpy(line, x, hidden_ * sizeof(float));
            std::memcpy(line + hidden_, feature, hidden_ * sizeof(float));
        }
        if (f_.join != ALONE) pair_.put(i, 0, line, hidden_), pair_.put(i, hidden_, line + hidden_, hidden_), pair_.round_row(i);
        std::memcpy(x, f_.join == BESIDE && f_.normed_residual ? line + hidden_ : feature, hidden_ * sizeof(float));
    }

    // Outputs from : from + n of `joint`, for all rows, to residuals that are `stride` apart.
    void through(int64_t from, int64_t n, int64_t rows, float* x, int64_t stride) {
        f_.joint->product(from, n, pair_, 0, rows, x + from, stride);
        for (int64_t i = 0; i < rows && f_.joint_bias; ++i)
            for (int64_t j = from; j < from + n; ++j) x[i * stride + j] += f_.joint_bias[j];
    }

   private:
    void read(int64_t t, int64_t i, float* out) const {
        const int64_t at = r_.tap_row[i] * f_.width;
        if (r_.tap_half)
            for (int64_t j = 0; j < f_.width; ++j) out[j] = widen(static_cast<const bf16*>(r_.tap[t])[at + j]);
        else std::memcpy(out, static_cast<const float*>(r_.tap[t]) + at, f_.width * sizeof(float));
    }

    FeaturePointers f_{};
    FeatureRows r_{};
    int64_t hidden_ = 0;
    float eps_ = 0.0f;
    int stores_ = 0;
    Buffer<float> fused_;
    Input taps_, pair_;
};

}  // namespace outrider
