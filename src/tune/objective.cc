#include "tune/objective.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "base/hash.h"
#include "formats/safetensors.h"
#include "tune/preference_data.h"
#include "tune/text_data.h"

namespace moru {
namespace {

constexpr std::array<std::string_view, 4> kMethods = {"sft", "text", "dpo", "kto"};

// Deals `rows`, whose lengths are given, to batches: run(indices into `rows`) for each.
template <typename Length, typename Run>
void each_batch(size_t rows, Length&& length_of, size_t capacity, Run&& run) {
  std::vector<size_t> lengths;
  for (size_t i = 0; i < rows; ++i) lengths.push_back(length_of(i));
  for (const std::vector<uint32_t>& members : pack(lengths, capacity)) run(members);
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

// Sums of what the logits of some documents' learnt tokens looked like.
struct LogitSums {
  double mean = 0, top = 0, tokens = 0;

  void add(const TrainingBatch& batch, const PackedDocument& document,
           std::span<const LogitStats> stats) {
    for (size_t i = document.first; i < document.end; ++i) {
      if (batch.targets[i] == TrainingBatch::kNoTarget) continue;
      mean += double{stats[i].mean};
      top += stats[i].top ? 1 : 0;
      tokens += 1;
    }
  }
  double mean_logit() const { return tokens == 0 ? 0 : mean / tokens; }
  double accuracy() const { return tokens == 0 ? 0 : top / tokens; }
};

// The request for the rows to validate on: all of them, as they are.
LoadExamples validation_of(const ObjectiveOptions& o) {
  LoadExamples request = o.data;
  request.sources = {{.path = o.validation, .format = o.data.sources.front().format}};
  if (!request.spill.empty()) request.spill = request.spill.parent_path() / "validation";
  return request;
}

// ---- documents ---------------------------------------------------------------------------------

class DocumentObjective : public Objective {
 public:
  DocumentObjective(Pool& pool, const ObjectiveOptions& o, const ModelFiles& files) {
    const auto load = [&](const LoadExamples& request) {
      return o.method == Method::text ? load_text(files, request)
                                      : load_examples(pool, files, request);
    };
    LoadedExamples data = load(o.data);
    counts_ = data.counts;
    problems_ = std::move(data.problems);
    if (o.validation.empty()) {
      split_ = split_by_hash(data.examples, o.val_fraction);
    } else {
      split_.train = std::move(data.examples);
      split_.validation = load(validation_of(o)).examples;
    }
    const size_t rows = split_.train.size();
    lengths_.resize(rows);
    for (size_t i = 0; i < rows; ++i) lengths_[i] = split_.train[i].ids.size();
    tokens_ = split_.train.tokens();
    trained_tokens_ = split_.train.trained_tokens();
    longest_ = std::max(split_.train.longest(), split_.validation.longest());
    validation_rows_ = split_.validation.size();
  }

  StepLoss accumulate(LoraTraining& training, std::span<const uint32_t> rows,
                      size_t capacity) override {
    const auto example = [&](size_t i) { return split_.train[rows[i]]; };
    StepLoss out;
    uint64_t learnt = 0;
    for (size_t i = 0; i < rows.size(); ++i) learnt += example(i).trained_tokens();
    training.clear_gradients();
    double sum = 0;
    std::vector<float> nll;
    each_batch(
        rows.size(), [&](size_t i) { return example(i).ids.size(); }, capacity,
        [&](const std::vector<uint32_t>& members) {
          TrainingBatch batch;
          for (const uint32_t i : members) batch.append(example(i).ids, example(i).trained);
          nll.assign(batch.tokens(), 0);
          sum += training.accumulate(batch, 1 / static_cast<float>(learnt), nll);
          out.tokens += batch.tokens();
          for (size_t d = 0; d < members.size() && out.bad_line == 0; ++d)
            if (!std::isfinite(logp_of(batch.documents[d], nll)))
              out.bad_line = example(members[d]).line;
        });
    out.loss = sum / static_cast<double>(learnt);
    return out;
  }

  StepLoss validate(LoraTraining& training, size_t capacity) override {
    StepLoss out;
    out.loss = validation_loss(training, split_.validation, capacity);
    return out;
  }

 private:
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

void hash_example(const Example& e, std::string& into) {
  into.append(reinterpret_cast<const char*>(e.ids.data()), e.ids.size() * sizeof(TokenId));
  into.append(reinterpret_cast<const char*>(e.trained.data()), e.trained.size());
  into.push_back('\n');
}

// Rows to learn and rows to validate on, by the hash of the prompt.
template <typename T, typename HashOf>
std::pair<std::vector<T>, std::vector<T>> split_rows(std::vector<T> rows, double fraction,
                                                     HashOf&& hash_of) {
  std::vector<Example> keys(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    keys[i].hash = hash_of(rows[i]);
    keys[i].line = i;
  }
  const ExampleSplit split = split_by_hash(Examples(keys), fraction);
  std::pair<std::vector<T>, std::vector<T>> out;
  for (size_t i = 0; i < split.train.size(); ++i)
    out.first.push_back(std::move(rows[split.train[i].line]));
  for (size_t i = 0; i < split.validation.size(); ++i)
    out.second.push_back(std::move(rows[split.validation[i].line]));
  return out;
}

// ---- pairs -------------------------------------------------------------------------------------

class PairObjective : public Objective {
 public:
  PairObjective(const ObjectiveOptions& o, const ModelFiles& files) : options_(o.preference) {
    Preferences<PreferenceExample> data = load_pairs(files, o.data);
    counts_ = data.counts;
    problems_ = std::move(data.problems);
    std::vector<PreferenceExample> validation;
    if (o.validation.empty()) {
      std::tie(pairs_, validation) =
          split_rows(std::move(data.examples), o.val_fraction,
                     [](const PreferenceExample& e) { return e.chosen.hash; });
    } else {
      pairs_ = std::move(data.examples);
      validation = load_pairs(files, validation_of(o)).examples;
    }
    for (const PreferenceExample& e : pairs_) {
      lengths_.push_back(e.tokens());
      tokens_ += e.tokens();
      trained_tokens_ += e.chosen.trained_tokens() + e.rejected.trained_tokens();
    }
    // One list, those to validate on at its end.
    validation_rows_ = validation.size();
    for (PreferenceExample& e : validation) pairs_.push_back(std::move(e));
    for (const PreferenceExample& e : pairs_) longest_ = std::max(longest_, e.tokens());
    references_.assign(pairs_.size(), {0, 0});
  }

  void take_reference(LoraTraining& training, size_t capacity, const std::filesystem::path& cache,
                      const std::string& model_key,
                      const std::function<void(size_t, size_t)>& told) override {
    if (!needs_reference(options_.loss)) return;
    std::string content = model_key + "\n";
    for (const PreferenceExample& e : pairs_) {
      hash_example(e.chosen, content);
      hash_example(e.rejected, content);
    }
    const std::string key = sha256(content);
    if (std::optional<References> kept = read_references(cache, key, pairs_.size())) {
      references_ = std::move(*kept);
      return;
    }
    size_t done = 0;
    each_batch(
        pairs_.size(), [&](size_t i) { return pairs_[i].tokens(); }, capacity,
        [&](const std::vector<uint32_t>& members) {
          const TrainingBatch batch = batch_of(members);
          std::vector<float> nll(batch.tokens());
          training.evaluate(batch, nll);
          for (size_t p = 0; p < members.size(); ++p)
            references_[members[p]] = {logp_of(batch.documents[2 * p], nll),
                                       logp_of(batch.documents[2 * p + 1], nll)};
          done += members.size();
          told(done, pairs_.size());
        });
    write_references(cache, key, references_);
  }

  StepLoss accumulate(LoraTraining& training, std::span<const uint32_t> rows,
                      size_t capacity) override {
    training.clear_gradients();
    return run(rows, capacity,
               [&](const TrainingBatch& batch, const WeighTokens& weigh, TokenLosses& losses) {
                 training.accumulate(batch, weigh, losses);
               });
  }

  StepLoss validate(LoraTraining& training, size_t capacity) override {
    std::vector<uint32_t> rows(validation_rows_);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint32_t>(lengths_.size() + i);
    return run(rows, capacity,
               [&](const TrainingBatch& batch, const WeighTokens& weigh, TokenLosses& losses) {
                 training.evaluate(batch, losses);
                 std::vector<float> factors(batch.tokens());
                 weigh(losses.nll, factors);
               });
  }

 private:
  // Document 2p is pair p's prompt and chosen answer, document 2p + 1 goes on where the prompt
  // ends.
  TrainingBatch batch_of(std::span<const uint32_t> pairs) const {
    TrainingBatch batch;
    for (const uint32_t i : pairs) {
      const PreferenceExample& e = pairs_[i];
      batch.append(e.chosen.ids, e.chosen.trained);
      batch.append_after(batch.documents.size() - 1, e.shared,
                         std::span(e.rejected.ids).subspan(e.shared),
                         std::span(e.rejected.trained).subspan(e.shared));
    }
    return batch;
  }

  template <typename Compute>
  StepLoss run(std::span<const uint32_t> rows, size_t capacity, Compute&& compute) {
    const double pairs = static_cast<double>(rows.size());
    double chosen_tokens = 0;  // of the whole step: the anchor is a mean over tokens
    for (const uint32_t i : rows)
      chosen_tokens += static_cast<double>(pairs_[i].chosen.trained_tokens());
    StepLoss out;
    PairLoss sums;
    double accurate = 0, logp_chosen = 0, logp_rejected = 0;
    LogitSums chosen_logits, rejected_logits;
    each_batch(
        rows.size(), [&](size_t i) { return pairs_[rows[i]].tokens(); }, capacity,
        [&](const std::vector<uint32_t>& dealt) {
          std::vector<uint32_t> members;
          for (const uint32_t i : dealt) members.push_back(rows[i]);
          const TrainingBatch batch = batch_of(members);
          TokenLosses losses;
          losses.stats.resize(batch.tokens());
          out.tokens += batch.tokens();
          const auto weigh = [&](std::span<const float> nll, std::span<float> factors) {
            for (size_t p = 0; p < members.size(); ++p) {
              const PackedDocument &chosen = batch.documents[2 * p],
                                   &rejected = batch.documents[2 * p + 1];
              const auto& reference = references_[members[p]];
              const PairLogps logps{.chosen = logp_of(chosen, nll),
                                    .rejected = logp_of(rejected, nll),
                                    .ref_chosen = reference[0],
                                    .ref_rejected = reference[1],
                                    .chosen_tokens = trained_in(batch, chosen),
                                    .rejected_tokens = trained_in(batch, rejected)};
              const PairLoss found = pair_loss(options_, logps);
              const double anchor = options_.anchor / chosen_tokens;
              // Factors are by −log p.
              set_factors(batch, chosen, anchor - found.by_chosen / pairs, factors);
              set_factors(batch, rejected, -found.by_rejected / pairs, factors);
              out.loss += found.loss / pairs - anchor * logps.chosen;
              if (out.bad_line == 0 && !std::isfinite(found.loss))
                out.bad_line = pairs_[members[p]].chosen.line;
              sums.chosen_reward += found.chosen_reward / pairs;
              sums.rejected_reward += found.rejected_reward / pairs;
              accurate += found.chosen_reward > found.rejected_reward ? 1 / pairs : 0;
              logp_chosen += logps.chosen / pairs;
              logp_rejected += logps.rejected / pairs;
            }
          };
          compute(batch, weigh, losses);
          for (size_t p = 0; p < members.size(); ++p) {
            chosen_logits.add(batch, batch.documents[2 * p], losses.stats);
            rejected_logits.add(batch, batch.documents[2 * p + 1], losses.stats);
          }
        });
    out.metrics = {{"rewards/chosen", sums.chosen_reward},
                   {"rewards/rejected", sums.rejected_reward},
                   {"rewards/accuracies", accurate},
                   {"rewards/margins", sums.chosen_reward - sums.rejected_reward},
                   {"logps/chosen", logp_chosen},
                   {"logps/rejected", logp_rejected},
                   {"logits/chosen", chosen_logits.mean_logit()},
                   {"logits/rejected", rejected_logits.mean_logit()},
                   {"mean_token_accuracy", chosen_logits.accuracy()}};
    return out;
  }

  PreferenceOptions options_;
  std::vector<PreferenceExample> pairs_;  // to learn, then to validate on
  References references_;
};

// ---- labelled answers --------------------------------------------------------------------------

class LabelledObjective : public Objective {
 public:
  LabelledObjective(const ObjectiveOptions& o, const ModelFiles& files) : options_(o.preference) {
    Preferences<LabelledExample> data = load_labelled(files, o.data);
    counts_ = data.counts;
    problems_ = std::move(data.problems);
    std::vector<LabelledExample> validation;
    if (o.validation.empty()) {
      std::tie(rows_, validation) =
          split_rows(std::move(data.examples), o.val_fraction,
                     [](const LabelledExample& e) { return e.example.hash; });
    } else {
      rows_ = std::move(data.examples);
      validation = load_labelled(files, validation_of(o)).examples;
    }
    for (const LabelledExample& e : rows_) {
      lengths_.push_back(e.example.ids.size());
      tokens_ += e.example.ids.size();
      trained_tokens_ += e.example.trained_tokens();
    }
    validation_rows_ = validation.size();
    mismatch(rows_, o.data.rows.max_length);
    mismatch(validation, o.data.rows.max_length);
    for (LabelledExample& e : validation) rows_.push_back(std::move(e));
    for (size_t i = 0; i < rows_.size(); ++i)
      longest_ = std::max({longest_, rows_[i].example.ids.size(), mismatched_[i].ids.size()});
    references_.assign(rows_.size(), {0, 0});
  }

  void take_reference(LoraTraining& training, size_t capacity, const std::filesystem::path& cache,
                      const std::string& model_key,
                      const std::function<void(size_t, size_t)>& told) override {
    std::string content = model_key + "\n";
    for (size_t i = 0; i < rows_.size(); ++i) {
      hash_example(rows_[i].example, content);
      hash_example(mismatched_[i], content);
    }
    const std::string key = sha256(content);
    if (std::optional<References> kept = read_references(cache, key, rows_.size())) {
      references_ = std::move(*kept);
      return;
    }
    std::vector<uint32_t> all(rows_.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint32_t>(i);
    size_t done = 0;
    const auto take = [&](size_t which, auto&& example_of) {
      evaluate(training, all, capacity, example_of, [&](uint32_t row, double logp) {
        references_[row][which] = logp;
        told(++done, 2 * rows_.size());
      });
    };
    take(0, [&](uint32_t i) -> const Example& { return rows_[i].example; });
    take(1, [&](uint32_t i) -> const Example& { return mismatched_[i]; });
    write_references(cache, key, references_);
  }

  StepLoss accumulate(LoraTraining& training, std::span<const uint32_t> rows,
                      size_t capacity) override {
    training.clear_gradients();
    return run(training, rows, capacity,
               [&](const TrainingBatch& batch, const WeighTokens& weigh, TokenLosses& losses) {
                 training.accumulate(batch, weigh, losses);
               });
  }

  StepLoss validate(LoraTraining& training, size_t capacity) override {
    std::vector<uint32_t> rows(validation_rows_);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint32_t>(lengths_.size() + i);
    return run(training, rows, capacity,
               [&](const TrainingBatch& batch, const WeighTokens& weigh, TokenLosses& losses) {
                 training.evaluate(batch, losses);
                 std::vector<float> factors(batch.tokens());
                 weigh(losses.nll, factors);
               });
  }

 private:
  // Every prompt with the answer of the row before: what the divergence is estimated on.
  void mismatch(std::span<const LabelledExample> rows, size_t max_length) {
    const auto answer_at = [](const Example& e) {
      return std::find(e.trained.begin(), e.trained.end(), uint8_t{1}) - e.trained.begin();
    };
    for (size_t i = 0; i < rows.size(); ++i) {
      const Example& prompt = rows[i].example;
      const Example& other = rows[(i + rows.size() - 1) % rows.size()].example;
      Example e;
      e.ids.assign(prompt.ids.begin(), prompt.ids.begin() + answer_at(prompt));
      e.ids.insert(e.ids.end(), other.ids.begin() + answer_at(other), other.ids.end());
      e.trained.assign(static_cast<size_t>(answer_at(prompt)), 0);
      e.trained.insert(e.trained.end(), other.trained.begin() + answer_at(other),
                       other.trained.end());
      if (e.ids.size() > max_length) {
        e.ids.resize(max_length);
        e.trained.resize(max_length);
      }
      mismatched_.push_back(std::move(e));
    }
  }

  // told(row, Σ log p of its answer) for each of `rows`.
  template <typename ExampleOf, typename Told>
  static void evaluate(LoraTraining& training, std::span<const uint32_t> rows, size_t capacity,
                       ExampleOf&& example_of, Told&& told) {
    each_batch(
        rows.size(), [&](size_t i) { return example_of(rows[i]).ids.size(); }, capacity,
        [&](const std::vector<uint32_t>& members) {
          TrainingBatch batch;
          for (const uint32_t i : members)
            batch.append(example_of(rows[i]).ids, example_of(rows[i]).trained);
          std::vector<float> nll(batch.tokens());
          training.evaluate(batch, nll);
          for (size_t d = 0; d < members.size(); ++d)
            told(rows[members[d]], logp_of(batch.documents[d], nll));
        });
  }

  template <typename Compute>
  StepLoss run(LoraTraining& training, std::span<const uint32_t> rows, size_t capacity,
               Compute&& compute) {
    const double count = static_cast<double>(rows.size());
    StepLoss out;
    double divergence = 0;
    evaluate(
        training, rows, capacity, [&](uint32_t i) -> const Example& { return mismatched_[i]; },
        [&](uint32_t i, double logp) { divergence += (logp - references_[i][1]) / count; });
    const double kl = std::max(0.0, divergence);

    std::array<double, 2> reward{}, logps{}, of{};  // of unwanted and wanted answers
    std::array<LogitSums, 2> logits;
    each_batch(
        rows.size(), [&](size_t i) { return rows_[rows[i]].example.ids.size(); }, capacity,
        [&](const std::vector<uint32_t>& members) {
          TrainingBatch batch;
          for (const uint32_t i : members)
            batch.append(rows_[rows[i]].example.ids, rows_[rows[i]].example.trained);
          TokenLosses losses;
          losses.stats.resize(batch.tokens());
          out.tokens += batch.tokens();
          const auto weigh = [&](std::span<const float> nll, std::span<float> factors) {
            for (size_t d = 0; d < members.size(); ++d) {
              const LabelledExample& row = rows_[rows[members[d]]];
              const double logp = logp_of(batch.documents[d], nll);
              const KtoLoss found =
                  kto_loss(options_, row.desirable, logp, references_[rows[members[d]]][0], kl);
              set_factors(batch, batch.documents[d], -found.by_logp / count, factors);
              out.loss += found.loss / count;
              if (out.bad_line == 0 && !std::isfinite(found.loss)) out.bad_line = row.example.line;
              const size_t side = row.desirable ? 1 : 0;
              reward[side] += found.reward;
              logps[side] += logp;
              of[side] += 1;
            }
          };
          compute(batch, weigh, losses);
          for (size_t d = 0; d < members.size(); ++d)
            logits[rows_[rows[members[d]]].desirable ? 1 : 0].add(batch, batch.documents[d],
                                                                  losses.stats);
        });
    const auto mean = [&](const std::array<double, 2>& sum, size_t side) {
      return of[side] == 0 ? 0.0 : sum[side] / of[side];
    };
    out.metrics = {{"rewards/chosen", mean(reward, 1)},
                   {"rewards/rejected", mean(reward, 0)},
                   {"rewards/margins", mean(reward, 1) - mean(reward, 0)},
                   {"logps/chosen", mean(logps, 1)},
                   {"logps/rejected", mean(logps, 0)},
                   {"logits/chosen", logits[1].mean_logit()},
                   {"logits/rejected", logits[0].mean_logit()},
                   {"kl", kl}};
    return out;
  }

  PreferenceOptions options_;
  std::vector<LabelledExample> rows_;  // to learn, then to validate on
  std::vector<Example> mismatched_;    // one for each row
  References references_;              // of the answer, of the mismatched one
};

}  // namespace

Method parse_method(std::string_view name) {
  for (size_t i = 0; i < kMethods.size(); ++i)
    if (kMethods[i] == name) return static_cast<Method>(i);
  throw Error(ErrorKind::usage, {.where = "--method",
                                 .what = fmt::format("\"{}\" is no method", name),
                                 .cure = fmt::format("one of {}", fmt::join(kMethods, ", "))});
}
std::string_view name_of(Method method) { return kMethods[static_cast<size_t>(method)]; }

void Objective::take_reference(LoraTraining&, size_t, const std::filesystem::path&,
                               const std::string&, const std::function<void(size_t, size_t)>&) {}

std::unique_ptr<Objective> make_objective(Pool& pool, const ObjectiveOptions& options,
                                          const ModelFiles& files) {
  switch (options.method) {
    case Method::sft:
    case Method::text:
      return std::make_unique<DocumentObjective>(pool, options, files);
    case Method::dpo:
      return std::make_unique<PairObjective>(options, files);
    case Method::kto:
      return std::make_unique<LabelledObjective>(options, files);
  }
  MORU_CHECK(false);
}

double validation_loss(LoraTraining& training, const Examples& examples, size_t capacity) {
  double sum = 0;
  size_t learnt = 0;
  each_batch(
      examples.size(), [&](size_t i) { return examples[i].ids.size(); }, capacity,
      [&](const std::vector<uint32_t>& members) {
        TrainingBatch batch;
        for (const uint32_t i : members) batch.append(examples[i].ids, examples[i].trained);
        sum += training.evaluate(batch);
        learnt += batch.trained();
      });
  return learnt == 0 ? 0 : sum / static_cast<double>(learnt);
}

}  // namespace moru
