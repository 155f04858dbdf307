// Fine-tuning: a model and rows of data in, a LoRA adapter or a model out.
//
// An optimiser step takes a fixed list of rows from the epoch's seeded order; what they are learnt
// by says objective.h, what of the model learns learnt.h. A checkpoint holds all there is to know,
// so that a run that is killed and started again reaches the same bits.
//
//   out/checkpoint.safetensors   while the run is not finished
//   out/examples.*               likewise, of data that memory should not hold; out/rank1/… of
//                                others
//   out/hashes.txt               likewise: of large files that were read
//   out/log.jsonl, tensorboard/  a line, and scalars, a step and a validation (run_log.h)
//   out/report.html              the log as a page (moru tune writes it)
//   out/reference.safetensors    log-probabilities of the reference, of methods that have one
//   out/adapter/                 PEFT folder: the best adapter by validation loss, or the last
//   out/model/ or model.gguf     instead, of full fine-tuning
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
#include "tune/examples.h"
#include "tune/learnt.h"
#include "tune/objective.h"
#include "tune/optimizer.h"
#include "tune/ranks.h"

namespace moru {

struct TuneOptions {
  std::filesystem::path model;       // GGUF file or Hugging Face folder
  std::vector<DataSource> data;      // rows to learn
  std::filesystem::path validation;  // rows to validate on; empty: a share of `data`
  std::filesystem::path out;         // folder
  std::filesystem::path adapter;     // PEFT folder to go on from; empty: a new adapter

  Method method = Method::sft;
  PreferenceOptions preference;
  LearntOptions learnt;
  DataOptions rows;
  uint64_t max_bad = 100;    // rows that may be unusable
  bool deduplicate = false;  // learn equal examples once
  AdapterOptions lora;
  AdamWOptions adamw;
  double lr = 2e-4;
  ScheduleOptions schedule;  // but its warm-up, total and peak, which the run gives it
  double warmup_ratio = 0.03;
  double max_grad_norm = 1;
  double neftune_alpha = 0;  // noise on embeddings while they are learnt from (EmbeddingNoise)
  double max_z_score = 6;    // of loss and gradient norm: a step above it is skipped; 0: none is
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

  Profile precision = Profile::bf16;  // bf16 or f32
  // A quantized model's weights stay packed and are unpacked as they are needed (QLoRA): the same
  // values as those of weights that are unpacked once, in less memory.
  bool keep_quantized = false;
  std::optional<Recompute> recompute;  // default: the lightest that fits the memory
  size_t threads = 0;                  // 0: all that this process may use
  size_t memory = 0;                   // bytes that the process may take; 0: likewise
  bool restart = false;                // forget an unfinished or finished run in `out`
};

struct MemoryPlan {
  size_t weights = 0, activations = 0, adapter = 0;  // bytes
  size_t peak = 0;                                   // of the whole process
  Recompute recompute = Recompute::light;
};

struct TuneEvent {
  enum class Kind { data, plan, reference, resumed, step, validation, skipped, stopped_early } kind;
  uint64_t step = 0, steps = 0;  // done, of
  double epoch = 0;
  double loss = 0;  // of the step, or of the validation
  double lr = 0, grad_norm = 0;
  std::vector<Metric> metrics;  // of the step, or of the validation; TRL's names
  double tokens_per_second = 0, seconds_left = 0;
  std::string text;  // for people
};
using TuneProgress = std::function<void(const TuneEvent&)>;

struct TuneResult {
  std::filesystem::path adapter;  // PEFT folder; empty of full fine-tuning
  std::filesystem::path model;    // its model; empty otherwise
  uint64_t steps = 0, best_step = 0, skipped_steps = 0;
  uint64_t examples = 0, validation_examples = 0;
  uint64_t tokens = 0, trained_tokens = 0;          // of one epoch
  double train_loss = 0;                            // mean of the last epoch's steps
  std::optional<double> val_loss_before, val_loss;  // of the base model, of the adapter written
  double seconds = 0, tokens_per_second = 0;
  size_t peak_bytes = 0;
  DataCounts counts;
};

// Refuses options that cannot be meant, alone or of this model: before any work. Errors: usage;
// those of the model.
void check(const TuneOptions& options);

// Runs to the end, going on from a checkpoint in `out` where there is one.
// Errors: those of the model and the data; usage (the checkpoint is of another run, or another
// process works in `out`); no_space (the plan does not fit); interrupted (SIGINT or SIGTERM:
// saved); bad_input (a loss is no number, naming the row).
TuneResult tune(const TuneOptions& options, const TuneProgress& progress = {});
// This process's part of a run by several; only rank 0 writes results and tells of progress. Error:
// also usage, where ranks read different models or data.
TuneResult tune(const TuneOptions& options, const TuneProgress& progress, Ranks& ranks);
// Whether SIGINT or SIGTERM has asked the run of this process to stop.
bool tune_is_asked_to_stop();

}  // namespace moru
