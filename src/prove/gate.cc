#include "prove/gate.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/clock.h"
#include "base/error.h"
#include "base/files.h"
#include "base/text.h"
#include "engine/generate.h"
#include "prove/instructions.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kChunk = 256;      // tokens of a text that are one passage
constexpr double kRounding = 1e-9;  // 0.75 − 0.74 is one point
constexpr std::array<const char*, 3> kKindNames = {"share", "tokens", "nats"};

// ---- the loss ----

std::vector<std::vector<TokenId>> passages_of(const ModelFiles& files, const GateOptions& options) {
  std::vector<std::vector<TokenId>> passages;
  if (options.text.empty()) {
    for (const std::string_view passage : general_passages())
      passages.push_back(encode_text(files, passage));
    return passages;
  }
  const std::vector<TokenId> ids = encode_text(files, read_file(options.text));
  for (size_t at = 0; at + 1 < ids.size() && passages.size() < options.text_chunks; at += kChunk)
    passages.emplace_back(ids.begin() + static_cast<ptrdiff_t>(at),
                          ids.begin() + static_cast<ptrdiff_t>(std::min(at + kChunk, ids.size())));
  // A short rest would count as much as a whole chunk.
  if (passages.size() > 1 && passages.back().size() < kChunk) passages.pop_back();
  if (passages.empty())
    throw Error(ErrorKind::bad_input, {.where = options.text.string(),
                                       .what = "holds no text",
                                       .cure = "give a plain text of some pages"});
  return passages;
}

std::vector<double> losses_on(const std::vector<std::vector<TokenId>>& passages, Engine& engine) {
  std::vector<Continuation> continuations;
  for (const std::vector<TokenId>& ids : passages)
    continuations.push_back({.prefix = {ids.front()}, .tokens = {ids.begin() + 1, ids.end()}});
  std::vector<double> losses;
  for (const ContinuationScore& score : score_continuations(engine, continuations))
    losses.push_back(-score.logprob /
                     static_cast<double>(continuations[losses.size()].tokens.size()));
  return losses;
}

// ---- paired differences ----

struct Differences {
  double before = 0, after = 0;  // means
  double change = 0, error = 0;  // mean of after − before, and its standard error
};

Differences paired(const std::vector<double>& before, const std::vector<double>& after) {
  MORU_CHECK(before.size() == after.size());
  Differences d;
  const double n = static_cast<double>(std::max<size_t>(1, before.size()));
  for (size_t i = 0; i < before.size(); ++i) {
    d.before += before[i] / n;
    d.after += after[i] / n;
  }
  d.change = d.after - d.before;
  double squares = 0;
  for (size_t i = 0; i < before.size(); ++i) {
    const double off = after[i] - before[i] - d.change;
    squares += off * off;
  }
  d.error = before.size() < 2 ? 0 : std::sqrt(squares / (n - 1) / n);
  return d;
}

Interval normal_interval(const Differences& d) {
  const double half = normal_quantile(0.5 + kConfidence / 2) * d.error;
  return {d.change - half, d.change + half};
}

// A row of yes and no: how many lost, and by how much they may.
GateRow share_row(std::string name, const std::vector<bool>& before, const std::vector<bool>& after,
                  const GateOptions& options) {
  PairedCounts counts;
  std::vector<double> was, is;
  for (size_t i = 0; i < before.size(); ++i) {
    was.push_back(before[i] ? 1 : 0);
    is.push_back(after[i] ? 1 : 0);
    size_t PairedCounts::*place =
        after[i] ? (before[i] ? &PairedCounts::both : &PairedCounts::only_a)
                 : (before[i] ? &PairedCounts::only_b : &PairedCounts::neither);
    ++(counts.*place);
  }
  const Differences d = paired(was, is);
  GateRow row{.kind = GateRow::Kind::share,
              .name = std::move(name),
              .count = before.size(),
              .before = d.before,
              .after = d.after,
              .change = paired_difference(counts),
              .allowed = std::max(options.tolerance, options.standard_errors * d.error)};
  row.refused = !(-d.change <= row.allowed + kRounding);
  return row;
}

bool is_generated(const ItemResult& item) { return item.logprobs.empty(); }

std::vector<bool> correct_of(const Results& results) {
  std::vector<bool> correct;
  for (const ItemResult& item : results.items) correct.push_back(item.correct);
  return correct;
}

std::vector<bool> ended(const GateMeasures& measures) {
  std::vector<bool> ends;
  const auto take = [&](const Results& results) {
    for (const ItemResult& item : results.items)
      if (is_generated(item)) ends.push_back(!item.cut);
  };
  for (const Results& results : measures.scores) take(results);
  take(measures.instructions);
  return ends;
}

GateRow length_row(const Results& before, const Results& after, const GateOptions& options) {
  std::vector<double> was, is;
  for (const ItemResult& item : before.items) was.push_back(static_cast<double>(item.tokens_out));
  for (const ItemResult& item : after.items) is.push_back(static_cast<double>(item.tokens_out));
  const Differences d = paired(was, is);
  GateRow row{.kind = GateRow::Kind::tokens,
              .name = "mean length, tokens",
              .count = was.size(),
              .before = d.before,
              .after = d.after,
              .change = normal_interval(d),
              .allowed = options.length_factor};
  const double factor = std::max(d.before, d.after) / std::max(1e-9, std::min(d.before, d.after));
  row.refused =
      factor > options.length_factor && std::abs(d.change) > options.standard_errors * d.error;
  return row;
}

GateRow loss_row(const std::vector<double>& before, const std::vector<double>& after,
                 const GateOptions& options) {
  const Differences d = paired(before, after);
  GateRow row{.kind = GateRow::Kind::nats,
              .name = options.text.empty() ? "loss, plain text"
                                           : "loss, " + options.text.filename().string(),
              .count = before.size(),
              .before = d.before,
              .after = d.after,
              .change = normal_interval(d),
              .allowed = std::max(options.loss_tolerance, options.standard_errors * d.error)};
  // A loss with no value (NaN) is refused too.
  row.refused = !(d.change <= row.allowed + kRounding);
  return row;
}

// ---- words ----

std::string value_of(GateRow::Kind kind, double value) {
  switch (kind) {
    case GateRow::Kind::share:
      return fmt::format("{:.1f} %", 100 * value);
    case GateRow::Kind::tokens:
      return fmt::format("{:.1f}", value);
    case GateRow::Kind::nats:
      return fmt::format("{:.3f}", value);
  }
  return "";
}

std::string change_of(GateRow::Kind kind, double value) {
  switch (kind) {
    case GateRow::Kind::share:
      return fmt::format("{:+.1f}", 100 * value);
    case GateRow::Kind::tokens:
      return fmt::format("{:+.1f}", value);
    case GateRow::Kind::nats:
      return fmt::format("{:+.3f}", value);
  }
  return "";
}

std::string limit_of(const GateRow& row) {
  switch (row.kind) {
    case GateRow::Kind::share:
      return fmt::format("{:+.1f}", -100 * row.allowed);
    case GateRow::Kind::tokens:
      return fmt::format("x{:g}", row.allowed);
    case GateRow::Kind::nats:
      return fmt::format("{:+.3f}", row.allowed);
  }
  return "";
}

std::string reason_of(const GateRow& row) {
  const double change = row.after - row.before;
  switch (row.kind) {
    case GateRow::Kind::share:
      return fmt::format("{}: fell by {:.1f} points, {:.1f} allowed", row.name, -100 * change,
                         100 * row.allowed);
    case GateRow::Kind::tokens:
      return fmt::format("{}: went from {:.1f} to {:.1f}, more than a factor of {:g}", row.name,
                         row.before, row.after, row.allowed);
    case GateRow::Kind::nats:
      return fmt::format("{}: rose by {:.3f}, {:.3f} allowed", row.name, change, row.allowed);
  }
  return "";
}

}  // namespace

void check(const GateOptions& options) {
  const auto refuse = [](const char* flag, double value, const char* cure) {
    throw Error(ErrorKind::usage,
                {.where = flag, .what = fmt::format("{} cannot be meant", value), .cure = cure});
  };
  if (!(options.tolerance >= 0 && options.tolerance <= 1))
    refuse("--tolerance", 100 * options.tolerance, "give points, 0 to 100");
  if (!(options.standard_errors >= 0 && options.standard_errors <= 100))
    refuse("--standard-errors", options.standard_errors, "give 0 to 100");
  if (!(options.loss_tolerance >= 0))
    refuse("--loss-tolerance", options.loss_tolerance, "give nats per token, 0 or more");
  if (!(options.length_factor >= 1))
    refuse("--length-factor", options.length_factor, "give 1 or more");
}

GateMeasures measure_for_gate(const std::vector<QuestionSet>& questions, std::string name,
                              std::string model_sha256, Engine& engine, const ModelFiles& files,
                              const PromptStyle& style, const GateOptions& options,
                              const std::filesystem::path& kept,
                              const std::function<void(const ProveProgress&)>& progress) {
  const Stopwatch watch;
  const std::vector<std::vector<TokenId>> passages = passages_of(files, options);
  ProveOptions asking{.limits = options.limits, .replace_other = true, .progress = progress};
  const auto kept_as = [&](const std::string& word) {
    return kept.empty() ? kept : kept / (word + ".jsonl");
  };
  GateMeasures measures{.name = std::move(name), .model_sha256 = std::move(model_sha256)};
  // One answerer at a time: each keeps the engine's cache full of what it has read.
  const auto asked_in = [&](const PromptStyle& s) {
    return make_answerer(measures.name, measures.model_sha256, engine, files, s);
  };
  {
    const Answerer answerer = asked_in(style);
    for (const QuestionSet& set : questions) {
      asking.results = kept_as(fmt::format("questions-{}", measures.scores.size() + 1));
      measures.scores.push_back(prove(set, answerer, asking));
    }
  }
  asking.results = kept_as("instructions");
  asking.limits = {.max_tokens = options.instruction_tokens};
  // Instructions are the same for every model: a system message of the task is no part of them.
  PromptStyle plain = style;
  plain.system.clear();
  measures.instructions = prove(instruction_questions(), asked_in(plain), asking);
  measures.losses = losses_on(passages, engine);
  measures.seconds = watch.seconds();
  return measures;
}

GateVerdict judge_gate(const GateMeasures& before, const GateMeasures& after,
                       const std::vector<QuestionSet>& questions, const GateOptions& options) {
  MORU_CHECK(before.scores.size() == questions.size() && after.scores.size() == questions.size());
  GateVerdict verdict{.before = before.name, .after = after.name, .rows = {}};
  for (size_t i = 0; i < questions.size(); ++i) {
    compare(after.scores[i], before.scores[i]);  // refuses what was not asked the same
    verdict.rows.push_back(
        share_row("right: " + std::filesystem::path(questions[i].where).filename().string(),
                  correct_of(before.scores[i]), correct_of(after.scores[i]), options));
  }
  compare(after.instructions, before.instructions);
  verdict.rows.push_back(share_row("instructions followed", correct_of(before.instructions),
                                   correct_of(after.instructions), options));
  verdict.rows.push_back(share_row("answers that end", ended(before), ended(after), options));
  verdict.rows.push_back(length_row(before.instructions, after.instructions, options));
  verdict.rows.push_back(loss_row(before.losses, after.losses, options));
  for (const GateRow& row : verdict.rows)
    if (row.refused) verdict.reasons.push_back(reason_of(row));
  verdict.accepted = verdict.reasons.empty();
  return verdict;
}

Json to_json(const GateVerdict& verdict) {
  Json rows = Json::array();
  for (const GateRow& row : verdict.rows)
    rows.push_back({{"name", row.name},
                    {"unit", kKindNames[static_cast<size_t>(row.kind)]},
                    {"count", row.count},
                    {"before", row.before},
                    {"after", row.after},
                    {"change", row.after - row.before},
                    {"interval95", {row.change.low, row.change.high}},
                    {"allowed", row.allowed},
                    {"refused", row.refused}});
  return {{"before", verdict.before},
          {"after", verdict.after},
          {"accepted", verdict.accepted},
          {"reasons", verdict.reasons},
          {"rows", std::move(rows)}};
}

std::string table_of(const GateVerdict& verdict) {
  std::string table = fmt::format("{}{:>9}{:>9}{:>8}{:>18}{:>8}\n", pad_right("", 26), "before",
                                  "after", "change", "95 %", "limit");
  for (const GateRow& row : verdict.rows) {
    const std::string range = fmt::format("{} to {}", change_of(row.kind, row.change.low),
                                          change_of(row.kind, row.change.high));
    const std::string name = fmt::format("{} ({})", truncate_to_width(row.name, 19), row.count);
    table += fmt::format("{}{:>9}{:>9}{:>8}{:>18}{:>8}{}\n",
                         pad_right(truncate_to_width(name, 26), 26), value_of(row.kind, row.before),
                         value_of(row.kind, row.after), change_of(row.kind, row.after - row.before),
                         range, limit_of(row), row.refused ? " ✗" : "");
  }
  for (const std::string& reason : verdict.reasons)
    table += truncate_to_width("refused: " + reason, 80) + "\n";
  if (verdict.accepted) table += "accepted\n";
  return table;
}

ChainVerdict judge_chain(const GateMeasures& base, const GateMeasures& last,
                         const GateMeasures& after, const std::vector<QuestionSet>& questions,
                         const GateOptions& options) {
  ChainVerdict verdict{.last = judge_gate(last, after, questions, options)};
  if (base.model_sha256 != last.model_sha256)
    verdict.base = judge_gate(base, after, questions, options);
  return verdict;
}

std::vector<std::string> ChainVerdict::reasons() const {
  std::vector<std::string> all = last.reasons;
  if (base)
    for (const std::string& reason : base->reasons)
      all.push_back(fmt::format("since {}: {}", base->before, reason));
  return all;
}

Json to_json(const ChainVerdict& verdict) {
  return {{"accepted", verdict.accepted()},
          {"reasons", verdict.reasons()},
          {"gate", to_json(verdict.last)},
          {"gate_since_base", verdict.base ? to_json(*verdict.base) : Json()}};
}

std::string table_of(const ChainVerdict& verdict) {
  const auto one = [](const GateVerdict& v) {
    return truncate_to_width(fmt::format("{} against {}", v.after, v.before), 80) + "\n" +
           table_of(v);
  };
  std::string table = one(verdict.last);
  if (verdict.base) table += "\n" + one(*verdict.base);
  return table;
}

}  // namespace moru
