#include "tune/preference_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "base/error.h"
#include "base/hash.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

// Examples of conversations whose last answer alone is learnt.
class LastAnswers {
 public:
  LastAnswers(const ModelFiles& files, const DataOptions& options)
      : system_(options.system), maker_(files, last_only(options)) {}

  // `asks` and then `answers`; nullopt if truncation leaves nothing to learn.
  std::optional<Example> make(Json asks, const Json& answers, const Json& tools, uint64_t line,
                              DataCounts& counts) const {
    if (!system_.empty() && (asks.empty() || asks.front()["role"] != "system"))
      asks.insert(asks.begin(), Json::object({{"role", "system"}, {"content", system_}}));
    for (const Json& turn : answers) asks.push_back(turn);
    Dataset one;
    maker_.add_conversation(asks, tools, line, one);
    counts.truncated += one.counts.truncated;
    counts.without_end += one.counts.without_end;
    if (one.examples.empty()) return std::nullopt;
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

// Rows of `kind`; add(row, its line, into) appends what one becomes.
template <typename Add>
LoadedExamples load(Pool& pool, const LoadExamples& request, TrainingRow::Kind kind,
                    const char* shape, Add&& add) {
  for (const DataSource& source : request.sources)
    if (source.weight != 1 || source.num_samples != 0)
      throw Error(ErrorKind::usage, {.where = source.path.string(),
                                     .what = "preferences are taken as they are, all of them",
                                     .cure = "leave out the weight and the number of samples"});
  return load_examples(pool, request, [&](const Row& row, size_t source, Dataset& into) {
    ++into.counts.rows;
    const auto problem = [&](std::string field, std::string what) {
      ++into.counts.bad;
      into.problems.push_back({row.line, std::move(field), std::move(what)});
    };
    try {
      Json room;
      const TrainingRow read =
          read_row(composed_row(row.value, request.rows.nfc, room, into.counts),
                   request.sources[source].format);
      if (read.kind != kind) throw UnusableRow{"row", shape};
      add(read, row.line, into);
    } catch (const UnusableRow& unusable) {
      problem(unusable.field, unusable.what);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::bad_input) throw;
      problem("messages", error.what());  // the template refused the conversation
    }
  });
}

size_t first_learnt(const Example& e) {
  return static_cast<size_t>(std::find(e.trained.begin(), e.trained.end(), uint8_t{1}) -
                             e.trained.begin());
}

}  // namespace

size_t shared_tokens(const Example& a, const Example& b) {
  const size_t shorter = std::min(a.ids.size(), b.ids.size());
  size_t same = 0;
  while (same < shorter && a.ids[same] == b.ids[same]) ++same;
  const size_t learnt = std::min(first_learnt(a), first_learnt(b));
  return std::min(same, learnt == 0 ? 0 : learnt - 1);
}

// The mark of a pair's second example is how many tokens they share.
PreferenceView PreferenceList::operator[](size_t i) const {
  PreferenceView pair{examples_[2 * i], examples_[2 * i + 1]};
  pair.shared = pair.rejected.mark;
  return pair;
}

ExampleStats PreferenceList::stats() const {
  ExampleStats stats;
  size_t tokens = 0, learnt = 0;  // of the chosen one
  examples_.each([&](size_t i, const ExampleView& e) {
    if (i % 2 == 1) return stats.add(tokens + e.ids.size() - e.mark, learnt + e.learnt);
    tokens = e.ids.size();
    learnt = e.learnt;
  });
  return stats;
}

// The mark of a labelled answer is where it begins, and in the last bit whether it is wanted.
LabelledView LabelledList::operator[](size_t i) const {
  const ExampleView e = examples_[i];
  return {.example = e, .desirable = (e.mark & 1) != 0, .prompt = e.mark >> 1};
}

Example LabelledList::mismatched(size_t i, size_t max_length) const {
  const LabelledView row = (*this)[i], other = (*this)[(i + size() - 1) % size()];
  Example e;
  const auto append = [&](const ExampleView& from, size_t first, size_t end) {
    e.ids.insert(e.ids.end(), &from.ids[first], from.ids.data() + end);
    e.trained.insert(e.trained.end(), &from.trained[first], from.trained.data() + end);
  };
  append(row.example, 0, row.prompt);
  append(other.example, other.prompt, other.example.ids.size());
  e.ids.resize(std::min(e.ids.size(), max_length));
  e.trained.resize(e.ids.size());
  return e;
}

size_t LabelledList::longest(size_t max_length) const {
  size_t longest = 0;
  if (size() == 0) return longest;
  const LabelledView last = (*this)[size() - 1];
  size_t answer = last.example.ids.size() - last.prompt;  // tokens of the row before's
  examples_.each([&](size_t, const ExampleView& e) {
    const size_t prompt = e.mark >> 1;
    longest = std::max({longest, e.ids.size(), std::min(prompt + answer, max_length)});
    answer = e.ids.size() - prompt;
  });
  return longest;
}

LoadedExamples load_pairs(Pool& pool, const ModelFiles& files, const LoadExamples& request) {
  const LastAnswers answers(files, request.rows);
  return load(
      pool, request, TrainingRow::Kind::preference, "has no two answers: chosen and rejected",
      [&](const TrainingRow& row, uint64_t line, Dataset& into) {
        auto chosen = answers.make(row.messages, row.chosen, row.tools, line, into.counts);
        auto rejected = answers.make(row.messages, row.rejected, row.tools, line, into.counts);
        if (!chosen || !rejected || chosen->ids == rejected->ids) {
          ++into.counts.without_answer;
          return;
        }
        rejected->mark = static_cast<uint32_t>(shared_tokens(*chosen, *rejected));
        rejected->hash = chosen->hash;
        // A pair equals another if both answers do.
        const std::array both = {content_hash(*chosen), content_hash(*rejected)};
        chosen->content = short_sha256(std::as_bytes(std::span(both)));
        rejected->content = chosen->content ^ 1;
        into.examples.push_back(std::move(*chosen));
        into.examples.push_back(std::move(*rejected));
      });
}

LoadedExamples load_labelled(Pool& pool, const ModelFiles& files, const LoadExamples& request) {
  const LastAnswers answers(files, request.rows);
  return load(pool, request, TrainingRow::Kind::rated,
              "has no label that says whether its answer is wanted",
              [&](const TrainingRow& row, uint64_t line, Dataset& into) {
                auto example = answers.make(row.messages, row.chosen, row.tools, line, into.counts);
                if (!example) {
                  ++into.counts.without_answer;
                  return;
                }
                example->mark =
                    static_cast<uint32_t>(2 * first_learnt(*example) + (row.desirable ? 1 : 0));
                example->content = content_hash(*example) ^ (row.desirable ? 1 : 0);
                into.examples.push_back(std::move(*example));
              });
}

}  // namespace moru
