// moru pairs, gate and improve as a person runs them, on models of random weights: the same files
// after kill -9, for any number of threads, and a gate that says no.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/files.h"
#include "base/hash.h"
#include "program.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

// Random weights seldom end an answer by themselves.
constexpr const char* kStops[] = {"e", "o", "3", "7", "\n"};

struct Folder : TempDir {
  std::string at(const std::string& name) const { return (path() / name).string(); }

  Folder() {
    write_tiny_model(path() / "tiny.gguf", {.embedding_gain = 1});
    std::string questions;
    for (int i = 0; i < 90; ++i)
      questions += fmt::format(
          "{{\"prompt\": \"say {} {}\", \"answer\": \"[a-m]\", \"check\": \"regex\", "
          "\"reference\": \"yes, a\", \"category\": \"{}\"}}\n",
          static_cast<char>('a' + i % 8), i * 37, i % 2 == 0 ? "even" : "odd");
    file("questions.jsonl", questions);
  }

  std::vector<std::string> pairs_words(const std::string& out,
                                       std::vector<std::string> more = {}) const {
    std::vector<std::string> words = {"pairs",
                                      at("tiny.gguf"),
                                      "--questions",
                                      at("questions.jsonl"),
                                      "--out",
                                      at(out),
                                      "--max-tokens",
                                      "12",
                                      "--answers",
                                      "4",
                                      "--max-length-ratio",
                                      "20"};
    for (const char* stop : kStops) words.insert(words.end(), {"--stop", stop});
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
};

// Kills the command at later and later moments until it ends by itself; the number of kills.
size_t run_killing(const std::vector<std::string>& words, double seconds) {
  size_t kills = 0;
  for (int attempt = 1; attempt <= 40; ++attempt) {
    Program program(words);
    program.kill_after(
        std::chrono::milliseconds(static_cast<int>(1000 * seconds * (0.1 + 0.05 * attempt))));
    const Ended ended = program.wait();
    if (ended.code == 0) return kills;
    CHECK(ended.code == 128 + SIGKILL);
    ++kills;
  }
  return kills;
}

}  // namespace

TEST_CASE("pairs are the same file after kill -9, and for any threads and answers at once") {
  const Folder folder;
  const Stopwatch watch;
  const Ended whole = run_program(folder.pairs_words("whole.jsonl", {"--threads", "1", "--json"}));
  CAPTURE(whole.output);
  REQUIRE(whole.code == 0);
  const double seconds = watch.seconds();
  const auto summary = nlohmann::json::parse(whole.output);
  CHECK(summary["counts"]["pairs"] > 10);
  CHECK(summary["made_of"].get<int>() + summary["held_out"].get<int>() == 90);
  const std::string expected = read_file(folder.at("whole.jsonl"));
  CHECK(summary["pairs_sha256"] == sha256(expected));

  for (const std::vector<std::string>& more :
       {std::vector<std::string>{"--threads", "3"},
        std::vector<std::string>{"--threads", "2", "--sequences", "5"}}) {
    REQUIRE(run_program(folder.pairs_words("other.jsonl", more)).code == 0);
    CHECK(read_file(folder.at("other.jsonl")) == expected);
    std::filesystem::remove(folder.at("other.samples.jsonl"));
  }
  CHECK(run_killing(folder.pairs_words("killed.jsonl", {"--threads", "1"}), seconds) >= 1);
  CHECK(read_file(folder.at("killed.jsonl")) == expected);
  CHECK(read_file(folder.at("killed.samples.jsonl")) ==
        read_file(folder.at("whole.samples.jsonl")));
}

TEST_CASE("the table of pairs fits 80 columns; no prompt left is an error") {
  const Folder folder;
  const Ended told = run_program(folder.pairs_words("pairs.jsonl"));
  CAPTURE(told.output);
  CHECK(told.code == 0);
  CHECK(told.output.find("never right") != std::string::npos);
  CHECK(told.output.find("even ") != std::string::npos);
  const Ended none = run_program(
      folder.pairs_words("pairs.jsonl", {"--evaluation", folder.at("questions.jsonl")}));
  CHECK(none.code == exit_code(ErrorKind::bad_input));
  CHECK(none.output.find("none is left") != std::string::npos);
}

TEST_CASE("the gate lets a model pass beside itself and refuses another one") {
  const Folder folder;
  write_tiny_model(folder.path() / "other.gguf", {.seed = 2});
  const auto gate = [&](const char* after) {
    return run_program({"gate", folder.at("tiny.gguf"), folder.at(after), "--questions",
                        folder.at("questions.jsonl"), "--limit", "8", "--max-tokens", "8"});
  };
  const Ended same = gate("tiny.gguf");
  CAPTURE(same.output);
  CHECK(same.code == 0);
  CHECK(same.output.find("accepted") != std::string::npos);
  const Ended refused = gate("other.gguf");
  CAPTURE(refused.output);
  CHECK(refused.code == 1);
  CHECK(refused.output.find("refused: loss, plain text: rose by") != std::string::npos);
}

TEST_CASE("improve ends in the same models however often it is killed") {
  const Folder folder;
  const auto words = [&](const std::string& out, std::vector<std::string> limits) {
    std::vector<std::string> all = {"improve",
                                    folder.at("tiny.gguf"),
                                    "--questions",
                                    folder.at("questions.jsonl"),
                                    "--out",
                                    folder.at(out),
                                    "--threads",
                                    "1",
                                    "--iterations",
                                    "2",
                                    "--answers",
                                    "2",
                                    "--max-tokens",
                                    "6",
                                    "--max-steps",
                                    "2",
                                    "--method",
                                    "sft,dpo",
                                    "--max-length-ratio",
                                    "20"};
    for (const char* stop : kStops) all.insert(all.end(), {"--stop", stop});
    all.insert(all.end(), limits.begin(), limits.end());
    return all;
  };
  const std::vector<std::string> lenient = {"--tolerance",      "100", "--length-factor", "1000",
                                            "--loss-tolerance", "100"};
  const auto state = [&](const std::string& out) {
    std::string text;
    for (const char* name : {"iteration-1/pairs.jsonl", "iteration-1/model-BF16.gguf",
                             "iteration-2/pairs.jsonl", "iteration-2/model.gguf", "model.gguf"})
      text += sha256_of_path(folder.path() / out / name) + "\n";
    return text;
  };
  const Stopwatch watch;
  const Ended whole = run_program(words("whole", lenient));
  CAPTURE(whole.output);
  REQUIRE(whole.code == 0);
  CHECK(whole.output.find("1 (sft)") != std::string::npos);
  CHECK(whole.output.find("2 (dpo)") != std::string::npos);
  const double seconds = watch.seconds();
  CHECK(run_killing(words("killed", lenient), seconds) >= 2);
  CHECK(state("killed") == state("whole"));
  const auto report = nlohmann::json::parse(read_file(folder.path() / "killed" / "improve.json"));
  CHECK(report["accepted"] == 2);

  // Where nothing may change, nothing is accepted and nothing is published.
  const Ended refused =
      run_program(words("refused", {"--tolerance", "0", "--standard-errors", "0", "--length-factor",
                                    "1", "--loss-tolerance", "0"}));
  CAPTURE(refused.output);
  CHECK(refused.code == 1);
  CHECK_FALSE(std::filesystem::exists(folder.path() / "refused" / "model.gguf"));
}
