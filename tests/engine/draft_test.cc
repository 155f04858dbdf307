#include "engine/draft.h"

#include "base/random.h"
#include "engine/generate.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

std::vector<TokenId> found(LookupDraft& draft, const std::vector<TokenId>& text, size_t most) {
  const std::span<const TokenId> tokens = draft.find(text, most);
  return {tokens.begin(), tokens.end()};
}

}  // namespace

TEST_CASE("a draft is what followed the last three tokens where they stood last") {
  using Ids = std::vector<TokenId>;
  LookupDraft draft(30);
  Ids text = {1, 2, 3, 4, 5, 1, 2, 3, 9, 8, 1, 2};
  CHECK(found(draft, {}, 8).empty());
  CHECK(found(draft, text, 8).empty());
  text.push_back(3);
  CHECK(found(draft, text, 8) == Ids{9, 8, 1, 2, 3});
  CHECK(found(draft, text, 2) == Ids{9, 8});
  CHECK(found(draft, text, 0).empty());
  text.push_back(4);
  CHECK(found(draft, text, 2) == Ids{5, 1});
  LookupDraft fresh(30);
  CHECK(found(fresh, {7, 7, 7, 7}, 8) == Ids{7});
}

TEST_CASE("what rows cost is learnt, interpolated, and guessed at first") {
  RowCost cost;
  CHECK(cost.of_more(1, 4) == doctest::Approx(0.4));
  cost.learn(1, 0.010);
  cost.learn(9, 0.018);
  CHECK(cost.of_more(1, 4) == doctest::Approx(0.4));
  CHECK(cost.of_more(1, 8) == doctest::Approx(0.8));
  cost.learn(1, 0.005);  // a machine that has become free
  CHECK(cost.of_more(1, 8) == doctest::Approx(2.6));
  cost.learn(1000, 1);
  CHECK(cost.of_more(9, 900) == doctest::Approx(90));
}

TEST_CASE("drafts that never come true stop, and cost little") {
  DraftAccount account;
  double lost = 0;
  size_t steps = 0;
  for (; steps < 1000; ++steps) {
    const size_t n = account.length(0.5);
    account.settle(n, 0, n > 0 ? 0.5 : 0);
    lost += n > 0 ? 0.5 : 0;
  }
  CHECK(lost <= 0.02 * 1000 + 1);
  DraftAccount good;
  CHECK(good.length(0.5) == DraftAccount::kShortest);
  good.settle(4, 4, 0.5);
  CHECK(good.length(0.5) == DraftAccount::kLongest);
  good.settle(8, 3, 1);
  CHECK(good.length(0.5) == DraftAccount::kShortest);
}

TEST_CASE("answers with drafts are the answers without, greedy, drawn, and held to a language") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf", {.type = DType::q4_k});
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(2);
  const Model model = load_model(pool, files, {.context = 512});
  // A cache so small that requests are sent back to wait.
  Engine engine(pool, model, {.step_tokens = 64, .cache_tokens = 1024});
  Random random(7);
  std::vector<GenerationRequest> requests;
  for (size_t i = 0; i < 12; ++i) {
    GenerationRequest request;
    // The same few tokens again and again: drafts are found at once, and often wrong.
    for (size_t n = 20 + random.below(40); n > 0; --n)
      request.prompt.push_back(static_cast<TokenId>(40 + random.below(i % 2 == 0 ? 3 : 30)));
    request.max_tokens = 60;
    request.stop_ids = files.stop_ids;
    request.sampling.temperature = i % 3 == 0 ? 0.0f : 0.7f;
    request.sampling.seed = i;
    if (i % 3 == 1) {  // few tokens to choose from: what stood before comes again
      request.sampling.top_k = 2;
      for (TokenId id = 65; id < 68; ++id) request.sampling.logit_bias.emplace_back(id, 30.0f);
    }
    if (i % 4 == 3) request.sampling.dry_multiplier = 0.5f;
    if (i % 4 == 2) request.top_logprobs = 2;
    if (i % 6 == 5)
      request.language = std::make_shared<const Language>(
          ConstraintSource{ConstraintSource::Kind::regex, "((ab|ac) (same words )?){5,9}"});
    if (i % 5 == 4) request.stop_texts = {"BA"};
    requests.push_back(request);
  }
  std::vector<GenerationResult> without;
  for (GenerationRequest request : requests) {
    request.drafts = false;
    Generator generator(engine, files.tokenizer);
    without.push_back(generate_all(generator, {request}).front());
  }
  for (const bool together : {false, true}) {
    Generator generator(engine, files.tokenizer);
    std::vector<GenerationResult> with;
    if (together) with = generate_all(generator, requests);
    if (!together)
      for (const GenerationRequest& request : requests)
        with.push_back(generate_all(generator, {request}).front());
    CHECK(generator.drafted().right > 0);
    CHECK(generator.drafted().tokens > generator.drafted().right);
    for (size_t i = 0; i < requests.size(); ++i) {
      CAPTURE(i);
      CAPTURE(together);
      CHECK(with[i].text == without[i].text);
      CHECK(with[i].finish == without[i].finish);
      CHECK(with[i].completion_tokens == without[i].completion_tokens);
      REQUIRE(with[i].logprobs.size() == without[i].logprobs.size());
      for (size_t t = 0; t < with[i].logprobs.size(); ++t) {
        CHECK(with[i].logprobs[t].id == without[i].logprobs[t].id);
        CHECK(with[i].logprobs[t].logprob == without[i].logprobs[t].logprob);
      }
    }
  }
}
