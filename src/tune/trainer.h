// Supervised fine-tuning: a model and a file of pairs in, a LoRA adapter out.
//
// An optimiser step takes a fixed list of examples from the epoch's seeded order and splits them
// into batches that fit the memory plan; the loss is Σ −log p over the tokens learnt in the whole
// step, divided by their number, so the split changes nothing. A checkpoint holds all there is to
// know, so that a run that is killed and started again reaches the same bits.
//
//   out/checkpoint.safetensors   while the run is not finished
//   out/log.jsonl                one line a step and a validation
//   out/adapter/                 PEFT folder: the best adapter by validation loss, or the last
//   out/tune.json                what was done, when finished
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/training.h"
#include "tune/adapter.h"
#include "tune/data.h"
#include "tune/optimizer.h"

namespace moru {

struct TuneOptions {
  std::filesystem::path model;       // GGUF file or Hugging Face folder
  std::filesystem::path data;        // rows to learn
  std::filesystem::path validation;  // rows to validate on; empty: a share of `data`
  std::filesystem::path out;         // folder
  std::filesystem::path adapter;     // PEFT folder to go on from; empty: a new adapter

  DataOptions rows;
  AdapterOptions lora;
  AdamWOptions adamw;
  double lr = 2e-4;
  Schedule schedule = Schedule::cosine;
  double min_lr_ratio = 0.1;
  double warmup_ratio = 0.03;
  double max_grad_norm = 1;
  uint64_t epochs = 3;
  uint64_t max_steps = 0;     // 0: as many as the epochs have
  uint64_t batch_size = 16;   // examples a step
  uint64_t batch_tokens = 0;  // if set, a step takes examples up to this many tokens instead
  uint64_t micro_batch_tokens = 2048;  // computed at a time: memory, not results
  double val_fraction = 0.1;
  uint64_t eval_steps = 0;  // 0: at the end of each epoch
  uint64_t patience = 0;    // validations without improvement before it stops; 0: never
  uint64_t save_steps = 50;
  uint64_t seed = 42;

  Profile precision = Profile::bf16;
  std::optional<Recompute> recompute;  // default: the lightest that fits the memory
  size_t threads = 0;                  // 0: all that this process may use
  bool restart = false;                // forget an unfinished or finished run in `out`
};

struct MemoryPlan {
  size_t weights = 0, activations = 0, adapter = 0;  // bytes
  size_t peak = 0;                                   // of the whole process
  Recompute recompute = Recompute::light;
};

struct TuneEvent {
  enum class Kind { data, plan, resumed, step, validation, skipped, stopped_early } kind;
  uint64_t step = 0, steps = 0;  // done, of
  double epoch = 0;
  double loss = 0;  // of the step, or of the validation
  double lr = 0, grad_norm = 0;
  double tokens_per_second = 0, seconds_left = 0;
  std::string text;  // for people
};
using TuneProgress = std::function<void(const TuneEvent&)>;

struct TuneResult {
  std::filesystem::path adapter;  // PEFT folder
  uint64_t steps = 0, best_step = 0, skipped_steps = 0;
  uint64_t examples = 0, validation_examples = 0;
  uint64_t tokens = 0, trained_tokens = 0;          // of one epoch
  double train_loss = 0;                            // mean of the last epoch's steps
  std::optional<double> val_loss_before, val_loss;  // of the base model, of the adapter written
  double seconds = 0, tokens_per_second = 0;
  size_t peak_bytes = 0;
  DataCounts counts;
};

// Runs to the end, going on from a checkpoint in `out` where there is one.
// Errors: those of the model and the data; usage (the checkpoint is of another run); no_space (the
// plan does not fit); interrupted (SIGINT or SIGTERM: saved); bad_input (the loss stays NaN).
TuneResult tune(const TuneOptions& options, const TuneProgress& progress = {});

// Mean −log p over the learnt tokens of `examples`, batches of at most `capacity` tokens.
double validation_loss(LoraTraining& training, std::span<const Example> examples, size_t capacity);

}  // namespace moru
