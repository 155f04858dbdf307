// What a person sees of a run of moru tune.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <string>
#include <vector>

#include "program.h"
#include "support.h"
#include "tune_runs.h"

using namespace moru;

TEST_CASE("a run says which steps it skipped and how many, and its log marks them") {
  const TempDir dir;
  std::string rows;
  for (size_t i = 0; i < 40; ++i)
    rows += fmt::format("{{\"prompt\": \"a\", \"completion\": \"{}\"}}\n",
                        i == 39 ? "Q7!?zK" : "an an an");
  const auto file = dir.file("rows.jsonl", rows);
  const auto out = dir.path() / "out";
  const Ended ended =
      run_program({"tune", MORU_SOURCE_DIR "/tests/golden/tune/llama", file.string(), "-o",
                   out.string(), "--batch-size", "1", "--val-fraction", "0", "--lr", "1e-2",
                   "--max-z-score", "4", "--precision", "f32"});
  CAPTURE(ended.output);
  REQUIRE(ended.code == 0);
  size_t skipped = 0;
  for (const nlohmann::json& line : log_of(out)) {
    const std::string step = fmt::format("step {}", line.at("step").get<size_t>());
    const bool said = ended.output.find("\n" + step + " skipped: ") != std::string::npos;
    CHECK(said == line.value("skipped", false));
    skipped += said;
  }
  CHECK(skipped != 0);
  CHECK(ended.output.find(fmt::format("{} of them skipped", skipped)) != std::string::npos);
}

TEST_CASE("of steps that are quicker than a person reads some are told, and all are logged") {
  const TempDir dir;
  const auto file = dir.file("rows.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n");
  const auto out = dir.path() / "out";
  const Ended ended =
      run_program({"tune", MORU_SOURCE_DIR "/tests/golden/tune/llama", file.string(), "-o",
                   out.string(), "--val-fraction", "0", "--max-steps", "1000"});
  CAPTURE(ended.output);
  REQUIRE(ended.code == 0);
  CHECK(log_of(out).size() == 1000);
  CHECK(ended.output.find("\nstep 1/1000  ") != std::string::npos);
  CHECK(ended.output.find("\nstep 1000/1000  ") != std::string::npos);
  size_t told = 0;
  for (size_t at = 0; (at = ended.output.find("\nstep ", at)) != std::string::npos; ++at) ++told;
  CHECK(told < 500);
}
