// Training by several processes: mpirun with the program itself.
#include "tune/ranks.h"

#include <signal.h>
#include <stdlib.h>

#include <charconv>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <optional>
#include <thread>

#include "base/files.h"
#include "program.h"
#include "support.h"
#include "tune_runs.h"

using namespace moru;

namespace {

const std::string kModel = MORU_SOURCE_DIR "/tests/golden/tune/llama";

bool has_mpirun() {
#ifndef MORU_MPI
  MESSAGE("skipped: built without MPI");
  return false;
#endif
  ::setenv("ASAN_OPTIONS", "detect_leaks=0", 0);  // Open MPI keeps what it has
  if (Program({"--version"}, "mpirun").wait().code == 0) return true;
  MESSAGE("skipped: there is no mpirun (apt-get install openmpi-bin)");
  return false;
}

std::vector<std::string> mpirun(size_t ranks, const std::vector<std::string>& words) {
  std::vector<std::string> all = {"--allow-run-as-root", "--oversubscribe", "-n",
                                  std::to_string(ranks), std::string(MORU_PROGRAM)};
  all.insert(all.end(), words.begin(), words.end());
  return all;
}

Ended run(size_t ranks, const std::vector<std::string>& words) {
  return ranks == 1 ? run_program(words) : Program(mpirun(ranks, words), "mpirun").wait();
}

// Five batches a step, so that rounds are full, and not.
std::vector<std::string> words_for(const TempDir& dir, const std::string& out,
                                   const std::vector<std::string>& more = {}) {
  const std::vector<std::string> start = {"tune", kModel, (dir.path() / "rows.jsonl").string()};
  const std::vector<std::string> rest = {"-o",
                                         (dir.path() / out).string(),
                                         "--max-length",
                                         "64",
                                         "--precision",
                                         "f32",
                                         "--batch-size",
                                         "8",
                                         "--micro-batch-tokens",
                                         "24",
                                         "--lr",
                                         "3e-3",
                                         "--eval-steps",
                                         "3"};
  std::vector<std::string> words = start;
  // Methods and presets stand first: they set what the others set again.
  words.insert(words.end(), more.begin(), more.end());
  words.insert(words.end(), rest.begin(), rest.end());
  // Raw text has no prompts to render.
  if (std::find(more.begin(), more.end(), "text") == more.end())
    words.insert(words.end(), {"--template", "{prompt}:{completion}"});
  return words;
}

// The lines that moru, rather than mpirun, says an error in.
std::vector<std::string> errors_in(const std::string& output) {
  std::vector<std::string> lines;
  for (size_t at = 0; (at = output.find("moru: ", at)) != std::string::npos; ++at)
    if (at == 0 || output[at - 1] == '\n')
      lines.push_back(output.substr(at, output.find('\n', at) - at));
  return lines;
}

// The process that is this rank of the run that writes to `out`.
std::optional<pid_t> process_of(size_t rank, const std::string& out) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename().string();
    pid_t pid = 0;
    if (std::from_chars(name.data(), name.data() + name.size(), pid).ec != std::errc{}) continue;
    const auto has = [&](const char* file, const std::string& wanted) {
      std::ifstream in(entry.path() / file, std::ios::binary);
      const std::string text(std::istreambuf_iterator<char>(in), {});
      return ("\0" + text).find(wanted + '\0') != std::string::npos;
    };
    std::error_code gone;
    if (std::filesystem::read_symlink(entry.path() / "exe", gone) ==
            std::filesystem::canonical(MORU_PROGRAM) &&
        has("cmdline", out) && has("environ", "OMPI_COMM_WORLD_RANK=" + std::to_string(rank)))
      return pid;
  }
  return std::nullopt;
}

}  // namespace

TEST_CASE("gradients of one process are added batch by batch, in order") {
  OneRank one;
  Pool pool(2);
  constexpr size_t kCount = (1 << 16) + 3;  // more than a tile
  const std::vector<float> terms = {1e8f, 3.5f, -1e8f, 0.25f};
  const float expected =
      std::accumulate(terms.begin() + 1, terms.end(), terms[0]);  // another order gives another
  for (int step = 0; step < 2; ++step) {
    std::vector<float> gradient;
    for (size_t i = 0; i < terms.size(); ++i) {
      gradient.assign(kCount, terms[i]);
      one.add(pool, gradient, {.first = i, .count = 1, .of = terms.size()});
    }
    CHECK(gradient == std::vector<float>(kCount, expected));
  }
  std::vector<float> single(3, 7);
  one.add(pool, single, {.first = 0, .count = 1, .of = 1});
  CHECK(single == std::vector<float>(3, 7));
}

TEST_CASE("one, two and four processes learn the same bits by every method") {
  if (!has_mpirun()) return;
  const TempDir dir;
  const std::vector<std::vector<std::string>> methods = {
      {"--method", "sft", "--epochs", "2"},
      {"--method", "dpo", "--epochs", "2"},
      {"--method", "kto", "--epochs", "2"},
      {"--method", "text", "--epochs", "2", "--recompute", "block"},
      {"--preset", "full", "--epochs", "2"}};
  for (const std::vector<std::string>& more : methods) {
    const std::string name = more[1];
    CAPTURE(name);
    dir.file("rows.jsonl", rows_for(name, 24));
    for (const size_t ranks : {1, 2, 4}) {
      CAPTURE(ranks);
      const std::vector<std::string> words = words_for(dir, name + std::to_string(ranks), more);
      const Ended ended = run(ranks, words);
      CAPTURE(ended.output);
      REQUIRE(ended.code == 0);
      CHECK(learnt_by(dir.path() / (name + std::to_string(ranks))) ==
            learnt_by(dir.path() / (name + "1")));
      CHECK(log_of(dir.path() / (name + std::to_string(ranks))) ==
            log_of(dir.path() / (name + "1")));
    }
  }
}

TEST_CASE("a run whose process is killed says so once, and any number goes on to the same bits") {
  if (!has_mpirun()) return;
  const TempDir dir;
  dir.file("rows.jsonl", rows_for("sft", 24));
  const std::vector<std::string> more = {"--epochs", "60", "--save-steps", "1"};
  REQUIRE(run(1, words_for(dir, "whole", more)).code == 0);
  for (const size_t killed : {1, 0}) {
    CAPTURE(killed);
    const std::string out = "killed" + std::to_string(killed);
    Program program(mpirun(4, words_for(dir, out, more)), "mpirun");
    bool was_killed = false;
    std::thread killer([&] {
      for (size_t tries = 0; tries < 3000 && !was_killed; ++tries) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        if (log_of(dir.path() / out).size() < 5 + 10 * killed) continue;
        const std::optional<pid_t> pid = process_of(killed, (dir.path() / out).string());
        was_killed = pid && ::kill(*pid, SIGKILL) == 0;
      }
    });
    const Ended ended = program.wait();
    killer.join();
    CAPTURE(ended.output);
    REQUIRE(was_killed);
    CHECK(ended.code != 0);
    const std::vector<std::string> said = errors_in(ended.output);
    REQUIRE(said.size() == 1);
    CHECK(said[0].starts_with("moru: rank " + std::to_string(killed) + " of 4 was killed"));
    REQUIRE(!std::filesystem::exists(dir.path() / out / "tune.json"));

    const Ended rest = run(killed + 1, words_for(dir, out, more));  // by one, by two
    CAPTURE(rest.output);
    REQUIRE(rest.code == 0);
    CHECK(rest.output.find("going on from step") != std::string::npos);
    CHECK(learnt_by(dir.path() / out) == learnt_by(dir.path() / "whole"));
    CHECK(log_of(dir.path() / out) == log_of(dir.path() / "whole"));
  }
}

TEST_CASE("a run that is stopped through mpirun saves what it has, also within a long step") {
  if (!has_mpirun()) return;
  const TempDir dir;
  // A step of so many rows takes longer than the second that mpirun waits.
  dir.file("rows.jsonl", rows_for("sft", 12000));
  for (const bool long_steps : {false, true}) {
    CAPTURE(long_steps);
    const std::string name = long_steps ? "long" : "short";
    std::vector<std::string> more = {"--save-steps", "1000", "--val-fraction", "0",
                                     "--threads",    "1"};
    const auto words = [&](const std::string& out) {
      std::vector<std::string> all = words_for(dir, out, more);
      const auto set = [&](const char* flag, const char* value) {
        *(std::find(all.begin(), all.end(), flag) + 1) = value;
      };
      const auto validates = std::find(all.begin(), all.end(), "--eval-steps");
      all.erase(validates, validates + 2);
      // Short ones are so many that their lines would fill a pipe that mpirun does not read.
      set("--batch-size", long_steps ? "12000" : "4");
      if (long_steps) set("--micro-batch-tokens", "64");
      return all;
    };
    // Enough of them that a busy machine does not end the run before mpirun passes the signal on.
    if (long_steps) more.insert(more.end(), {"--max-steps", "12"});
    if (!long_steps) more.insert(more.end(), {"--max-steps", "3000"});
    REQUIRE(run(2, words(name + "_whole")).code == 0);
    Program program(mpirun(2, words(name)), "mpirun");
    std::thread stopper([&] {
      for (size_t tries = 0; tries < 6000; ++tries) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        if (log_of(dir.path() / name).size() < 2) continue;
        ::kill(program.pid(), SIGINT);
        return;
      }
    });
    const Ended ended = program.wait();
    stopper.join();
    CAPTURE(ended.output);
    CHECK(ended.code != 0);
    // mpirun may drop what is said after it was asked.
    const std::vector<std::string> said = errors_in(ended.output);
    REQUIRE(said.size() <= 1);
    for (const std::string& line : said)
      CHECK(line.find("stopped after step ") != std::string::npos);
    REQUIRE(!std::filesystem::exists(dir.path() / name / "tune.json"));
    REQUIRE(std::filesystem::exists(dir.path() / name / "checkpoint.safetensors"));

    const Ended rest = run(2, words(name));
    CAPTURE(rest.output);
    REQUIRE(rest.code == 0);
    CHECK(rest.output.find("going on from step") != std::string::npos);
    CHECK(learnt_by(dir.path() / name) == learnt_by(dir.path() / (name + "_whole")));
    CHECK(log_of(dir.path() / name) == log_of(dir.path() / (name + "_whole")));
  }
}

TEST_CASE("an error of all processes is said once, one of a single process names it") {
  if (!has_mpirun()) return;
  const TempDir dir;
  dir.file("rows.jsonl", rows_for("sft", 24));
  dir.file("other.jsonl", rows_for("sft", 25));
  const std::vector<std::string> words = words_for(dir, "out");
  std::vector<std::string> missing = words, other = words;
  missing[2] = (dir.path() / "missing.jsonl").string();
  other[2] = (dir.path() / "other.jsonl").string();
  const auto fail = [&](const std::vector<std::string>& all) {
    const Ended ended = Program(all, "mpirun").wait();
    CAPTURE(ended.output);
    CHECK(ended.code != 0);
    const std::vector<std::string> said = errors_in(ended.output);
    REQUIRE(said.size() == 1);
    return said[0];
  };
  const auto beside = [&](const std::vector<std::string>& second) {
    std::vector<std::string> all = mpirun(1, words);
    for (const char* word : {":", "-n", "1", MORU_PROGRAM}) all.push_back(word);
    all.insert(all.end(), second.begin(), second.end());
    return all;
  };
  CHECK(fail(mpirun(2, missing)).find("missing.jsonl: cannot open") != std::string::npos);
  CHECK(fail(beside(missing)).starts_with("moru: rank 1 on "));
  CHECK(fail(beside(other)).starts_with("moru: rank 1: reads another model or other data"));
}

TEST_CASE("processes that cannot find each other are refused in one sentence") {
  ::setenv("PMI_SIZE", "2", 1);  // of an mpirun that is not Open MPI's
  const Ended ended = run_program({"tune", kModel, "rows.jsonl"});
  ::unsetenv("PMI_SIZE");
  CAPTURE(ended.output);
  CHECK(ended.code == exit_code(ErrorKind::unsupported));
  const std::vector<std::string> said = errors_in(ended.output);
  REQUIRE(said.size() == 1);
  CHECK(said[0].starts_with("moru: mpirun: "));
#ifndef MORU_MPI
  CHECK(said[0].find("was built without MPI") != std::string::npos);
#endif

  ::setenv("PMI_SIZE", "2", 1);
  ::setenv("PMI_RANK", "1", 1);  // the other one leaves it to the first
  const Ended other = run_program({"tune", kModel, "rows.jsonl"});
  ::unsetenv("PMI_SIZE");
  ::unsetenv("PMI_RANK");
  CHECK(other.code == exit_code(ErrorKind::unsupported));
  CHECK(other.output.find("moru: ") == std::string::npos);
}
