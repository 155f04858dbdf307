#include "prove/questions.h"

#include <fmt/format.h>

#include "support.h"

using namespace moru;

namespace {

QuestionSet read(std::string_view name, std::string_view content,
                 const QuestionOptions& options = {}) {
  const TempDir folder;
  return read_questions(folder.file(name, content), options);
}

Error refusal(std::string_view content, const QuestionOptions& options = {}) {
  return error_from([&] { read("q.jsonl", content, options); });
}

}  // namespace

TEST_CASE("a prompt becomes one user message, after the system message") {
  const QuestionSet set =
      read("q.jsonl",
           "{\"prompt\": \"Hi\", \"answer\": \"hello\"}\n"
           "{\"system\": \"Be brief.\", \"prompt\": \"안녕\", \"answer\": \"네\"}\n",
           {.system = "Answer."});
  REQUIRE(set.items.size() == 2);
  CHECK(set.items[0].messages.dump() ==
        R"([{"role":"system","content":"Answer."},{"role":"user","content":"Hi"}])");
  CHECK(set.items[1].messages[0]["content"] == "Be brief.");
  CHECK(set.items[0].id == "1");
  CHECK(set.items[1].line == 2);
  CHECK(set.items[1].expected.check == Check::exact);
}

TEST_CASE("a conversation is taken as it stands") {
  const QuestionSet set = read("q.json", R"([{"messages": [{"role": "user", "content": "a"},
                                       {"role": "assistant", "content": "b"},
                                       {"role": "user", "content": "c"}],
                          "answers": ["d", 5], "id": "x"}])");
  CHECK(set.items[0].messages.size() == 3);
  CHECK(set.items[0].id == "x");
  CHECK(set.items[0].expected.answers == std::vector<std::string>{"d", "5"});
}

TEST_CASE("a CSV may name its columns as it likes") {
  const QuestionSet set = read("q.csv",
                               "text,category\r\n"
                               "\"I lost, my card\",card_lost\r\n"
                               "환불해 주세요,refund\r\n",
                               {.prompt_column = "text", .answer_column = "category"});
  REQUIRE(set.items.size() == 2);
  CHECK(set.items[0].messages[0]["content"] == "I lost, my card");
  CHECK(set.items[1].expected.answers == std::vector<std::string>{"refund"});
}

TEST_CASE("every check can be asked for in a row") {
  const QuestionSet set =
      read("q.jsonl",
           R"({"prompt": "p", "check": "number", "answer": 1234.5, "within": "1%"}
{"prompt": "p", "check": "number", "answer": "1,234", "within": 0.5}
{"prompt": "p", "check": "regex", "answer": "^a", "ignore_case": true}
{"prompt": "p", "check": "json", "answer": {"b": 1, "a": [2]}}
{"prompt": "p", "check": "json", "answer": "[1]"}
{"prompt": "p", "choices": ["yes", "no"], "answer": "no"}
{"prompt": "p", "choices": ["yes", "no"], "answer": "B"}
{"prompt": "p", "choices": ["1", "0"], "answer": 1}
{"prompt": "p", "choices": ["yes", "no"], "answer": 0}
{"prompt": "p", "check": "contains", "answers": ["a", "b"]}
{"prompt": "p", "answer": true}
)");
  const auto& items = set.items;
  CHECK(items[0].expected.within.relative);
  CHECK(items[0].expected.answers[0] == "1234.5");
  CHECK(items[1].expected.within.amount == 0.5);
  CHECK(items[2].expected.ignore_case);
  CHECK(items[3].expected.answers[0] == R"({"b":1,"a":[2]})");
  CHECK(items[4].expected.answers[0] == "[1]");
  for (const size_t i : {5u, 6u}) {
    CHECK(items[i].expected.check == Check::choice);
    CHECK(items[i].expected.answers[0] == "no");
  }
  CHECK(items[7].expected.answers[0] == "1");  // the text of a choice comes before its place
  CHECK(items[8].expected.answers[0] == "yes");
  CHECK(items[9].expected.answers.size() == 2);
  CHECK(items[10].expected.answers[0] == "true");
  CHECK(set.repeated == 10);
}

TEST_CASE("lists in a CSV are JSON or separated by bars") {
  const QuestionSet set = read("q.csv",
                               "prompt,choices,answers,check\n"
                               "p,yes | no,no,\n"
                               "p,\"[\"\"a|b\"\", \"\"c\"\"]\",a|b,exact\n"
                               "p,,\"[\"\"a|b\"\"]\",exact\n");
  CHECK(set.items[0].expected.choices == std::vector<std::string>{"yes", "no"});
  CHECK(set.items[0].expected.check == Check::choice);
  CHECK(set.items[1].expected.choices[0] == "a|b");
  CHECK(set.items[1].expected.answers == std::vector<std::string>{"a", "b"});
  CHECK(set.items[2].expected.answers == std::vector<std::string>{"a|b"});
}

TEST_CASE("a row that is no question is refused with line, field and cure") {
  struct Case {
    const char* row;
    const char* field;
    const char* what;
  };
  const Case cases[] = {
      {R"({"answer": "a"})", "field prompt",
       "is missing, and so is messages (fields here: answer)"},
      {R"({"prompt": "p"})", "field answer", "is missing"},
      {R"({"prompt": "p", "answer": ""})", "field answer", "is missing"},
      {R"({"prompt": "p", "answer": " "})", "field answer", "is empty"},
      {R"({"prompt": ["p"], "answer": "a"})", "field prompt", "is not text"},
      {R"({"prompt": "p", "answer": {"a": 1}})", "field answer", "is an object"},
      {R"({"prompt": "p", "answers": [{"a": 1}]})", "field answers", "item 1 is not text"},
      {R"({"prompt": "p", "answer": "a", "check": "exat"})", "field check", "\"exat\""},
      {R"({"prompt": "p", "answer": "a", "check": "choice"})", "field choices", "has 0 choices"},
      {R"({"prompt": "p", "answer": "c", "choices": ["a", "b"]})", "field answer",
       "“c” is not one"},
      {R"({"prompt": "p", "answer": "(", "check": "regex"})", "field answer", "byte 1"},
      {R"({"prompt": "p", "answer": "x", "check": "number"})", "field answer", "not one number"},
      {R"({"prompt": "p", "answer": "1", "within": "1 kg"})", "field within", "1 kg"},
      {R"({"prompt": "p", "answer": "1", "ignore_case": "maybe"})", "field ignore_case", "neither"},
      {R"({"messages": [], "answer": "1"})", "field messages", "not a list"},
      {R"({"messages": "[[", "answer": "1"})", "field messages", "not a list"},
      {R"({"messages": [{"role": "user"}], "answer": "1"})", "field messages", "message 1 lacks"},
      {R"({"messages": [{"role": "bot", "content": ""}], "answer": "1"})", "field messages", "bot"},
      {R"({"messages": [{"role": "assistant", "content": ""}], "answer": "1"})", "field messages",
       "the last message"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.row);
    const Error error =
        refusal(fmt::format("{{\"prompt\": \"p\", \"answer\": \"a\"}}\n{}\n", c.row));
    CHECK(error.kind() == ErrorKind::bad_input);
    CHECK(error.where().find("q.jsonl: line 2, ") != std::string::npos);
    CHECK(error.where().ends_with(c.field));
    CHECK(error.problem().find(c.what) != std::string::npos);
    CHECK(!error.cure().empty());
  }
}

TEST_CASE("a cell nested past all use is refused, not followed") {
  const std::string deep = std::string(100'000, '[') + std::string(100'000, ']');
  const Error error = refusal("{\"messages\": \"" + deep + "\", \"answer\": \"1\"}\n");
  CHECK(error.problem() == "is not a list of messages");
}

TEST_CASE("ids must differ, and there must be questions") {
  const char* row = "{\"id\": 7, \"prompt\": \"p\", \"answer\": \"a\"}\n";
  CHECK(refusal(std::string(row) + row).problem() == "\"7\" stands in an earlier row too");
  CHECK(refusal("[]").problem() == "holds no questions");
  CHECK(refusal("{\"prompt\": \"p\", \"answer\": \"1\"}\n", {.within = "x"}).kind() ==
        ErrorKind::usage);
}

TEST_CASE("a limit takes the same sample whatever the order of the file") {
  std::string rows, reversed;
  for (int i = 0; i < 50; ++i) {
    const std::string row = fmt::format(R"({{"id": {}, "prompt": "p{}", "answer": "a"}})", i, i);
    rows += row + "\n";
    reversed = row + "\n" + reversed;
  }
  const auto ids = [](const QuestionSet& set) {
    std::vector<std::string> found;
    for (const Question& q : set.items) found.push_back(q.id);
    std::sort(found.begin(), found.end());
    return found;
  };
  const QuestionSet some = read("q.jsonl", rows, {.limit = 7});
  CHECK(some.items.size() == 7);
  CHECK(ids(some) == ids(read("q.jsonl", reversed, {.limit = 7})));
  CHECK(read("q.jsonl", rows, {.limit = 100}).items.size() == 50);
}

TEST_CASE("the hash of what is asked ignores the file's form and sees every change in meaning") {
  const std::string jsonl = read("q.jsonl", R"({"prompt": "p", "answer": "a"})").asked_sha256;
  CHECK(jsonl == read("q.csv", "prompt,answer\np,a\n").asked_sha256);
  CHECK(jsonl != read("q.csv", "prompt,answer\np,b\n").asked_sha256);
  CHECK(jsonl != read("q.csv", "prompt,answer\np,a\n", {.system = "s"}).asked_sha256);
  CHECK(jsonl != read("q.csv", "prompt,answer\np,a\n", {.ignore_case = true}).asked_sha256);
}

TEST_CASE("a question becomes the row that it came from") {
  const QuestionSet set =
      read("q.jsonl", R"({"prompt": "a", "answer": "x", "ignore_case": true})"
                      "\n"
                      R"({"prompt": "b", "answer": {"k": [1, "2"]}, "check": "json"})"
                      "\n"
                      R"({"prompt": "c", "answers": [3, 4], "check": "number", "within": "1%"})"
                      "\n"
                      R"({"prompt": "d", "choices": ["yes", "no"], "answer": "B"})"
                      "\n"
                      R"({"system": "s", "prompt": "e", "answer": "long text", "at_least": 0.7, )"
                      R"("check": "similarity", "category": "letters"})"
                      "\n"
                      R"({"prompt": "f", "answer": "^x", "check": "regex", "reference": "xy"})");
  std::string rows;
  for (const Question& question : set.items) rows += row_of(question).dump() + "\n";
  const QuestionSet again = read("again.jsonl", rows);
  CHECK(again.asked_sha256 == set.asked_sha256);
  REQUIRE(again.items.size() == 6);
  for (size_t i = 0; i < 6; ++i) {
    CHECK(again.items[i].reference == set.items[i].reference);
    CHECK(again.items[i].category == set.items[i].category);
  }
  CHECK(set.items[1].reference == R"({"k":[1,"2"]})");
  CHECK(set.items[3].reference == "no");
  CHECK(again.items[4].expected.at_least == 0.7);
  CHECK(again.items[5].reference == "xy");
}
