#include "tune/optimizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <string>

#include "base/error.h"
#include "engine/float_kernels.h"

namespace moru {
namespace {

constexpr size_t kTile = 16384;
size_t tiles(size_t count) { return (count + kTile - 1) / kTile; }

struct ScheduleRow {
  std::string_view name;
  Schedule schedule;
};
constexpr std::array<ScheduleRow, 5> kSchedules = {{
    {"constant", Schedule::constant},
    {"constant_with_warmup", Schedule::constant},
    {"linear", Schedule::linear},
    {"cosine", Schedule::cosine},
    {"cosine_with_min_lr", Schedule::cosine_with_min_lr},
}};

}  // namespace

void AdamW::step(Pool& pool, std::span<float> p, std::span<const float> g, double lr,
                 double gradient_scale, std::span<const ParameterGroup> groups) {
  MORU_CHECK(p.size() == m.size() && g.size() == m.size());
  ++steps;
  const double t = static_cast<double>(steps);
  AdamWStep step{.beta1 = static_cast<float>(options.beta1),
                 .rest1 = static_cast<float>(1 - options.beta1),
                 .beta2 = static_cast<float>(options.beta2),
                 .rest2 = static_cast<float>(1 - options.beta2),
                 .scale = static_cast<float>(gradient_scale),
                 .decay = 1,
                 .rate = 0,
                 .root = static_cast<float>(std::sqrt(1 - std::pow(options.beta2, t))),
                 .eps = static_cast<float>(options.eps)};
  const ParameterGroup all{.first = 0, .end = p.size()};
  if (groups.empty()) groups = std::span(&all, 1);
  for (const ParameterGroup& group : groups) {
    const double rate = lr * group.lr_ratio;
    step.decay = static_cast<float>(1 - rate * (group.decays ? options.weight_decay : 0.0));
    step.rate = static_cast<float>(rate / (1 - std::pow(options.beta1, t)));
    pool.each(tiles(group.end - group.first), [&](size_t tile) {
      const size_t first = group.first + tile * kTile, last = std::min(first + kTile, group.end);
      float_kernels().adamw(step, &g[first], last - first, &m[first], &v[first], &p[first]);
    });
  }
}

double global_norm(Pool& pool, std::span<const float> g) {
  std::vector<double> sums(tiles(g.size()), 0.0);
  pool.each(sums.size(), [&](size_t tile) {
    const size_t last = std::min((tile + 1) * kTile, g.size());
    // Eight sums, so that none waits for its own last addition.
    double lanes[8] = {};
    size_t i = tile * kTile;
    for (; i + 8 <= last; i += 8)
      for (size_t j = 0; j < 8; ++j) lanes[j] += double{g[i + j]} * double{g[i + j]};
    for (size_t j = 0; i < last; ++i, ++j) lanes[j] += double{g[i]} * double{g[i]};
    for (const double lane : lanes) sums[tile] += lane;
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  return std::sqrt(sum);
}

double clip_scale(double norm, double max_norm) {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

double schedule_factor(const ScheduleOptions& o, uint64_t step) {
  if (step < o.warmup) return static_cast<double>(step) / static_cast<double>(o.warmup);
  if (o.kind == Schedule::constant) return 1;
  const double span =
      static_cast<double>(std::max<uint64_t>(1, o.total - std::min(o.warmup, o.total)));
  const double progress = static_cast<double>(step - o.warmup) / span;
  if (o.kind == Schedule::linear) return std::max(0.0, 1 - progress);
  const double cosine = std::max(0.0, 0.5 * (1 + std::cos(std::numbers::pi * progress)));
  return o.kind == Schedule::cosine ? cosine : cosine * (1 - o.min_ratio) + o.min_ratio;
}

Schedule parse_schedule(std::string_view name) {
  for (const ScheduleRow& row : kSchedules)
    if (row.name == name) return row.schedule;
  throw Error(ErrorKind::usage, {.where = "--lr-scheduler-type",
                                 .what = fmt::format("\"{}\" is no schedule", name),
                                 .cure = "use constant, linear, cosine or cosine_with_min_lr"});
}

std::string_view name_of(Schedule schedule) {
  for (const ScheduleRow& row : kSchedules)
    if (row.schedule == schedule) return row.name;
  MORU_CHECK(false);
}

}  // namespace moru
