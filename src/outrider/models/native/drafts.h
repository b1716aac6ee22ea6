// The C interface of learned drafters' forwards. nn/drafts.py, nn/draft_heads.py and nn/sequential.py call it and mirror these structs
// field by field.
#pragma once

#include <mutex>
#include <new>
#include <vector>

#include "decoder.h"
#include "heads.h"
#include "sequence.h"

namespace outrider {

struct DraftLayer {
    const float *norm1, *qkv_bias, *q_norm, *k_norm, *norm2;  // null where there is none
    const Linear *qkv, *o, *gate_up, *down;
};

struct DraftModel {
    int64_t vocab, hidden, layers, heads, kv_heads, head_dim, inner, half;
    double eps;
    const float *inv_freq, *norm;  // norm: null where there is none
    const Linear *embedding, *head;
    const DraftLayer* layer;
    FeaturePointers features;
};

struct DraftCall {
    int64_t rows, scored, segments, threads, slots, capacity;
    const int64_t *token, *position, *scored_row, *segment;
    const int64_t* table;  // [slots] 0, 1, 2, ...: a slot's rows are a page
    void *k, *v;           // [layers, kv_heads, slots, capacity, head_dim]
    float* logits;
    FeatureRows features;
};

// Layers of a drafter; calls from several threads take turns.
class DraftLayers {
   public:
    virtual ~DraftLayers() = default;
    virtual Status forward(const DraftCall& call) = 0;
};

template <class W>
class DraftLayersOf final : public DraftLayers {
   public:
    explicit DraftLayersOf(const DraftModel& m) : layers_(m.layers) {
        for (int64_t i = 0; i < m.layers; ++i) {
            LayerPointers& to = layers_[i];
            const DraftLayer& from = m.layer[i];
            to = LayerPointers{};
            to.norm1 = from.norm1, to.qkv_bias = from.qkv_bias, to.q_norm = from.q_norm, to.k_norm = from.k_norm, to.norm2 = from.norm2;
            to.qkv = from.qkv, to.o = from.o, to.gate_up = from.gate_up, to.down = from.down;
        }
        ModelPointers to{};
        to.vocab = m.vocab, to.hidden = m.hidden, to.layers = m.layers, to.heads = m.heads, to.kv_heads = m.kv_heads;
        to.head_dim = m.head_dim, to.inner = m.inner, to.half = m.half, to.eps = m.eps;
        to.turned = m.head_dim / 2, to.frequencies = 1, to.attention_scale = 1.0 / std::sqrt((double)m.head_dim);
        to.rope_scale = to.embed_scale = to.residual_scale = to.logit_scale = 1.0;
        to.inv_freq = m.inv_freq, to.norm = m.norm, to.embedding = m.embedding, to.head = m.head, to.layer = layers_.data();
        decoder_.build(to, m.features);
    }

    Status forward(const DraftCall& c) override {
        const std::lock_guard<std::mutex> turn(mutex_);
        CallPointers to{};
        to.rows = c.rows, to.scored = c.scored, to.segments = c.segments, to.threads = c.threads;
        to.slots = to.pages = c.slots, to.capacity = to.page = c.capacity, to.table = c.table, to.token = c.token, to.position = c.position;
        to.scored_row = c.scored_row, to.segment = c.segment, to.k = c.k, to.v = c.v, to.logits = c.logits;
        return decoder_.forward(to, c.features);
    }

   private:
    std::mutex mutex_;
    std::vector<LayerPointers> layers_;
    Decoder<W> decoder_;
};

// Heads; calls from several threads take turns.
class DraftHeads {
   public:
    explicit DraftHeads(const HeadsPointers& h)
        : block_(h.block, h.block + h.levels * h.layers), bias_(h.bias, h.bias + h.levels * h.layers),
          head_(h.head, h.head + (h.shared ? 1 : h.levels)) {
        HeadsPointers own = h;
        own.block = block_.data(), own.bias = bias_.data(), own.head = head_.data();
        heads_.build(own);
    }
    Status forward(const HeadsCall& call) {
        const std::lock_guard<std::mutex> turn(mutex_);
        return heads_.forward(call);
    }

   private:
    std::mutex mutex_;
    std::vector<const Linear*> block_;
    std::vector<const float*> bias_;
    std::vector<const Linear*> head_;
    Heads heads_;
};

// Heads that follow one another; calls from several threads take turns.
class DraftSequence {
   public:
    explicit DraftSequence(const SequencePointers& s) : block_(s.block, s.block + s.layers) {
        SequencePointers own = s;
        own.block = block_.data();
        sequence_.build(own);
    }
    Status forward(const SequenceCall& call) {
        const std::lock_guard<std::mutex> turn(mutex_);
        return sequence_.forward(call);
    }

   private:
    std::mutex mutex_;
    std::vector<SequenceBlock> block_;
    Sequence sequence_;
};

}  // namespace outrider
