// moru tune ends in the same files however often it is killed, whatever it learns by.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "base/random.h"
#include "program.h"
#include "support.h"
#include "tiny_model.h"
#include "tune_runs.h"

using namespace moru;

namespace {

struct Case {
  const char* name;     // of the method, which names the rows too
  const char* variant;  // tells cases of a method apart
  std::vector<std::string> flags;
};

// Kills the program, given `words`, a few milliseconds after its log has so many lines: within a
// batch, between the batches of a step, between steps, in a validation, in a checkpoint.
void kill_within(const std::vector<std::string>& words, const std::filesystem::path& out,
                 size_t lines, std::chrono::microseconds later) {
  Program program(words);
  for (size_t tries = 0; tries < 60'000 && log_of(out).size() < lines; ++tries) {
    if (std::filesystem::exists(out / "tune.json")) break;
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
  std::this_thread::sleep_for(later);
  program.kill_now();
  program.wait();
}

}  // namespace

TEST_CASE("a run killed at random moments ends in the bits of one that was not, by every method") {
  const TempDir dir;
  write_tiny_model(dir.path() / "packed.gguf");
  const std::string dense = MORU_SOURCE_DIR "/tests/golden/tune/llama";
  const std::vector<Case> cases = {
      {"sft",
       "patience",
       {"--epochs", "40", "--eval-steps", "2", "--patience", "3", "--lr", "0.1"}},
      {"dpo", "lora", {"--epochs", "4", "--eval-steps", "5", "--lr", "3e-3"}},
      {"kto", "lora", {"--epochs", "4", "--eval-steps", "5", "--lr", "3e-3"}},
      {"text", "lora", {"--epochs", "6", "--eval-steps", "5", "--lr", "3e-3"}},
      {"sft", "full", {"--full", "--epochs", "6", "--eval-steps", "5", "--lr", "1e-3"}},
      {"sft", "qlora", {"--qlora", "--epochs", "3", "--eval-steps", "5", "--lr", "3e-3"}}};
  const uint64_t seed =
      static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  CAPTURE(seed);
  Random random(seed, 0);
  size_t resumed = 0;
  for (const Case& c : cases) {
    CAPTURE(c.name);
    CAPTURE(c.variant);
    const bool packed = std::string_view(c.variant) == "qlora";
    dir.file("rows.jsonl", rows_for(c.name, 40));
    const auto words_for = [&](const std::filesystem::path& out) {
      std::vector<std::string> words = {"tune",
                                        "--method",
                                        c.name,
                                        packed ? (dir.path() / "packed.gguf").string() : dense,
                                        (dir.path() / "rows.jsonl").string(),
                                        "-o",
                                        out.string(),
                                        "--max-length",
                                        "64",
                                        "--batch-size",
                                        "8",
                                        "--micro-batch-tokens",
                                        "24",
                                        "--save-steps",
                                        "3",
                                        "--threads",
                                        "2"};
      if (std::string_view(c.name) != "text")  // which has no prompts to render
        words.insert(words.end(), {"--template", "{prompt}:{completion}"});
      words.insert(words.end(), c.flags.begin(), c.flags.end());
      return words;
    };
    const std::filesystem::path whole = dir.path() / (std::string(c.name) + c.variant);
    const std::filesystem::path killed = whole.string() + "-killed";
    const Ended expected = run_program(words_for(whole));
    CAPTURE(expected.output);
    REQUIRE(expected.code == 0);
    const size_t lines = log_of(whole).size();
    std::vector<size_t> moments;
    for (size_t kills = 0; kills < 5; ++kills)
      moments.push_back(random.below(static_cast<uint32_t>(lines)));
    std::sort(moments.begin(), moments.end());
    for (const size_t moment : moments)
      kill_within(words_for(killed), killed, moment, std::chrono::microseconds(random.below(6000)));
    const Ended ended = run_program(words_for(killed));
    CAPTURE(ended.output);
    REQUIRE(ended.code == 0);
    if (ended.output.find("going on from step") != std::string::npos) ++resumed;
    CHECK(!learnt_by(whole).empty());
    CHECK(learnt_by(killed) == learnt_by(whole));
    CHECK(log_of(killed) == log_of(whole));
  }
  CHECK(resumed > 0);
}
