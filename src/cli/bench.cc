#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/clock.h"
#include "base/memory.h"
#include "cli/commands.h"
#include "cli/model_flags.h"
#include "engine/forward.h"

namespace moru {
namespace {

struct BenchFlags {
  ModelFlags model;
  size_t prompt = 512, generate = 64, batch = 1, depth = 0, repeat = 3;
  bool json = false;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void bench(const BenchFlags& flags) {
  const Stopwatch load_watch;
  const ModelFiles files = open_model(flags.model.path);
  Pool pool(flags.model.pool_size());
  const Model model = load_model(pool, files, flags.model.load_options());
  const double load_seconds = load_watch.seconds();
  const size_t longest = flags.depth + flags.prompt + flags.generate + 1;
  Engine engine(pool, model,
                {.step_tokens = std::max<size_t>(512, flags.batch),
                 .cache_tokens = (flags.batch + 1) * (longest + kPageTokens)});
  const auto ignore = [](size_t, size_t, float*) {};
  std::vector<TokenId> ids(longest);
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<TokenId>((i * 7919 + 11) % model.config.vocab);
  const auto feed = [&](KvSequence& sequence, size_t from, size_t count) {
    for (size_t at = 0; at < count; at += engine.step_tokens()) {
      const size_t n = std::min(engine.step_tokens(), count - at);
      const StepSpan span{&sequence, std::span(ids).subspan(from + at, n),
                          at + n == count ? n - 1 : n};
      engine.step({&span, 1}, ignore);
    }
  };

  std::vector<double> prefill, decode;
  for (size_t round = 0; round <= flags.repeat; ++round) {  // the first one warms up
    std::vector<KvSequence> sequences;
    for (size_t i = 0; i < flags.batch; ++i) sequences.push_back(engine.cache().make_sequence());
    if (flags.depth > 0) feed(sequences[0], 0, flags.depth);
    const Stopwatch prompt_watch;
    feed(sequences[0], flags.depth, flags.prompt);
    const double prompt_seconds = prompt_watch.seconds();
    for (size_t i = 1; i < flags.batch; ++i)
      engine.cache().fork(sequences[0], sequences[0].tokens(), sequences[i]);
    const Stopwatch decode_watch;
    std::vector<StepSpan> spans;
    for (size_t t = 0; t < flags.generate; ++t) {
      spans.clear();
      for (KvSequence& sequence : sequences)
        spans.push_back({&sequence, std::span(ids).subspan(flags.depth + flags.prompt + t, 1), 0});
      engine.step(spans, ignore);
    }
    if (round == 0) continue;
    prefill.push_back(static_cast<double>(flags.prompt) / prompt_seconds);
    decode.push_back(static_cast<double>(flags.generate * flags.batch) / decode_watch.seconds());
  }
  if (flags.json) {
    fmt::print("{}\n", nlohmann::ordered_json{{"machine", machine_name()},
                                              {"threads", pool.size()},
                                              {"weight_bytes", model.weight_bytes()},
                                              {"load_seconds", load_seconds},
                                              {"prefill_tokens_per_s", median(prefill)},
                                              {"decode_tokens_per_s", median(decode)},
                                              {"batch", flags.batch},
                                              {"depth", flags.depth},
                                              {"peak_memory_bytes", peak_memory_bytes()}}
                           .dump());
    return;
  }
  fmt::print("{}\n", machine_name());
  fmt::print("{:<24}{:>10.2f} s\n", "load", load_seconds);
  fmt::print("{:<24}{:>10.0f} tokens/s\n", fmt::format("prefill {}", flags.prompt),
             median(prefill));
  fmt::print("{:<24}{:>10.1f} tokens/s, {:.1f} GB/s of weights\n",
             fmt::format("decode {} × {}", flags.batch, flags.generate), median(decode),
             median(decode) / static_cast<double>(flags.batch) *
                 static_cast<double>(model.weight_bytes()) / 1e9);
  fmt::print("{:<24}{:>10.0f} MB\n", "peak memory", static_cast<double>(peak_memory_bytes()) / 1e6);
}

}  // namespace

void add_bench(CLI::App& app) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* cmd = app.add_subcommand("bench", "Measure prefill and decode speed");
  flags->model.add_to(*cmd);
  cmd->add_option("-p,--prompt-tokens", flags->prompt, "tokens of the prompt")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("-n,--new-tokens", flags->generate, "tokens of the answer")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("-b,--batch", flags->batch, "sequences that decode together")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("-d,--depth", flags->depth, "tokens already in the context")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  cmd->add_option("-r,--repeat", flags->repeat, "runs, of which the median counts")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([flags] { bench(*flags); });
}

}  // namespace moru
