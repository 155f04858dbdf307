// The main job on a model of random weights: it runs, it resumes after kill -9 at any moment, and
// ends in the same files.
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

// Eight kinds of rows, each learnable from one word.
void write_rows(const TempDir& folder) {
  std::string pairs, questions;
  for (int i = 0; i < 120; ++i) {
    const std::string row = fmt::format("say {} {}", static_cast<char>('a' + i % 8), i * 37);
    const std::string answer(1, static_cast<char>('A' + i % 8));
    if (i % 4 == 3) {
      questions += fmt::format("{{\"prompt\": \"{}\", \"answer\": \"{}\"}}\n", row, answer);
    } else {
      pairs += fmt::format("{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n", row, answer);
    }
  }
  folder.file("pairs.jsonl", pairs);
  folder.file("questions.jsonl", questions);
}

std::vector<std::string> forge_words(const TempDir& folder, const std::string& out) {
  const auto path = [&](const char* name) { return (folder.path() / name).string(); };
  return {"forge",
          "--model",
          path("tiny.gguf"),
          "--pairs",
          path("pairs.jsonl"),
          "--questions",
          path("questions.jsonl"),
          "--out",
          path(out.c_str()),
          "--size-ladder",
          "Q8_0,Q4_0",
          "--template",
          "{prompt}={completion}",
          "--epochs",
          "2",
          "--max-tokens",
          "4",
          "--threads",
          "1"};
}

// What must not depend on interruptions. Which candidate is cheapest is decided by measured time,
// so the candidates themselves are compared.
std::string state_of(const std::filesystem::path& out) {
  std::string state;
  for (const char* name : {"tuned-BF16.gguf", "tuned-Q8_0.gguf", "tuned-Q4_0.gguf"})
    state += sha256_of_path(out / "candidates" / name) + "\n";
  const auto report = nlohmann::json::parse(read_file(out / "report.json"));
  for (const auto& candidate : report["candidates"])
    state += fmt::format("{} {}\n", candidate["name"].get<std::string>(),
                         candidate["correct"].get<int>());
  return state + sha256_of_path(out / "adapter" / "adapter_model.safetensors");
}

}  // namespace

TEST_CASE("forge ends in the same files however often it is killed") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf");
  write_rows(folder);
  const Stopwatch watch;
  const Ended whole = run_program(forge_words(folder, "whole"));
  CAPTURE(whole.output);
  REQUIRE(whole.code == 0);
  CHECK(whole.output.find("report.html") != std::string::npos);
  const double seconds = watch.seconds();
  const std::string expected = state_of(folder.path() / "whole");
  CHECK(std::filesystem::exists(folder.path() / "whole" / "report.html"));

  size_t kills = 0;
  for (int attempt = 1; attempt <= 40; ++attempt) {
    Program program(forge_words(folder, "killed"));
    // From the first moments to most of the whole run, so that every stage is hit.
    program.kill_after(
        std::chrono::milliseconds(static_cast<int>(1000 * seconds * (0.04 + 0.03 * attempt))));
    const Ended ended = program.wait();
    if (ended.code == 0) break;
    CHECK(ended.code == 128 + SIGKILL);
    ++kills;
  }
  MESSAGE(kills << " kills");
  CHECK(kills >= 2);
  REQUIRE(run_program(forge_words(folder, "killed")).code == 0);
  CHECK(state_of(folder.path() / "killed") == expected);
}
