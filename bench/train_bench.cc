// Speed of one LoRA training step, as a share of what dense products reach on this machine.
//
// train_bench MODEL [bf16|f32] [none|light|block] [threads]
//
// Two shapes: 4 documents of 512 tokens, all learnt, and short rows of about 35 tokens of which
// 30 % are learnt, packed to 2,048. To be compared with torch and PEFT on the same shapes.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "base/random.h"
#include "engine/dense.h"
#include "engine/model_files.h"
#include "engine/training.h"
#include "tune/adapter.h"
#include "tune/optimizer.h"

using namespace moru;

namespace {

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

TrainingBatch batch_of(size_t documents, size_t length, double share, size_t vocab) {
  TrainingBatch batch;
  Random random(1);
  for (size_t d = 0; d < documents; ++d) {
    std::vector<int32_t> ids(length);
    std::vector<uint8_t> trained(length);
    for (size_t i = 0; i < length; ++i) {
      ids[i] = static_cast<int32_t>(random.below(vocab));
      trained[i] = static_cast<double>(i) >= (1 - share) * static_cast<double>(length) ? 1 : 0;
    }
    batch.append(ids, trained);
  }
  return batch;
}

void measure(Pool& pool, const Model& model, Lora& lora, const char* name,
             const TrainingBatch& batch, Recompute recompute, double rate) {
  const TrainingOptions options{.tokens = batch.tokens(), .recompute = recompute};
  LoraTraining training(pool, model, lora, options);
  AdamW adamw(lora.values.size());
  double best = 1e9, loss = 0;
  for (int step = 0; step < 3; ++step) {
    const Stopwatch watch;
    training.clear_gradients();
    const auto learnt = static_cast<double>(batch.trained());
    loss = training.accumulate(batch, static_cast<float>(1 / learnt)) / learnt;
    const double norm = global_norm(pool, training.gradients());
    adamw.step(pool, lora.values, training.gradients(), 1e-4, clip_scale(norm, 1));
    best = std::min(best, watch.seconds());
  }
  const double flops = training_flops(model, lora, batch);
  fmt::print(
      "{}: {} tokens, {} learnt: {:.2f} s, {:.0f} tokens/s, {:.0f} GFLOP/s, {:.0f} % of "
      "products; loss {:.4f}; activations {} MB, peak memory {} MB\n",
      name, batch.tokens(), batch.trained(), best, static_cast<double>(batch.tokens()) / best,
      flops / best / 1e9, 100 * flops / best / rate, loss,
      LoraTraining::plan_bytes(model, lora, options) / 1'000'000, peak_memory_bytes() / 1'000'000);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "train_bench MODEL [bf16|f32] [none|light|block] [threads]\n");
    return 64;
  }
  const Profile profile =
      argc > 2 && std::string_view(argv[2]) == "f32" ? Profile::f32 : Profile::bf16;
  Pool pool(argc > 4 ? static_cast<size_t>(std::atoi(argv[4])) : usable_threads());
  const Model model = load_model(pool, open_model(argv[1]), {.profile = profile, .context = 2048});
  const double rate = product_rate(pool, profile == Profile::bf16 ? DType::bf16 : DType::f32);
  fmt::print("{}, {}: products {:.0f} GFLOP/s\n", machine_name(),
             profile == Profile::bf16 ? "bf16" : "f32", rate / 1e9);
  const size_t vocab = model.config.vocab;
  const std::string_view level = argc > 3 ? argv[3] : "light";
  const Recompute recompute = level == "none"    ? Recompute::none
                              : level == "block" ? Recompute::block
                                                 : Recompute::light;
  const auto fresh = [&] { return make_lora(model.config, {}, 1); };
  Lora lora = fresh();
  measure(pool, model, lora, "4 x 512", batch_of(4, 512, 1, vocab), recompute, rate);
  lora = fresh();
  measure(pool, model, lora, "58 x 35", batch_of(58, 35, 0.3, vocab), recompute, rate);
  return 0;
}
