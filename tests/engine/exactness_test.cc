// The promise of the exact profile: a token's logits are the same bits whatever computes beside it.
#include <doctest/doctest.h>
#include <unistd.h>

#include <bit>
#include <chrono>
#include <cstdio>

#include "base/cpu.h"
#include "engine/forward.h"
#include "engine/generate.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

constexpr size_t kVocab = 259;

std::vector<TokenId> random_ids(size_t count, Random& random) {
  std::vector<TokenId> ids(count);
  for (TokenId& id : ids) id = static_cast<TokenId>(random.below(kVocab));
  return ids;
}

// Logits of every position, [ids, vocab], fed in parts of the given sizes.
std::vector<float> logits_in_parts(Engine& engine, std::span<const TokenId> ids,
                                   std::span<const size_t> parts) {
  std::vector<float> all;
  KvSequence sequence = engine.cache().make_sequence();
  size_t at = 0;
  for (const size_t part : parts) {
    const StepSpan span{&sequence, ids.subspan(at, part), 0};
    engine.step({&span, 1}, [&](size_t, size_t count, float* logits) {
      all.insert(all.end(), logits, logits + count * kVocab);
    });
    at += part;
  }
  return all;
}

std::vector<size_t> random_parts(size_t total, Random& random) {
  // Sizes around the thresholds where kernels change, and anything else.
  constexpr size_t kSizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65};
  std::vector<size_t> parts;
  while (total > 0) {
    const size_t part = std::min(total, kSizes[random.below(std::size(kSizes))]);
    parts.push_back(part);
    total -= part;
  }
  return parts;
}

uint64_t fresh_seed() {
  return static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
}

}  // namespace

TEST_CASE("exact logits do not depend on threads, chunks or neighbours, for every block type") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  const TempDir folder;
  for (const std::string family : {"llama", "gemma3", "llama with int8 activations"}) {
    const bool narrow = family.ends_with("int8 activations");
    for (const DType type :
         {DType::q8_0, DType::q4_0, DType::q4_1, DType::q5_0, DType::q5_1, DType::q2_k, DType::q3_k,
          DType::q4_k, DType::q5_k, DType::q6_k, DType::iq4_nl, DType::iq4_xs, DType::mxfp4}) {
      CAPTURE(family);
      CAPTURE(traits(type).name);
      Random random(seed, static_cast<uint64_t>(type));
      const auto path = folder.path() / "tiny.gguf";
      write_tiny_model(path, {.family = narrow ? "llama" : family, .type = type, .seed = seed});
      const ModelFiles files = open_model(path);
      const std::vector<TokenId> ids = random_ids(150, random);
      std::vector<float> expected;
      for (const size_t threads : {1, 2, 4}) {
        Pool pool(threads);
        LoadOptions options;
        options.activations = narrow ? Activations::int8 : Activations::int16;
        options.context = 512;
        const Model model = load_model(pool, files, options);
        Engine engine(pool, model, {.step_tokens = 512, .cache_tokens = 8192});
        const size_t whole[] = {ids.size()};
        const std::vector<float> at_once = logits_in_parts(engine, ids, whole);
        if (expected.empty()) expected = at_once;
        REQUIRE(at_once == expected);
        REQUIRE(logits_in_parts(engine, ids, random_parts(ids.size(), random)) == expected);
        const std::vector<size_t> singly(ids.size(), 1);
        if (threads == 2) REQUIRE(logits_in_parts(engine, ids, singly) == expected);

        // Beside seven others of other lengths, and from a shared beginning.
        std::vector<std::vector<TokenId>> others;
        std::vector<KvSequence> sequences;
        for (size_t i = 0; i < 7; ++i) others.push_back(random_ids(1 + random.below(40), random));
        others.push_back({ids.begin() + 100, ids.end()});
        for (size_t i = 0; i < others.size(); ++i)
          sequences.push_back(engine.cache().make_sequence());
        {
          KvSequence first = engine.cache().make_sequence();
          const StepSpan span{&first, std::span(ids).first(130), 130};
          engine.step({&span, 1}, [](size_t, size_t, float*) {});
          REQUIRE(engine.cache().fork(first, 100, sequences.back()));
        }
        std::vector<StepSpan> spans;
        for (size_t i = 0; i < others.size(); ++i)
          spans.push_back(
              {&sequences[i], others[i], i + 1 == others.size() ? 0 : others[i].size()});
        std::vector<float> beside;
        engine.step(spans, [&](size_t, size_t count, float* logits) {
          beside.insert(beside.end(), logits, logits + count * kVocab);
        });
        REQUIRE(std::equal(beside.begin(), beside.end(), expected.begin() + 100 * kVocab,
                           expected.end()));
      }
    }
  }
}

namespace {

// Rows of a step around the places where something changes: the kernels' tokens per pass (up to
// 16), panels unpacked once for all tokens (12 and 32), rows of an item of attention (96 over the
// heads of a group), tokens that share one unpacking (512).
constexpr size_t kRows[] = {1,  2,  3,   4,   5,   7,   8,   9,   11,  12,  13, 15,
                            16, 17, 31,  32,  33,  47,  48,  49,  63,  64,  65, 95,
                            96, 97, 127, 128, 129, 191, 192, 193, 511, 512, 513};
constexpr size_t kLongest = 600;

// Logits of ids[at …] as one step, from a copy of a sequence that has what comes before.
std::vector<float> rows_of_step(Engine& engine, const KvSequence& base,
                                std::span<const TokenId> ids, size_t at) {
  KvSequence sequence = engine.cache().make_sequence();
  REQUIRE(engine.cache().fork(base, at, sequence));
  std::vector<float> logits;
  const StepSpan span{&sequence, ids.subspan(at), 0};
  engine.step({&span, 1}, [&](size_t, size_t count, float* rows) {
    logits.insert(logits.end(), rows, rows + count * kVocab);
  });
  return logits;
}

// One token of each of `count` sequences of other lengths in one step, against `expected` of all
// positions.
bool batch_is_exact(Engine& engine, const KvSequence& base, std::span<const TokenId> ids,
                    size_t count, const std::vector<float>& expected, Random& random) {
  std::vector<KvSequence> sequences;
  std::vector<size_t> at;
  std::vector<StepSpan> spans;
  for (size_t i = 0; i < count; ++i) {
    at.push_back(random.below(kLongest));
    sequences.push_back(engine.cache().make_sequence());
    REQUIRE(engine.cache().fork(base, at[i], sequences[i]));
  }
  for (size_t i = 0; i < count; ++i) spans.push_back({&sequences[i], ids.subspan(at[i], 1), 0});
  bool equal = true;
  engine.step(spans, [&](size_t first, size_t rows, float* logits) {
    for (size_t i = 0; i < rows; ++i)
      equal = equal && std::equal(logits + i * kVocab, logits + (i + 1) * kVocab,
                                  expected.begin() + ptrdiff_t(at[first + i] * kVocab));
  });
  return equal;
}

}  // namespace

TEST_CASE("exact logits are the same at every threshold of rows and in batches of 1, 8 and 64") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  const TempDir folder;
  const auto path = folder.path() / "tiny.gguf";
  struct Case {
    std::string family;
    DType type;
    KvType kv;
  };
  std::vector<Case> cases;
  // Block types of each shape: blocks of 16 and of 32, with and without minimums.
  for (const DType type : {DType::q4_0, DType::q4_k, DType::q6_k, DType::q2_k, DType::iq4_xs})
    cases.push_back({"llama", type, KvType::i16});
  for (const KvType kv : {KvType::i16, KvType::f16, KvType::bf16, KvType::q8_0, KvType::f32})
    cases.push_back({"gemma3", DType::q5_k, kv});
  cases.push_back({"llama", DType::q8_0, KvType::q8_0});
  for (const Case& c : cases) {
    CAPTURE(c.family);
    CAPTURE(traits(c.type).name);
    CAPTURE(name_of(c.kv));
    Random random(seed, static_cast<uint64_t>(c.type));
    write_tiny_model(path, {.family = c.family, .type = c.type, .window = 70, .seed = seed});
    const ModelFiles files = open_model(path);
    const std::vector<TokenId> ids = random_ids(kLongest, random);
    std::vector<float> expected;
    for (const size_t threads : {2, 1, 4}) {
      Pool pool(threads);
      const Model model = load_model(pool, files, {.context = 1024});
      Engine engine(pool, model, {.step_tokens = 600, .cache_tokens = 80 * 640, .kv_type = c.kv});
      // All at once: nothing has been let go that a fork in the middle needs.
      KvSequence base = engine.cache().make_sequence();
      std::vector<float> whole;
      const StepSpan span{&base, ids, 0};
      engine.step({&span, 1}, [&](size_t, size_t count, float* rows) {
        whole.insert(whole.end(), rows, rows + count * kVocab);
      });
      if (expected.empty()) expected = whole;
      REQUIRE(whole == expected);
      for (const size_t rows : kRows) {
        if (threads != 2 && rows > 33) continue;
        CAPTURE(rows);
        const std::vector<float> part = rows_of_step(engine, base, ids, kLongest - rows);
        REQUIRE(std::equal(part.begin(), part.end(), expected.end() - ptrdiff_t(part.size()),
                           expected.end()));
      }
      for (const size_t count : {1, 8, 64})
        REQUIRE(batch_is_exact(engine, base, ids, count, expected, random));
    }
  }
}

TEST_CASE("float logits do not depend on the number of threads") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  const TempDir folder;
  const auto path = folder.path() / "tiny.gguf";
  for (const DType type : {DType::bf16, DType::f16, DType::f32}) {
    CAPTURE(traits(type).name);
    Random random(seed, static_cast<uint64_t>(type));
    write_tiny_model(path, {.family = "gemma3", .type = type, .seed = seed});
    const ModelFiles files = open_model(path);
    const std::vector<TokenId> ids = random_ids(200, random);
    const std::vector<size_t> parts = random_parts(ids.size(), random);
    std::vector<float> expected;
    for (const size_t threads : {1, 2, 4}) {
      Pool pool(threads);
      const Model model = load_model(pool, files, {.context = 512});
      Engine engine(pool, model, {.step_tokens = 512, .cache_tokens = 1024});
      const std::vector<float> logits = logits_in_parts(engine, ids, parts);
      if (expected.empty()) expected = logits;
      CHECK(logits == expected);
    }
  }
}

// Run by the test below under another level of the instruction set.
TEST_CASE("a hash of exact logits" * doctest::skip()) {
  const TempDir folder;
  const auto path = folder.path() / "tiny.gguf";
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const DType type : {DType::q4_k, DType::q6_k, DType::q8_0, DType::q4_0, DType::iq4_xs}) {
    for (const KvType kv : {KvType::i16, KvType::f16, KvType::q8_0}) {
      write_tiny_model(path, {.family = "gemma3", .type = type, .seed = 7});
      const ModelFiles files = open_model(path);
      Pool pool(2);
      const Model model = load_model(pool, files, {.context = 512});
      Engine engine(pool, model, {.step_tokens = 512, .cache_tokens = 1024, .kv_type = kv});
      Random random(7);
      const std::vector<TokenId> ids = random_ids(200, random);
      const size_t parts[] = {100, 5, 20, 1, 74};
      for (const float logit : logits_in_parts(engine, ids, parts))
        hash = (hash ^ std::bit_cast<uint32_t>(logit)) * 1099511628211u;
    }
  }
  std::printf("hash %016llx\n", static_cast<unsigned long long>(hash));
}

TEST_CASE("exact logits are the same on every level of the instruction set") {
  const auto hash_on = [](const std::string& level) {
    const std::string command = "MORU_ISA=" + level + " /proc/" + std::to_string(::getpid()) +
                                "/exe --no-skip --test-case='a hash of exact logits' 2>&1";
    FILE* pipe = ::popen(command.c_str(), "r");
    REQUIRE(pipe != nullptr);
    std::string out;
    for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) out += static_cast<char>(c);
    CHECK(::pclose(pipe) == 0);
    const size_t at = out.find("hash ");
    REQUIRE(at != std::string::npos);
    return out.substr(at, 21);
  };
  const std::string scalar = hash_on("scalar");
  for (const Isa level : {Isa::avx2, Isa::avx512}) {
    if (level > isa()) {
      MESSAGE("skipped: this processor has no " << std::string(name_of(level)));
      continue;
    }
    CHECK(hash_on(name_of(level)) == scalar);
  }
}

namespace {

// An adapter of every matrix with numbers as after training.
Adapter random_adapter(const Config& config, size_t rank, uint64_t seed, bool zero_b = false) {
  Lora lora;
  lora.layers.resize(config.layers);
  for (LoraLayer& layer : lora.layers)
    for (LoraPair& pair : layer) {
      pair.rank = rank;
      pair.alpha = 2 * static_cast<float>(rank);
    }
  lora.layers[0][1].rank = 0;         // one matrix without
  lora.layers[1][4].rank = rank + 3;  // and one of another rank
  lay_out(lora, config);
  Random random(seed);
  for (float& value : lora.values) value = 0.04f * random.normal();
  if (zero_b)
    for (const LoraLayer& layer : lora.layers)
      for (const LoraPair& pair : layer) std::ranges::fill(lora.b(pair), 0.0f);
  return make_adapter(std::move(lora));
}

std::vector<float> logits_of_span(Engine& engine, const std::vector<TokenId>& ids,
                                  const Adapter* adapter) {
  KvSequence sequence = engine.cache().make_sequence();
  const StepSpan span{&sequence, ids, 0, adapter};
  std::vector<float> out;
  engine.step({&span, 1}, [&](size_t, size_t count, float* logits) {
    out.insert(out.end(), logits, logits + count * kVocab);
  });
  return out;
}

}  // namespace

TEST_CASE("with adapters a token's logits do not depend on its neighbours or theirs") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  const TempDir folder;
  for (const std::string family : {"llama", "gemma3"}) {
    for (const DType type : {DType::q8_0, DType::q4_k}) {
      CAPTURE(family);
      Random random(seed, static_cast<uint64_t>(type));
      const auto path = folder.path() / "tiny.gguf";
      write_tiny_model(path, {.family = family, .type = type, .seed = seed});
      const ModelFiles files = open_model(path);
      const Adapter first = random_adapter(files.config, 4, seed),
                    second = random_adapter(files.config, 17, seed + 1),
                    idle = random_adapter(files.config, 8, seed + 2, true);
      const Adapter* adapters[] = {nullptr, &first, &second, &idle};
      const std::vector<TokenId> ids = random_ids(90, random);
      std::vector<std::vector<float>> alone;
      for (const size_t threads : {1, 2, 4}) {
        Pool pool(threads);
        const Model model = load_model(pool, files, {.context = 512});
        Engine engine(pool, model, {.step_tokens = 1024, .cache_tokens = 8192});
        for (size_t i = 0; i < 4; ++i) {
          const std::vector<float> logits = logits_of_span(engine, ids, adapters[i]);
          if (threads == 1) alone.push_back(logits);
          REQUIRE(logits == alone[i]);
        }
        REQUIRE(alone[1] != alone[0]);
        REQUIRE(alone[2] != alone[1]);
        REQUIRE(alone[3] == alone[0]);  // B = 0 changes nothing

        // All at once: each adapter's sequence in two steps, between those of the others.
        std::vector<KvSequence> sequences;
        for (size_t i = 0; i < 8; ++i) sequences.push_back(engine.cache().make_sequence());
        std::vector<std::vector<float>> together(8);
        const size_t cut = 1 + random.below(80);
        for (const auto& [from, to] : {std::pair{size_t{0}, cut}, std::pair{cut, ids.size()}}) {
          std::vector<StepSpan> spans;
          for (size_t i = 0; i < 8; ++i) {
            // The second four have logits of their last row alone.
            const std::span part = std::span(ids).subspan(from, to - from);
            spans.push_back({&sequences[i], part, i < 4 ? 0 : part.size() - 1, adapters[i % 4]});
          }
          size_t at = 0, row = 0;
          engine.step(spans, [&](size_t, size_t count, float* logits) {
            for (size_t k = 0; k < count; ++k) {
              while (row == spans[at].tokens.size() - spans[at].logits_from) ++at, row = 0;
              together[at].insert(together[at].end(), logits + k * kVocab,
                                  logits + (k + 1) * kVocab);
              ++row;
            }
          });
        }
        for (size_t i = 0; i < 4; ++i) REQUIRE(together[i] == alone[i]);
        for (size_t i = 4; i < 8; ++i)
          REQUIRE(std::equal(together[i].end() - kVocab, together[i].end(),
                             alone[i - 4].end() - kVocab));
      }
    }
  }
}

TEST_CASE("a beginning computed with one adapter is not another's") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf", {.type = DType::q4_k});
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(2);
  const Model model = load_model(pool, files, {.context = 512});
  const Adapter adapter = random_adapter(files.config, 4, 3);
  Engine engine(pool, model, {.step_tokens = 128, .cache_tokens = 4096});
  Generator generator(engine, files.tokenizer);
  Random random(9);
  GenerationRequest request;
  request.prompt = random_ids(100, random);
  request.max_tokens = 12;
  request.top_logprobs = 0;
  const auto ask = [&](const Adapter* a) {
    GenerationRequest r = request;
    r.adapter = a;
    return generate_all(generator, {r}).front();
  };
  const GenerationResult base = ask(nullptr), adapted = ask(&adapter);
  CHECK(adapted.cached_tokens == 0);
  // Kept for the model itself alone, but shared while a request of the same adapter runs.
  CHECK(ask(&adapter).cached_tokens == 0);
  GenerationRequest both[] = {request, request};
  both[0].adapter = both[1].adapter = &adapter;
  const std::vector<GenerationResult> pair = generate_all(generator, {both[0], both[1]});
  CHECK(pair[1].cached_tokens > 0);
  CHECK(pair[1].logprobs[0].logprob == adapted.logprobs[0].logprob);
  both[1].adapter = nullptr;
  generator.forget();
  CHECK(generate_all(generator, {both[0], both[1]})[1].cached_tokens == 0);
  CHECK(ask(nullptr).cached_tokens > 0);
  CHECK(ask(nullptr).logprobs[0].logprob == base.logprobs[0].logprob);
  CHECK(ask(&adapter).logprobs[0].logprob == adapted.logprobs[0].logprob);
  CHECK(adapted.logprobs[0].logprob != base.logprobs[0].logprob);
}

TEST_CASE("answers generated together are the answers generated alone") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf", {.type = DType::q4_k});
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(2);
  const Model model = load_model(pool, files, {.context = 512});
  // A cache so small that requests must wait, be sent back and compute again.
  Engine engine(pool, model, {.step_tokens = 64, .cache_tokens = 1024});
  Random random(5);
  const std::vector<TokenId> beginning = random_ids(70, random);
  std::vector<GenerationRequest> requests;
  for (size_t i = 0; i < 12; ++i) {
    std::vector<TokenId> prompt = beginning;
    for (const TokenId id : random_ids(1 + random.below(90), random)) prompt.push_back(id);
    GenerationRequest request;
    request.prompt = std::move(prompt);
    request.max_tokens = 40;
    request.sampling.temperature = i % 2 == 1 ? 0.8f : 0.0f;
    request.sampling.seed = i;
    request.stop_ids = files.stop_ids;
    request.top_logprobs = 2;
    requests.push_back(std::move(request));
  }
  std::vector<GenerationResult> alone;
  for (const GenerationRequest& request : requests) {
    Generator generator(engine, files.tokenizer);
    alone.push_back(generate_all(generator, {request}).front());
  }
  Generator generator(engine, files.tokenizer);
  const std::vector<GenerationResult> together = generate_all(generator, requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    CAPTURE(i);
    CHECK(together[i].text == alone[i].text);
    REQUIRE(together[i].logprobs.size() == alone[i].logprobs.size());
    for (size_t t = 0; t < alone[i].logprobs.size(); ++t) {
      CHECK(together[i].logprobs[t].logprob == alone[i].logprobs[t].logprob);
      CHECK(together[i].logprobs[t].top == alone[i].logprobs[t].top);
    }
  }
}

TEST_CASE("a stop text is found across token borders and is not part of the answer") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf");
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(1);
  const Model model = load_model(pool, files, {.context = 256});
  Engine engine(pool, model, {.step_tokens = 64, .cache_tokens = 512});
  GenerationRequest request;
  request.prompt = {1, 2, 3};
  request.max_tokens = 60;
  request.sampling.temperature = 1;
  request.sampling.seed = 3;
  Generator generator(engine, files.tokenizer);
  const std::string whole = generate_all(generator, {request}).front().text;
  REQUIRE(whole.size() > 20);
  // A stop of three bytes: three tokens of this vocabulary.
  for (const size_t at : {5, 11}) {
    GenerationRequest stopped = request;
    stopped.stop_texts = {"never said by it", whole.substr(at, 3)};
    const GenerationResult result = generate_all(generator, {stopped}).front();
    CHECK(result.finish == Finish::stop);
    CHECK(result.text == whole.substr(0, whole.find(stopped.stop_texts[1])));
  }
}
