#include "tune/preference_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "base/error.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

struct RowOrigin {
  size_t source;  // which of the data sources
  uint64_t line;
};

// Examples of conversations whose last answer alone is learnt.
class LastAnswers {
 public:
  LastAnswers(const ModelFiles& files, const DataOptions& options)
      : system_(options.system), maker_(files, last_only(options)) {}

  // `asks` and then `answers`; nullopt if truncation leaves nothing to learn.
  std::optional<Example> make(Json asks, const Json& answers, const Json& tools, RowOrigin from,
                              DataCounts& counts) {
    if (!system_.empty() && (asks.empty() || asks.front()["role"] != "system"))
      asks.insert(asks.begin(), Json::object({{"role", "system"}, {"content", system_}}));
    for (const Json& turn : answers) asks.push_back(turn);
    Dataset one;
    maker_.add_conversation(asks, tools, from.line, one);
    counts.truncated += one.counts.truncated;
    counts.without_end += one.counts.without_end;
    if (one.examples.empty()) return std::nullopt;
    one.examples.back().source = from.source;
    return std::move(one.examples.back());
  }

 private:
  static DataOptions last_only(DataOptions options) {
    options.last_turn_only = true;
    options.train_on_prompt = false;
    return options;
  }
  std::string system_;
  ExampleMaker maker_;
};

// Reads rows one by one; `add` takes those of `kind`.
template <typename T, typename Add>
Preferences<T> load(const LoadExamples& request, TrainingRow::Kind kind, const char* shape,
                    Add&& add) {
  Preferences<T> out;
  for (const DataSource& source : request.sources) {
    if (source.weight != 1 || source.num_samples != 0)
      throw Error(ErrorKind::usage, {.where = source.path.string(),
                                     .what = "preferences are taken as they are, all of them",
                                     .cure = "leave out the weight and the number of samples"});
    RecordReader reader(source.path);
    const size_t before = out.examples.size();
    const auto problem = [&](const RowProblem& row) {
      ++out.counts.bad;
      if (out.problems.size() < 100) out.problems.push_back({source.path, row});
      if (out.counts.bad <= request.max_bad) return;
      throw Error(
          ErrorKind::bad_input,
          {.where = fmt::format("{}: line {}: {}", source.path.string(), row.line, row.field),
           .what = fmt::format("{}; that is bad row {}", row.what, out.counts.bad),
           .cure = "mend the rows, or allow more with --max-bad"});
    };
    while (const std::optional<Row> row = reader.next()) {
      ++out.counts.rows;
      try {
        const TrainingRow read = read_row(row->value, source.format);
        if (read.kind != kind) throw UnusableRow{"row", shape};
        add(read, RowOrigin{static_cast<size_t>(&source - request.sources.data()), row->line}, out);
      } catch (const UnusableRow& unusable) {
        problem({row->line, unusable.field, unusable.what});
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::bad_input || out.counts.bad > request.max_bad) throw;
        problem({row->line, "messages", error.what()});  // the template refused the conversation
      }
    }
    for (const RowProblem& row : reader.problems()) {
      ++out.counts.rows;
      problem(row);
    }
    if (out.examples.size() == before)
      refuse_unusable(source.path, out.counts,
                      out.problems.empty() ? nullptr : &out.problems.front().row);
  }
  return out;
}

}  // namespace

size_t shared_tokens(const Example& a, const Example& b) {
  const size_t shorter = std::min(a.ids.size(), b.ids.size());
  size_t same = 0;
  while (same < shorter && a.ids[same] == b.ids[same]) ++same;
  const auto first_learnt = [](const Example& e) {
    return static_cast<size_t>(std::find(e.trained.begin(), e.trained.end(), uint8_t{1}) -
                               e.trained.begin());
  };
  const size_t learnt = std::min(first_learnt(a), first_learnt(b));
  return std::min(same, learnt == 0 ? 0 : learnt - 1);
}

Preferences<PreferenceExample> load_pairs(const ModelFiles& files, const LoadExamples& request) {
  LastAnswers answers(files, request.rows);
  return load<PreferenceExample>(
      request, TrainingRow::Kind::preference, "has no two answers: chosen and rejected",
      [&](const TrainingRow& row, RowOrigin from, Preferences<PreferenceExample>& out) {
        auto chosen = answers.make(row.messages, row.chosen, row.tools, from, out.counts);
        auto rejected = answers.make(row.messages, row.rejected, row.tools, from, out.counts);
        if (!chosen || !rejected || chosen->ids == rejected->ids) {
          ++out.counts.without_answer;
          return;
        }
        const size_t shared = shared_tokens(*chosen, *rejected);
        out.examples.push_back({std::move(*chosen), std::move(*rejected), shared});
      });
}

Preferences<LabelledExample> load_labelled(const ModelFiles& files, const LoadExamples& request) {
  LastAnswers answers(files, request.rows);
  return load<LabelledExample>(
      request, TrainingRow::Kind::rated, "has no label that says whether its answer is wanted",
      [&](const TrainingRow& row, RowOrigin from, Preferences<LabelledExample>& out) {
        auto example = answers.make(row.messages, row.chosen, row.tools, from, out.counts);
        if (!example)
          ++out.counts.without_answer;
        else
          out.examples.push_back({std::move(*example), row.desirable});
      });
}

}  // namespace moru
