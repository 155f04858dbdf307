#include "tune/optimizer.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "support.h"

using namespace moru;

namespace {

// What torch and transformers compute (tests/parity/tune/make_golden.py).
nlohmann::json golden() {
  return nlohmann::json::parse(read_file(MORU_SOURCE_DIR "/tests/golden/tune/optimizer.json"));
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
  const auto expected = golden()["adamw"];
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

TEST_CASE("schedules are transformers' at every step") {
  for (const auto& [name, curve] : golden()["schedules"].items()) {
    CAPTURE(name);
    const ScheduleOptions options{
        .kind = parse_schedule(name), .warmup = 7, .total = 100, .min_ratio = 0.1};
    for (uint64_t step = 0; step < 100; ++step)
      CHECK(schedule_factor(options, step) ==
            doctest::Approx(curve[step].get<double>()).epsilon(1e-12));
  }
  CHECK(error_from([] { parse_schedule("wavy"); }).kind() == ErrorKind::usage);
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
