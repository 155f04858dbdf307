#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/memory.h"
#include "cli/commands.h"
#include "cli/model_flags.h"
#include "engine/forward.h"
#include "engine/machine.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

struct BenchFlags {
  ModelFlags model;
  CacheFlags cache;
  bool machine = false, json = false;
  size_t prompt = 512, generate = 64, depth = 0, repeat = 3;
  std::vector<size_t> batches = {1, 8, 32};
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// ---- the machine ----

void bench_machine(const BenchFlags& flags) {
  std::vector<size_t> counts = {1, flags.model.pool_size()};
  if (counts[1] == 1) counts.pop_back();
  std::vector<MachineRates> all;
  for (const size_t threads : counts) {
    Pool pool(threads);
    all.push_back(measure_machine(pool));
  }
  if (flags.json) {
    ordered_json rows = ordered_json::array();
    for (const MachineRates& r : all)
      rows.push_back({{"threads", r.threads},
                      {"read_bytes_per_s", r.read},
                      {"f32_operations_per_s", r.f32},
                      {"bf16_operations_per_s", r.bf16},
                      {"int16_operations_per_s", r.int16},
                      {"int8_operations_per_s", r.int8},
                      {"phase_seconds", r.phase_seconds}});
    fmt::print("{}\n", ordered_json{{"machine", machine_name()}, {"rates", rows}}.dump());
    return;
  }
  fmt::print("{}\n{:<24}", machine_name(), "");
  for (const MachineRates& r : all)
    fmt::print("{:>14}", fmt::format("{} thread{}", r.threads, r.threads == 1 ? "" : "s"));
  const auto row = [&](const char* name, const char* unit, double scale,
                       double MachineRates::*rate) {
    fmt::print("\n{:<24}", name);
    for (const MachineRates& r : all)
      fmt::print(
          "{:>14}",
          r.*rate == 0 ? "–" : fmt::format("{:.{}f} {}", r.*rate / scale, scale < 1 ? 2 : 1, unit));
  };
  row("read", "GB/s", 1e9, &MachineRates::read);
  row("f32", "GFLOP/s", 1e9, &MachineRates::f32);
  row("bf16", "GFLOP/s", 1e9, &MachineRates::bf16);
  row("int16", "GOP/s", 1e9, &MachineRates::int16);
  row("int8", "GOP/s", 1e9, &MachineRates::int8);
  row("parallel phase", "µs", 1e-6, &MachineRates::phase_seconds);
  fmt::print("\n");
}

// ---- a model ----

// What a step must do at least: read these bytes, and so many operations for each token.
struct Work {
  double bytes = 0;
  double block_operations = 0, head_operations = 0;  // of products
  double attention_operations = 0;                   // for each key that a token sees
};
Work work_of(const Model& model) {
  const Config& c = model.config;
  Work work;
  work.bytes = static_cast<double>(model.weight_bytes());
  if (!c.tied_head) work.bytes -= static_cast<double>(model.embedding.bytes());
  const auto operations = [](const Matrix& m) {
    return 2 * static_cast<double>(m.rows()) * static_cast<double>(m.cols());
  };
  for (const Layer& l : model.layers)
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.attn_out, &l.gate, &l.up, &l.down})
      work.block_operations += operations(*m);
  work.head_operations = operations(model.output());
  work.attention_operations = 4 * static_cast<double>(c.layers * c.q_width());
  return work;
}

// Seconds that the machine's limits allow for one sequence's `tokens` new ones after `context`, of
// which `logits` meet the head. Keys and values count as the cache has them: attention over codes
// of i16 is int16 work, over all others f32 work.
double least_seconds(const Model& model, const KvShape& kv, const Work& work,
                     const MachineRates& rates, double tokens, double sequences, double context,
                     double logits) {
  const double products = model.profile == Profile::exact
                              ? (model.activations == Activations::int8 ? rates.int8 : rates.int16)
                          : model.profile == Profile::bf16 ? std::max(rates.bf16, rates.f32)
                                                           : rates.f32;
  const double keys = context + (tokens / sequences + 1) / 2;
  const double bytes_per_token =
      static_cast<double>(KvCache::page_bytes(kv) * KvCache::groups(kv)) / kPageTokens;
  const double kv_bytes = sequences * (context + tokens / sequences) * bytes_per_token;
  const double arithmetic =
      products == 0 ? 0
                    : (tokens * work.block_operations + logits * work.head_operations) / products +
                          tokens * keys * work.attention_operations /
                              (kv.type == KvType::i16 ? rates.int16 : rates.f32);
  return std::max((work.bytes + kv_bytes) / rates.read, arithmetic);
}

// A run, and what it had to do.
struct Measured {
  double tokens_per_s = 0, seconds = 0;
  double steps = 0, tokens = 0, sequences = 0, context = 0, logits = 0;  // the last four of a step
};
double share_of_limit(const Model& model, const KvShape& kv, const Work& work,
                      const MachineRates& rates, const Measured& m) {
  return m.steps *
         least_seconds(model, kv, work, rates, m.tokens, m.sequences, m.context, m.logits) /
         m.seconds;
}

class ModelBench {
 public:
  ModelBench(const BenchFlags& flags, Pool& pool, const Model& model)
      : flags_(flags),
        engine_(pool, model,
                {.step_tokens = step_tokens(flags),
                 .cache_tokens = room(flags),
                 .kv_type = flags.cache.engine_options().kv_type}),
        ids_(flags.depth + std::max(flags.prompt, flags.generate)) {
    for (size_t i = 0; i < ids_.size(); ++i)
      ids_[i] = static_cast<TokenId>((i * 7919 + 11) % model.config.vocab);
  }

  const KvShape& kv_shape() { return engine_.cache().shape(); }
  size_t cache_bytes() {
    return engine_.cache().total_pages() * KvCache::page_bytes(engine_.cache().shape());
  }

  // The whole prompt in one go, with the logits of its last token.
  Measured prefill() {
    KvSequence sequence = engine_.cache().make_sequence();
    feed(sequence, 0, flags_.depth);
    const double seconds = middle_seconds(
        [&] {
          feed(sequence, flags_.depth, flags_.prompt);
          return flags_.depth;
        },
        {&sequence, 1});
    const auto tokens = static_cast<double>(flags_.prompt);
    return {tokens / seconds, seconds, 1, tokens, 1, depth(), 1};
  }

  // One token after the other, of `batch` sequences together.
  Measured decode(size_t batch) {
    std::vector<KvSequence> sequences;
    for (size_t i = 0; i < batch; ++i) {
      sequences.push_back(engine_.cache().make_sequence());
      feed(sequences.back(), 0, flags_.depth);
    }
    std::vector<StepSpan> spans;
    const double seconds = middle_seconds(
        [&] {
          for (size_t t = 0; t < flags_.generate; ++t) {
            spans.clear();
            for (KvSequence& s : sequences)
              spans.push_back({&s, std::span(ids_).subspan(flags_.depth + t, 1), 0});
            engine_.step(spans, [](size_t, size_t, float*) {});
          }
          return flags_.depth;
        },
        sequences);
    const auto steps = static_cast<double>(flags_.generate), width = static_cast<double>(batch);
    return {steps * width / seconds, seconds, steps, width, width, depth() + steps / 2, width};
  }

 private:
  // 0 where nothing is decoded.
  static size_t largest_batch(const BenchFlags& flags) {
    return flags.generate == 0 ? 0 : *std::max_element(flags.batches.begin(), flags.batches.end());
  }
  static size_t step_tokens(const BenchFlags& flags) {
    return std::max<size_t>(512, largest_batch(flags));
  }
  static size_t room(const BenchFlags& flags) {
    return std::max(flags.depth + flags.prompt + kPageTokens,
                    largest_batch(flags) * (flags.depth + flags.generate + kPageTokens));
  }
  double depth() const { return static_cast<double>(flags_.depth); }

  void feed(KvSequence& sequence, size_t from, size_t count) {
    for (size_t at = 0; at < count; at += engine_.step_tokens()) {
      const size_t n = std::min(engine_.step_tokens(), count - at);
      const StepSpan span{&sequence, std::span(ids_).subspan(from + at, n),
                          at + n == count ? n - 1 : n};
      engine_.step({&span, 1}, [](size_t, size_t, float*) {});
    }
  }

  // Of `repeat` runs after one that warms up. Sequences are cut to what run() returns afterwards.
  template <typename Run>
  double middle_seconds(Run&& run, std::span<KvSequence> sequences) {
    std::vector<double> seconds;
    for (size_t round = 0; round <= flags_.repeat; ++round) {
      const Stopwatch watch;
      const size_t keep = run();
      if (round > 0) seconds.push_back(watch.seconds());
      for (KvSequence& s : sequences) engine_.cache().truncate(s, keep);
    }
    return median(seconds);
  }

  const BenchFlags& flags_;
  Engine engine_;
  std::vector<TokenId> ids_;
};

void bench_model(const BenchFlags& flags) {
  const Stopwatch load_watch;
  const ModelFiles files = open_model(flags.model.path);
  Pool pool(flags.model.pool_size());
  // Positions are prepared for what is measured, also beyond what the model was trained for.
  LoadOptions options = flags.model.load_options();
  const size_t needed = flags.depth + std::max(flags.prompt, flags.generate);
  if (options.context != 0 && options.context < needed)
    throw Error(ErrorKind::usage,
                {.where = "--context",
                 .what = fmt::format("is {}, but {} tokens are measured", options.context, needed),
                 .cure = "leave it out, or measure fewer"});
  options.context = std::max<size_t>(options.context, needed);
  const Model model = load_model(pool, files, options);
  const double load_seconds = load_watch.seconds();
  const uint64_t loaded_bytes = peak_memory_bytes();
  ModelBench run(flags, pool, model);
  const Measured prefill = flags.prompt > 0 ? run.prefill() : Measured{};
  std::vector<Measured> decode;
  if (flags.generate > 0)
    for (const size_t batch : flags.batches) decode.push_back(run.decode(batch));
  const uint64_t peak_bytes = peak_memory_bytes();  // what follows takes memory of its own
  const MachineRates rates = measure_machine(pool);
  const Work work = work_of(model);
  const auto of_limit = [&](const Measured& m) {
    return share_of_limit(model, run.kv_shape(), work, rates, m);
  };

  if (flags.json) {
    ordered_json rows = ordered_json::array();
    for (size_t i = 0; i < decode.size(); ++i)
      rows.push_back({{"batch", flags.batches[i]},
                      {"tokens_per_s", decode[i].tokens_per_s},
                      {"of_limit", of_limit(decode[i])}});
    fmt::print("{}\n", ordered_json{{"machine", machine_name()},
                                    {"threads", pool.size()},
                                    {"weight_bytes", model.weight_bytes()},
                                    {"load_seconds", load_seconds},
                                    {"loaded_memory_bytes", loaded_bytes},
                                    {"cache_bytes", run.cache_bytes()},
                                    {"read_bytes_per_s", rates.read},
                                    {"int16_operations_per_s", rates.int16},
                                    {"depth", flags.depth},
                                    {"prefill_tokens_per_s", prefill.tokens_per_s},
                                    {"prefill_of_limit", flags.prompt > 0 ? of_limit(prefill) : 0},
                                    {"decode", rows},
                                    {"peak_memory_bytes", peak_bytes}}
                           .dump());
    return;
  }
  fmt::print("{}: read {:.1f} GB/s, f32 {:.0f} GFLOP/s, int16 {:.0f} GOP/s\n", machine_name(),
             rates.read / 1e9, rates.f32 / 1e9, rates.int16 / 1e9);
  fmt::print("{:<24}{:>10.2f} s, {:.0f} MB of memory\n", "load", load_seconds,
             static_cast<double>(loaded_bytes) / 1e6);
  const auto row = [&](const std::string& name, const Measured& m) {
    fmt::print("{:<24}{:>10.1f} tokens/s, {:.0f} % of the machine's limit\n", name, m.tokens_per_s,
               100 * of_limit(m));
  };
  if (flags.prompt > 0) row(fmt::format("prefill {}", flags.prompt), prefill);
  for (size_t i = 0; i < decode.size(); ++i)
    row(flags.batches[i] == 1 ? std::string("decode")
                              : fmt::format("decode, {} together", flags.batches[i]),
        decode[i]);
}

}  // namespace

void add_bench(CLI::App& app) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* cmd =
      app.add_subcommand("bench", "Measure a model's speed, or what this machine could do at most");
  flags->model.add_to(*cmd);
  flags->cache.add_type_to(*cmd);
  CLI::Option* machine = cmd->add_flag("--machine", flags->machine,
                                       "no model: measure reading, arithmetic and parallel phases");
  cmd->get_option("model")->required(false)->excludes(machine);
  cmd->add_option("-p,--prompt-tokens", flags->prompt, "tokens of the prompt; 0: leave it out")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  cmd->add_option("-n,--new-tokens", flags->generate, "tokens of each answer; 0: leave it out")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  cmd->add_option("-b,--batch", flags->batches, "sequences that decode together, as 1,8,32")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("-d,--depth", flags->depth, "tokens that each sequence's context begins with")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  cmd->add_option("-r,--repeat", flags->repeat, "runs, of which the median counts")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([cmd, flags] {
    if (flags->machine) {
      refuse_given(*cmd,
                   {"--precision", "--activations", "--context", "--kv-type", "--prompt-tokens",
                    "--new-tokens", "--batch", "--depth", "--repeat"},
                   "is about a model, and --machine measures without one");
      return bench_machine(*flags);
    }
    if (flags->generate == 0)
      refuse_given(*cmd, {"--batch"}, "is about answers, which --new-tokens 0 leaves out");
    if (flags->model.path.empty())
      throw Error(ErrorKind::usage, {.where = "bench",
                                     .what = "neither a model nor --machine is given",
                                     .cure = "name a GGUF file or a Hugging Face folder"});
    bench_model(*flags);
  });
}

}  // namespace moru
