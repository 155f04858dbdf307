#include "tune/trainer.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/files.h"
#include "support.h"

using namespace moru;

namespace {

const std::filesystem::path kModel = MORU_SOURCE_DIR "/tests/golden/tune/llama";

std::string rows(size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i)
    text += nlohmann::json{{"prompt", "say " + std::to_string(i * 7 % 10)},
                           {"completion", std::string(1 + i % 5, static_cast<char>('a' + i % 26))}}
                .dump() +
            "\n";
  return text;
}

TuneOptions options_for(const TempDir& dir, const char* out) {
  TuneOptions o;
  o.model = kModel;
  o.data = {{.path = dir.path() / "rows.jsonl"}};
  o.out = dir.path() / out;
  o.rows.plain_template = "{prompt}:{completion}";
  o.rows.max_length = 64;
  o.precision = Profile::f32;
  o.threads = 2;
  o.epochs = 3;
  o.batch_size = 4;
  o.lr = 3e-3;
  o.eval_steps = 3;
  o.save_steps = 2;
  return o;
}

std::string adapter_bytes(const TuneOptions& o) {
  return read_file(o.out / "adapter" / "adapter_model.safetensors");
}

// The log without what depends on the clock.
std::vector<nlohmann::json> log_of(const TuneOptions& o) {
  std::ifstream in(o.out / "log.jsonl");
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(in, line);) {
    lines.push_back(nlohmann::json::parse(line));
    lines.back().erase("tokens_per_second");
  }
  return lines;
}

}  // namespace

TEST_CASE("eight samples are learnt by heart") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(8));
  TuneOptions o = options_for(dir, "out");
  o.val_fraction = 0;
  o.batch_size = 8;
  o.max_steps = 150;
  o.lr = 2e-2;
  o.lora = {.rank = 16, .alpha = 32, .targets = {}};
  double last = 100;
  tune(o, [&](const TuneEvent& e) {
    if (e.kind == TuneEvent::Kind::step) last = e.loss;
  });
  CHECK(last < 0.06);
}

TEST_CASE("a run stopped at any step goes on to the bits of one that was not") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(30));
  TuneOptions whole = options_for(dir, "whole");
  whole.lora.dora = true;  // the most there is to keep
  whole.neftune_alpha = 5;
  const TuneResult expected = tune(whole);
  CHECK(expected.steps > 15);
  REQUIRE(expected.val_loss.has_value());
  CHECK(*expected.val_loss < *expected.val_loss_before);

  // Stopped by a signal after every third step, again and again.
  TuneOptions stopped = whole;
  stopped.out = dir.path() / "stopped";
  size_t runs = 0;
  for (;;) {
    ++runs;
    size_t steps = 0;
    try {
      tune(stopped, [&](const TuneEvent& e) {
        if (e.kind == TuneEvent::Kind::step && ++steps == 3) ::raise(SIGTERM);
      });
      break;
    } catch (const Error& error) {
      REQUIRE(error.kind() == ErrorKind::interrupted);
    }
  }
  CHECK(runs > 4);
  CHECK(adapter_bytes(stopped) == adapter_bytes(whole));
  CHECK(log_of(stopped) == log_of(whole));
}

TEST_CASE("a run killed without warning goes on to the bits of one that was not") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(30));
  const TuneOptions whole = options_for(dir, "whole");
  tune(whole);
  for (const size_t kill_at : {1, 4, 8, 13}) {
    CAPTURE(kill_at);
    TuneOptions o = options_for(dir, "killed");
    o.restart = false;
    std::filesystem::remove_all(o.out);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      size_t steps = 0;
      tune(o, [&](const TuneEvent& e) {
        if (e.kind == TuneEvent::Kind::step && ++steps == kill_at) ::raise(SIGKILL);
      });
      ::_exit(0);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    tune(o);
    CHECK(adapter_bytes(o) == adapter_bytes(whole));
    CHECK(log_of(o) == log_of(whole));
  }
}

TEST_CASE("threads, micro-batches and what is made anew do not change what is learnt") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(20));
  const TuneOptions one = options_for(dir, "one");
  const TuneResult expected = tune(one);
  TuneOptions threads = options_for(dir, "threads");
  threads.threads = 1;
  threads.recompute = Recompute::block;
  tune(threads);
  CHECK(adapter_bytes(threads) == adapter_bytes(one));
  TuneOptions small = options_for(dir, "small");
  small.micro_batch_tokens = 1;  // every example alone: sums in another order
  const TuneResult found = tune(small);
  CHECK(std::abs(*found.val_loss - *expected.val_loss) < 1e-5);
  CHECK(std::abs(found.train_loss - expected.train_loss) < 1e-5);
}

TEST_CASE("a step's loss and gradient are means over its tokens, however examples are dealt") {
  const TempDir dir;
  std::string text;
  for (size_t i = 0; i < 8; ++i)  // answers of 1 to 36 letters
    text += nlohmann::json{{"prompt", "say " + std::to_string(i)},
                           {"completion", std::string(1 + 5 * i, static_cast<char>('a' + i))}}
                .dump() +
            "\n";
  dir.file("rows.jsonl", text);
  const auto steps_of = [&](uint64_t batch_size, uint64_t micro_batch_tokens) {
    TuneOptions o = options_for(dir, "out");
    o.restart = true;
    o.val_fraction = 0;
    o.epochs = 1;
    o.lr = 1e-30;  // steps that change nothing
    o.batch_size = batch_size;
    o.micro_batch_tokens = micro_batch_tokens;
    std::vector<TuneEvent> steps;
    tune(o, [&](const TuneEvent& e) {
      if (e.kind == TuneEvent::Kind::step) steps.push_back(e);
    });
    return steps;
  };
  const std::vector<TuneEvent> whole = steps_of(8, 2048);
  REQUIRE(whole.size() == 1);
  for (const uint64_t tokens : {1, 60, 120}) {  // one example, some of them
    const std::vector<TuneEvent> parts = steps_of(8, tokens);
    REQUIRE(parts.size() == 1);
    CHECK(std::abs(parts[0].loss / whole[0].loss - 1) < 1e-6);
    CHECK(std::abs(parts[0].grad_norm / whole[0].grad_norm - 1) < 1e-6);
  }
  // A mean of the examples' means would be another number.
  double mean_of_means = 0;
  for (const TuneEvent& e : steps_of(1, 2048)) mean_of_means += e.loss / 8;
  CHECK(std::abs(mean_of_means / whole[0].loss - 1) > 1e-2);
}

TEST_CASE("a finished run is not run again, and another run's checkpoint is refused") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(10));
  TuneOptions o = options_for(dir, "out");
  const TuneResult first = tune(o);
  size_t events = 0;
  const TuneResult again = tune(o, [&](const TuneEvent&) { ++events; });
  CHECK(events == 0);
  CHECK(again.steps == first.steps);
  CHECK(again.val_loss == first.val_loss);

  TuneOptions other = options_for(dir, "other");
  size_t steps = 0;
  CHECK(error_from([&] {
          tune(other, [&](const TuneEvent& e) {
            if (e.kind == TuneEvent::Kind::step && ++steps == 2) ::raise(SIGINT);
          });
        }).kind() == ErrorKind::interrupted);
  other.lr *= 2;
  CHECK(error_from([&] { tune(other); }).kind() == ErrorKind::usage);
  other.restart = true;
  tune(other);
}

TEST_CASE("a folder in which another run is at work is refused, and nothing in it is touched") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(10));
  const TuneOptions o = options_for(dir, "out");
  make_folder(o.out);
  {
    const FolderLock other(o.out, o.out / ".lock");
    const Error error = error_from([&] { tune(o); });
    CHECK(error.kind() == ErrorKind::usage);
    CHECK(error.where() == o.out.string());
    CHECK(std::distance(std::filesystem::directory_iterator(o.out), {}) == 1);
  }
  tune(o);
}

TEST_CASE("a run that stops improving ends early with its best adapter") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(12));
  TuneOptions o = options_for(dir, "out");
  o.lr = 0.5;  // far too high: validation soon rises
  o.epochs = 30;
  o.eval_steps = 1;
  o.patience = 4;
  const TuneResult r = tune(o);
  CHECK(r.steps == r.best_step + 4);
  CHECK(*r.val_loss <= *r.val_loss_before);
}

TEST_CASE("going on from an adapter starts at its loss") {
  const TempDir dir;
  dir.file("rows.jsonl", rows(20));
  const TuneOptions first = options_for(dir, "first");
  const TuneResult before = tune(first);
  TuneOptions next = options_for(dir, "next");
  next.adapter = before.adapter;
  const TuneResult after = tune(next);
  CHECK(*after.val_loss_before == doctest::Approx(*before.val_loss).epsilon(1e-9));
}

TEST_CASE("flags that cannot be meant are refused before any work") {
  const TempDir dir;
  const auto refused = [&](auto&& change) {
    TuneOptions o = options_for(dir, "out");
    change(o);
    return error_from([&] { tune(o); }).kind() == ErrorKind::usage;
  };
  CHECK(refused([](TuneOptions& o) { o.lr = 0; }));
  CHECK(refused([](TuneOptions& o) { o.lora.rank = 0; }));
  CHECK(refused([](TuneOptions& o) { o.val_fraction = 1; }));
  CHECK(refused([](TuneOptions& o) { o.batch_size = 0; }));
  CHECK(refused([](TuneOptions& o) { o.rows.max_length = 1; }));
  CHECK(refused([](TuneOptions& o) { o.lora.alpha = 0; }));
  CHECK(refused([](TuneOptions& o) { o.adamw.weight_decay = -1; }));
  CHECK(refused([](TuneOptions& o) { o.max_grad_norm = -1; }));
  CHECK(refused([](TuneOptions& o) { o.schedule.min_ratio = 2; }));
  CHECK(refused([](TuneOptions& o) { o.micro_batch_tokens = 0; }));
}
