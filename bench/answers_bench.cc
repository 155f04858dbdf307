// What choosing tokens costs beside the model: sampling from large vocabularies, masks of JSON
// Schemas, and what drafts save. Ratios are of one run; parts alternate, and the median counts.
//
//   answers_bench MODEL [sampling] [constraints] [drafts]      all by default
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/random.h"
#include "engine/constraint.h"
#include "engine/generate.h"
#include "engine/prompt.h"
#include "engine/sampling.h"

namespace {

using namespace moru;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void measure_sampling() {
  struct Case {
    const char* name;
    SamplingOptions options;
  };
  std::vector<Case> cases(6);
  cases[0].name = "greedy";
  cases[1].name = "temperature 1";
  cases[2].name = "top-p 0.95";
  cases[2].options.top_p = 0.95f;
  cases[3].name = "top-k 40";
  cases[3].options.top_k = 40;
  cases[4].name = "min-p 0.05";
  cases[4].options.min_p = 0.05f;
  cases[5].name = "typical 0.9";
  cases[5].options.typical_p = 0.9f;
  for (const size_t vocab : {49'152, 151'936, 262'144}) {
    Random random(1);
    std::vector<float> logits(vocab), row(vocab);
    for (float& x : logits) x = 3 * random.normal();
    for (Case& c : cases) {
      if (&c != &cases[0]) c.options.temperature = 0.8f;
      Sampler sampler;
      std::vector<double> times;
      for (uint64_t i = 0; i < 60; ++i) {
        row = logits;
        c.options.seed = i;
        const Stopwatch watch;
        sampler.choose(row, c.options, {});
        times.push_back(watch.seconds());
      }
      fmt::print("{:<20}{:>8} logits{:>10.0f} µs\n", c.name, vocab, median(times) * 1e6);
    }
  }
}

struct Run {
  double seconds = 0;
  size_t tokens = 0;
  std::string text;
  double rate() const { return static_cast<double>(tokens) / seconds; }
};

// One answer; the prompt's time is left out.
Run answer(Generator& generator, const GenerationRequest& request) {
  Run run;
  generator.submit(request);
  Stopwatch watch;
  size_t first = 0;
  while (generator.busy()) {
    generator.step([&](const GenerationEvent& event) {
      if (first == 0 && event.completion_tokens > 0) {
        first = event.completion_tokens;
        watch = Stopwatch();
      }
      run.tokens = event.completion_tokens;
      run.text += event.text;
    });
  }
  run.tokens -= first;
  run.seconds = watch.seconds();
  return run;
}

constexpr std::string_view kTypical = R"({"type": "object", "properties": {
    "title": {"type": "string", "maxLength": 80},
    "summary": {"type": "string", "maxLength": 1000},
    "sentiment": {"enum": ["positive", "neutral", "negative"]},
    "score": {"type": "integer", "minimum": 0, "maximum": 100},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
    "author": {"type": "object", "properties": {"name": {"type": "string"},
               "email": {"type": "string", "format": "email"}}, "required": ["name"]}},
    "required": ["title", "summary", "sentiment", "score", "tags", "author"],
    "additionalProperties": false})";

void measure_constraints(const ModelFiles& files, Engine& engine) {
  struct Case {
    const char* name;
    ConstraintSource source;
  };
  using Kind = ConstraintSource::Kind;
  const std::vector<Case> cases = {
      {"typical schema", {Kind::json_schema, std::string(kTypical)}},
      {"string of 1,000", {Kind::json_schema, R"({"type": "string", "minLength": 1000,
                                                "maxLength": 1000})"}},
      {"deep arrays", {Kind::json_schema, R"({"type": "array", "minItems": 1, "items":
                       {"anyOf": [{"$ref": "#"}, {"type": "string", "maxLength": 10}]}})"}},
      {"any object", {Kind::json_object, ""}},
      {"lower-case words", {Kind::regex, "([a-z]{1,20} ){60}[a-z]+"}}};
  Stopwatch tree_watch;
  const auto vocabulary =
      std::make_shared<const Vocabulary>(files.tokenizer, engine.model().config.vocab);
  fmt::print("{:<20}{:>10.1f} ms, once a model\n", "tree of tokens", tree_watch.seconds() * 1e3);
  Generator generator(engine, files.tokenizer);
  for (const Case& c : cases) {
    const Stopwatch compile_watch;
    const auto language = std::make_shared<const Language>(c.source);
    const double compile_s = compile_watch.seconds();
    GenerationRequest request;
    request.prompt = encode_text(files, "A review of a book about the sea, as JSON:\n");
    request.max_tokens = 200;
    request.sampling.temperature = 1;
    request.sampling.seed = 3;
    request.sampling.repetition_penalty = 1.1f;
    request.stop_ids = files.stop_ids;
    GenerationRequest held = request;
    held.language = language;
    request.stop_ids.clear();

    std::vector<double> ratios, free_rates, held_rates;
    Run one;
    for (int round = 0; round < 5; ++round) {
      // A language of its own each time: no mask is known yet.
      held.language = std::make_shared<const Language>(c.source);
      one = answer(generator, held);
      request.max_tokens = std::max<size_t>(one.tokens, 20);
      const Run free = answer(generator, request);
      free_rates.push_back(free.rate());
      held_rates.push_back(one.rate());
      ratios.push_back(one.rate() / free.rate());
    }
    // The masks alone, along the same answer: first met, then known.
    const std::vector<TokenId> ids = files.tokenizer.encode(one.text);
    const auto masks = std::make_shared<TokenMasks>(language, vocabulary);
    std::vector<double> cold, known;
    for (std::vector<double>* times : {&cold, &known}) {
      Constraint constraint(masks);
      std::vector<float> logits(vocabulary->vocab());
      for (const TokenId id : ids) {
        const Stopwatch watch;
        apply_mask(constraint.mask(), logits);
        const bool fits = constraint.take(files.tokenizer.bytes_of(id));
        times->push_back(watch.seconds());
        if (!fits) break;
      }
    }
    fmt::print(
        "{:<20}{:>7.1f} → {:>6.1f} tokens/s: {:.3f}   {} tokens; compiled in {:.1f} ms; a mask "
        "met first {:.0f} µs (longest {:.0f}), known {:.1f} µs\n",
        c.name, median(free_rates), median(held_rates), median(ratios), one.tokens, compile_s * 1e3,
        median(cold) * 1e6, *std::max_element(cold.begin(), cold.end()) * 1e6, median(known) * 1e6);
  }
}

// A text to copy with a change, prose on a theme, and both beside seven other answers.
void measure_drafts(const ModelFiles& files, Engine& engine) {
  const std::string paragraph =
      "The harbour opens at six in the morning. Boats that arrive before that wait outside of the "
      "breakwater, where the water is calm, and the harbour master calls them in by the size of "
      "their catch. Ice is sold at the second pier; fuel at the third. Nets are dried on the "
      "northern wall, never on the road.";
  struct Case {
    const char* name;
    std::string prompt;
    float temperature;
    size_t beside;
  };
  const std::string copy = "Text: " + paragraph + "\n\nThe same text again, word for word: ";
  const std::string prose =
      "A long letter about the weather, the sea and the people of the town:\n";
  const std::vector<Case> cases = {
      {"copying, greedy", copy, 0, 0},    {"copying, drawn", copy, 0.3f, 0},
      {"prose, greedy", prose, 0, 0},     {"prose, drawn", prose, 1, 0},
      {"prose, 8 together", prose, 1, 7}, {"copying, 8 together", copy, 0, 7}};
  for (const Case& c : cases) {
    std::vector<double> ratios, rates;
    Generator::Drafted drafted;
    for (int round = 0; round < 5; ++round) {
      double seconds[2] = {}, tokens[2] = {};
      std::string texts[2];
      for (const bool drafts : {false, true}) {
        Generator generator(engine, files.tokenizer);
        std::vector<GenerationRequest> requests(c.beside + 1);
        for (size_t i = 0; i < requests.size(); ++i) {
          requests[i].prompt = encode_text(files, c.prompt);
          requests[i].max_tokens = 120;
          requests[i].sampling.temperature = c.temperature;
          requests[i].sampling.seed = 10 * static_cast<uint64_t>(round) + i;
          requests[i].drafts = drafts;
        }
        // The prompts first: what is measured is answering.
        for (GenerationRequest& request : requests) generator.submit(request);
        size_t first = 0, begun = 0;
        Stopwatch watch;
        while (generator.busy()) {
          if (begun == requests.size() && first == 0) {
            first = 1;
            watch = Stopwatch();
          }
          generator.step([&](const GenerationEvent& event) {
            if (first == 0) begun += event.completion_tokens == 1;
            if (first != 0) texts[drafts] += event.text;
            if (event.finish) tokens[drafts] += static_cast<double>(event.completion_tokens);
          });
        }
        seconds[drafts] = watch.seconds();
        if (drafts) drafted = generator.drafted();
      }
      if (texts[0].size() != texts[1].size()) fmt::print("the answers differ!\n");
      ratios.push_back(seconds[0] / seconds[1]);
      rates.push_back(tokens[1] / seconds[1]);
    }
    fmt::print(
        "{:<20}{:>7.1f} tokens/s with drafts, {:.3f} × without (worst {:.3f}); {} of {} guesses "
        "right\n",
        c.name, median(rates), median(ratios), *std::min_element(ratios.begin(), ratios.end()),
        drafted.right, drafted.tokens);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print("usage: answers_bench MODEL [sampling] [constraints] [drafts]\n");
    return 2;
  }
  const auto asked = [&](std::string_view part) {
    return argc == 2 || std::find(argv + 2, argv + argc, part) != argv + argc;
  };
  if (asked("sampling")) measure_sampling();
  if (!asked("constraints") && !asked("drafts")) return 0;
  const ModelFiles files = open_model(argv[1]);
  Pool pool(usable_threads());
  const Model model = load_model(pool, files, {});
  Engine engine(pool, model);
  if (asked("constraints")) measure_constraints(files, engine);
  if (asked("drafts")) measure_drafts(files, engine);
  return 0;
}
