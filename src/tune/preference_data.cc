#include "tune/preference_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "base/error.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

// A row that cannot be used: what stands at which field.
struct Unusable {
  std::string field, what;
};

const Json& member(const Json& row, const char* field) {
  const auto found = row.find(field);
  if (found == row.end()) throw Unusable{field, "is missing"};
  return *found;
}

bool is_turn(const Json& value) {
  return value.is_object() && (value.contains("role") || value.contains("from"));
}

// A text, one turn or a list of turns as a list; a text is said by `role`.
Json turns_of(const Json& value, const char* role, const char* field) {
  if (value.is_string()) {
    Json turns = Json::array();
    turns.push_back({{"role", role}, {"content", value}});
    return turns;
  }
  if (is_turn(value)) {
    Json turns = Json::array();
    turns.push_back(value);
    return turns;
  }
  if (value.is_array() && std::all_of(value.begin(), value.end(), is_turn)) return value;
  throw Unusable{field, "is neither a text nor a list of turns"};
}

Json joined(Json first, const Json& more) {
  for (const Json& turn : more) first.push_back(turn);
  return first;
}

Json instruction_of(const Json& row) {
  const Json& instruction = member(row, "instruction");
  if (!instruction.is_string()) throw Unusable{"instruction", "is not a text"};
  std::string text = instruction.get<std::string>();
  if (const auto input = row.find("input"); input != row.end() && input->is_string())
    if (const std::string more = input->get<std::string>(); !more.empty()) text += "\n" + more;
  return turns_of(Json(text), "user", "instruction");
}

Json prompt_of(const Json& row) {
  if (row.contains("conversations")) return turns_of(row["conversations"], "user", "conversations");
  if (row.contains("instruction") && !row.contains("prompt")) return instruction_of(row);
  return turns_of(member(row, "prompt"), "user", "prompt");
}

void put_system(const Json& row, Json& turns) {
  const auto system = row.find("system");
  if (system == row.end() || !system->is_string() || *system == "") return;
  if (!turns.empty() && turns[0].value("role", "") == "system") return;
  turns.insert(turns.begin(), Json{{"role", "system"}, {"content", *system}});
}

// The turns before the answers, and the answers' own.
struct Conversations {
  Json prompt, chosen, rejected;
};

Conversations conversations_of(const Json& row) {
  Conversations out;
  const bool compares = row.contains("output") && !row.contains("chosen");
  if (compares) {
    const Json& both = row["output"];
    if (!both.is_array() || both.size() != 2) throw Unusable{"output", "is not [chosen, rejected]"};
    out.chosen = turns_of(both[0], "assistant", "output");
    out.rejected = turns_of(both[1], "assistant", "output");
  } else {
    out.chosen = turns_of(member(row, "chosen"), "assistant", "chosen");
    out.rejected = turns_of(member(row, "rejected"), "assistant", "rejected");
  }
  // Lists that hold the whole conversation: what they begin with is the prompt.
  const size_t shorter = std::min(out.chosen.size(), out.rejected.size());
  size_t same = 0;
  while (same + 1 < shorter && out.chosen[same] == out.rejected[same]) ++same;
  if (same == 0) {
    out.prompt = prompt_of(row);
  } else {
    const auto split = static_cast<std::ptrdiff_t>(same);
    out.prompt = Json(out.chosen.begin(), out.chosen.begin() + split);
    out.chosen = Json(out.chosen.begin() + split, out.chosen.end());
    out.rejected = Json(out.rejected.begin() + split, out.rejected.end());
  }
  put_system(row, out.prompt);
  return out;
}

bool label_of(const Json& row) {
  const char* field = row.contains("label") ? "label" : "kto_tag";
  const Json& value = member(row, field);
  if (value.is_boolean()) return value.get<bool>();
  if (value == 0 || value == 1) return value == 1;
  for (const char* yes : {"true", "True", "1"})
    if (value == yes) return true;
  for (const char* no : {"false", "False", "0"})
    if (value == no) return false;
  throw Unusable{field, "is neither true nor false"};
}

// Examples of conversations whose last answer alone is learnt.
class LastAnswers {
 public:
  LastAnswers(const ModelFiles& files, const DataOptions& options)
      : maker_(files, last_only(options)) {}

  // nullopt: truncation leaves nothing to learn.
  std::optional<Example> make(const Json& turns, const Json& row, uint64_t line,
                              DataCounts& counts) const {
    Json value = {{"messages", turns}};
    if (row.contains("tools")) value["tools"] = row["tools"];
    Dataset one;
    maker_.add({line, std::move(value)}, one);
    if (!one.problems.empty()) throw Unusable{one.problems[0].field, one.problems[0].what};
    counts.truncated += one.counts.truncated;
    counts.without_end += one.counts.without_end;
    if (one.examples.empty()) return std::nullopt;
    return std::move(one.examples.back());
  }

 private:
  static DataOptions last_only(DataOptions options) {
    options.last_turn_only = true;
    options.prompt_column.clear();
    options.completion_column.clear();
    return options;
  }
  ExampleMaker maker_;
};

// Reads rows one by one; `add` appends what a row gives.
template <typename T, typename Add>
Preferences<T> load(const std::filesystem::path& path, const char* shape, Add&& add) {
  RecordReader reader(path);
  Preferences<T> out;
  while (const std::optional<Row> row = reader.next()) {
    ++out.counts.rows;
    try {
      add(*row, out);
    } catch (const Unusable& unusable) {
      ++out.counts.bad;
      out.problems.push_back({row->line, unusable.field, unusable.what});
    }
  }
  for (const RowProblem& problem : reader.problems()) {
    ++out.counts.rows;
    ++out.counts.bad;
    out.problems.push_back(problem);
  }
  if (out.examples.empty())
    throw Error(
        ErrorKind::bad_input,
        {.where = path.string(),
         .what =
             out.problems.empty()
                 ? fmt::format("none of {} rows leaves an answer to learn from", out.counts.rows)
                 : fmt::format("no row can be used; line {}: {} {}", out.problems[0].line,
                               out.problems[0].field, out.problems[0].what),
         .cure = shape});
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

Preferences<PreferenceExample> load_pairs(const std::filesystem::path& path,
                                          const ModelFiles& files, const DataOptions& options) {
  const LastAnswers answers(files, options);
  return load<PreferenceExample>(
      path, "rows need prompt, chosen and rejected",
      [&](const Row& row, Preferences<PreferenceExample>& out) {
        const Conversations c = conversations_of(row.value);
        const auto make = [&](const Json& answer) {
          return answers.make(joined(c.prompt, answer), row.value, row.line, out.counts);
        };
        auto chosen = make(c.chosen), rejected = make(c.rejected);
        if (!chosen || !rejected || chosen->ids == rejected->ids) {
          ++out.counts.without_answer;
          return;
        }
        const size_t shared = shared_tokens(*chosen, *rejected);
        out.examples.push_back({std::move(*chosen), std::move(*rejected), shared});
      });
}

Preferences<LabelledExample> load_labelled(const std::filesystem::path& path,
                                           const ModelFiles& files, const DataOptions& options) {
  const LastAnswers answers(files, options);
  return load<LabelledExample>(
      path, "rows need prompt, completion and label",
      [&](const Row& row, Preferences<LabelledExample>& out) {
        const bool desirable = label_of(row.value);
        Json turns;
        if (row.value.contains("messages")) {
          turns = turns_of(row.value["messages"], "user", "messages");
        } else {
          const char* answer = row.value.contains("completion") ? "completion" : "output";
          turns = joined(prompt_of(row.value),
                         turns_of(member(row.value, answer), "assistant", answer));
        }
        put_system(row.value, turns);
        auto example = answers.make(turns, row.value, row.line, out.counts);
        if (!example)
          ++out.counts.without_answer;
        else
          out.examples.push_back({std::move(*example), desirable});
      });
}

}  // namespace moru
