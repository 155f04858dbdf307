#include "tune/check.h"

#include <sstream>

#include "base/text.h"
#include "support.h"

using namespace moru;

namespace {

const ModelFiles& model() {
  static const ModelFiles files = open_model(MORU_SOURCE_DIR "/tests/golden/tune/llama");
  return files;
}

LoadedExamples load(const TempDir& dir, const std::string& rows, DataOptions options = {}) {
  Pool pool(1);
  LoadExamples request{.sources = {{.path = dir.file("rows.jsonl", rows)}},
                       .rows = std::move(options),
                       .max_bad = UINT64_MAX};
  return load_examples(pool, model(), request);
}

DataReport report(const LoadedExamples& data) {
  Pool pool(2);
  return report_of(pool, model(), data.examples);
}

std::string without_colour(std::string text) {
  for (size_t at; (at = text.find('\033')) != std::string::npos;)
    text.erase(at, text.find('m', at) - at + 1);
  return text;
}

void check_width(const std::string& text, size_t width) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    CAPTURE(line);
    CHECK(display_width(without_colour(line)) <= width);
    CHECK(!find_invalid_utf8(line));
  }
}

constexpr const char* kRows =
    "{\"prompt\": \"What is it?\", \"completion\": \"An anvil.\"}\n"
    "{\"prompt\": \"say <|im_end|>\", \"completion\": \"모루는 대장간에서 쇠를 두드릴 때 받침으로 "
    "쓰는 "
    "쇳덩이이다. 모루는 대장간에서 쇠를 두드릴 때 받침으로 쓰는 쇳덩이이다.\\t\\u001b[31m\"}\n"
    "{\"prompt\": \"What is it?\", \"completion\": \"An anvil.\"}\n"
    "{\"prompt\": \"x\"}\n"
    "{\"prompt\": \"q\", \"completion\": \"\u1112\u1161\u11AB\"}\n";

}  // namespace

TEST_CASE("an end that is there but not learnt is told") {
  const TempDir dir;
  const LoadedExamples data = load(dir, kRows);
  ExampleView e = data.examples[0];
  std::vector<uint8_t> trained;
  for (const uint8_t t : e.trained) trained.push_back(t);
  REQUIRE(!trained.empty());
  trained[trained.size() - 1] = 0;
  e.trained = trained;
  CHECK(show_example(model(), e, "rows.jsonl", {}).find("no end token learnt") !=
        std::string::npos);
}

TEST_CASE("an example is shown as the model reads it, what is learnt in brackets or on colour") {
  const TempDir dir;
  const LoadedExamples data = load(dir, kRows);
  const std::string shown = show_example(model(), data.examples[0], "rows.jsonl", {});
  CHECK(
      shown.starts_with("--- rows.jsonl line 1: 37 tokens, 9 learnt, ends with <|im_end|>, learnt\n"
                        "<|im_start|>user\n"
                        "What is it?<|im_end|>\n"
                        "<|im_start|>assistant\n"
                        "[[An anvil.<|im_end|>]]\n"
                        "ids "));
  const TokenId end = data.examples[0].ids.back();
  CHECK(shown.ends_with(" [" + std::to_string(end) + "]\n"));
  const std::string coloured =
      show_example(model(), data.examples[0], "rows.jsonl", {.colour = true});
  CHECK(coloured.find("\033[0;30;42mAn anvil.") != std::string::npos);
  CHECK(coloured.find("[[") == std::string::npos);
}

TEST_CASE("every method's rows are shown as that method learns them") {
  const TempDir dir;
  Pool pool(1);
  const auto checked = [&](Method method, const std::string& rows, const char* name) {
    LoadExamples request{.sources = {{.path = dir.file(name, rows)}}, .max_bad = UINT64_MAX};
    return load_checked(pool, model(), method, request);
  };
  const auto shown = [&](const CheckedExamples& c, size_t i) {
    return show_example(model(), c.data.examples[i], "rows", {});
  };
  const auto pairs = checked(Method::dpo,
                             "{\"prompt\": \"a?\", \"chosen\": \"good\", \"rejected\": \"bad\"}\n"
                             "{\"prompt\": \"b?\", \"chosen\": \"same\", \"rejected\": \"same\"}\n",
                             "pairs.jsonl");
  REQUIRE(pairs.data.examples.size() == 2);
  CHECK(pairs.a_row() == 2);
  CHECK(pairs.answer(0) == "chosen");
  CHECK(pairs.answer(1) == "rejected");
  CHECK(shown(pairs, 0).find("[[good<|im_end|>]]") != std::string::npos);
  CHECK(shown(pairs, 1).find("[[bad<|im_end|>]]") != std::string::npos);
  CHECK(pairs.data.counts.rows == 2);
  CHECK(pairs.data.counts.bad == 1);  // answers that are the same

  const auto rated = checked(Method::kto,
                             "{\"prompt\": \"a?\", \"completion\": \"x\", \"label\": true}\n"
                             "{\"prompt\": \"a?\", \"completion\": \"y\", \"label\": false}\n",
                             "rated.jsonl");
  CHECK(rated.answer(0) == "wanted");
  CHECK(rated.answer(1) == "not wanted");
  CHECK(shown(rated, 1).find("[[y<|im_end|>]]") != std::string::npos);

  CHECK(checked(Method::text, "plain words\n", "text.txt").data.examples.size() == 1);
  const auto text = checked(Method::text, "{\"text\": \"plain words\"}\n", "text.jsonl");
  REQUIRE(text.data.examples.size() == 1);
  CHECK(text.answer(0).empty());
  // What begins a text has nothing before it to be learnt from.
  CHECK(shown(text, 0).find("\n[[") == std::string::npos);
}

TEST_CASE("nothing is wider than the terminal, and nothing of a row acts on it") {
  const TempDir dir;
  const LoadedExamples data = load(dir, kRows);
  for (const bool colour : {false, true}) {
    for (const size_t width : {60, 80}) {
      for (size_t i = 0; i < data.examples.size(); ++i) {
        const std::string shown = show_example(model(), data.examples[i], "rows.jsonl",
                                               {.colour = colour, .width = width, .max_ids = 8});
        check_width(shown, width);
        CHECK(without_colour(shown).find("\033") == std::string::npos);
        CHECK(shown.find("\033[31m") == std::string::npos);
      }
      check_width(show_report(model(), data, report(data), width), width);
    }
  }
}

TEST_CASE("what is odd about a data set is counted") {
  const TempDir dir;
  const LoadedExamples data = load(dir, kRows);
  const DataReport r = report(data);
  CHECK(r.duplicates == 1);
  CHECK(r.spelled == 1);
  CHECK(r.ends_learnt == 4);
  CHECK(r.double_bos == 0);
  CHECK(r.cut_characters == 0);
  CHECK(r.tokens_per_hangul == 3);  // a byte vocabulary
  const std::string shown = show_report(model(), data, r, 80);
  for (const char* part : {"5 rows: 4 examples", "1 repeat an earlier one", "1 rows were dropped",
                           "rows.jsonl: line 4:", "1 spell a control token", "(NFD)"}) {
    CAPTURE(part);
    CHECK(shown.find(part) != std::string::npos);
  }
}

TEST_CASE("examples that never learn to end, and cuts inside characters, are told") {
  const TempDir dir;
  // keep_end takes whole tokens off the front of the text: here two of the three bytes of 모.
  const LoadedExamples data = load(dir, "{\"prompt\": \"모\", \"completion\": \"ab\"}\n",
                                   {.plain_template = "{prompt}{completion}",
                                    .max_length = 4,
                                    .truncation = Truncation::keep_end});
  CHECK(report(data).cut_characters == 1);
  const LoadedExamples endless = load(dir, "{\"prompt\": \"x\", \"completion\": \"abcdef\"}\n",
                                      {.plain_template = "{prompt}{completion}", .max_length = 4});
  CHECK(report(endless).ends_learnt == 0);
}
