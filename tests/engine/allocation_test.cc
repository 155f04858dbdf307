// No step allocates once sizes repeat. This program counts every call of the allocator, of all
// threads, while a step runs.
#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>

#include "base/cpu.h"
#include "engine/forward.h"
#include "engine/generate.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

std::atomic<bool> counting{false};
std::atomic<size_t> allocations{0}, largest{0};

[[maybe_unused]] void count(size_t bytes) noexcept {
  if (!counting.load(std::memory_order_relaxed)) return;
  allocations.fetch_add(1);
  for (size_t seen = largest.load(); bytes > seen && !largest.compare_exchange_weak(seen, bytes);) {
  }
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kHooked = false;
#else
constexpr bool kHooked = true;
// The program's own names come before the C library's; operator new ends here too.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) noexcept {
  count(bytes);
  return __libc_malloc(bytes);
}
void* calloc(size_t n, size_t bytes) noexcept {
  count(n * bytes);
  return __libc_calloc(n, bytes);
}
void* realloc(void* p, size_t bytes) noexcept {
  count(bytes);
  return __libc_realloc(p, bytes);
}
void* memalign(size_t alignment, size_t bytes) noexcept {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) noexcept {
  count(bytes);
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
}
#endif

namespace {

struct Counted {
  size_t allocations, largest;
};

template <typename F>
Counted count_in(F&& f) {
  allocations = largest = 0;
  counting = true;
  f();
  counting = false;
  return {allocations.load(), largest.load()};
}

constexpr size_t kTokens = 1400;

// Feeds `tokens` more tokens in parts of `part`, all of them wanting logits if `part` is 1.
void feed(Engine& engine, KvSequence& sequence, std::span<const TokenId> ids, size_t tokens,
          size_t part) {
  for (const size_t end = sequence.tokens() + tokens; sequence.tokens() < end;) {
    const size_t n = std::min(part, end - sequence.tokens());
    const StepSpan span{&sequence, ids.subspan(sequence.tokens(), n), n - 1};
    engine.step({&span, 1}, [](size_t, size_t, float*) {});
  }
}

// A prompt in parts of several sizes, single tokens over borders of pages and of blocks of keys, 8
// sequences together: once to warm up, then counted.
Counted count_steps(const ModelFiles& files, const EngineOptions& options) {
  Pool pool(2);
  const Model model = load_model(pool, files, {.context = 2048});
  Engine engine(pool, model, options);
  std::vector<TokenId> ids(kTokens);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<TokenId>(i * 7 % 250);
  Counted counted{};
  for (const bool warm : {false, true}) {
    std::vector<KvSequence> sequences;
    for (size_t i = 0; i < 9; ++i) sequences.push_back(engine.cache().make_sequence());
    std::vector<StepSpan> spans;
    spans.reserve(8);
    const auto run = [&] {
      feed(engine, sequences[0], ids, 700, 256);
      feed(engine, sequences[0], ids, 300, 100);
      feed(engine, sequences[0], ids, 100, 1);
      for (size_t t = 0; t < 70; ++t) {
        spans.clear();
        for (size_t i = 1; i < 9; ++i)
          spans.push_back({&sequences[i], std::span(ids).subspan(t, 1), 0});
        engine.step(spans, [](size_t, size_t, float*) {});
      }
    };
    if (warm) {
      counted = count_in(run);
    } else {
      run();
    }
  }
  return counted;
}

}  // namespace

TEST_CASE("the count sees what is allocated" * doctest::skip(!kHooked)) {
  const Counted none = count_in([] {});
  CHECK(none.allocations == 0);
  const Counted some = count_in([] {
    const std::vector<int> a(1000);
    void* b = std::malloc(10);
    std::free(b);
  });
  CHECK(some.allocations == 2);
  CHECK(some.largest == 4000);
}

TEST_CASE("a step of quantized weights allocates nothing" * doctest::skip(!kHooked)) {
  const TempDir folder;
  for (const std::string family : {"llama", "gemma3"})
    for (const KvType type : {KvType::i16, KvType::f16, KvType::bf16, KvType::q8_0}) {
      CAPTURE(family);
      CAPTURE(int(type));
      const auto path = folder.path() / "tiny.gguf";
      write_tiny_model(path, {.family = family, .type = DType::q4_k});
      const ModelFiles files = open_model(path);
      CHECK(count_steps(files, {.step_tokens = 256, .cache_tokens = 4096, .kv_type = type})
                .allocations == 0);
    }
}

TEST_CASE("a step of bf16 weights allocates nothing" * doctest::skip(!kHooked)) {
  if (isa() != Isa::avx512) {
    MESSAGE("skipped: no bf16 products of the processor's own");
    return;
  }
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf", {.type = DType::bf16});
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  CHECK(count_steps(files, {.step_tokens = 256, .cache_tokens = 4096}).allocations == 0);
}

// Elsewhere prompts of dense weights go through oneDNN, which packs them into memory of its own.
TEST_CASE("a step of one token of bf16 weights allocates nothing" * doctest::skip(!kHooked)) {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf", {.type = DType::bf16});
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(2);
  const Model model = load_model(pool, files, {.context = 2048});
  Engine engine(pool, model, {.step_tokens = 256, .cache_tokens = 4096});
  const std::vector<TokenId> ids(kTokens, 5);
  for (const bool warm : {false, true}) {
    KvSequence sequence = engine.cache().make_sequence();
    feed(engine, sequence, ids, 1000, 256);
    const Counted single = count_in([&] { feed(engine, sequence, ids, 100, 1); });
    if (warm) CHECK(single.allocations == 0);
  }
}

TEST_CASE("generating a token allocates nothing but the text of its event" *
          doctest::skip(!kHooked)) {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf", {.type = DType::q4_k});
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(2);
  const Model model = load_model(pool, files, {.context = 1024});
  Engine engine(pool, model, {.step_tokens = 64, .cache_tokens = 4096});
  Generator generator(engine, files.tokenizer, {.step_seconds = 0.2});
  for (const bool warm : {false, true}) {
    for (size_t i = 0; i < 4; ++i) {
      GenerationRequest request;
      request.prompt.assign(40 + i, static_cast<TokenId>(i));
      request.max_tokens = 200;
      request.drafts = false;
      request.sampling.temperature = i % 2 == 0 ? 0.0f : 0.8f;
      request.stop_texts = {"never said by it"};
      generator.submit(std::move(request));
    }
    const auto ignore = [](const GenerationEvent&) {};
    for (int i = 0; i < 3; ++i) generator.step(ignore);  // prompts
    const Counted counted = count_in([&] {
      for (int i = 0; i < 150; ++i) generator.step(ignore);
    });
    if (warm) CHECK(counted.allocations == 0);
    while (generator.busy()) generator.step(ignore);
  }
}
