// The C interface of the native decoder. Callers: runtime.py, nn/products.py (linears), nn/drafts.py, nn/draft_heads.py and
// nn/sequential.py (learned drafters).
#include "decoder.h"
#include "drafts.h"
#include "feed.h"

#include <mutex>

namespace {

using namespace outrider;

// One decoder; calls from several threads take turns, since they share its workspace.
class Handle {
   public:
    virtual ~Handle() = default;
    virtual Status forward(const CallPointers& call) = 0;
};

template <class W>
class HandleOf final : public Handle {
   public:
    explicit HandleOf(const ModelPointers& model) { decoder_.build(model); }
    Status forward(const CallPointers& call) override {
        const std::lock_guard<std::mutex> turn(mutex_);
        return decoder_.forward(call);
    }

   private:
    std::mutex mutex_;
    Decoder<W> decoder_;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* outrider_new(const ModelPointers* model) {
    if (model->cache == CODES) return static_cast<Handle*>(new (std::nothrow) HandleOf<coded>(*model));
    if (model->cache == BFLOAT16) return static_cast<Handle*>(new (std::nothrow) HandleOf<bf16>(*model));
    return static_cast<Handle*>(new (std::nothrow) HandleOf<float>(*model));
}

EXPORT int outrider_forward(void* handle, const CallPointers* call) { return static_cast<Handle*>(handle)->forward(*call); }

EXPORT int outrider_feed(void* handle, const Feed* level) { return feed_tokens(*static_cast<Handle*>(handle), *level); }

EXPORT void outrider_free(void* handle) { delete static_cast<Handle*>(handle); }

EXPORT void* outrider_draft_new(const DraftModel* model) {
    if (model->half) return static_cast<DraftLayers*>(new (std::nothrow) DraftLayersOf<bf16>(*model));
    return static_cast<DraftLayers*>(new (std::nothrow) DraftLayersOf<float>(*model));
}

EXPORT int outrider_draft_forward(void* handle, const DraftCall* call) { return static_cast<DraftLayers*>(handle)->forward(*call); }

EXPORT int outrider_draft_feed(void* handle, const Feed* level) { return feed_layers(*static_cast<DraftLayers*>(handle), *level); }

EXPORT void outrider_draft_free(void* handle) { delete static_cast<DraftLayers*>(handle); }

EXPORT void* outrider_heads_new(const HeadsPointers* heads) { return new (std::nothrow) DraftHeads(*heads); }

EXPORT int outrider_heads_forward(void* handle, const HeadsCall* call) { return static_cast<DraftHeads*>(handle)->forward(*call); }

EXPORT void outrider_heads_free(void* handle) { delete static_cast<DraftHeads*>(handle); }

EXPORT void* outrider_sequence_new(const SequencePointers* sequence) { return new (std::nothrow) DraftSequence(*sequence); }

EXPORT int outrider_sequence_forward(void* handle, const SequenceCall* call) { return static_cast<DraftSequence*>(handle)->forward(*call); }

EXPORT int outrider_sequence_feed(void* handle, const Feed* level) { return feed_heads(*static_cast<DraftSequence*>(handle), *level); }

EXPORT void outrider_sequence_free(void* handle) { delete static_cast<DraftSequence*>(handle); }

// A linear of `count` segments with k inputs each; null when there is no memory. twice: see STORE_TWICE.
EXPORT void* outrider_linear_new(const SegmentPointers* segment, int64_t count, int64_t k, int64_t twice) {
    return Linear::make(segment, count, k, twice != 0);
}

EXPORT int64_t outrider_linear_bytes(const void* linear) { return static_cast<const Linear*>(linear)->bytes(); }

// Packs its blocks into memory of so many bytes, which must outlive it.
EXPORT void outrider_linear_pack(void* linear, uint8_t* memory, int64_t threads) {
    Linear& made = *static_cast<Linear*>(linear);
    made.place(memory);
    std::atomic<int64_t> next{0};
    in_parallel((int)threads, [&](int, int) {
        for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < made.pack_units();) made.pack(u);
    });
}

EXPORT void outrider_linear_free(void* linear) { delete static_cast<Linear*>(linear); }

// out [rows, outputs] = x [rows, inputs] times the weights.
EXPORT int outrider_linear_run(const void* linear, const float* x, int64_t rows, int64_t threads, float* out) {
    const Linear& weight = *static_cast<const Linear*>(linear);
    constexpr int64_t BLOCK = 64;
    Input input;
    if (!input.reserve(rows, weight.inputs(), weight.stores())) return NO_MEMORY;
    for (int64_t i = 0; i < rows; ++i) {
        input.put(i, 0, x + i * weight.inputs(), weight.inputs());
        input.round_row(i);
    }
    const int64_t n = weight.outputs();
    std::atomic<int64_t> next{0};
    in_parallel((int)threads, [&](int, int) {
        for (int64_t at; (at = BLOCK * next.fetch_add(1, std::memory_order_relaxed)) < n;)
            weight.product(at, n - at < BLOCK ? n - at : BLOCK, input, 0, rows, out + at, n);
    });
    return OK;
}

// out [rows, inputs] = those rows of the weights, as float32.
EXPORT int outrider_linear_rows(const void* linear, const int64_t* row, int64_t rows, float* out) {
    const Linear& weight = *static_cast<const Linear*>(linear);
    for (int64_t i = 0; i < rows; ++i) {
        if (row[i] < 0 || row[i] >= weight.outputs()) return BAD_TOKEN;
        weight.row(row[i], out + i * weight.inputs());
    }
    return OK;
}

// The definition of a quantised product, for tests: see twin.h.
EXPORT int64_t outrider_twin(
    int64_t format, const uint8_t* weight, int64_t bytes, int64_t n, int64_t k, const float* x, int64_t twice, float* out
) {
    return twin_product((Format)format, weight, bytes, n, k, x, twice != 0, out);
}

// What this library was compiled for, for logs.
EXPORT const char* outrider_kind() {
#if OUTRIDER_BF16_DOT
    return "AVX-512 BF16";
#elif defined(__AVX512F__)
    return OUTRIDER_DOTS == 2 ? "AVX-512 VNNI" : "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
    return OUTRIDER_DOTS == 2 ? "AVX-VNNI" : "AVX2";
#elif defined(__aarch64__)
    return OUTRIDER_DOTS == 3 ? "NEON dotprod" : "NEON";
#else
    return "generic";
#endif
}
