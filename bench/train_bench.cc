// Speed of one training step, as a share of what dense products reach on this machine.
//
// train_bench MODEL [--precision bf16|f32] [--recompute none|light|block] [--threads N] [--packed]
//             [--text FILE] [--steps N] [--json] SHAPE…
//
// Shapes:
//   lora   4 documents of 512 tokens, all learnt; adapters of rank 16 on every matrix
//   rows   58 rows of 35 tokens of which 30 % are learnt
//   short  64 rows of the lengths that Banking77's have, 28 tokens on average, a quarter learnt
//   full   as lora, every weight learnt
//   pairs  8 pairs: a prompt of 128 tokens, two answers of 64 each, DPO
// Tokens are drawn evenly from the vocabulary, unless --text names a text to take them from.
// --packed keeps a quantized model packed (QLoRA). The best of --steps counts. Peers on the same
// shapes: bench/peers/training.py.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/files.h"
#include "base/memory.h"
#include "base/random.h"
#include "engine/dense.h"
#include "engine/model_files.h"
#include "engine/training.h"
#include "tune/adapter.h"
#include "tune/learnt.h"
#include "tune/optimizer.h"

using namespace moru;

namespace {

struct Flags {
  std::string model;
  Profile precision = Profile::bf16;
  Recompute recompute = Recompute::light;
  size_t threads = usable_threads(), steps = 3;
  bool packed = false, json = false;
  std::string text;
  std::vector<std::string> shapes;
};

// Operations a second of x [2048, 576] · w [1536, 576]ᵀ in the precision of training.
double product_rate(Pool& pool, DType type) {
  constexpr size_t kM = 2048, kN = 1536, kK = 576;
  PageBuffer x(kM * kK * 4), w(kN * kK * 4), y(kM * kN * 4);
  std::memset(x.data(), 0x3c, x.bytes());
  std::memset(w.data(), 0x3c, w.bytes());
  const DenseView a{type, x.data(), kM, kK, kK}, b{type, w.data(), kN, kK, kK};
  double best = 0;
  for (int round = 0; round < 12; ++round) {
    const Stopwatch watch;
    matmul_nt(pool, a, b, {DType::f32, y.data(), kN, false, 1});
    best = std::max(best, 2.0 * kM * kN * kK / watch.seconds());
  }
  return best;
}

struct Text {
  std::vector<int32_t> ids;
  std::vector<uint8_t> trained;
};
// Where tokens come from: a text, read over and over, or without one even draws.
struct Source {
  std::vector<int32_t> ids;
  size_t vocab = 0, next = 0;
  Random random{1};

  int32_t token() {
    if (ids.empty()) return static_cast<int32_t>(random.below(vocab));
    return ids[next++ % ids.size()];
  }
};
Source source_of(const ModelFiles& files, const std::string& path) {
  Source source{.vocab = files.config.vocab};
  if (!path.empty()) source.ids = files.tokenizer.encode(read_file(path));
  return source;
}

// The last `learnt` of `length` tokens are learnt.
Text text_of(Source& source, size_t length, size_t learnt) {
  Text text{std::vector<int32_t>(length), std::vector<uint8_t>(length)};
  for (size_t i = 0; i < length; ++i) {
    text.ids[i] = source.token();
    text.trained[i] = i + learnt >= length ? 1 : 0;
  }
  return text;
}

// Rows of Banking77 as SmolLM2 splits them, prompt and answer: 64 quantiles of their lengths.
constexpr size_t kShortRows[] = {21, 23, 22, 26, 32, 37, 23, 38, 29, 29, 17, 23, 18, 22, 21, 24,
                                 21, 36, 34, 28, 24, 25, 23, 26, 25, 25, 31, 52, 29, 28, 23, 31,
                                 27, 45, 57, 27, 22, 20, 27, 32, 30, 26, 30, 22, 41, 24, 25, 20,
                                 18, 22, 26, 43, 27, 24, 20, 26, 33, 19, 19, 67, 24, 21, 48, 28};

TrainingBatch short_rows(Source& source) {
  TrainingBatch batch;
  for (const size_t length : kShortRows) {
    const Text text = text_of(source, length, length / 4);
    batch.append(text.ids, text.trained);
  }
  return batch;
}

TrainingBatch documents_of(size_t documents, size_t length, double share, Source& source) {
  TrainingBatch batch;
  for (size_t d = 0; d < documents; ++d) {
    const auto learnt = static_cast<size_t>(share * static_cast<double>(length));
    const Text text = text_of(source, length, learnt);
    batch.append(text.ids, text.trained);
  }
  return batch;
}

TrainingBatch pairs_of(size_t pairs, size_t prompt, size_t answer, Source& source) {
  TrainingBatch batch;
  for (size_t p = 0; p < pairs; ++p) {
    const Text chosen = text_of(source, prompt + answer, answer);
    const Text rejected = text_of(source, answer + 1, answer);
    batch.append(chosen.ids, chosen.trained);
    batch.append_after(2 * p, prompt - 1, rejected.ids, rejected.trained);
  }
  return batch;
}

struct Shape {
  TrainingBatch batch;
  size_t tokens;  // of the rows one by one: what a peer without shared prompts computes
  bool full = false, pairs = false;
};
Shape shape_of(std::string_view name, Source& source) {
  if (name == "lora") return {documents_of(4, 512, 1, source), 2048};
  if (name == "rows") return {documents_of(58, 35, 0.3, source), 58 * 35};
  if (name == "short") {
    TrainingBatch batch = short_rows(source);
    const size_t tokens = batch.tokens();
    return {std::move(batch), tokens};
  }
  if (name == "full") return {documents_of(4, 512, 1, source), 2048, true};
  if (name == "pairs") return {pairs_of(8, 128, 64, source), 16 * 192, false, true};
  fmt::print(stderr, "no shape {}\n", name);
  std::exit(64);
}

void measure(Pool& pool, const Flags& flags, const std::string& name, double rate) {
  const ModelFiles files = open_model(flags.model);
  const Profile profile = flags.packed ? Profile::exact : flags.precision;
  Model model = load_model(pool, files, {.profile = profile, .context = 2048});
  Source source = source_of(files, flags.text);
  const Shape shape = shape_of(name, source);
  const DType type = flags.precision == Profile::bf16 ? DType::bf16 : DType::f32;
  Lora lora;
  lora.layers.resize(model.config.layers);
  if (shape.full)
    add_whole(pool, model, {.full = true, .modules_to_save = {}}, type, lora);
  else
    lora = make_lora(model.config, {}, 1);
  const TrainingOptions options{
      .tokens = shape.batch.tokens(), .recompute = flags.recompute, .quantized_type = type};
  LoraTraining training(pool, model, lora, options);
  AdamW adamw(lora.values.size());
  double best = 1e9;
  for (size_t step = 0; step < flags.steps; ++step) {
    const Stopwatch watch;
    training.clear_gradients();
    const auto learnt = static_cast<double>(shape.batch.trained());
    if (shape.pairs) {
      TokenLosses losses;
      losses.stats.resize(shape.batch.tokens());
      training.accumulate(
          shape.batch,
          [&](std::span<const float>, std::span<float> factors) {
            for (size_t d = 0; d < shape.batch.documents.size(); ++d)
              for (size_t i = shape.batch.documents[d].first; i < shape.batch.documents[d].end; ++i)
                factors[i] = d % 2 == 0 ? 1e-2f : -1e-2f;
          },
          losses);
    } else {
      training.accumulate(shape.batch, static_cast<float>(1 / learnt));
    }
    const double norm = global_norm(pool, training.gradients());
    adamw.step(pool, lora.values, training.gradients(), 1e-4, clip_scale(norm, 1));
    training.refresh();
    best = std::min(best, watch.seconds());
  }
  const double flops = training_flops(model, lora, shape.batch);
  const nlohmann::ordered_json found = {
      {"shape", name},
      {"seconds", best},
      {"tokens_per_second", static_cast<double>(shape.tokens) / best},
      {"share_of_products", flops / best / rate},
      {"activations_bytes", LoraTraining::plan_bytes(model, lora, options)},
      {"peak_bytes", peak_memory_bytes()}};
  if (flags.json)
    fmt::print("{}\n", found.dump());
  else
    fmt::print(
        "{}: {} tokens, {} computed, {} learnt: {:.2f} s, {:.0f} tokens/s, {:.0f} GFLOP/s, {:.0f} "
        "% "
        "of products; activations {} MB, peak memory {} MB\n",
        name, shape.tokens, shape.batch.tokens(), shape.batch.trained(), best,
        static_cast<double>(shape.tokens) / best, flops / best / 1e9, 100 * flops / best / rate,
        found["activations_bytes"].get<size_t>() / 1'000'000, peak_memory_bytes() / 1'000'000);
  std::fflush(stdout);
}

Flags flags_of(int argc, char** argv) {
  Flags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    const auto next = [&] { return std::string_view(i + 1 < argc ? argv[++i] : ""); };
    if (word == "--precision") {
      flags.precision = next() == "f32" ? Profile::f32 : Profile::bf16;
    } else if (word == "--recompute") {
      const std::string_view level = next();
      flags.recompute = level == "none"    ? Recompute::none
                        : level == "block" ? Recompute::block
                                           : Recompute::light;
    } else if (word == "--threads") {
      flags.threads = static_cast<size_t>(std::atoi(std::string(next()).c_str()));
    } else if (word == "--steps") {
      flags.steps = static_cast<size_t>(std::max(1, std::atoi(std::string(next()).c_str())));
    } else if (word == "--text") {
      flags.text = next();
    } else if (word == "--packed") {
      flags.packed = true;
    } else if (word == "--json") {
      flags.json = true;
    } else if (flags.model.empty()) {
      flags.model = word;
    } else {
      flags.shapes.emplace_back(word);
    }
  }
  return flags;
}

}  // namespace

int main(int argc, char** argv) {
  const Flags flags = flags_of(argc, argv);
  if (flags.model.empty()) {
    fmt::print(stderr,
               "train_bench MODEL [--precision bf16|f32] [--packed] lora|rows|short|full|pairs\n");
    return 64;
  }
  Pool pool(flags.threads);
  const double rate =
      product_rate(pool, flags.precision == Profile::bf16 ? DType::bf16 : DType::f32);
  if (!flags.json)
    fmt::print("{}, {}: products {:.0f} GFLOP/s\n", machine_name(),
               flags.precision == Profile::bf16 ? "bf16" : "f32", rate / 1e9);
  const std::vector<std::string> all = {"lora", "rows"};
  for (const std::string& name : flags.shapes.empty() ? all : flags.shapes)
    measure(pool, flags, name, rate);
  return 0;
}
