#include "prove/gate.h"

#include <fmt/format.h>

#include <cmath>

#include "base/files.h"
#include "base/text.h"
#include "prove/instructions.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

Results results(size_t total, size_t right, size_t cut = 0, size_t tokens = 20) {
  Results r{.name = "m", .key = {.asked_sha256 = "q"}};
  for (size_t i = 0; i < total; ++i)
    r.items.push_back({.id = fmt::format("{}", i),
                       .prompt_sha256 = "p",
                       .correct = i < right,
                       .tokens_out = tokens + i % 3,
                       .cut = i < cut});
  return r;
}

GateMeasures measures() {
  return {.name = "model.gguf",
          .model_sha256 = "x",
          .scores = {results(400, 300)},
          .instructions = results(50, 30),
          .losses = {3.1, 2.9, 3.4, 3.0}};
}

const std::vector<QuestionSet>& one_set() {
  static const std::vector<QuestionSet> sets = [] {
    std::vector<QuestionSet> s(1);
    s[0].where = "folder/a-long-name-of-questions.jsonl";
    return s;
  }();
  return sets;
}

GateVerdict judge(const GateMeasures& after, const GateOptions& options = {}) {
  return judge_gate(measures(), after, one_set(), options);
}

void check_refused(const GateMeasures& after, const std::string& row) {
  const GateVerdict verdict = judge(after);
  CHECK_FALSE(verdict.accepted);
  REQUIRE(verdict.reasons.size() == 1);
  CHECK(verdict.reasons[0].starts_with(row));
  CHECK(table_of(verdict).find("refused: " + row) != std::string::npos);
}

}  // namespace

TEST_CASE("an equal or better model is accepted") {
  CHECK(judge(measures()).accepted);
  GateMeasures better = measures();
  better.scores[0] = results(400, 360);
  better.losses = {2.9, 2.8, 3.3, 2.9};
  const GateVerdict verdict = judge(better);
  CHECK(verdict.accepted);
  CHECK(verdict.rows[0].before == doctest::Approx(0.75));
  CHECK(verdict.rows[0].after == doctest::Approx(0.9));
  CHECK(verdict.rows[0].change.low > 0);
}

TEST_CASE("each of the five measures can refuse alone") {
  GateMeasures after = measures();
  after.scores[0] = results(400, 280);
  check_refused(after, "right: a-long-name-of-questions.jsonl: fell by 5.0 points");

  after = measures();
  after.instructions = results(50, 10);
  check_refused(after, "instructions followed: fell by 40.0 points");

  after = measures();
  after.scores[0] = results(400, 300, 100);
  check_refused(after, "answers that end: fell by");

  after = measures();
  after.instructions = results(50, 30, 0, 60);
  check_refused(after, "mean length, tokens: went from");

  after = measures();
  after.losses = {3.3, 3.1, 3.6, 3.2};
  check_refused(after, "loss, plain text: rose by 0.200");
}

TEST_CASE("a fall within the tolerance or within chance is accepted") {
  GateMeasures after = measures();
  after.scores[0] = results(400, 296);  // one point
  CHECK(judge(after).accepted);
  CHECK_FALSE(judge(after, {.tolerance = 0.005, .standard_errors = 1}).accepted);
  // Of 50 instructions, 8 newly wrong and 5 newly right: 6 points that mean nothing.
  after = measures();
  for (size_t i = 0; i < 8; ++i) after.instructions.items[i].correct = false;
  for (size_t i = 30; i < 35; ++i) after.instructions.items[i].correct = true;
  CHECK(judge(after).accepted);
  CHECK_FALSE(judge(after, {.standard_errors = 0}).accepted);
}

TEST_CASE("losses that each pass add up, and are refused against the model all began with") {
  // Each step may lose a point of 400 questions and 0.05 nats.
  GateMeasures base = measures(), first = measures(), second = measures();
  base.name = "the-base.gguf";
  first.name = first.model_sha256 = "first";
  second.name = second.model_sha256 = "second";
  first.scores[0] = results(400, 297);
  second.scores[0] = results(400, 294);
  const auto judge = [&](const GateMeasures& last, const GateMeasures& after) {
    return judge_chain(base, last, after, one_set(), {});
  };
  const ChainVerdict once = judge(base, first);
  CHECK(once.accepted());
  CHECK_FALSE(once.base);  // the last is the base
  const ChainVerdict twice = judge(first, second);
  CHECK(twice.last.accepted);
  CHECK_FALSE(twice.accepted());
  REQUIRE(twice.reasons().size() == 1);
  CHECK(twice.reasons()[0].starts_with("since the-base.gguf: right: a-long-name"));
  CHECK(table_of(twice).find("second against the-base.gguf\n") != std::string::npos);
  CHECK(to_json(twice)["accepted"] == false);
  CHECK(to_json(twice)["gate"]["accepted"] == true);
  CHECK(to_json(twice)["gate_since_base"]["accepted"] == false);

  second.scores[0] = results(400, 300);
  for (double& loss : first.losses) loss += 0.04;
  second.losses = first.losses;
  for (double& loss : second.losses) loss += 0.04;
  CHECK(judge(base, first).accepted());
  CHECK(judge(first, second).last.accepted);
  CHECK(judge(first, second).reasons() ==
        std::vector<std::string>{"since the-base.gguf: loss, plain text: rose by 0.080, 0.050 "
                                 "allowed"});
  // What a later step wins back is not held against it.
  second.losses = base.losses;
  CHECK(judge(first, second).accepted());
}

TEST_CASE("a loss without a value is refused") {
  GateMeasures after = measures();
  after.losses[2] = std::nan("");
  CHECK_FALSE(judge(after).accepted);
}

TEST_CASE("answers to other questions are not compared") {
  GateMeasures after = measures();
  after.scores[0].key.asked_sha256 = "other";
  CHECK(error_from([&] { judge(after); }).kind() == ErrorKind::bad_input);
}

TEST_CASE("the table fits 80 columns, also with long names and refusals") {
  GateMeasures after = measures();
  after.scores[0] = results(400, 0);
  after.instructions = results(50, 0, 50, 999);
  after.losses = {13.3, 13.1, 13.6, 13.2};
  const GateVerdict verdict = judge(after);
  CHECK(verdict.reasons.size() == 5);
  const std::string table = table_of(verdict);
  for (size_t at = 0; at < table.size();) {
    const size_t end = table.find('\n', at);
    CHECK(display_width(table.substr(at, end - at)) <= 80);
    at = end + 1;
  }
  CHECK(to_json(verdict)["rows"].size() == 5);
  CHECK(to_json(verdict)["accepted"] == false);
}

TEST_CASE("every instruction is sound, and a right answer to it passes") {
  const QuestionSet set = instruction_questions();
  CHECK(set.items.size() >= 40);
  const auto judged = [&](const char* id, const char* answer) {
    for (const Question& q : set.items)
      if (q.id == id) return judge(q.expected, answer).correct;
    FAIL(id);
    return false;
  };
  CHECK(judged("words-3", "deep, blue, endless"));
  CHECK_FALSE(judged("words-3", "deep and blue and endless"));
  CHECK(judged("upper", "GOOD MORNING, TEAM!"));
  CHECK_FALSE(judged("upper", "Good MORNING"));
  CHECK(judged("bullets-3", "- fresh air\n- calm\n- health\n"));
  CHECK_FALSE(judged("bullets-3", "- fresh air\n- calm\n- health\n- joy"));
  CHECK(judged("two-paragraphs", "Summer is hot.\n***\nWinter is cold."));
  CHECK(judged("json-object", "```json\n{\"country\": \"South Korea\", \"city\": \"Busan\"}\n```"));
  CHECK(judged("json-한국어", "{\"name\": \"민수\", \"age\": 30}"));
  CHECK(judged("in-korean", "나무는 줄기와 잎이 있는 식물입니다."));
  CHECK_FALSE(judged("in-korean", "A tree is 나무."));
  CHECK(judged("끝", "낮에 걸으세요. 이상입니다."));
  CHECK(judged("forbidden", "The sun is a star."));
  CHECK_FALSE(judged("forbidden", "The sun is hot."));
}

TEST_CASE("a model measured twice passes its own gate; a spoilt one does not") {
  const TempDir folder;
  const std::filesystem::path path = folder.path() / "tiny.gguf";
  write_tiny_model(path);
  const ModelFiles files = open_model(path);
  Pool pool(2);
  const GateOptions options{.limits = {.max_tokens = 8}, .instruction_tokens = 4};
  const std::vector<QuestionSet> questions = {
      read_questions(folder.file("q.jsonl", "{\"prompt\": \"a\", \"answer\": \"b\"}\n"))};
  const auto measure = [&](const ModelFiles& f, const char* kept) {
    const Model model = load_model(pool, f, {.context = 1024});
    Engine engine(pool, model);
    return measure_for_gate(
        questions, "tiny", "hash", engine, f, {}, options,
        *kept == '\0' ? "" : (make_folder(folder.path() / kept), folder.path() / kept));
  };
  const GateMeasures first = measure(files, "kept"), again = measure(files, "kept");
  CHECK(first.losses == again.losses);
  CHECK(std::filesystem::exists(folder.path() / "kept" / "questions-1.jsonl"));
  CHECK(judge_gate(first, again, questions, options).accepted);
  CHECK(judge_gate(first, measure(files, ""), questions, options).accepted);
  GateMeasures spoilt = first;
  for (double& loss : spoilt.losses) loss += 1;
  CHECK_FALSE(judge_gate(first, spoilt, questions, options).accepted);
}

TEST_CASE("questions that fill the cache leave room for the instructions after them") {
  const TempDir folder;
  const std::filesystem::path path = folder.path() / "tiny.gguf";
  write_tiny_model(path);
  const ModelFiles files = open_model(path);
  Pool pool(2);
  std::string rows;
  for (int i = 0; i < 24; ++i)
    rows += fmt::format("{{\"prompt\": \"{} {}\", \"answer\": \"b\"}}\n", i,
                        std::string(150, static_cast<char>('a' + i)));
  const std::vector<QuestionSet> questions = {read_questions(folder.file("q.jsonl", rows))};
  const Model model = load_model(pool, files, {.context = 1024});
  Engine engine(pool, model, {.cache_tokens = 1536});
  const GateOptions options{.limits = {.max_tokens = 8}, .instruction_tokens = 4};
  const GateMeasures measured =
      measure_for_gate(questions, "tiny", "hash", engine, files, {}, options);
  CHECK(measured.scores[0].items.size() == 24);
  CHECK(measured.instructions.items.size() == 48);
  CHECK(engine.cache().free_pages() == engine.cache().total_pages());
}
