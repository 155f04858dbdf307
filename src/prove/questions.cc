#include "prove/questions.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <unordered_set>

#include "base/error.h"
#include "base/hash.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<std::string_view, 4> kRoles = {"system", "developer", "user", "assistant"};

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// JSON inside a cell. Deeper values than anyone writes are refused: copying them would recurse.
Json parse_cell(const std::string& cell) {
  constexpr int kMaxDepth = 64;
  bool too_deep = false;
  const auto watch = [&](int depth, Json::parse_event_t, Json&) {
    too_deep |= depth > kMaxDepth;
    return depth <= kMaxDepth;
  };
  Json value = Json::parse(cell, watch, false);
  return too_deep ? Json(Json::value_t::discarded) : value;
}

// Reads the fields of one row, and knows how to refuse them.
class Fields {
 public:
  Fields(const std::string& where, const Row& row) : where_(where), row_(row) {}

  // nullptr where the field is absent, null, or an empty cell.
  const Json* find(const std::string& name) const {
    const auto field = row_.value.find(name);
    if (field == row_.value.end() || field->is_null()) return nullptr;
    if (field->is_string() && field->get_ref<const std::string&>().empty()) return nullptr;
    return &*field;
  }

  std::optional<std::string> text(const std::string& name) const {
    const Json* field = find(name);
    if (field == nullptr) return std::nullopt;
    if (!is_scalar(*field)) refuse(name, "is not text", "write it as one string");
    return scalar_text(*field);
  }

  // For fields that may mean something else in files not written for moru.
  std::string text_if_any(const std::string& name) const {
    const Json* field = find(name);
    return field != nullptr && is_scalar(*field) ? scalar_text(*field) : "";
  }

  // A list: a JSON array, a string that holds one, or texts separated by "|" in a string.
  std::vector<std::string> list(const std::string& name, bool elements_are_json) const {
    const Json* field = find(name);
    if (field == nullptr) return {};
    if (field->is_array()) return texts(name, *field, elements_are_json);
    if (!field->is_string())
      refuse(name, "is not a list", "write a JSON array, or texts separated by |");
    const std::string& cell = field->get_ref<const std::string&>();
    const Json parsed = cell.front() == '[' ? parse_cell(cell) : Json();
    if (parsed.is_array()) return texts(name, parsed, elements_are_json);
    std::vector<std::string> parts;
    for (size_t at = 0; at <= cell.size();) {
      const size_t bar = std::min(cell.find('|', at), cell.size());
      parts.push_back(normalise_answer(cell.substr(at, bar - at)));
      at = bar + 1;
    }
    return parts;
  }

  bool flag(const std::string& name, bool otherwise) const {
    const Json* field = find(name);
    if (field == nullptr) return otherwise;
    if (field->is_boolean()) return field->get<bool>();
    if (*field == "true" || *field == "1" || *field == 1) return true;
    if (*field == "false" || *field == "0" || *field == 0) return false;
    refuse(name, "is neither true nor false", "write true or false");
  }

  static bool is_scalar(const Json& value) { return value.is_primitive() && !value.is_null(); }
  static std::string scalar_text(const Json& value) {
    return value.is_string() ? value.get<std::string>() : dump(value);
  }

  std::string names() const {
    std::string list;
    for (const auto& [name, value] : row_.value.items()) list += (list.empty() ? "" : ", ") + name;
    return list.empty() ? "none" : list;
  }

  [[noreturn]] void refuse(const std::string& field, std::string what, std::string cure) const {
    throw Error(ErrorKind::bad_input,
                {.where = fmt::format("{}: line {}, field {}", where_, row_.line, field),
                 .what = std::move(what),
                 .cure = std::move(cure)});
  }

 private:
  std::vector<std::string> texts(const std::string& name, const Json& array,
                                 bool elements_are_json) const {
    std::vector<std::string> texts;
    for (const Json& element : array) {
      if (!is_scalar(element) && !elements_are_json)
        refuse(name, fmt::format("its item {} is not text", texts.size() + 1),
               "write an array of strings");
      texts.push_back(is_scalar(element) ? scalar_text(element) : dump(element));
    }
    return texts;
  }

  const std::string& where_;
  const Row& row_;
};

Json message(std::string_view role, std::string content) {
  return {{"role", role}, {"content", std::move(content)}};
}

Json read_conversation(const Fields& fields) {
  const Json* field = fields.find("messages");
  const Json messages =
      field->is_string() ? parse_cell(field->get_ref<const std::string&>()) : *field;
  const auto refuse = [&](std::string what) {
    fields.refuse("messages", std::move(what),
                  "write [{\"role\": \"user\", \"content\": \"…\"}, …] that ends with the user");
  };
  if (!messages.is_array() || messages.empty()) refuse("is not a list of messages");
  for (size_t i = 0; i < messages.size(); ++i) {
    const Json& m = messages[i];
    const auto is_text = [&](const char* key) { return m.contains(key) && m[key].is_string(); };
    if (!m.is_object() || !is_text("role") || !is_text("content"))
      refuse(fmt::format("message {} lacks a role or a text content", i + 1));
    const std::string& role = m["role"].get_ref<const std::string&>();
    if (std::find(kRoles.begin(), kRoles.end(), role) == kRoles.end())
      refuse(fmt::format("message {} has the unknown role {}", i + 1, dump(m["role"])));
  }
  if (messages.back()["role"] == "assistant") refuse("the last message is the assistant's");
  return messages;
}

Json read_messages(const Fields& fields, const QuestionOptions& options) {
  Json messages = Json::array();
  if (std::optional<std::string> prompt = fields.text(options.prompt_column)) {
    messages.push_back(message("user", std::move(*prompt)));
  } else if (fields.find("messages") != nullptr) {
    messages = read_conversation(fields);
  } else {
    fields.refuse(options.prompt_column,
                  fmt::format("is missing, and so is messages (fields here: {})", fields.names()),
                  "give every question a prompt, or name its column with --prompt-column");
  }
  const std::string system = fields.text(options.system_column).value_or(options.system);
  const bool has_system = messages[0]["role"] == "system" || messages[0]["role"] == "developer";
  if (!system.empty() && !has_system) messages.insert(messages.begin(), message("system", system));
  return messages;
}

std::optional<Check> read_check(const Fields& fields, const QuestionOptions& options) {
  const std::optional<std::string> name = fields.text("check");
  if (!name) return options.check;
  const std::optional<Check> check = check_named(*name);
  if (!check)
    fields.refuse("check", fmt::format("there is no check named \"{}\"", *name),
                  fmt::format("use one of {}", names_of_checks()));
  return check;
}

// The expected answers as texts. `json`: a string is JSON text already, and an array is one value.
std::vector<std::string> read_answers(const Fields& fields, const QuestionOptions& options,
                                      bool json) {
  const Json* one = fields.find(options.answer_column);
  if (one == nullptr) return fields.list("answers", json);
  if (json || Fields::is_scalar(*one))
    return {one->is_string() ? one->get<std::string>() : dump(*one)};
  if (one->is_array()) return fields.list(options.answer_column, false);
  fields.refuse(options.answer_column, "is an object",
                "add \"check\": \"json\" to compare objects");
}

// An answer to a choice may also be its letter (A, B, …) or, as a number, its place from 0; a
// choice of the same text comes first.
void resolve_choices(Expectation& expected) {
  for (std::string& answer : expected.answers) {
    const std::vector<std::string>& choices = expected.choices;
    if (std::find(choices.begin(), choices.end(), answer) != choices.end()) continue;
    size_t index = choices.size();
    if (answer.size() == 1 && answer[0] >= 'A' && answer[0] <= 'Z')
      index = static_cast<size_t>(answer[0] - 'A');
    else if (!answer.empty() && answer.size() <= 4 &&
             std::all_of(answer.begin(), answer.end(), [](char c) { return c >= '0' && c <= '9'; }))
      index = std::stoul(answer);
    if (index < choices.size()) answer = choices[index];
  }
}

const char* cure_for(Check check) {
  switch (check) {
    case Check::exact:
    case Check::contains:
      return "give the text that a right answer has";
    case Check::regex:
      return "correct the pattern (PCRE2 syntax)";
    case Check::number:
      return "give one number, such as 42, 1,234.5 or 12%";
    case Check::choice:
      return "give the text of a choice, its letter, or its place from 0";
    case Check::json:
      return "give a JSON value";
    case Check::similarity:
      return "give the text to be close to, and at_least in (0, 1]";
  }
  return "";
}

Expectation read_expectation(const Fields& fields, const QuestionOptions& options) {
  Expectation expected;
  expected.choices = fields.list(options.choices_column, false);
  const std::optional<Check> check = read_check(fields, options);
  expected.check = check.value_or(expected.choices.empty() ? Check::exact : Check::choice);
  expected.ignore_case = fields.flag("ignore_case", options.ignore_case);
  if (expected.check == Check::choice && expected.choices.size() < 2)
    fields.refuse(options.choices_column, fmt::format("has {} choices", expected.choices.size()),
                  "a question with check \"choice\" needs at least two");

  const std::string within = fields.text("within").value_or(options.within);
  if (!within.empty()) {
    const std::optional<Tolerance> tolerance = parse_tolerance(within);
    if (!tolerance)
      fields.refuse("within", fmt::format("\"{}\" is not a tolerance", within),
                    "write a number such as 0.5, or a share such as 1%");
    expected.within = *tolerance;
  }
  if (const std::optional<std::string> at_least = fields.text("at_least")) {
    const char* end = at_least->data() + at_least->size();
    const auto read = std::from_chars(at_least->data(), end, expected.at_least);
    if (read.ec != std::errc() || read.ptr != end)
      fields.refuse("at_least", fmt::format("\"{}\" is not a number", *at_least),
                    "write a share such as 0.5");
  }

  expected.answers = read_answers(fields, options, expected.check == Check::json);
  if (expected.answers.empty())
    fields.refuse(options.answer_column,
                  fmt::format("is missing, and so is answers (fields here: {})", fields.names()),
                  "give every question an answer, or name its column with --answer-column");
  if (expected.check == Check::choice) resolve_choices(expected);
  if (std::optional<std::string> problem = problem_with(expected))
    fields.refuse(options.answer_column, std::move(*problem), cure_for(expected.check));
  return expected;
}

// All that decides a result, as one line.
std::string canonical(const Question& question) {
  const Expectation& e = question.expected;
  Json line = {question.id, question.messages, name_of(e.check),  e.answers,
               e.choices,   e.within.amount,   e.within.relative, e.ignore_case};
  if (e.check == Check::similarity) line.push_back(e.at_least);
  return dump(line);
}

bool is_answer_in_full(Check check) { return check != Check::contains && check != Check::regex; }

void keep_sample(std::vector<Question>& items, size_t limit) {
  if (limit == 0 || items.size() <= limit) return;
  const auto rank = [](const Question& q) { return std::tie(q.prompt_sha256, q.id); };
  std::vector<const Question*> order;
  for (const Question& question : items) order.push_back(&question);
  std::nth_element(order.begin(), order.begin() + static_cast<ptrdiff_t>(limit - 1), order.end(),
                   [&](const Question* a, const Question* b) { return rank(*a) < rank(*b); });
  const Question last = *order[limit - 1];
  std::erase_if(items, [&](const Question& q) { return rank(q) > rank(last); });
}

}  // namespace

Question question_from_row(const std::string& where, const Row& row,
                           const QuestionOptions& options) {
  const Fields fields(where, row);
  Question question;
  question.line = row.line;
  question.id = fields.text(options.id_column).value_or("");
  question.messages = read_messages(fields, options);
  question.expected = read_expectation(fields, options);
  question.category = fields.text_if_any("category");
  question.reference = fields.text_if_any("reference");
  if (question.reference.empty() && is_answer_in_full(question.expected.check))
    question.reference = question.expected.answers.front();
  question.prompt_sha256 = sha256(dump(question.messages));
  return question;
}

Json row_of(const Question& question) {
  const Expectation& e = question.expected;
  Json row = {{"id", question.id}, {"messages", question.messages}, {"check", name_of(e.check)}};
  if (e.answers.size() == 1)
    row["answer"] = e.answers.front();
  else
    row["answers"] = e.answers;
  if (!e.choices.empty()) row["choices"] = e.choices;
  if (e.within.relative) row["within"] = fmt::format("{}%", 100 * e.within.amount);
  if (!e.within.relative && e.within.amount > 0) row["within"] = e.within.amount;
  if (e.ignore_case) row["ignore_case"] = true;
  if (e.check == Check::similarity) row["at_least"] = e.at_least;
  if (!question.category.empty()) row["category"] = question.category;
  if (!question.reference.empty()) row["reference"] = question.reference;
  return row;
}

QuestionSet read_questions(const std::filesystem::path& path, const QuestionOptions& options) {
  if (!options.within.empty() && !parse_tolerance(options.within))
    throw Error(ErrorKind::usage, {.where = "--within",
                                   .what = fmt::format("\"{}\" is not a tolerance", options.within),
                                   .cure = "write a number such as 0.5, or a share such as 1%"});
  QuestionSet set;
  set.where = path.string();
  set.file_sha256 = sha256_of_path(path);
  std::unordered_set<std::string> ids, prompts;
  for (const Row& row : read_records(path)) {
    Question question = question_from_row(set.where, row, options);
    if (question.id.empty()) question.id = std::to_string(set.items.size() + 1);
    if (!ids.insert(question.id).second)
      throw Error(
          ErrorKind::bad_input,
          {.where = fmt::format("{}: line {}, field {}", set.where, row.line, options.id_column),
           .what = fmt::format("\"{}\" stands in an earlier row too", question.id),
           .cure = "give every question an id of its own, or none any"});
    set.items.push_back(std::move(question));
  }
  if (set.items.empty())
    throw Error(ErrorKind::bad_input, {.where = set.where,
                                       .what = "holds no questions",
                                       .cure = "give a file with one question a row"});
  keep_sample(set.items, options.limit);
  std::string asked;
  for (const Question& question : set.items) {
    if (!prompts.insert(question.prompt_sha256).second) ++set.repeated;
    asked += canonical(question) + '\n';
  }
  set.asked_sha256 = sha256(asked);
  return set;
}

}  // namespace moru
