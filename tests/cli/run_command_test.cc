// moru run as a person runs it: every flag of sampling and of form does what its help says.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "program.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

using Words = std::vector<std::string>;

struct Models {
  TempDir folder;
  std::string free = (folder.path() / "free.gguf").string();      // says anything
  std::string parrot = (folder.path() / "parrot.gguf").string();  // says its last token again
  Models() {
    write_tiny_model(free, {.embedding_gain = 1});
    write_tiny_model(parrot, {.embedding_gain = 4});
  }
};

nlohmann::json answer(const std::string& model, Words flags) {
  Words words = {"run", model, "--raw", "--json", "-p", "one two three"};
  words.insert(words.end(), flags.begin(), flags.end());
  if (std::find(flags.begin(), flags.end(), "--max-tokens") == flags.end())
    words.insert(words.end(), {"--max-tokens", "24"});
  const Ended ended = run_program(words);
  CAPTURE(ended.output);
  REQUIRE(ended.code == 0);
  return nlohmann::json::parse(ended.output);
}
std::string text(const std::string& model, Words flags) {
  return answer(model, std::move(flags))["text"].get<std::string>();
}

}  // namespace

TEST_CASE("filters that leave one token answer as the greedy choice does") {
  const Models m;
  const std::string greedy = text(m.free, {});
  const Words drawn = {"--temperature", "1", "--seed", "5"};
  CHECK(text(m.free, drawn) != greedy);
  for (const Words& filter :
       {Words{"--top-k", "1"}, Words{"--top-p", "0.000001"}, Words{"--min-p", "1"}}) {
    CAPTURE(filter[0]);
    Words flags = drawn;
    flags.insert(flags.end(), filter.begin(), filter.end());
    CHECK(text(m.free, flags) == greedy);
  }
  // The most typical token is seldom the likeliest one.
  Words typical = drawn;
  typical.insert(typical.end(), {"--typical-p", "0.000001"});
  const std::string expected = text(m.free, typical);
  CHECK(expected != greedy);
  typical[3] = "6";
  CHECK(text(m.free, typical) == expected);  // one token is left: the seed has no say
}

TEST_CASE("a seed gives one answer whatever the threads, another seed another") {
  const Models m;
  const auto seeded = [&](const std::string& seed, const std::string& threads) {
    return text(m.free, {"--temperature", "1.5", "--seed", seed, "--threads", threads});
  };
  const std::string first = seeded("11", "1");
  CHECK(seeded("11", "3") == first);
  CHECK(seeded("12", "1") != first);
}

TEST_CASE("penalties keep a model from saying its last token again") {
  const Models m;
  const auto most_often = [](const std::string& said) {
    size_t most = 0;
    for (const char c : said)
      most = std::max(most, static_cast<size_t>(std::count(said.begin(), said.end(), c)));
    return most;
  };
  const size_t before = most_often(text(m.parrot, {}));
  REQUIRE(before >= 12);
  CHECK(most_often(text(m.parrot, {"--repetition-penalty", "50"})) < before);
  CHECK(text(m.parrot, {"--presence-penalty", "2"}) != text(m.parrot, {}));
  CHECK(text(m.parrot, {"--frequency-penalty", "2"}) != text(m.parrot, {}));

  const std::string dry = text(m.parrot, {"--dry-multiplier", "50"});
  CHECK(most_often(dry) < before);
  CHECK(text(m.parrot, {"--dry-multiplier", "50", "--dry-allowed-length", "100"}) ==
        text(m.parrot, {}));
  CHECK(text(m.parrot, {"--dry-multiplier", "0.001", "--dry-base", "1"}) == text(m.parrot, {}));
  CHECK(text(m.parrot, {"--dry-multiplier", "0.001", "--dry-base", "100"}) != text(m.parrot, {}));
  // A sequence that is all breakers never repeats.
  const std::string start = text(m.parrot, {"--max-tokens", "6"});
  REQUIRE(start == std::string(6, start[0]));
  CHECK(text(m.parrot, {"--max-tokens", "6", "--dry-multiplier", "50"}) != start);
  CHECK(text(m.parrot, {"--max-tokens", "6", "--dry-multiplier", "50", "--dry-sequence-breaker",
                        start.substr(0, 1)}) == start);
}

TEST_CASE("an answer ends where it is told to") {
  const Models m;
  const auto short_one = answer(m.free, {"--max-tokens", "24"});
  CHECK(short_one["finish"] == "length");
  CHECK(short_one["completion_tokens"] == 24);
  // A piece of the greedy answer that is ASCII, so that a word of the command line can hold it.
  const std::string greedy = short_one["text"].get<std::string>();
  const auto at =
      std::find_if(greedy.begin() + 3, greedy.end(), [](char c) { return c > ' ' && c < 127; });
  REQUIRE(at != greedy.end());
  const std::string stop(1, *at);
  const auto stopped = answer(m.free, {"--stop", "not in it", "--stop", stop});
  CHECK(stopped["finish"] == "stop");
  CHECK(stopped["text"] == greedy.substr(0, greedy.find(stop)));
}

TEST_CASE("an answer has the form that is asked for") {
  const Models m;
  CHECK(std::regex_match(text(m.free, {"--regex", "[0-9]{4}-[a-f]{2}"}),
                         std::regex("[0-9]{4}-[a-f]{2}")));
  const auto schema = m.folder.file(
      "schema.json",
      R"({"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "n": {"type": "boolean"}},
          "required": ["a", "n"], "additionalProperties": false})");
  const auto made =
      nlohmann::json::parse(text(m.free, {"--json-schema", schema.string(), "--max-tokens", "60"}));
  CHECK((made["a"] == "x" || made["a"] == "yy"));
  CHECK(made["n"].is_boolean());
  CHECK(text(m.free, {"--json-object"}).front() == '{');
}

TEST_CASE("guessing changes no answer; what keys are rounded to hardly does") {
  const Models m;
  for (const std::string& model : {m.free, m.parrot}) {
    CHECK(text(model, {"--draft", "off"}) == text(model, {}));
    for (const char* type : {"i16", "f16", "bf16"}) {
      CAPTURE(type);
      CHECK(text(model, {"--kv-type", type}).substr(0, 2) == text(model, {}).substr(0, 2));
    }
    CHECK(answer(model, {"--kv-type", "q8_0"})["completion_tokens"] == 24);
  }
}

TEST_CASE("a number that a flag cannot be is refused in a line that names it") {
  const Models m;
  for (const Words& wrong :
       {Words{"--temperature", "-1"}, Words{"--temperature", "nan"}, Words{"--top-k", "-1"},
        Words{"--top-p", "0"}, Words{"--min-p", "3"}, Words{"--typical-p", "2"},
        Words{"--repetition-penalty", "0"}, Words{"--frequency-penalty", "9"},
        Words{"--presence-penalty", "-9"}, Words{"--dry-multiplier", "-1"},
        Words{"--dry-base", "0.5"}, Words{"--dry-allowed-length", "-1"}, Words{"--max-tokens", "0"},
        Words{"--regex", "["}, Words{"--kv-type", "f8"}}) {
    CAPTURE(wrong[0]);
    Words words = {"run", m.free, "--raw", "-p", "x"};
    words.insert(words.end(), wrong.begin(), wrong.end());
    // What the others are about.
    if (wrong[0] != "--temperature") words.insert(words.end(), {"--temperature", "1"});
    if (wrong[0] != "--dry-multiplier") words.insert(words.end(), {"--dry-multiplier", "1"});
    const Ended ended = run_program(words);
    CAPTURE(ended.output);
    CHECK(ended.code == (wrong[0] == "--regex" ? 65 : 64));
    CHECK(std::count(ended.output.begin(), ended.output.end(), '\n') == 1);
    std::string name = wrong[0].substr(2);
    std::string field = name;
    std::replace(field.begin(), field.end(), '-', '_');
    CHECK((ended.output.find(name) != std::string::npos ||
           ended.output.find(field) != std::string::npos));
  }
}
