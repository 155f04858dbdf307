#include "prove/prove.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "base/clock.h"
#include "base/error.h"
#include "base/files.h"
#include "base/text.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<const char*, 3> kScoreNames = {"sum", "per_character", "per_byte"};

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// ---- the file ----

Json to_json(const ResultsKey& key) {
  return {{"model_sha256", key.model_sha256},
          {"engine", key.engine},
          {"asked_sha256", key.asked_sha256},
          {"max_tokens", key.limits.max_tokens},
          {"stop", key.limits.stop},
          {"choice_score", kScoreNames[static_cast<size_t>(key.choice_score)]}};
}

std::string header_line(const std::string& name, const ResultsKey& key) {
  return dump({{"moru", "results"}, {"version", 1}, {"model", name}, {"key", to_json(key)}});
}

std::string item_line(const ItemResult& item) {
  Json line = {{"id", item.id},
               {"prompt_sha256", item.prompt_sha256},
               {"correct", item.correct},
               {"answer", item.answer}};
  if (!item.reason.empty()) line["reason"] = item.reason;
  if (!item.logprobs.empty()) line["logprobs"] = item.logprobs;
  line["tokens_in"] = item.tokens_in;
  line["tokens_out"] = item.tokens_out;
  if (item.cut) line["cut"] = true;
  line["seconds"] = item.seconds;
  return dump(line);
}

ResultsKey key_from(const Json& json) {
  ResultsKey key;
  json.at("model_sha256").get_to(key.model_sha256);
  json.at("engine").get_to(key.engine);
  json.at("asked_sha256").get_to(key.asked_sha256);
  json.at("max_tokens").get_to(key.limits.max_tokens);
  json.at("stop").get_to(key.limits.stop);
  const auto score =
      std::find(kScoreNames.begin(), kScoreNames.end(), json.at("choice_score").get<std::string>());
  if (score == kScoreNames.end()) throw std::invalid_argument("choice_score");
  key.choice_score = static_cast<ChoiceScore>(score - kScoreNames.begin());
  return key;
}

ItemResult item_from(const Json& json) {
  ItemResult item;
  json.at("id").get_to(item.id);
  json.at("prompt_sha256").get_to(item.prompt_sha256);
  json.at("correct").get_to(item.correct);
  json.at("answer").get_to(item.answer);
  item.reason = json.value("reason", "");
  for (const Json& value : json.value("logprobs", Json::array()))
    item.logprobs.push_back(value.is_null() ? std::nan("") : value.get<double>());
  json.at("tokens_in").get_to(item.tokens_in);
  json.at("tokens_out").get_to(item.tokens_out);
  item.cut = json.value("cut", false);
  json.at("seconds").get_to(item.seconds);
  return item;
}

struct ResultsFile {
  Results results;
  bool empty = true;       // killed before its header was whole
  size_t whole_bytes = 0;  // up to the end of the last whole line
};

// Lines that end in a line break are whole: append_line writes a line and its break at once, and a
// kill can only cut the end off.
ResultsFile load(const std::filesystem::path& path) {
  const std::string content = read_file(path);
  ResultsFile file;
  size_t line_number = 0;
  for (size_t at = 0, end; (end = content.find('\n', at)) != std::string::npos; at = end + 1) {
    ++line_number;
    const auto refuse = [&](std::string what) {
      throw Error(ErrorKind::bad_input,
                  {.where = fmt::format("{}: line {}", path.string(), line_number),
                   .what = std::move(what),
                   .cure = "remove the file, and the questions are asked again"});
    };
    const Json json = Json::parse(content.begin() + static_cast<ptrdiff_t>(at),
                                  content.begin() + static_cast<ptrdiff_t>(end), nullptr, false);
    if (json.is_discarded()) refuse("is not JSON");
    try {
      if (line_number == 1) {
        if (json.at("moru") != "results" || json.at("version") != 1)
          refuse("is not the header of results that this version reads");
        json.at("model").get_to(file.results.name);
        file.results.key = key_from(json.at("key"));
        file.empty = false;
      } else {
        file.results.items.push_back(item_from(json));
      }
    } catch (const std::exception& problem) {
      if (dynamic_cast<const Error*>(&problem) != nullptr) throw;
      refuse(fmt::format("is not a line of results ({})", problem.what()));
    }
    file.whole_bytes = end + 1;
  }
  return file;
}

// What is answered already, by the question's id; the file then ends in a whole line.
std::unordered_map<std::string, ItemResult> resume(const std::filesystem::path& path,
                                                   const std::string& name, const ResultsKey& key,
                                                   bool replace_other) {
  std::unordered_map<std::string, ItemResult> answered;
  const std::string header = header_line(name, key) + "\n";
  if (!std::filesystem::exists(path)) {
    write_file(path, header);
    return answered;
  }
  ResultsFile file = load(path);
  const bool same = !file.empty && to_json(file.results.key) == to_json(key);
  if (!same && !file.empty && !replace_other)
    throw Error(ErrorKind::usage,
                {.where = path.string(),
                 .what = "holds results of another model, other questions or other settings",
                 .cure = "name another file, or remove this one"});
  if (!same) {
    write_file(path, header);
    return answered;
  }
  std::filesystem::resize_file(path, file.whole_bytes);
  for (ItemResult& item : file.results.items) answered.try_emplace(item.id, std::move(item));
  return answered;
}

// ---- asking ----

ItemResult result_of(const Question& question, Reply reply) {
  ItemResult item{.id = question.id,
                  .prompt_sha256 = question.prompt_sha256,
                  .answer = repair_utf8(reply.text)};
  Verdict verdict = judge(question.expected, item.answer);
  item.correct = verdict.correct;
  item.reason = std::move(verdict.reason);
  item.tokens_in = reply.tokens_in;
  item.tokens_out = reply.tokens_out;
  item.cut = reply.cut;
  return item;
}

ItemResult result_of(const Question& question, ChoiceReply reply, ChoiceScore score) {
  MORU_CHECK(reply.logprobs.size() == question.expected.choices.size());
  ItemResult item{.id = question.id, .prompt_sha256 = question.prompt_sha256, .answer = ""};
  Verdict verdict{.correct = false, .reason = "the model gives a choice no probability (NaN)"};
  const bool sound = std::none_of(reply.logprobs.begin(), reply.logprobs.end(),
                                  [](double p) { return std::isnan(p); });
  if (sound) {
    const size_t chosen = best_choice(question.expected, reply.logprobs, score);
    item.answer = question.expected.choices[chosen];
    verdict = judge_choice(question.expected, chosen);
  }
  item.correct = verdict.correct;
  item.reason = std::move(verdict.reason);
  item.logprobs = std::move(reply.logprobs);
  item.tokens_in = reply.tokens_in;
  item.tokens_out = reply.tokens_out;
  return item;
}

// One batch, all of whose questions are of one kind; each item bears its share of the time.
std::vector<ItemResult> ask(QuestionBatch batch, const Answerer& model,
                            const ProveOptions& options) {
  std::vector<ItemResult> items;
  const MachineTime watch(model.threads);
  double seconds = 0;
  if (batch.front()->expected.check == Check::choice) {
    std::vector<ChoiceReply> replies = model.score(batch);
    seconds = watch.seconds();
    MORU_CHECK(replies.size() == batch.size());
    for (size_t i = 0; i < batch.size(); ++i)
      items.push_back(result_of(*batch[i], std::move(replies[i]), options.choice_score));
  } else {
    std::vector<Reply> replies = model.generate(batch, options.limits);
    seconds = watch.seconds();
    MORU_CHECK(replies.size() == batch.size());
    for (size_t i = 0; i < batch.size(); ++i)
      items.push_back(result_of(*batch[i], std::move(replies[i])));
  }
  for (ItemResult& item : items) item.seconds = seconds / static_cast<double>(items.size());
  return items;
}

void keep(const std::filesystem::path& path, std::span<const ItemResult> items) {
  std::string lines;
  for (const ItemResult& item : items) {
    if (!lines.empty()) lines += '\n';
    lines += item_line(item);
  }
  append_line(path, lines);
}

}  // namespace

Results prove(const QuestionSet& questions, const Answerer& model, const ProveOptions& options) {
  MORU_CHECK(model.batch > 0);
  Results results{.name = model.name,
                  .key = {.model_sha256 = model.model_sha256,
                          .engine = model.engine,
                          .asked_sha256 = questions.asked_sha256,
                          .limits = options.limits,
                          .choice_score = options.choice_score},
                  .items = {}};
  std::unordered_map<std::string, ItemResult> answered;
  if (!options.results.empty())
    answered = resume(options.results, model.name, results.key, options.replace_other);

  const Stopwatch watch;
  ProveProgress progress{.total = questions.items.size()};
  std::vector<const Question*> to_generate, to_score;
  for (const Question& question : questions.items) {
    if (const auto found = answered.find(question.id); found != answered.end()) {
      ++progress.done;
      progress.correct += found->second.correct;
    } else {
      (question.expected.check == Check::choice ? to_score : to_generate).push_back(&question);
    }
  }
  const auto ask_all = [&](QuestionBatch pending) {
    for (size_t at = 0; at < pending.size(); at += model.batch) {
      const QuestionBatch batch = pending.subspan(at, std::min(model.batch, pending.size() - at));
      std::vector<ItemResult> items = ask(batch, model, options);
      if (!options.results.empty()) keep(options.results, items);
      for (ItemResult& item : items) {
        ++progress.done;
        progress.correct += item.correct;
        progress.tokens += item.tokens_in + item.tokens_out;
        answered.emplace(item.id, std::move(item));
      }
      progress.seconds = watch.seconds();
      if (options.progress) options.progress(progress);
    }
  };
  ask_all(to_generate);
  ask_all(to_score);
  for (const Question& question : questions.items)
    results.items.push_back(std::move(answered.at(question.id)));
  return results;
}

Results read_results(const std::filesystem::path& path) {
  ResultsFile file = load(path);
  if (file.empty)
    throw Error(ErrorKind::bad_input, {.where = path.string(),
                                       .what = "holds no results",
                                       .cure = "name a file that moru prove wrote"});
  return std::move(file.results);
}

double Tally::accuracy() const {
  return total == 0 ? 0 : static_cast<double>(correct) / static_cast<double>(total);
}
double Tally::tokens_per_second() const {
  return seconds <= 0 ? 0 : static_cast<double>(tokens_in + tokens_out) / seconds;
}
double Tally::answers_per_second() const {
  return seconds <= 0 ? 0 : static_cast<double>(total) / seconds;
}
double Tally::usd_per_1000(double machine_usd_per_hour) const {
  if (total == 0) return 0;
  return machine_usd_per_hour * (seconds / 3600) / static_cast<double>(total) * 1000;
}

Tally tally(std::span<const ItemResult> items) {
  Tally sums;
  sums.total = items.size();
  for (const ItemResult& item : items) {
    sums.correct += item.correct;
    sums.tokens_in += item.tokens_in;
    sums.tokens_out += item.tokens_out;
    sums.cut += item.cut;
    sums.seconds += item.seconds;
  }
  sums.interval = wilson(sums.correct, sums.total);
  return sums;
}

Comparison compare(const Results& candidate, const Results& reference) {
  std::unordered_map<std::string_view, const ItemResult*> before;
  for (const ItemResult& item : reference.items) before.emplace(item.id, &item);
  const auto refuse = [&](std::string what) {
    throw Error(ErrorKind::bad_input,
                {.where = fmt::format("{} against {}", candidate.name, reference.name),
                 .what = std::move(what),
                 .cure = "prove both models on the same questions"});
  };
  if (candidate.key.asked_sha256 != reference.key.asked_sha256)
    refuse("they were asked different questions");
  if (candidate.items.size() != reference.items.size())
    refuse(fmt::format("one has {} answers, the other {}", candidate.items.size(),
                       reference.items.size()));
  Comparison comparison;
  for (size_t i = 0; i < candidate.items.size(); ++i) {
    const ItemResult& after = candidate.items[i];
    const auto found = before.find(after.id);
    if (found == before.end()) refuse(fmt::format("question {} stands in only one", after.id));
    const bool was_correct = found->second->correct;
    if (after.correct && was_correct) ++comparison.counts.both;
    if (!after.correct && !was_correct) ++comparison.counts.neither;
    if (after.correct && !was_correct) comparison.newly_right.push_back(i);
    if (!after.correct && was_correct) comparison.newly_wrong.push_back(i);
  }
  comparison.counts.only_a = comparison.newly_right.size();
  comparison.counts.only_b = comparison.newly_wrong.size();
  comparison.p = mcnemar_exact(comparison.counts);
  comparison.difference = paired_difference(comparison.counts);
  comparison.ratio = paired_ratio(comparison.counts);
  return comparison;
}

}  // namespace moru
