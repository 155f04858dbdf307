#include "tune/objective.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/hash.h"
#include "formats/safetensors.h"
#include "tune/preference_data.h"

namespace moru {
namespace {

constexpr std::array<std::string_view, 4> kMethods = {"sft", "text", "dpo", "kto"};

// Where batches are computed, and what of.
struct Dealing {
  Pool& pool;
  Ranks& ranks;
  LoraTraining& training;
  size_t capacity;     // tokens of a batch at most
  bool stats = false;  // of logits, too
};

// The rows of one batch, as indices into those that were dealt, and what they lost.
struct DealtBatch {
  std::vector<uint32_t> members;
  TrainingBatch tokens;
  TokenLosses losses;
};

// Deals `rows`, whose lengths are given, to batches, and these to the ranks in rounds.
// compute(batch) finds a batch's losses, on one rank; take(batch) has them, on all, in order.
template <typename Length, typename BatchOf, typename Compute, typename Take, typename RoundEnds>
void each_round(const Dealing& d, size_t rows, Length&& length_of, BatchOf&& batch_of,
                Compute&& compute, Take&& take, RoundEnds&& round_ends) {
  std::vector<size_t> lengths;
  for (size_t i = 0; i < rows; ++i) lengths.push_back(length_of(i));
  std::vector<std::vector<uint32_t>> dealt = pack(lengths, d.capacity);
  for (size_t first = 0; first < dealt.size(); first += d.ranks.size()) {
    const Round round{first, std::min(d.ranks.size(), dealt.size() - first), dealt.size()};
    std::vector<DealtBatch> batches(round.count);
    for (size_t i = 0; i < round.count; ++i) {
      DealtBatch& b = batches[i];
      b.members = std::move(dealt[first + i]);
      b.tokens = batch_of(b.members);
      b.losses.nll.resize(b.tokens.tokens());
      if (d.stats) b.losses.stats.resize(b.tokens.tokens());
      if (i == d.ranks.rank()) compute(b);
    }
    for (size_t i = 0; i < round.count; ++i) {
      d.ranks.share(std::as_writable_bytes(std::span(batches[i].losses.nll)), i);
      d.ranks.share(std::as_writable_bytes(std::span(batches[i].losses.stats)), i);
      take(batches[i]);
    }
    round_ends(round);
  }
}

// The losses alone.
template <typename Length, typename BatchOf, typename Take>
void evaluate_batches(const Dealing& d, size_t rows, Length&& length_of, BatchOf&& batch_of,
                      Take&& take) {
  each_round(
      d, rows, length_of, batch_of, [&](DealtBatch& b) { d.training.evaluate(b.tokens, b.losses); },
      take, [](const Round&) {});
}

// Also the sum of the gradients that accumulate(batch) makes, in the order of batches.
template <typename Length, typename BatchOf, typename Accumulate, typename Take>
void learn_batches(const Dealing& d, size_t rows, Length&& length_of, BatchOf&& batch_of,
                   Accumulate&& accumulate, Take&& take) {
  each_round(
      d, rows, length_of, batch_of,
      [&](DealtBatch& b) {
        d.training.clear_gradients();
        accumulate(b);
      },
      take, [&](const Round& round) { d.ranks.add(d.pool, d.training.gradients(), round); });
}

// Σ log p of a document's tokens that `answer` marks; the others may have been learnt too.
double logp_of(const PackedDocument& document, std::span<const uint8_t> answer,
               std::span<const float> nll) {
  double sum = 0;
  for (size_t i = 1; i < answer.size(); ++i)
    if (answer[i] != 0) sum += double{nll[document.first + i - 1]};
  return -sum;
}
double logp_of(const PackedDocument& document, std::span<const float> nll) {
  double sum = 0;
  for (size_t i = document.first; i < document.end; ++i) sum += double{nll[i]};
  return -sum;
}

size_t trained_in(const TrainingBatch& batch, const PackedDocument& document) {
  const auto first = batch.targets.begin() + static_cast<std::ptrdiff_t>(document.first);
  const auto last = batch.targets.begin() + static_cast<std::ptrdiff_t>(document.end);
  return static_cast<size_t>(last - first) -
         static_cast<size_t>(std::count(first, last, TrainingBatch::kNoTarget));
}

// Sets the gradient's factor on each learnt token of a document.
void set_factors(const TrainingBatch& batch, const PackedDocument& document, double factor,
                 std::span<float> factors) {
  for (size_t i = document.first; i < document.end; ++i)
    if (batch.targets[i] != TrainingBatch::kNoTarget) factors[i] = static_cast<float>(factor);
}

// Sums of what the logits of learnt tokens looked like.
struct LogitSums {
  double mean = 0, entropy = 0, top = 0, tokens = 0;

  void add(const LogitStats& stats) {
    mean += double{stats.mean};
    entropy += double{stats.entropy};
    top += stats.top ? 1 : 0;
    tokens += 1;
  }
  void add(const TrainingBatch& batch, const PackedDocument& document,
           std::span<const LogitStats> stats) {
    for (size_t i = document.first; i < document.end; ++i)
      if (batch.targets[i] != TrainingBatch::kNoTarget) add(stats[i]);
  }
  // Those of the answer alone.
  void add(const PackedDocument& document, std::span<const uint8_t> answer,
           std::span<const LogitStats> stats) {
    for (size_t i = 1; i < answer.size(); ++i)
      if (answer[i] != 0) add(stats[document.first + i - 1]);
  }
  double mean_logit() const { return mean_of(mean); }
  double mean_entropy() const { return mean_of(entropy); }
  double accuracy() const { return mean_of(top); }

  double mean_of(double sum) const { return tokens == 0 ? 0 : sum / tokens; }
};

// The request for the rows to validate on: all of them, as they are.
LoadExamples validation_of(const ObjectiveOptions& o) {
  LoadExamples request = o.data;
  request.sources = {{.path = o.validation, .format = o.data.sources.front().format}};
  if (!request.spill.empty()) request.spill = request.spill.parent_path() / "validation";
  return request;
}

// Batches of so many rows are dealt at a time: lists of all would grow with the data.
constexpr size_t kDealt = size_t{1} << 16;

// ---- documents ---------------------------------------------------------------------------------

class DocumentObjective : public Objective {
 public:
  DocumentObjective(Pool& pool, Ranks& ranks, const ObjectiveOptions& o, const ModelFiles& files)
      : Objective(pool, ranks, o) {
    const auto load = [&](LoadExamples request) {
      request.raw_text = o.method == Method::text;
      return load_examples(pool, files, request);
    };
    LoadedExamples data = load(o.data);
    counts_ = data.counts;
    problems_ = std::move(data.problems);
    if (o.validation.empty()) {
      split_ = split_by_hash(data.examples, o.val_fraction);
    } else {
      split_.train = std::move(data.examples);
      split_.train_stats = split_.train.stats();
      split_.validation = load(validation_of(o)).examples;
      split_.validation_stats = split_.validation.stats();
    }
    rows_ = split_.train.size();
    validation_rows_ = split_.validation.size();
    longest_ = std::max(split_.train_stats.longest(), split_.validation_stats.longest());
    account(std::move(split_.train_stats));
  }

  size_t length(size_t row) const override { return split_.train.length(row); }

  StepLoss accumulate(LoraTraining& training, std::span<const uint32_t> rows,
                      size_t capacity) override {
    const auto example = [&](size_t i) { return split_.train[rows[i]]; };
    StepLoss out;
    uint64_t learnt = 0;
    for (size_t i = 0; i < rows.size(); ++i) learnt += example(i).trained_tokens();
    double sum = 0;
    LogitSums logits;
    learn_batches(
        Dealing{pool_, ranks_, training, capacity, true}, rows.size(),
        [&](size_t i) { return length(rows[i]); },
        [&](const std::vector<uint32_t>& members) { return batch_of(members, example, rows); },
        [&](DealtBatch& b) {
          training.accumulate(b.tokens, 1 / static_cast<float>(learnt), b.losses.nll,
                              b.losses.stats);
        },
        [&](const DealtBatch& b) {
          sum += sum_of(b.losses.nll);
          for (const PackedDocument& d : b.tokens.documents)
            logits.add(b.tokens, d, b.losses.stats);
          out.tokens += b.tokens.tokens();
          note_bad_of(out, false, b, example);
        });
    out.loss = sum / static_cast<double>(learnt);
    out.metrics = {{"entropy", logits.mean_entropy()}, {"mean_token_accuracy", logits.accuracy()}};
    return out;
  }

  StepLoss validate(LoraTraining& training, size_t capacity) override {
    const Examples& examples = split_.validation;
    StepLoss out;
    double sum = 0;
    size_t learnt = 0;
    LogitSums logits;
    for (size_t first = 0; first < examples.size(); first += kDealt) {
      const auto example = [&](size_t i) { return examples[first + i]; };
      evaluate_batches(
          Dealing{pool_, ranks_, training, capacity, true},
          std::min(kDealt, examples.size() - first),
          [&](size_t i) { return examples.length(first + i); },
          [&](const std::vector<uint32_t>& members) { return batch_of(members, example, {}); },
          [&](const DealtBatch& b) {
            sum += sum_of(b.losses.nll);
            learnt += b.tokens.trained();
            for (const PackedDocument& d : b.tokens.documents)
              logits.add(b.tokens, d, b.losses.stats);
            note_bad_of(out, true, b, example);
          });
    }
    out.metrics = {{"entropy", logits.mean_entropy()}, {"mean_token_accuracy", logits.accuracy()}};
    out.loss = learnt == 0 ? 0 : sum / static_cast<double>(learnt);
    return out;
  }

 private:
  // A row to learn is the key of its noise.
  template <typename ExampleAt>
  static TrainingBatch batch_of(const std::vector<uint32_t>& members, ExampleAt&& example,
                                std::span<const uint32_t> rows) {
    TrainingBatch batch;
    for (const uint32_t i : members)
      batch.append(example(i).ids, example(i).trained, rows.empty() ? 0 : rows[i]);
    return batch;
  }

  template <typename ExampleAt>
  void note_bad_of(StepLoss& out, bool validates, const DealtBatch& b, ExampleAt&& example) const {
    for (size_t d = 0; d < b.members.size() && !out.bad_row; ++d)
      if (const ExampleView e = example(b.members[d]);
          !std::isfinite(logp_of(b.tokens.documents[d], b.losses.nll)))
        note_bad(out, validates, e.source, e.line);
  }

  // What is not learnt is 0.
  static double sum_of(std::span<const float> nll) {
    double sum = 0;
    for (const float loss : nll) sum += double{loss};
    return sum;
  }

  ExampleSplit split_;
};

// ---- reference ---------------------------------------------------------------------------------

// Log-probabilities of the reference, some for each row. They are doubles, kept to the bit: a
// policy that is still its reference has rewards of exactly 0.
using References = std::vector<std::array<double, 2>>;

std::optional<References> read_references(const std::filesystem::path& path, const std::string& key,
                                          size_t rows) {
  if (!std::filesystem::exists(path)) return std::nullopt;
  const SafetensorsFile file(path);
  const auto found = file.metadata().find("key");
  const Tensor* bits = file.find("logps");
  if (found == file.metadata().end() || found->second != key || bits == nullptr ||
      bits->data.size() != rows * sizeof(References::value_type))
    return std::nullopt;
  References out(rows);
  std::memcpy(out.data(), bits->data.data(), bits->data.size());
  return out;
}

void write_references(const std::filesystem::path& path, const std::string& key,
                      const References& logps) {
  // Safetensors of ours know no doubles: each is two words of 32 bits.
  const Tensor bits{"logps",
                    DType::i32,
                    {logps.size(), 4},
                    std::as_bytes(std::span<const References::value_type>(logps))};
  write_safetensors(path, std::span(&bits, 1), {{"key", key}});
}

// What take_reference does: those that rank 0 has kept, or those that compute() finds.
template <typename Compute>
void take_references(Ranks& ranks, const std::filesystem::path& cache, const std::string& key,
                     References& references, Compute&& compute) {
  std::optional<References> kept;
  if (ranks.leads()) kept = read_references(cache, key, references.size());
  bool found = kept.has_value();
  share_value(ranks, found);
  if (kept) references = std::move(*kept);
  if (found) return ranks.share(std::as_writable_bytes(std::span(references)), 0);
  compute();
  if (ranks.leads()) write_references(cache, key, references);
}

// A name for examples, after `start`, that takes no memory for them.
std::string key_of(std::string start, std::initializer_list<const Examples*> lists) {
  constexpr size_t kTogether = size_t{64} << 10;
  for (const Examples* list : lists) {
    list->each([&](size_t, const ExampleView& e) {
      start.append(reinterpret_cast<const char*>(&e.content), sizeof e.content);
      if (start.size() > kTogether) start = sha256(start);
    });
    start = sha256(start);
  }
  return start;
}

// Calls work(rows) for [first, end), some at a time.
template <typename Work>
void each_part(size_t first, size_t end, Work&& work) {
  std::vector<uint32_t> rows;
  for (; first < end; first += rows.size()) {
    rows.resize(std::min(kDealt, end - first));
    std::iota(rows.begin(), rows.end(), static_cast<uint32_t>(first));
    work(std::span<const uint32_t>(rows));
  }
}

// ---- pairs -------------------------------------------------------------------------------------

class PairObjective : public Objective {
 public:
  PairObjective(Pool& pool, Ranks& ranks, const ObjectiveOptions& o, const ModelFiles& files)
      : Objective(pool, ranks, o), options_(o.preference) {
    LoadedExamples data = load_pairs(pool, files, o.data);
    counts_ = data.counts;
    problems_ = std::move(data.problems);
    if (o.validation.empty()) {
      ExampleSplit split = split_by_hash(data.examples, o.val_fraction);
      learnt_ = PreferenceList(std::move(split.train));
      validated_ = PreferenceList(std::move(split.validation));
    } else {
      learnt_ = PreferenceList(std::move(data.examples));
      validated_ = PreferenceList(load_pairs(pool, files, validation_of(o)).examples);
    }
    ExampleStats stats = learnt_.stats();
    longest_ = std::max(stats.longest(), validated_.stats().longest());
    account(std::move(stats));
    rows_ = learnt_.size();
    validation_rows_ = validated_.size();
    if (needs_reference(options_.loss)) references_.assign(rows_ + validation_rows_, {0, 0});
  }

  // Rows to learn, then those to validate on.
  PreferenceView pair(size_t row) const {
    return row < rows_ ? learnt_[row] : validated_[row - rows_];
  }
  size_t length(size_t row) const override { return pair(row).tokens(); }

  void take_reference(LoraTraining& training, size_t capacity, const std::filesystem::path& cache,
                      const std::string& model_key,
                      const std::function<void(size_t, size_t)>& told) override {
    if (!needs_reference(options_.loss)) return;
    const std::string key = key_of(model_key + "\n", {&learnt_.examples(), &validated_.examples()});
    take_references(ranks_, cache, key, references_, [&] {
      size_t done = 0;
      each_part(0, references_.size(), [&](std::span<const uint32_t> rows) {
        evaluate_batches(
            Dealing{pool_, ranks_, training, capacity}, rows.size(),
            [&](size_t i) { return length(rows[i]); },
            [&](const std::vector<uint32_t>& members) { return batch_of(rows, members); },
            [&](const DealtBatch& b) {
              for (size_t p = 0; p < b.members.size(); ++p) {
                const uint32_t row = rows[b.members[p]];
                references_[row] = {
                    logp_of(b.tokens.documents[2 * p], pair(row).chosen.trained, b.losses.nll),
                    logp_of(b.tokens.documents[2 * p + 1], b.losses.nll)};
              }
              done += b.members.size();
              told(done, references_.size());
            });
      });
    });
  }

  StepLoss accumulate(LoraTraining& training, std::span<const uint32_t> rows,
                      size_t capacity) override {
    StepSums sums(*this, rows);
    learn_batches(
        Dealing{pool_, ranks_, training, capacity, true}, rows.size(),
        [&](size_t i) { return length(rows[i]); },
        [&](const std::vector<uint32_t>& members) { return batch_of(rows, members); },
        [&](DealtBatch& b) {
          training.accumulate(
              b.tokens,
              [&](std::span<const float> nll, std::span<float> factors) {
                for (size_t p = 0; p < b.members.size(); ++p) {
                  const auto [logps, found] = loss_of(rows[b.members[p]], b.tokens, p, nll);
                  // Factors are by −log p: of the anchor, and of the answer.
                  const PackedDocument& chosen = b.tokens.documents[2 * p];
                  const std::span<const uint8_t> answer = pair(rows[b.members[p]]).chosen.trained;
                  set_factors(b.tokens, chosen, sums.anchor, factors);
                  for (size_t i = 1; i < answer.size(); ++i)
                    if (answer[i] != 0)
                      factors[chosen.first + i - 1] =
                          static_cast<float>(sums.anchor - found.by_chosen / sums.pairs);
                  set_factors(b.tokens, b.tokens.documents[2 * p + 1],
                              -found.by_rejected / sums.pairs, factors);
                }
              },
              b.losses);
        },
        [&](const DealtBatch& b) { sums.add(*this, rows, b); });
    return sums.step_loss();
  }

  StepLoss validate(LoraTraining& training, size_t capacity) override {
    StepSums sums(*this, rows_, rows_ + validation_rows_);
    each_part(rows_, rows_ + validation_rows_, [&](std::span<const uint32_t> rows) {
      evaluate_batches(
          Dealing{pool_, ranks_, training, capacity, true}, rows.size(),
          [&](size_t i) { return length(rows[i]); },
          [&](const std::vector<uint32_t>& members) { return batch_of(rows, members); },
          [&](const DealtBatch& b) { sums.add(*this, rows, b); });
    });
    return sums.step_loss();
  }

 private:
  // Document 2p is pair p's prompt and chosen answer, document 2p + 1 goes on where the prompt
  // ends.
  TrainingBatch batch_of(std::span<const uint32_t> rows, std::span<const uint32_t> members) const {
    TrainingBatch batch;
    for (const uint32_t i : members) {
      const PreferenceView e = pair(rows[i]);
      const uint64_t key = 2 * uint64_t{rows[i]};
      if (options_.anchor_over_prompt)
        batch.append(e.chosen.ids, std::vector<uint8_t>(e.chosen.ids.size(), 1), key);
      else
        batch.append(e.chosen.ids, e.chosen.trained, key);
      batch.append_after(batch.documents.size() - 1, e.shared, e.rejected.ids.subspan(e.shared),
                         e.rejected.trained.subspan(e.shared), key + 1);
    }
    return batch;
  }

  // Of the p-th pair of a batch, which is `row`.
  std::pair<PairLogps, PairLoss> loss_of(uint32_t row, const TrainingBatch& batch, size_t p,
                                         std::span<const float> nll) const {
    const PackedDocument &chosen = batch.documents[2 * p], &rejected = batch.documents[2 * p + 1];
    const ExampleView answer = pair(row).chosen;
    const auto [ref_chosen, ref_rejected] =
        references_.empty() ? References::value_type{} : references_[row];
    const PairLogps logps{.chosen = logp_of(chosen, answer.trained, nll),
                          .rejected = logp_of(rejected, nll),
                          .ref_chosen = ref_chosen,
                          .ref_rejected = ref_rejected,
                          .chosen_tokens = answer.trained_tokens(),
                          .rejected_tokens = trained_in(batch, rejected)};
    return {logps, pair_loss(options_, logps)};
  }

  // What a step over `rows` adds up.
  struct StepSums {
    double pairs, anchor;  // of the whole step: the anchor is a mean over tokens
    StepLoss out;
    PairLoss rewards;
    double accurate = 0, logp_chosen = 0, logp_rejected = 0;
    LogitSums chosen_logits, rejected_logits;

    StepSums(const PairObjective& o, std::span<const uint32_t> rows)
        : StepSums(o, rows.size(), [&](size_t i) { return rows[i]; }) {}
    // Rows [first, end).
    StepSums(const PairObjective& o, size_t first, size_t end)
        : StepSums(o, end - first, [&](size_t i) { return first + i; }) {}
    template <typename RowAt>
    StepSums(const PairObjective& o, size_t count, RowAt&& row_at)
        : pairs(static_cast<double>(count)) {
      double chosen_tokens = 0;
      for (size_t i = 0; i < count; ++i) {
        const ExampleView chosen = o.pair(row_at(i)).chosen;
        chosen_tokens += static_cast<double>(
            o.options_.anchor_over_prompt ? chosen.ids.size() - 1 : chosen.trained_tokens());
      }
      anchor = o.options_.anchor / chosen_tokens;
    }

    void add(const PairObjective& o, std::span<const uint32_t> rows, const DealtBatch& b) {
      out.tokens += b.tokens.tokens();
      for (size_t p = 0; p < b.members.size(); ++p) {
        const uint32_t row = rows[b.members[p]];
        const auto [logps, found] = o.loss_of(row, b.tokens, p, b.losses.nll);
        const PackedDocument& chosen = b.tokens.documents[2 * p];
        out.loss += found.loss / pairs - anchor * logp_of(chosen, b.losses.nll);
        const ExampleView answer = o.pair(row).chosen;
        if (!std::isfinite(found.loss)) o.note_bad(out, row >= o.rows_, answer.source, answer.line);
        rewards.chosen_reward += found.chosen_reward / pairs;
        rewards.rejected_reward += found.rejected_reward / pairs;
        accurate += found.chosen_reward > found.rejected_reward ? 1 / pairs : 0;
        logp_chosen += logps.chosen / pairs;
        logp_rejected += logps.rejected / pairs;
        chosen_logits.add(chosen, answer.trained, b.losses.stats);
        rejected_logits.add(b.tokens, b.tokens.documents[2 * p + 1], b.losses.stats);
      }
    }

    StepLoss step_loss() {
      out.metrics = {{"rewards/chosen", rewards.chosen_reward},
                     {"rewards/rejected", rewards.rejected_reward},
                     {"rewards/accuracies", accurate},
                     {"rewards/margins", rewards.chosen_reward - rewards.rejected_reward},
                     {"logps/chosen", logp_chosen},
                     {"logps/rejected", logp_rejected},
                     {"logits/chosen", chosen_logits.mean_logit()},
                     {"logits/rejected", rejected_logits.mean_logit()}};
      // As TRL has them: the entropy is both answers', the accuracy the chosen one's.
      LogitSums both = chosen_logits;
      both.entropy += rejected_logits.entropy;
      both.tokens += rejected_logits.tokens;
      out.metrics.push_back({"entropy", both.mean_entropy()});
      out.metrics.push_back({"mean_token_accuracy", chosen_logits.accuracy()});
      return out;
    }
  };

  PreferenceOptions options_;
  PreferenceList learnt_, validated_;
  References references_;  // of rows to learn, then of those to validate on; empty if not needed
};

// ---- labelled answers --------------------------------------------------------------------------

class LabelledObjective : public Objective {
 public:
  LabelledObjective(Pool& pool, Ranks& ranks, const ObjectiveOptions& o, const ModelFiles& files)
      : Objective(pool, ranks, o), options_(o.preference), max_length_(o.data.rows.max_length) {
    LoadedExamples data = load_labelled(pool, files, o.data);
    counts_ = data.counts;
    problems_ = std::move(data.problems);
    if (o.validation.empty()) {
      ExampleSplit split = split_by_hash(data.examples, o.val_fraction);
      learnt_ = LabelledList(std::move(split.train));
      validated_ = LabelledList(std::move(split.validation));
    } else {
      learnt_ = LabelledList(std::move(data.examples));
      validated_ = LabelledList(load_labelled(pool, files, validation_of(o)).examples);
    }
    account(learnt_.examples().stats());
    rows_ = learnt_.size();
    validation_rows_ = validated_.size();
    longest_ = std::max(learnt_.longest(max_length_), validated_.longest(max_length_));
    references_.assign(rows_ + validation_rows_, {0, 0});
  }

  size_t length(size_t row) const override {
    return row < rows_ ? learnt_.examples().length(row) : validated_.examples().length(row - rows_);
  }

  void take_reference(LoraTraining& training, size_t capacity, const std::filesystem::path& cache,
                      const std::string& model_key,
                      const std::function<void(size_t, size_t)>& told) override {
    const std::string key = key_of(fmt::format("{}\n{}\n", model_key, max_length_),
                                   {&learnt_.examples(), &validated_.examples()});
    take_references(ranks_, cache, key, references_, [&] {
      size_t done = 0;
      for (const Which which : {kAnswer, kMismatched})
        each_part(0, references_.size(), [&](std::span<const uint32_t> rows) {
          evaluate(training, rows, capacity, which, [&](uint32_t row, double logp) {
            references_[row][which] = logp;
            told(++done, 2 * references_.size());
          });
        });
    });
  }

  StepLoss accumulate(LoraTraining& training, std::span<const uint32_t> rows,
                      size_t capacity) override {
    Divergence divergence;
    diverge(training, rows, capacity, divergence);
    StepSums sums(rows.size(), divergence);
    learn_batches(
        Dealing{pool_, ranks_, training, capacity, true}, rows.size(),
        [&](size_t i) { return length(rows[i]); },
        [&](const std::vector<uint32_t>& members) { return batch_of(rows, members, kAnswer); },
        [&](DealtBatch& b) {
          training.accumulate(
              b.tokens,
              [&](std::span<const float> nll, std::span<float> factors) {
                for (size_t d = 0; d < b.members.size(); ++d) {
                  const PackedDocument& document = b.tokens.documents[d];
                  const KtoLoss found =
                      loss_of(rows[b.members[d]], logp_of(document, nll), sums.kl);
                  set_factors(b.tokens, document, -found.by_logp / sums.count, factors);
                }
              },
              b.losses);
        },
        [&](const DealtBatch& b) { sums.add(*this, rows, b); });
    return sums.step_loss(*this);
  }

  StepLoss validate(LoraTraining& training, size_t capacity) override {
    Divergence divergence;
    each_part(rows_, rows_ + validation_rows_, [&](std::span<const uint32_t> rows) {
      diverge(training, rows, capacity, divergence);
    });
    StepSums sums(validation_rows_, divergence);
    each_part(rows_, rows_ + validation_rows_, [&](std::span<const uint32_t> rows) {
      evaluate_batches(
          Dealing{pool_, ranks_, training, capacity, true}, rows.size(),
          [&](size_t i) { return length(rows[i]); },
          [&](const std::vector<uint32_t>& members) { return batch_of(rows, members, kAnswer); },
          [&](const DealtBatch& b) { sums.add(*this, rows, b); });
    });
    return sums.step_loss(*this);
  }

 private:
  LabelledView answer(size_t row) const {
    return row < rows_ ? learnt_[row] : validated_[row - rows_];
  }
  Example mismatched(size_t row) const {
    return row < rows_ ? learnt_.mismatched(row, max_length_)
                       : validated_.mismatched(row - rows_, max_length_);
  }

  // What a row's log-probabilities are of, as references_ has them.
  enum Which : size_t { kAnswer, kMismatched };
  TrainingBatch batch_of(std::span<const uint32_t> rows, std::span<const uint32_t> members,
                         Which which) const {
    TrainingBatch batch;
    for (const uint32_t i : members) {
      if (which == kAnswer) {
        const ExampleView e = answer(rows[i]).example;
        batch.append(e.ids, e.trained, rows[i]);
      } else {
        const Example e = mismatched(rows[i]);
        batch.append(e.ids, e.trained, rows[i]);
      }
    }
    return batch;
  }

  // told(row, Σ log p of its answer) for each of `rows`.
  template <typename Told>
  void evaluate(LoraTraining& training, std::span<const uint32_t> rows, size_t capacity,
                Which which, Told&& told) const {
    evaluate_batches(
        Dealing{pool_, ranks_, training, capacity}, rows.size(),
        [&](size_t i) {
          return which == kAnswer ? length(rows[i]) : mismatched(rows[i]).ids.size();
        },
        [&](const std::vector<uint32_t>& members) { return batch_of(rows, members, which); },
        [&](const DealtBatch& b) {
          for (size_t d = 0; d < b.members.size(); ++d)
            told(rows[b.members[d]], logp_of(b.tokens.documents[d], b.losses.nll));
        });
  }

  // How far the policy is from the reference, estimated on mismatched answers.
  struct Divergence {
    double sum = 0, rows = 0;
    std::optional<uint32_t> bad;  // the first row whose mismatched answer makes it no number

    double kl() const { return std::max(0.0, sum / rows); }
  };
  void diverge(LoraTraining& training, std::span<const uint32_t> rows, size_t capacity,
               Divergence& into) const {
    into.rows += static_cast<double>(rows.size());
    evaluate(training, rows, capacity, kMismatched, [&](uint32_t i, double logp) {
      into.sum += logp - references_[i][kMismatched];
      if (!std::isfinite(logp) && !into.bad) into.bad = i;
    });
  }

  // The row whose answer is that of `row`'s mismatch.
  uint32_t mismatched_with(uint32_t row) const {
    const auto learnt = static_cast<uint32_t>(rows_);
    if (row < learnt) return row == 0 ? learnt - 1 : row - 1;
    return row == learnt ? static_cast<uint32_t>(rows_ + validation_rows_) - 1 : row - 1;
  }

  void note_bad_row(StepLoss& out, uint32_t row) const {
    const ExampleView e = answer(row).example;
    note_bad(out, row >= rows_, e.source, e.line);
  }

  KtoLoss loss_of(uint32_t row, double logp, double kl) const {
    return kto_loss(options_, answer(row).desirable, logp, references_[row][kAnswer], kl);
  }

  // What a step over `rows` adds up.
  struct StepSums {
    double count, kl;
    std::optional<uint32_t> bad_mismatch;
    StepLoss out;
    std::array<double, 2> reward{}, logps{}, of{};  // of unwanted and wanted answers
    std::array<LogitSums, 2> logits;

    StepSums(size_t rows, const Divergence& found)
        : count(static_cast<double>(rows)), kl(found.kl()), bad_mismatch(found.bad) {}

    void add(const LabelledObjective& o, std::span<const uint32_t> rows, const DealtBatch& b) {
      out.tokens += b.tokens.tokens();
      for (size_t d = 0; d < b.members.size(); ++d) {
        const uint32_t i = rows[b.members[d]];
        const LabelledView row = o.answer(i);
        const double logp = logp_of(b.tokens.documents[d], b.losses.nll);
        const KtoLoss found = o.loss_of(i, logp, kl);
        out.loss += found.loss / count;
        if (!std::isfinite(logp)) o.note_bad_row(out, i);
        const size_t side = row.desirable ? 1 : 0;
        reward[side] += found.reward;
        logps[side] += logp;
        of[side] += 1;
        logits[side].add(b.tokens, b.tokens.documents[d], b.losses.stats);
      }
    }

    StepLoss step_loss(const LabelledObjective& o) {
      // A prompt that breaks its mismatch breaks its own answer too.
      if (bad_mismatch) o.note_bad_row(out, o.mismatched_with(*bad_mismatch));
      // A side without answers in the step has no means; TRL leaves them out too.
      for (const auto& [side, name] : {std::pair{1u, "chosen"}, {0u, "rejected"}}) {
        if (of[side] == 0) continue;
        out.metrics.push_back({fmt::format("rewards/{}", name), reward[side] / of[side]});
        out.metrics.push_back({fmt::format("logps/{}", name), logps[side] / of[side]});
        out.metrics.push_back({fmt::format("logits/{}", name), logits[side].mean_logit()});
      }
      if (of[0] != 0 && of[1] != 0)
        out.metrics.push_back({"rewards/margins", reward[1] / of[1] - reward[0] / of[0]});
      out.metrics.push_back({"kl", kl});
      // As of pairs: the entropy is all answers', the accuracy the wanted ones'.
      LogitSums all = logits[1];
      all.entropy += logits[0].entropy;
      all.tokens += logits[0].tokens;
      out.metrics.push_back({"entropy", all.mean_entropy()});
      if (of[1] != 0) out.metrics.push_back({"mean_token_accuracy", logits[1].accuracy()});
      return out;
    }
  };

  PreferenceOptions options_;
  size_t max_length_;
  LabelledList learnt_, validated_;
  // Of the answer, of the mismatched one; of rows to learn, then of those to validate on.
  References references_;
};

}  // namespace

Method parse_method(std::string_view name) {
  for (size_t i = 0; i < kMethods.size(); ++i)
    if (kMethods[i] == name) return static_cast<Method>(i);
  throw Error(ErrorKind::usage,
              {.where = "--method",
               .what = fmt::format("\"{}\" is no method", name),
               .cure = fmt::format("one of {}, simpo, orpo", fmt::join(kMethods, ", "))});
}
std::string_view name_of(Method method) { return kMethods[static_cast<size_t>(method)]; }

Objective::Objective(Pool& pool, Ranks& ranks, const ObjectiveOptions& options)
    : pool_(pool), ranks_(ranks), validation_(options.validation) {
  for (const DataSource& source : options.data.sources) files_.push_back(source.path);
}

size_t Objective::largest(size_t count) const {
  size_t tokens = 0;
  for (auto l = lengths_.rbegin(); l != lengths_.rend() && count != 0; ++l) {
    const size_t taken = std::min<size_t>(count, l->second);
    tokens += taken * l->first;
    count -= taken;
  }
  return tokens;
}

void Objective::take_reference(LoraTraining&, size_t, const std::filesystem::path&,
                               const std::string&, const std::function<void(size_t, size_t)>&) {}

std::unique_ptr<Objective> make_objective(Pool& pool, Ranks& ranks, const ObjectiveOptions& options,
                                          const ModelFiles& files) {
  switch (options.method) {
    case Method::sft:
    case Method::text:
      return std::make_unique<DocumentObjective>(pool, ranks, options, files);
    case Method::dpo:
      return std::make_unique<PairObjective>(pool, ranks, options, files);
    case Method::kto:
      return std::make_unique<LabelledObjective>(pool, ranks, options, files);
  }
  MORU_CHECK(false);
}

}  // namespace moru
