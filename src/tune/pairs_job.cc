#include "tune/pairs_job.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/clock.h"
#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/text.h"
#include "prove/engine_answerer.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kShownCategories = 20;

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// "pairs.jsonl" → "pairs.samples.jsonl"
std::filesystem::path beside(const std::filesystem::path& out, const char* word) {
  std::filesystem::path path = out;
  const std::string ending = out.extension().string();
  path.replace_extension(fmt::format("{}{}", word, ending.empty() ? ".jsonl" : ending));
  return path;
}

void write_rows(const std::filesystem::path& path, const std::vector<Json>& rows) {
  AtomicFile file(path);
  for (const Json& row : rows) file.write(dump(row) + "\n");
  file.commit();
}

Json to_json(const PairCounts& c) {
  return {{"prompts", c.prompts},
          {"always_right", c.always_right},
          {"sometimes_right", c.sometimes_right},
          {"never_right", c.never_right},
          {"answers", c.answers},
          {"right", c.right},
          {"wrong", c.wrong},
          {"wrong_left_out",
           {{"cut_off", c.cut},
            {"empty", c.empty},
            {"like_another", c.repeated},
            {"logp_filter", c.by_logp},
            {"nothing_to_choose", c.without_chosen},
            {"length_ratio", c.by_length},
            {"margin", c.by_margin},
            {"over_prompt_cap", c.over_prompt},
            {"over_category_quota", c.over_category}}},
          {"pairs", c.pairs},
          {"chosen_own", c.chosen_own}};
}

}  // namespace

std::vector<Question> read_all_questions(const std::vector<std::filesystem::path>& paths,
                                         const QuestionOptions& rows) {
  std::vector<Question> all;
  for (const std::filesystem::path& path : paths) {
    for (Question& question : read_questions(path, rows).items) {
      if (paths.size() > 1) question.id = path.filename().string() + ":" + question.id;
      all.push_back(std::move(question));
    }
  }
  return all;
}

PairsSummary write_pairs(const PairsJob& job, Engine& engine, const ModelFiles& files,
                         const std::string& model_sha256,
                         const std::function<void(const SampleProgress&)>& progress) {
  const Stopwatch watch;
  EvaluationTexts evaluation(job.overlap_words);
  for (const std::filesystem::path& path : job.evaluation) evaluation.add_file(path);
  const std::vector<Question> questions = read_all_questions(job.questions, job.rows);

  PairsSummary summary{.questions = questions.size(),
                       .prompts = choose_prompts(questions, evaluation, job.prompts),
                       .pairs = job.out,
                       .right = beside(job.out, ".right"),
                       .samples = beside(job.out, ".samples")};
  ChosenPrompts& prompts = summary.prompts;
  summary.made_of = prompts.make.size();
  summary.held_out = prompts.validate.size();
  if (prompts.make.empty())
    throw Error(
        ErrorKind::bad_input,
        {.where = job.questions.front().string(),
         .what = fmt::format("of {} questions none is left to make pairs of", questions.size()),
         .cure = "give more questions, or ones that no evaluation file holds"});
  if (job.out.has_parent_path()) make_folder(job.out.parent_path());
  if (!prompts.validate.empty()) {
    summary.validate = beside(job.out, ".validate");
    std::vector<Json> rows;
    for (const Question* question : prompts.validate) rows.push_back(row_of(*question));
    write_rows(summary.validate, rows);
  }

  const std::vector<PromptSamples> samples =
      sample_answers(prompts.make, engine, files, model_sha256, job.style, job.sampling,
                     summary.samples, progress);
  summary.made = make_pairs(prompts.make, samples, job.rules);
  const Provenance from{.model_sha256 = model_sha256,
                        .engine = describe_engine(engine, files, job.style),
                        .sampling = job.sampling};
  std::vector<Json> rows;
  for (const Pair& pair : summary.made.pairs) rows.push_back(pair_row(pair, from));
  write_rows(job.out, rows);
  write_rows(summary.right, right_rows(prompts.make, samples));

  summary.pairs_sha256 = sha256_of_path(job.out);
  prompts.make.clear();
  prompts.validate.clear();
  summary.made.pairs.clear();
  summary.seconds = watch.seconds();
  return summary;
}

Json to_json(const PairsSummary& s) {
  Json categories = Json::object();
  for (const auto& [name, counts] : s.made.by_category) categories[name] = to_json(counts);
  return {{"questions", s.questions},
          {"repeated", s.prompts.repeated},
          {"near_duplicates", s.prompts.near},
          {"contaminated", s.prompts.contaminated},
          {"overlaps", s.prompts.overlaps},
          {"held_out", s.held_out},
          {"made_of", s.made_of},
          {"counts", to_json(s.made.counts)},
          {"by_category", std::move(categories)},
          {"mean_logp", s.made.mean_logp},
          {"pairs_file", s.pairs.string()},
          {"pairs_sha256", s.pairs_sha256},
          {"right_file", s.right.string()},
          {"samples_file", s.samples.string()},
          {"validate_file", s.validate.string()},
          {"seconds", s.seconds}};
}

std::string table_of(const PairsSummary& s) {
  std::string table;
  const auto row = [&](std::string_view name, size_t count, size_t of, size_t indent) {
    const std::string label = std::string(indent, ' ') + std::string(name);
    table += fmt::format("{}{:>8}{}\n", pad_right(label, 40), count,
                         of == 0 ? ""
                                 : fmt::format("{:>8.1f} %", 100 * static_cast<double>(count) /
                                                                 static_cast<double>(of)));
  };
  // Rows that say nothing are left out, except the ones that others are shares of.
  const auto some = [&](std::string_view name, size_t count, size_t of) {
    if (count > 0) row(name, count, of, 2);
  };
  const PairCounts& c = s.made.counts;
  row("questions", s.questions, 0, 0);
  some("stand twice", s.prompts.repeated, s.questions);
  some("nearly repeat another", s.prompts.near, s.questions);
  some("overlap with evaluation text", s.prompts.contaminated, s.questions);
  some("held out to validate", s.held_out, s.questions);
  row("asked", c.prompts, s.questions, 2);
  some("always right (no pair)", c.always_right, c.prompts);
  some("sometimes right", c.sometimes_right, c.prompts);
  some("never right", c.never_right, c.prompts);
  row("answers", c.answers, 0, 0);
  row("right", c.right, c.answers, 2);
  row("wrong", c.wrong, c.answers, 2);
  some("cut off", c.cut, c.wrong);
  some("empty", c.empty, c.wrong);
  some("like another one", c.repeated, c.wrong);
  some("left out by log-probability", c.by_logp, c.wrong);
  some("without a right answer to choose", c.without_chosen, c.wrong);
  some("too long or short beside the chosen", c.by_length, c.wrong);
  some("already far apart", c.by_margin, c.wrong);
  some("over the prompt's cap", c.over_prompt, c.wrong);
  some("over the category's quota", c.over_category, c.wrong);
  row("pairs", c.pairs, c.wrong, 0);
  some("chosen: its own right answer", c.chosen_own, c.pairs);
  some("chosen: the reference", c.pairs - c.chosen_own, c.pairs);
  if (s.made.by_category.size() > 1) {
    table += fmt::format("\n{}{:>8}{:>9}{:>9}{:>8}\n", pad_right("category", 40), "prompts",
                         "right", "never", "pairs");
    size_t shown = 0;
    for (const auto& [name, n] : s.made.by_category) {
      if (++shown > kShownCategories) break;
      const double right =
          100 * static_cast<double>(n.right) / static_cast<double>(std::max<size_t>(1, n.answers));
      table += fmt::format("{}{:>8}{:>7.1f} %{:>9}{:>8}\n",
                           pad_right(truncate_to_width(name.empty() ? "(none)" : name, 39), 40),
                           n.prompts, right, n.never_right, n.pairs);
    }
    if (s.made.by_category.size() > kShownCategories)
      table += fmt::format("… and {} more\n", s.made.by_category.size() - kShownCategories);
  }
  for (const std::string& overlap : s.prompts.overlaps)
    table += truncate_to_width("overlap: " + overlap, 80) + "\n";
  return table;
}

}  // namespace moru
