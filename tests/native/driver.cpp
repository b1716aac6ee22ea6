// Runs the libraries of a wheel on a small random model, without Python: for machines that are emulated.
//
//     driver DECODER.so PASSES.so
//
// Prints every number on a line of its own, in hexadecimal. Ends with 1 if a row's numbers depend on its company.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../src/outrider/models/native/layout.h"

using namespace outrider;

namespace {

uint64_t state = 1;
float uniform() {  // between -1 and 1; the same on every machine
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (float)((int32_t)(state >> 32)) * 0x1p-31f;
}

constexpr int64_t VOCAB = 77, HIDDEN = 50, LAYERS = 2, HEADS = 5, KV = 1, HEAD = 40, INNER = 71, CAPACITY = 32, PAGE = 4, ROWS = 9;

// Weights of one model, as floats or as the upper halves of floats.
struct Weights {
    bool half;
    std::vector<std::vector<float>> kept;
    std::vector<std::vector<uint16_t>> halves;
    const float* vector(int64_t count, float scale, float middle = 0) {
        std::vector<float> x(count);
        for (float& v : x) v = middle + scale * uniform();
        if (half)
            for (float& v : x) {
                uint32_t bits;
                __builtin_memcpy(&bits, &v, 4);
                bits &= 0xffff0000u;
                __builtin_memcpy(&v, &bits, 4);
            }
        return kept.push_back(std::move(x)), kept.back().data();
    }
    const void* make(int64_t count, float scale) {
        const float* x = vector(count, scale);
        if (!half) return x;
        std::vector<uint16_t> h(count);
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits;
            __builtin_memcpy(&bits, &x[i], 4);
            h[i] = (uint16_t)(bits >> 16);
        }
        return halves.push_back(std::move(h)), halves.back().data();
    }
};

void* symbol(void* library, const char* name) {
    void* found = dlsym(library, name);
    if (found == nullptr) std::fprintf(stderr, "%s\n", dlerror()), std::exit(2);
    return found;
}

void* open(const char* path) {
    void* library = dlopen(path, RTLD_NOW);
    if (library == nullptr) std::fprintf(stderr, "%s\n", dlerror()), std::exit(2);
    return library;
}

// Logits [ROWS - from, VOCAB] of tokens from : ROWS behind those before, which are fed first; on `threads` threads.
std::vector<float> logits(void* library, void* handle, Stored cache, int64_t from, int64_t threads) {
    auto* forward = (int (*)(void*, const CallPointers*))symbol(library, "outrider_forward");
    const int64_t entry = cache == CODES ? HEAD + 4 : HEAD * (cache == BFLOAT16 ? 2 : 4), places = LAYERS * KV * CAPACITY * entry;
    std::vector<char> k(places), v(places);
    std::vector<float> out;
    const int64_t pieces[2][2] = {{0, from}, {from, ROWS}};
    for (const auto& piece : pieces) {
        const int64_t n = piece[1] - piece[0];
        if (n == 0) continue;
        std::vector<int64_t> token, position, scored;
        for (int64_t i = 0; i < n; ++i) {
            token.push_back((7 * (piece[0] + i) + 3) % VOCAB), position.push_back(piece[0] + i), scored.push_back(i);
        }
        const int64_t table[] = {2, 3, 0, 1, 7, 6, 5, 4};
        const int64_t segment[6] = {0, 0, piece[0], n, 0, 0};
        out.assign(n * VOCAB, 0);
        const CallPointers call{n, n, 1, 0, threads, 1, CAPACITY, PAGE, CAPACITY / PAGE, token.data(), position.data(), scored.data(),
                                segment, table, nullptr, nullptr, k.data(), v.data(), out.data()};
        if (const int status = forward(handle, &call)) std::fprintf(stderr, "status %d\n", status), std::exit(2);
    }
    return out;
}

void* make_linear(void* library, const SegmentPointers& segment, int64_t k, int64_t threads, bool twice) {
    const auto make = (void* (*)(const SegmentPointers*, int64_t, int64_t, int64_t))symbol(library, "outrider_linear_new");
    const auto bytes = (int64_t (*)(const void*))symbol(library, "outrider_linear_bytes");
    const auto pack = (void (*)(void*, uint8_t*, int64_t))symbol(library, "outrider_linear_pack");
    void* linear = make(&segment, 1, k, twice);
    if (bytes(linear) > 0) pack(linear, (uint8_t*)aligned_alloc(64, bytes(linear)), threads);  // the process is short
    return linear;
}

void decode(void* library, bool half, Stored cache) {
    Weights w{half, {}, {}};
    const auto linear = [&](int64_t n, int64_t k, float scale) {
        const SegmentPointers segment{half ? 30 : 0, n, w.make(n * k, scale)};
        return (const Linear*)make_linear(library, segment, k, 1, false);
    };
    std::vector<LayerPointers> layers;
    const int64_t wide = HEADS * HEAD, fused = wide + 2 * KV * HEAD;
    for (int64_t i = 0; i < LAYERS; ++i) {
        LayerPointers p{};
        p.norm1 = w.vector(HIDDEN, 0.3f, 1), p.qkv = linear(fused, HIDDEN, 0.3f), p.qkv_bias = w.vector(fused, 0.3f);
        p.o = linear(HIDDEN, wide, 0.1f), p.norm2 = w.vector(HIDDEN, 0.3f, 1);
        p.gate_up = linear(2 * INNER, HIDDEN, 0.2f), p.down = linear(HIDDEN, INNER, 0.2f);
        layers.push_back(p);
    }
    float frequency[HEAD / 2];
    for (int64_t i = 0; i < HEAD / 2; ++i) frequency[i] = 1.0f / (float)(1 << (i / 2));
    ModelPointers model{};
    model.vocab = VOCAB, model.hidden = HIDDEN, model.layers = LAYERS, model.heads = HEADS, model.kv_heads = KV, model.head_dim = HEAD;
    model.inner = INNER, model.half = half, model.cache = cache, model.turned = HEAD / 2, model.frequencies = 1, model.eps = 1e-6;
    model.rope_scale = model.embed_scale = model.residual_scale = model.logit_scale = 1.0;
    model.attention_scale = 0.15811388300841897, model.inv_freq = frequency, model.layer = layers.data();
    model.embedding = linear(VOCAB, HIDDEN, 1), model.norm = w.vector(HIDDEN, 0.3f, 1), model.head = linear(VOCAB, HIDDEN, 0.5f);
    void* handle = ((void* (*)(const ModelPointers*))symbol(library, "outrider_new"))(&model);
    const std::vector<float> all = logits(library, handle, cache, 0, 1);
    for (const float x : all) std::printf("%a\n", (double)x);
    for (int64_t from = 1; from < ROWS; ++from)
        for (int64_t threads = 1; threads < 3; ++threads) {
            const std::vector<float> part = logits(library, handle, cache, from, threads);
            if (__builtin_memcmp(part.data(), all.data() + from * VOCAB, part.size() * 4) != 0) {
                std::fprintf(stderr, "rows from %d on %d threads are not the same bits\n", (int)from, (int)threads), std::exit(1);
            }
        }
    ((void (*)(void*))symbol(library, "outrider_free"))(handle);
}

// Products of every quantised type with 1 to 9 rows: ends with 1 where one is not the twin's, bit for bit. Prints them.
void multiply(void* library) {
    constexpr int64_t K = 512, N = 37, MOST = 9;
    const struct { int64_t format, values, bytes, scales[2]; } types[] = {
        {2, 32, 18, {0, -1}}, {3, 32, 20, {0, 2}}, {6, 32, 22, {0, -1}}, {7, 32, 24, {0, 2}}, {8, 32, 34, {0, -1}},
        {12, 256, 144, {0, 2}}, {13, 256, 176, {0, 2}}, {14, 256, 210, {208, -1}}, {39, 32, 17, {-1, -1}}, {1000, 32, 36, {-1, -1}}};
    for (const auto& type : types) {
        const int64_t row = K / type.values * type.bytes;
        std::vector<uint8_t> raw(N * row);
        for (uint8_t& b : raw) b = (uint8_t)(128 + 127 * uniform());
        for (int64_t at = 0; at < N * row; at += type.bytes) {
            for (const int64_t place : type.scales)
                if (place >= 0) raw[at + place + 1] = (uint8_t)(raw[at + place + 1] & 0x83) | 0x24;  // half precision: 1/64 to 1/32
            if (type.format == 39) raw[at] = (uint8_t)(100 + raw[at] % 30);
            const float scale = 1.0f / (float)(1 + at / row);
            if (type.format == 1000) __builtin_memcpy(&raw[at], &scale, 4);
        }
        const SegmentPointers segment{type.format, N, raw.data()};
        std::vector<float> x(MOST * K), expected(MOST * N), found(MOST * N);
        for (float& v : x) v = uniform();
        for (int64_t k = 0; k < K; ++k) x[k] = k % 2 ? 3.0f : -3.0f;
        const auto twin =
            (int64_t (*)(int64_t, const uint8_t*, int64_t, int64_t, int64_t, const float*, int64_t, float*))symbol(library, "outrider_twin");
        for (const bool twice : {true, false}) {
            void* linear = make_linear(library, segment, K, 2, twice);
            for (int64_t r = 0; r < MOST; ++r) twin(type.format, raw.data(), row, N, K, x.data() + r * K, twice, expected.data() + r * N);
            for (int64_t rows = 1; rows <= MOST; ++rows) {
                ((int (*)(const void*, const float*, int64_t, int64_t, float*))symbol(library, "outrider_linear_run"))(linear, x.data(), rows, 2, found.data());
                if (__builtin_memcmp(found.data(), expected.data(), rows * N * 4) != 0)
                    std::fprintf(stderr, "type %d with %d rows is not its twin\n", (int)type.format, (int)rows), std::exit(1);
            }
            ((void (*)(void*))symbol(library, "outrider_linear_free"))(linear);
        }
        for (const float v : found) std::printf("%a\n", (double)v);
    }
}

void judge(void* library) {
    std::vector<double> p(5000), q(5000);
    double sums[2] = {0, 0};
    for (size_t i = 0; i < p.size(); ++i) {
        p[i] = 1.001 + uniform(), q[i] = 1.001 + uniform();
        sums[0] += p[i], sums[1] += q[i];
    }
    for (size_t i = 0; i < p.size(); ++i) p[i] /= sums[0], q[i] /= sums[1];
    double out[3];
    ((void (*)(const void*, const void*, double, int64_t, int, double*))symbol(library, "outrider_overlap"))(
        p.data(), q.data(), 0.8, (int64_t)p.size(), 1, out);
    for (const double x : out) std::printf("%a\n", x);
    const auto draw = (int64_t (*)(const void*, const void*, double, int64_t, double, int, double*))symbol(library, "outrider_draw");
    for (double u = 0.05; u < 1; u += 0.1) {
        double total;
        std::printf("%a\n", (double)draw(p.data(), q.data(), 1.0, (int64_t)p.size(), u, 1, &total));
        std::printf("%a\n", total);
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    void* decoder = open(arguments[1]);
    std::fprintf(stderr, "%s\n", ((const char* (*)())symbol(decoder, "outrider_kind"))());
    decode(decoder, false, FLOAT32);
    decode(decoder, true, BFLOAT16);
    multiply(decoder);
    decode(decoder, false, CODES);
    decode(decoder, true, CODES);
    judge(open(arguments[2]));
    return 0;
}
