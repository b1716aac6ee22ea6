// A decoder on threads that are held up at random between units: the same bits as on one thread, and no deadlock.
//
// Prints nothing and returns 0 if all is well. Meant to be compiled with -fsanitize=thread too.
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "decoder.h"
#include "heads.h"

namespace outrider {

thread_local std::minstd_rand chance;

void between_units() {
    const unsigned drawn = chance() % 256;
    if (drawn == 0) std::this_thread::sleep_for(std::chrono::microseconds(chance() % 500));
    if (drawn < 8) std::this_thread::yield();
}

void in_threads(int threads, const std::function<void(int, int)>& body) {
    static unsigned seed = 1;
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; ++i)
        pool.emplace_back([&body, i, threads, s = ++seed] {
            chance.seed(s);
            if (s % 3 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(s % 4));  // comes late, or when all is done
            body(i, threads);
        });
    body(0, threads);
    for (std::thread& thread : pool) thread.join();
}

}  // namespace outrider

namespace {

using namespace outrider;

constexpr int64_t VOCAB = 301, HIDDEN = 104, LAYERS = 3, HEADS = 6, KV = 2, WIDTH = 24, INNER = 192, ROWS = 11;
constexpr int64_t CAPACITY = 40, PAGE = 8, PAGES = 10, EXPERTS = 5;

template <class W>
std::vector<W> random_numbers(int64_t n, float size, std::minstd_rand& draw) {
    std::uniform_real_distribution<float> uniform(-size, size);
    std::vector<float> x(n);
    for (float& v : x) v = uniform(draw);
    std::vector<W> out(n);
    narrow(x.data(), n, out.data());
    return out;
}

// One random model of weights W and a call with a chain of 7 rows, a tree of 4 and taps; as a drafter it reads hidden states too, and
// has heads.
template <class W, class K>
class Case {
   public:
    Case() {
        const auto vector = [&](int64_t n, float size) { return vectors_.emplace_back(random_numbers<float>(n, size, draw_)).data(); };
        const auto linear = [&](int64_t n, int64_t k, float size) {
            const SegmentPointers segment{sizeof(W) == 2 ? BF16 : F32, n, tensors_.emplace_back(random_numbers<W>(n * k, size, draw_)).data()};
            return linears_.emplace_back(Linear::make(&segment, 1, k)).get();
        };
        tensors_.reserve(7 + LAYERS * 5), vectors_.reserve(4 + LAYERS * 2);
        for (int64_t l = 0; l < LAYERS; ++l) {
            const int64_t wide = HEADS * WIDTH;
            LayerPointers p{};
            p.norm1 = vector(HIDDEN, 2), p.qkv = linear(wide + 2 * KV * WIDTH, HIDDEN, .3f), p.o = linear(HIDDEN, wide, .2f);
            const int64_t experts = l % 2 ? EXPERTS : 1;
            if (l % 2) p.router = linear(EXPERTS, HIDDEN, .5f);
            p.norm2 = vector(HIDDEN, 2), p.gate_up = linear(2 * experts * INNER, HIDDEN, .2f), p.down = quantised(experts * HIDDEN, INNER);
            p.window = l % 2 ? 5 : 0;
            layers_.push_back(p);
        }
        for (int64_t i = 0; i < WIDTH / 2; ++i) frequency_.push_back(1.0f / (float)(i + 1));
        const Linear *embedding = linear(VOCAB, HIDDEN, 1), *head = linear(VOCAB, HIDDEN, .3f);
        const float* norm = vector(HIDDEN, 2);
        model_.vocab = VOCAB, model_.hidden = HIDDEN, model_.layers = LAYERS, model_.heads = HEADS, model_.kv_heads = KV;
        model_.head_dim = WIDTH, model_.inner = INNER, model_.turned = WIDTH / 2, model_.frequencies = 1, model_.eps = 1e-6;
        model_.rope_scale = model_.embed_scale = model_.residual_scale = model_.logit_scale = 1.0;
        model_.attention_scale = 1.0 / std::sqrt((double)WIDTH), model_.inv_freq = frequency_.data();
        model_.norm = norm, model_.embedding = embedding, model_.head = head, model_.layer = layers_.data();
        features_.taps = 2, features_.width = HIDDEN, features_.fuse = linear(HIDDEN, 2 * HIDDEN, .1f), features_.fused_norm = norm;
        features_.join = THROUGH, features_.joint = linear(HIDDEN, 2 * HIDDEN, .1f), features_.joint_bias = vector(HIDDEN, 1);
        for (int i = 0; i < 2; ++i) blocks_.push_back(linear(HIDDEN, HIDDEN, .2f)), biases_.push_back(vector(HIDDEN, 1));
        heads_ = {HIDDEN, 2, 1, VOCAB, VOCAB, 1, 1e-6, norm, blocks_.data(), biases_.data(), &model_.head, nullptr};
        model_.half = sizeof(W) == 2, model_.experts = EXPERTS, model_.experts_used = 2, model_.expert_inner = INNER, model_.normalised = 1;
    }

    // Everything a new decoder writes in some forwards on `threads` threads.
    std::vector<char> results(int threads, int forwards, bool drafter) {
        Decoder<K> decoder;
        Heads heads;
        std::vector<char> out;
        decoder.build(model_, drafter ? features_ : FeaturePointers{}), heads.build(heads_);
        std::vector<K> k(LAYERS * KV * PAGES * PAGE * entry_size<K>(WIDTH)), v(k.size());
        for (int i = 0; i < forwards; ++i) {
            std::vector<float> logits(ROWS * VOCAB);
            std::vector<W> first(ROWS * HIDDEN), last(ROWS * HIDDEN);
            void* outs[] = {first.data(), last.data()};
            const int64_t from = i % 3;
            std::vector<int64_t> token, position, scored, segment{1, 0, from, 7, 0, 0, 0, 7, from, 1, 3, 0, 0, 0, 2};
            for (int64_t r = 0; r < ROWS; ++r) token.push_back((r * 37 + i) % VOCAB), scored.push_back(ROWS - 1 - r);
            for (int64_t r = 0; r < 7; ++r) position.push_back(from + r);
            for (const int64_t depth : {0, 1, 1, 2}) position.push_back(from + depth);
            const int64_t table[] = {3, 1, 2, 9, 4, 0, 5, 7, 6, 8};
            const int64_t taps[] = {0, LAYERS};
            const CallPointers call{ROWS, ROWS, 2, 2, threads, 2, CAPACITY, PAGE, PAGES, token.data(), position.data(), scored.data(),
                                    segment.data(), table, taps, outs, k.data(), v.data(), logits.data()};
            std::minstd_rand same(i + 1);
            const std::vector<float> hidden = random_numbers<float>(ROWS * HIDDEN, 1, same);
            const void* const read[] = {hidden.data(), hidden.data()};
            std::vector<float> states(ROWS * HIDDEN), ahead(2 * ROWS * VOCAB);
            FeatureRows rows{};
            if (drafter) rows.tap = read, rows.tap_row = scored.data(), rows.out = states.data();
            if (decoder.forward(call, rows) != OK) return {};
            append(out, logits), append(out, first), append(out, last), append(out, states);
            if (drafter && heads.forward({ROWS, 2, threads, hidden.data(), ahead.data()}) != OK) return {};
            append(out, ahead);
        }
        append(out, k), append(out, v);
        return out;
    }

   private:
    // Random blocks of Q8_0: rows of this linear's inputs are rounded in a phase of their own.
    const Linear* quantised(int64_t n, int64_t k) {
        std::vector<uint8_t> raw(n * k / 32 * 34);
        for (uint8_t& b : raw) b = (uint8_t)(draw_() >> 8);
        for (size_t at = 0; at < raw.size(); at += 34) raw[at + 1] = 0x14;  // half precision: about 1/1000
        const SegmentPointers segment{Q8_0, n, raw.data()};
        Linear* made = linears_.emplace_back(Linear::make(&segment, 1, k)).get();
        memory_.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(64, (size_t)made->bytes())), &std::free);
        made->place(memory_.back().get());
        for (int64_t u = 0; u < made->pack_units(); ++u) made->pack(u);
        return made;
    }

    template <class T>
    static void append(std::vector<char>& out, const std::vector<T>& more) {
        const char* bytes = reinterpret_cast<const char*>(more.data());
        out.insert(out.end(), bytes, bytes + more.size() * sizeof(T));
    }

    std::minstd_rand draw_{7};
    std::vector<std::vector<W>> tensors_;
    std::vector<std::vector<float>> vectors_;
    std::vector<std::unique_ptr<Linear>> linears_;
    std::vector<std::unique_ptr<uint8_t, void (*)(void*)>> memory_;
    std::vector<LayerPointers> layers_;
    std::vector<float> frequency_;
    ModelPointers model_{};
    FeaturePointers features_{};
    HeadsPointers heads_{};
    std::vector<const Linear*> blocks_;
    std::vector<const float*> biases_;
};

template <class W, class K = W>
bool same(const char* name, int rounds) {
    Case<W, K> model;
    for (const bool drafter : {false, true}) {
        const auto expected = model.results(1, 6, drafter);
        if (expected.empty()) return std::puts("a forward failed"), false;
        for (int round = 0; round < rounds; ++round)
            for (const int threads : {2, 3, 5})
                if (model.results(threads, 6, drafter) != expected) return std::printf("%s: other bits on %d threads\n", name, threads), false;
    }
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 10;
    return same<float>("float32", rounds) && same<bf16>("bfloat16", rounds) &&
                   same<bf16, coded>("codes", rounds)
               ? 0
               : 1;
}
