#include "tune/optimizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string>
#include <utility>

#include "base/error.h"
#include "engine/float_kernels.h"

namespace moru {
namespace {

constexpr size_t kTile = 16384;
size_t tiles(size_t count) { return (count + kTile - 1) / kTile; }

// ---- schedules: transformers' optimization.py, line by line ----

double half_cosine(double progress) { return 0.5 * (1 + std::cos(std::numbers::pi * progress)); }

// From 0 at the end of the warm-up to 1 at the end of the run.
double progress_of(const ScheduleOptions& o, double step) {
  const double warmup = static_cast<double>(o.warmup), total = static_cast<double>(o.total);
  return (step - warmup) / std::max(1.0, total - warmup);
}

double constant(const ScheduleOptions&, double) { return 1; }
double linear(const ScheduleOptions& o, double step) {
  return std::max(0.0, 1 - progress_of(o, step));
}
double cosine(const ScheduleOptions& o, double step) {
  return std::max(0.0, half_cosine(progress_of(o, step)));
}
double cosine_with_min_lr(const ScheduleOptions& o, double step) {
  return cosine(o, step) * (1 - o.min_ratio) + o.min_ratio;
}
double cosine_with_restarts(const ScheduleOptions& o, double step) {
  const double progress = progress_of(o, step);
  return progress >= 1 ? 0 : std::max(0.0, half_cosine(std::fmod(o.num_cycles * progress, 1.0)));
}
double polynomial(const ScheduleOptions& o, double step) {
  const double left = std::max(0.0, 1 - progress_of(o, step));
  return ((o.lr - o.lr_end) * std::pow(left, o.power) + o.lr_end) / o.lr;
}
double inverse_sqrt(const ScheduleOptions& o, double step) {
  const double warmup = static_cast<double>(o.warmup);
  const double timescale = o.timescale > 0 ? o.timescale : warmup > 0 ? warmup : 10'000.0;
  return 1 / std::sqrt((step + timescale - warmup) / timescale);
}

double ramp_down(Ramp ramp, double progress) {
  if (ramp == Ramp::linear) return 1 - progress;
  return ramp == Ramp::cosine ? half_cosine(progress) : 1 - std::sqrt(progress);
}
double warmup_stable_decay(const ScheduleOptions& o, double step) {
  const auto above_least = [&](double factor) {
    return std::max(0.0, factor * (1 - o.min_lr_ratio) + o.min_lr_ratio);
  };
  const double warmup = static_cast<double>(o.warmup), decay = o.num_decay_steps.value_or(0);
  if (step < warmup) return above_least(ramp_down(o.warmup_type, 1 - step / warmup));
  const double stable = o.num_stable_steps.value_or(static_cast<double>(o.total) - warmup - decay);
  const double since = step - warmup - stable;
  if (since < 0) return 1;
  return since < decay ? above_least(ramp_down(o.decay_type, since / decay)) : o.min_lr_ratio;
}

struct ScheduleRow {
  std::string_view name;
  Schedule schedule;
  double (*factor)(const ScheduleOptions& options, double step);
  bool warms_up_itself = false;  // else its curve begins after a straight warm-up
};
constexpr std::array<ScheduleRow, 9> kSchedules = {{
    {"constant", Schedule::constant, constant},
    {"constant_with_warmup", Schedule::constant, constant},
    {"linear", Schedule::linear, linear},
    {"cosine", Schedule::cosine, cosine},
    {"cosine_with_min_lr", Schedule::cosine_with_min_lr, cosine_with_min_lr},
    {"cosine_with_restarts", Schedule::cosine_with_restarts, cosine_with_restarts},
    {"polynomial", Schedule::polynomial, polynomial},
    {"inverse_sqrt", Schedule::inverse_sqrt, inverse_sqrt},
    {"warmup_stable_decay", Schedule::warmup_stable_decay, warmup_stable_decay, true},
}};
const ScheduleRow& row_of(Schedule schedule) {
  for (const ScheduleRow& row : kSchedules)
    if (row.schedule == schedule) return row;
  MORU_CHECK(false);
}

// An option of one schedule: a number of at least `least`, or the name of a ramp.
struct KwargRow {
  std::string_view name;
  Schedule schedule;
  double least = 0;
  double ScheduleOptions::*number = nullptr;
  std::optional<double> ScheduleOptions::*steps = nullptr;
  Ramp ScheduleOptions::*ramp = nullptr;
};
constexpr Schedule kWsd = Schedule::warmup_stable_decay;
constexpr KwargRow kKwargs[] = {
    {"num_cycles", Schedule::cosine_with_restarts, 1, &ScheduleOptions::num_cycles},
    {"lr_end", Schedule::polynomial, 0, &ScheduleOptions::lr_end},
    {"power", Schedule::polynomial, 0, &ScheduleOptions::power},
    {"timescale", Schedule::inverse_sqrt, 1, &ScheduleOptions::timescale},
    {"num_decay_steps", kWsd, 0, nullptr, &ScheduleOptions::num_decay_steps},
    {"num_stable_steps", kWsd, 0, nullptr, &ScheduleOptions::num_stable_steps},
    {"warmup_type", kWsd, 0, nullptr, nullptr, &ScheduleOptions::warmup_type},
    {"decay_type", kWsd, 0, nullptr, nullptr, &ScheduleOptions::decay_type},
    {"min_lr_ratio", kWsd, 0, &ScheduleOptions::min_lr_ratio},
};
constexpr std::array<std::pair<std::string_view, Ramp>, 3> kRamps = {
    {{"linear", Ramp::linear}, {"cosine", Ramp::cosine}, {"1-sqrt", Ramp::one_minus_sqrt}}};

constexpr const char* kKwargsFlag = "--lr-scheduler-kwargs";

[[noreturn]] void refuse_kwarg(std::string_view name, std::string what, std::string cure) {
  throw Error(ErrorKind::usage, {.where = fmt::format("{}: {}", kKwargsFlag, name),
                                 .what = std::move(what),
                                 .cure = std::move(cure)});
}

void take_kwarg(const KwargRow& row, const nlohmann::json& value, ScheduleOptions& o) {
  if (row.ramp != nullptr) {
    const std::string name = value.is_string() ? value.get<std::string>() : "";
    for (const auto& [known, ramp] : kRamps) {
      if (known != name) continue;
      o.*row.ramp = ramp;
      return;
    }
    refuse_kwarg(row.name, "is no way up or down", "use linear, cosine or 1-sqrt");
  }
  const double number = value.is_number() ? value.get<double>() : -1.0;
  if (!(number >= row.least))
    refuse_kwarg(row.name, fmt::format("is no number of {} or more", row.least), "give one");
  if (row.number != nullptr)
    o.*row.number = number;
  else
    o.*row.steps = number;
}

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
  const ScheduleRow& row = row_of(o.kind);
  if (step < o.warmup && !row.warms_up_itself)
    return static_cast<double>(step) / static_cast<double>(o.warmup);
  return row.factor(o, static_cast<double>(step));
}

Schedule parse_schedule(std::string_view name) {
  for (const ScheduleRow& row : kSchedules)
    if (row.name == name) return row.schedule;
  throw Error(ErrorKind::usage, {.where = "--lr-scheduler-type",
                                 .what = fmt::format("\"{}\" is no schedule", name),
                                 .cure = "use one of " + names_of_schedules()});
}

std::string_view name_of(Schedule schedule) { return row_of(schedule).name; }

std::string names_of_schedules() {
  std::string names;
  for (const ScheduleRow& row : kSchedules)
    if (row.name == name_of(row.schedule))
      names += fmt::format("{}{}", names.empty() ? "" : ", ", row.name);
  return names;
}

void take_schedule_kwargs(std::string_view json, ScheduleOptions& o) {
  const nlohmann::json given = nlohmann::json::parse(json, nullptr, false);
  if (!given.is_object())
    throw Error(ErrorKind::usage, {.where = kKwargsFlag,
                                   .what = fmt::format("\"{}\" is no JSON object", json),
                                   .cure = "for example {\"num_decay_steps\": 100}"});
  std::string known;
  for (const KwargRow& row : kKwargs)
    if (row.schedule == o.kind) known += fmt::format("{}{}", known.empty() ? "" : ", ", row.name);
  for (const auto& item : given.items()) {
    const std::string& name = item.key();
    const auto* row = std::find_if(std::begin(kKwargs), std::end(kKwargs), [&](const KwargRow& r) {
      return r.schedule == o.kind && r.name == name;
    });
    if (row == std::end(kKwargs))
      refuse_kwarg(name, fmt::format("is no option of {}", name_of(o.kind)),
                   known.empty() ? "it has none, but see --min-lr-ratio" : "it has " + known);
    take_kwarg(*row, item.value(), o);
  }
}

std::string schedule_kwargs(const ScheduleOptions& o) {
  nlohmann::ordered_json all;
  for (const KwargRow& row : kKwargs) {
    if (row.schedule != o.kind) continue;
    nlohmann::ordered_json& value = all[std::string(row.name)];
    if (row.number != nullptr) value = o.*row.number;
    if (row.steps != nullptr && o.*row.steps) value = *(o.*row.steps);
    if (row.ramp != nullptr) value = static_cast<int>(o.*row.ramp);
  }
  return all.is_null() ? "" : all.dump();
}

void check(const ScheduleOptions& o) {
  if (o.kind == Schedule::warmup_stable_decay && !o.num_decay_steps)
    refuse_kwarg("num_decay_steps",
                 "is missing: the steps at the end that warmup_stable_decay goes down in",
                 "give {\"num_decay_steps\": 100}");
  if (!(o.min_lr_ratio <= 1)) refuse_kwarg("min_lr_ratio", "is above 1", "it is a share of --lr");
  if (o.kind == Schedule::polynomial && !(o.lr > o.lr_end))
    refuse_kwarg("lr_end", fmt::format("is {}, and --lr no more than that", o.lr_end),
                 "give a smaller one");
}

}  // namespace moru
