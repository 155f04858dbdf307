#include "tune/optimizer.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "base/files.h"
#include "support.h"

using namespace moru;

namespace {

// What torch and transformers compute (tests/parity/tune/make_golden.py).
nlohmann::json golden(const std::string& name) {
  return nlohmann::json::parse(read_file(MORU_SOURCE_DIR "/tests/golden/tune/" + name + ".json"));
}

}  // namespace

TEST_CASE("100 steps of AdamW are torch's") {
  Pool pool(2);
  std::vector<float> p, g(17);
  for (int i = 0; i < 17; ++i) p.push_back(static_cast<float>(i - 8) / 4);
  AdamW adamw(p.size(), {.beta1 = 0.9, .beta2 = 0.99, .eps = 1e-6, .weight_decay = 0.1});
  for (int t = 1; t <= 100; ++t) {
    for (int i = 0; i < 17; ++i)
      g[static_cast<size_t>(i)] =
          static_cast<float>(std::sin(0.1 * t * (i + 1)) * std::pow(10.0, i % 4 - 2));
    adamw.step(pool, p, g, 1e-2);
  }
  const auto expected = golden("optimizer")["adamw"];
  for (size_t i = 0; i < p.size(); ++i)
    CHECK(p[i] == doctest::Approx(expected[i].get<double>()).epsilon(1e-6));
}

// Algorithm 1 of arXiv:1412.6980: from nothing, with one gradient always, both corrected moments
// are that gradient's, so that each step is lr · g / (|g| + eps). 100 steps of small numbers above
// would hide what eps does to gradients of its own size.
TEST_CASE("a gradient as large as eps moves a weight half as far as a large one") {
  Pool pool(1);
  const std::vector<float> g = {1e-6f, -1e-6f, 3e-6f, 1, 0};
  std::vector<float> p(g.size(), 0.0f);
  AdamW adamw(p.size(), {.eps = 1e-6, .weight_decay = 0});
  for (int t = 1; t <= 3; ++t) {
    adamw.step(pool, p, g, 0.5);
    const std::vector<double> moves = {0.5, -0.5, 0.75, 1, 0};
    // Of 24 bits, m and v lose a few in their own decay, and so do the corrections of them.
    for (size_t i = 0; i < p.size(); ++i)
      CHECK(p[i] == doctest::Approx(-0.5 * t * moves[i]).epsilon(1e-5));
  }
}

TEST_CASE("scaling the gradient in the step is scaling it before") {
  Pool pool(1);
  const std::vector<float> g = {0.5f, -3, 1e-4f};
  std::vector<float> half = g;
  for (float& x : half) x *= 0.25f;
  AdamW a(3), b(3);
  std::vector<float> p = {1, 2, 3}, q = p;
  a.step(pool, p, g, 0.1, 0.25);
  b.step(pool, q, half, 0.1);
  CHECK(p == q);
}

TEST_CASE("schedules are transformers' at every step and beyond the last") {
  for (const auto& curve : golden("schedules")) {
    const std::string name = curve["name"], kwargs = curve["kwargs"].dump();
    CAPTURE(name);
    CAPTURE(kwargs);
    ScheduleOptions options{
        .kind = parse_schedule(name), .warmup = curve["warmup"], .total = 100, .lr = 2e-3};
    if (options.kind == Schedule::cosine_with_min_lr)
      options.min_ratio = curve["kwargs"]["min_lr_rate"];
    else
      take_schedule_kwargs(kwargs, options);
    check(options);
    for (uint64_t step = 0; step < 110; ++step) {
      CAPTURE(step);
      const double expected = curve["factors"][step];
      // Where a factor is nothing, what cosines leave of it is.
      CHECK(std::abs(schedule_factor(options, step) - expected) <= 1e-12 * expected + 1e-18);
    }
  }
}

TEST_CASE("a schedule takes its own options alone, and no others of them") {
  CHECK(error_from([] { parse_schedule("wavy"); }).kind() == ErrorKind::usage);
  const auto problem = [](Schedule kind, const std::string& kwargs) {
    return error_from([&] {
      ScheduleOptions options{.kind = kind, .total = 100, .lr = 2e-3};
      take_schedule_kwargs(kwargs, options);
      check(options);
    });
  };
  using S = Schedule;
  const std::vector<std::tuple<Schedule, std::string, std::string>> cases = {
      {S::cosine, R"({"num_cycles": 2})", "num_cycles"},
      {S::polynomial, R"({"decay_type": "linear"})", "lr_end, power"},
      {S::polynomial, R"({"lr_end": 0.002})", "lr_end"},
      {S::polynomial, R"({"power": "two"})", "power"},
      {S::polynomial, "power=2", "JSON"},
      {S::inverse_sqrt, R"({"timescale": 0})", "timescale"},
      {S::cosine_with_restarts, R"({"num_cycles": -1})", "num_cycles"},
      {S::warmup_stable_decay, "{}", "num_decay_steps"},
      {S::warmup_stable_decay, R"({"num_decay_steps": 2, "decay_type": "1-square"})", "decay_type"},
      {S::warmup_stable_decay, R"({"num_decay_steps": 2, "min_lr_ratio": 2})", "min_lr_ratio"}};
  for (const auto& [kind, kwargs, says] : cases) {
    CAPTURE(kwargs);
    const Error found = problem(kind, kwargs);
    CHECK(found.kind() == ErrorKind::usage);
    CHECK(std::string(found.what()).find(says) != std::string::npos);
  }
}

TEST_CASE(
    "what a schedule was given tells its runs apart, and the first ones have nothing to tell") {
  ScheduleOptions a{.kind = Schedule::warmup_stable_decay};
  a.num_decay_steps = 20;
  ScheduleOptions b = a;
  CHECK(schedule_kwargs(a) == schedule_kwargs(b));
  b.decay_type = Ramp::linear;
  CHECK(schedule_kwargs(a) != schedule_kwargs(b));
  for (const Schedule kind :
       {Schedule::constant, Schedule::linear, Schedule::cosine, Schedule::cosine_with_min_lr})
    CHECK(schedule_kwargs({.kind = kind}).empty());
}

TEST_CASE("the norm is the same for any number of threads and shows what is no number") {
  std::vector<float> g(100'000);
  for (size_t i = 0; i < g.size(); ++i) g[i] = std::sin(static_cast<float>(i));
  double sum = 0;
  for (const float x : g) sum += double{x} * double{x};
  Pool one(1), three(3);
  CHECK(global_norm(one, g) == global_norm(three, g));
  CHECK(global_norm(one, g) == doctest::Approx(std::sqrt(sum)).epsilon(1e-12));
  g[70'000] = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(global_norm(three, g)));
}

TEST_CASE("clipping scales down to the largest norm and never up") {
  CHECK(clip_scale(4, 1) == doctest::Approx(0.25).epsilon(1e-6));
  CHECK(clip_scale(0.5, 1) == 1);
  CHECK(clip_scale(4, 0) == 1);
}
