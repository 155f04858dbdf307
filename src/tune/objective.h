// What a training step is made of: the rows of one method, and the loss that they are learnt by.
//
//   sft    documents: Σ −log p over learnt tokens, over their number in the whole step
//   text   the same of raw text
//   dpo    pairs of answers: the mean of preference.h's loss over the step's pairs
//   kto    labelled answers: the mean of kto_loss over the step's rows
//
// A step's rows are dealt to batches that the memory plan allows, and these to ranks (ranks.h); how
// they are dealt to batches changes nothing but the order of sums, and how to ranks not even that.
// Metrics bear TRL's names.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/training.h"
#include "tune/examples.h"
#include "tune/preference.h"
#include "tune/ranks.h"

namespace moru {

enum class Method { sft, text, dpo, kto };
// "sft", "text", "dpo", "kto"; SimPO and ORPO are losses of pairs. Error: usage.
Method parse_method(std::string_view name);
std::string_view name_of(Method method);

struct Metric {
  std::string name;
  double value = 0;
};

// Where a row stands.
struct RowPlace {
  std::filesystem::path file;
  uint64_t line = 0;
};

struct StepLoss {
  double loss = 0;
  uint64_t tokens = 0;              // computed
  std::optional<RowPlace> bad_row;  // the first whose loss is no number
  std::vector<Metric> metrics;
};

struct ObjectiveOptions {
  Method method = Method::sft;
  LoadExamples data;                 // rows to learn
  std::filesystem::path validation;  // rows to validate on; empty: a share of `data`
  double val_fraction = 0.1;
  PreferenceOptions preference;
};

// The ranks call the same functions in the same order, and get the same answers.
class Objective {
 public:
  virtual ~Objective() = default;

  size_t rows() const { return rows_; }  // to learn
  // Tokens that a row to learn takes in a batch.
  virtual size_t length(size_t row) const = 0;
  // Tokens of the `count` longest rows to learn.
  size_t largest(size_t count) const;
  size_t longest() const { return longest_; }  // of all rows, those to validate on too
  size_t validation_rows() const { return validation_rows_; }
  uint64_t tokens() const { return tokens_; }  // of one epoch
  uint64_t trained_tokens() const { return trained_tokens_; }
  const DataCounts& counts() const { return counts_; }
  const std::vector<FileProblem>& problems() const { return problems_; }

  // Log-probabilities of the model as it is now become those of the reference. They are read from
  // `cache` if it holds those of `model_key`, this data and this precision, and written there
  // otherwise. `told` hears of rows done, of all. Does nothing for losses without a reference.
  virtual void take_reference(LoraTraining& training, size_t capacity,
                              const std::filesystem::path& cache, const std::string& model_key,
                              const std::function<void(size_t, size_t)>& told);

  // The gradients become those of the loss over `rows`: each batch's, of at most `capacity` tokens
  // (or one row), from zeros, then added in the order of batches.
  virtual StepLoss accumulate(LoraTraining& training, std::span<const uint32_t> rows,
                              size_t capacity) = 0;
  // The loss over the rows to validate on, which there must be.
  virtual StepLoss validate(LoraTraining& training, size_t capacity) = 0;

 protected:
  Objective(Pool& pool, Ranks& ranks, const ObjectiveOptions& options);

  // Remembers the first row of `out` that is bad.
  void note_bad(StepLoss& out, bool validates, size_t source, uint64_t line) const {
    if (!out.bad_row)
      out.bad_row = {validates && !validation_.empty() ? validation_ : files_[source], line};
  }

  Pool& pool_;
  Ranks& ranks_;
  std::vector<std::filesystem::path> files_;  // of rows to learn
  std::filesystem::path validation_;          // of rows to validate on, if they have their own
  // Of rows to learn.
  void account(ExampleStats stats) {
    tokens_ = stats.tokens;
    trained_tokens_ = stats.learnt;
    lengths_ = std::move(stats.lengths);
  }

  size_t rows_ = 0, longest_ = 0, validation_rows_ = 0;
  uint64_t tokens_ = 0, trained_tokens_ = 0;
  std::map<size_t, uint64_t> lengths_;  // how many rows to learn have so many tokens
  DataCounts counts_;
  std::vector<FileProblem> problems_;
};

// Reads the data. `pool` and `ranks` must outlive the result. Errors: those of the data; usage.
std::unique_ptr<Objective> make_objective(Pool& pool, Ranks& ranks, const ObjectiveOptions& options,
                                          const ModelFiles& files);

}  // namespace moru
