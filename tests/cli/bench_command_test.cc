// moru bench as a script runs it.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <vector>

#include "program.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

TEST_CASE("a process's peak of memory is its own, however large the one that started it") {
  const TempDir folder;
  const std::string model = (folder.path() / "tiny.gguf").string();
  write_tiny_model(model);
  std::vector<char> large(size_t{600} << 20, 1);  // written, so it is there
  const Ended ended = run_program(
      {"bench", model, "--json", "-p", "8", "-n", "2", "-b", "1", "-r", "1", "--threads", "1"});
  CAPTURE(ended.output);
  REQUIRE(ended.code == 0);
  const auto row = nlohmann::json::parse(ended.output);
  CHECK(row["prefill_tokens_per_s"] > 0);
  CHECK(row["peak_memory_bytes"] > row["weight_bytes"]);
  CHECK(row["peak_memory_bytes"] < large.size() / 2);
}
