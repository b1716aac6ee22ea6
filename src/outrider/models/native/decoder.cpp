// The C interface of the native decoder. runtime.py is its only caller.
#include "decoder.h"

#include <mutex>
#include <new>

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
    bool build(const ModelPointers& model) { return decoder_.build(model); }
    Status forward(const CallPointers& call) override {
        const std::lock_guard<std::mutex> turn(mutex_);
        return decoder_.forward(call);
    }

   private:
    std::mutex mutex_;
    Decoder<W> decoder_;
};

template <class W>
Handle* make(const ModelPointers& model) {
    auto* handle = new (std::nothrow) HandleOf<W>();
    if (handle != nullptr && handle->build(model)) return handle;
    delete handle;
    return nullptr;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* outrider_new(const ModelPointers* model) { return model->half ? make<bf16>(*model) : make<float>(*model); }

EXPORT int outrider_forward(void* handle, const CallPointers* call) { return static_cast<Handle*>(handle)->forward(*call); }

EXPORT void outrider_free(void* handle) { delete static_cast<Handle*>(handle); }

// What this library was compiled for, for logs.
EXPORT const char* outrider_kind() {
#if OUTRIDER_BF16_DOT
    return "AVX-512 BF16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "AVX2";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "generic";
#endif
}
