// Which tokens a step carries: how requests share time, memory and what they have in common.
#include "engine/generate.h"

#include <doctest/doctest.h>

#include <map>

#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

constexpr size_t kVocab = 259;

std::vector<TokenId> random_ids(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<TokenId> ids(count);
  for (TokenId& id : ids) id = static_cast<TokenId>(random.below(kVocab));
  return ids;
}

GenerationRequest request_of(std::vector<TokenId> prompt, size_t max_tokens) {
  GenerationRequest request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.drafts = false;  // steps carry what is asked for, and can be counted
  return request;
}

// A model, an engine, a generator, and a clock that every step moves by what it carries.
struct Bench {
  TempDir folder;
  ModelFiles files;
  Pool pool{2};
  Model model;
  Engine engine;
  double fixed_s = 1e-3, token_s = 5e-4;
  double time = 0;
  size_t rows = 0;                                   // of the last step
  size_t all_rows = 0;                               // of all steps
  std::vector<size_t> of_step;                       // rows by step
  std::map<uint64_t, size_t> first_step, last_step;  // of each request's tokens
  Generator generator;

  static ModelFiles write(const TempDir& folder, const TinyModelOptions& tiny) {
    write_tiny_model(folder.path() / "tiny.gguf", tiny);
    return open_model(folder.path() / "tiny.gguf");
  }

  explicit Bench(const EngineOptions& options, double step_seconds,
                 const TinyModelOptions& tiny = {})
      : files(write(folder, tiny)),
        model(load_model(pool, files, {.context = 9000})),
        engine(pool, model, options),
        generator(engine, files.tokenizer,
                  {.step_seconds = step_seconds, .now = [this] { return time; }}) {
    engine.watch_inputs([this](std::string_view name, const float*, size_t count, size_t) {
      if (name != "blk.0.attn_q.weight") return;
      rows = count;
      all_rows += count;
      time += fixed_s + token_s * double(count);
    });
  }

  void step() {
    rows = 0;
    generator.step([&](const GenerationEvent& event) {
      first_step.emplace(event.request, of_step.size());
      last_step[event.request] = of_step.size();
    });
    of_step.push_back(rows);
    const GeneratorLoad load = generator.load();
    CHECK(load.pages_used <= load.pages);
  }
  void run() {
    while (generator.busy()) step();
  }
};

}  // namespace

TEST_CASE("a short request that comes during a long prompt begins to be answered in two steps") {
  // On a fast machine, on one where a step takes 100 tokens, on one where none is fast enough.
  for (const double token_s : {1e-5, 2e-3, 1.0}) {
    CAPTURE(token_s);
    Bench b({.step_tokens = 512, .cache_tokens = 16384}, 0.2);
    b.token_s = token_s;
    const uint64_t answering = b.generator.submit(request_of(random_ids(10, 7), 200));
    for (int i = 0; i < 5; ++i) b.step();
    const uint64_t longest = b.generator.submit(request_of(random_ids(8192, 1), 4));
    for (size_t arrival = 0; arrival < 3; ++arrival) {
      for (int i = 0; i < 3; ++i) b.step();
      REQUIRE(!b.first_step.contains(longest));
      const size_t now = b.of_step.size();
      const uint64_t shortest = b.generator.submit(request_of(random_ids(20, 2 + arrival), 2));
      b.step();
      b.step();
      REQUIRE(b.first_step.contains(shortest));
      CHECK(b.first_step.at(shortest) < now + 2);
    }
    // The answer under way had a token in every step.
    CHECK(b.last_step.at(answering) + 1 == b.of_step.size());
  }
}

TEST_CASE("a step takes the time that it may, once the machine is known") {
  Bench b({.step_tokens = 512, .cache_tokens = 16384}, 0.1);  // 198 tokens
  b.generator.submit(request_of(random_ids(8192, 1), 1));
  for (int i = 0; i < 10; ++i) b.step();
  for (int i = 0; i < 10; ++i) {
    const double before = b.time;
    b.step();
    CHECK(b.time - before <= 0.1 * 1.001);
    CHECK(b.time - before >= 0.1 * 0.95);
  }
  b.token_s *= 3;  // a neighbour has come
  for (int i = 0; i < 10; ++i) b.step();
  CHECK(b.of_step.back() <= 70);
  CHECK(b.of_step.back() >= 50);
}

TEST_CASE("prompts share the time: equal ones end together, short ones before") {
  Bench b({.step_tokens = 512, .cache_tokens = 16384}, 0.1);
  b.generator.submit(request_of(random_ids(600, 9), 1));
  b.run();  // the machine is known
  std::vector<uint64_t> numbers;
  for (size_t i = 0; i < 4; ++i)
    numbers.push_back(b.generator.submit(request_of(random_ids(i == 3 ? 300 : 1500, i), 1)));
  b.run();
  const size_t last = b.of_step.size() - 1;
  for (size_t i = 0; i < 3; ++i) CHECK(b.first_step.at(numbers[i]) + 1 >= last);
  CHECK(b.first_step.at(numbers[3]) + 10 < last);
}

TEST_CASE("where time is too short for all prompts, they take turns") {
  Bench b({.step_tokens = 512, .cache_tokens = 16384}, 0.1);
  b.token_s = 2e-3;  // 49 tokens a step: one prompt at a time
  b.generator.submit(request_of(random_ids(200, 9), 1));
  b.run();
  std::vector<uint64_t> numbers;
  for (size_t i = 0; i < 5; ++i)
    numbers.push_back(b.generator.submit(request_of(random_ids(40, i), 1)));
  const size_t start = b.of_step.size();
  b.run();
  for (size_t i = 0; i < 5; ++i) CHECK(b.first_step.at(numbers[i]) == start + i);
}

TEST_CASE("without a time limit prompts run in order, in full steps") {
  Bench b({.step_tokens = 256, .cache_tokens = 16384}, 0);
  const uint64_t one = b.generator.submit(request_of(random_ids(500, 1), 1));
  const uint64_t two = b.generator.submit(request_of(random_ids(500, 2), 1));
  b.run();
  CHECK(b.of_step == std::vector<size_t>{256, 256, 256, 232});
  CHECK(b.first_step.at(one) == 1);
  CHECK(b.first_step.at(two) == 3);
}

TEST_CASE("a prompt that begins like one being computed waits for it, others do not") {
  Bench b({.step_tokens = 128, .cache_tokens = 16384}, 0);
  const std::vector<TokenId> common = random_ids(300, 1);
  std::vector<TokenId> longer = common;
  for (const TokenId id : random_ids(30, 2)) longer.push_back(id);
  b.generator.submit(request_of(common, 3));
  for (int i = 0; i < 3; ++i) b.generator.submit(request_of(common, 3));
  b.generator.submit(request_of(longer, 3));
  const uint64_t other = b.generator.submit(request_of(random_ids(40, 3), 3));
  CHECK(b.generator.load().waiting == 6);
  b.step();
  CHECK(b.generator.load().running == 2);
  b.run();
  // 300 once, a token of each for its logits, what is longer, the other prompt, 2 more tokens each.
  CHECK(b.all_rows == 300 + 3 * 1 + 30 + 40 + 6 * 2);
  CHECK(b.first_step.at(other) <= 2);
  CHECK(b.generator.load().cached_tokens == 3 * 299 + 300);
}

TEST_CASE("what was computed is not computed again; all of it can be forgotten") {
  Bench b({.step_tokens = 512, .cache_tokens = 4096}, 0);
  const std::vector<TokenId> prompt = random_ids(1000, 1);
  b.generator.submit(request_of(prompt, 5));
  b.run();
  const size_t first = b.all_rows;
  CHECK(first == 1004);
  b.generator.submit(request_of(prompt, 5));
  b.run();
  CHECK(b.all_rows - first == 5);
  b.generator.forget();
  CHECK(b.generator.load().pages_used == 0);
  b.generator.submit(request_of(prompt, 5));
  b.run();
  CHECK(b.all_rows == 2 * first + 5);
}

TEST_CASE("a model with windows runs long contexts in the memory of a few windows") {
  TinyModelOptions tiny{.family = "gemma3", .layers = 6, .window = 64};  // layer 5 is full
  // Six layers of 8,192 tokens would take 768 pages; one full layer takes 128.
  Bench whole({.step_tokens = 128, .cache_tokens = 8448}, 0, tiny);
  REQUIRE(whole.engine.cache().groups() == 6);
  const size_t page = KvCache::page_bytes(whole.engine.cache().shape());
  Bench tight({.step_tokens = 128, .cache_bytes = 170 * page}, 0, tiny);
  CHECK(tight.engine.cache().total_pages() == 170);
  std::vector<GenerationResult> results;
  for (Bench* b : {&whole, &tight}) {
    GenerationRequest request = request_of(random_ids(8192, 1), 8);
    request.top_logprobs = 3;
    results.push_back(generate_all(b->generator, {request}).front());
  }
  REQUIRE(results[0].logprobs.size() == 8);
  for (size_t t = 0; t < 8; ++t) CHECK(results[0].logprobs[t].top == results[1].logprobs[t].top);
}

TEST_CASE("a beginning reused across a window's border gives the same bits") {
  TinyModelOptions tiny{.family = "gemma3", .layers = 6, .window = 100};
  const std::vector<TokenId> common = random_ids(700, 1);
  for (const size_t shared : {30, 63, 64, 65, 99, 100, 101, 163, 164, 320, 500, 640, 700}) {
    CAPTURE(shared);
    std::vector<TokenId> prompt(common.begin(), common.begin() + ptrdiff_t(shared));
    for (const TokenId id : random_ids(90, shared)) prompt.push_back(id);
    GenerationRequest request = request_of(prompt, 6);
    request.top_logprobs = 3;
    Bench fresh({.step_tokens = 128, .cache_tokens = 4096}, 0, tiny);
    Bench reused({.step_tokens = 128, .cache_tokens = 4096}, 0, tiny);
    generate_all(reused.generator, {request_of(common, 4)});
    const GenerationResult a = generate_all(fresh.generator, {request}).front();
    const GenerationResult b = generate_all(reused.generator, {request}).front();
    CHECK(a.cached_tokens == 0);
    CHECK(b.cached_tokens + 63 >= shared);
    REQUIRE(a.logprobs.size() == b.logprobs.size());
    for (size_t t = 0; t < a.logprobs.size(); ++t) CHECK(a.logprobs[t].top == b.logprobs[t].top);
  }
}

TEST_CASE("a cache of stated bytes is refused where it holds nothing, and never passed") {
  Bench b({.step_tokens = 64, .cache_tokens = 256}, 0);
  const size_t page = KvCache::page_bytes(b.engine.cache().shape());
  CHECK_THROWS_AS(Engine(b.pool, b.model, {.cache_bytes = 2 * page - 1}), Error);
  Engine small(b.pool, b.model, {.cache_bytes = 5 * page - 1});
  CHECK(small.cache().total_pages() == 4);
}
