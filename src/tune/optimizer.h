// AdamW, gradient clipping and learning-rate schedules, as torch.optim and transformers define
// them. Every sum runs in a fixed order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/threads.h"

namespace moru {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
};

// Parameters [first, end) with a learning rate of their own, and with or without decay.
struct ParameterGroup {
  size_t first = 0, end = 0;
  double lr_ratio = 1;
  bool decays = true;
  bool operator==(const ParameterGroup&) const = default;
};

// Decoupled weight decay (arXiv:1711.05101), step t from 1:
//   p ← p·(1 − lr·wd)   m ← β1·m + (1 − β1)·g   v ← β2·v + (1 − β2)·g²
//   p ← p − lr/(1 − β1ᵗ) · m / (√v/√(1 − β2ᵗ) + eps)
struct AdamW {
  AdamWOptions options;
  std::vector<float> m, v;
  uint64_t steps = 0;

  explicit AdamW(size_t parameters, const AdamWOptions& chosen = {})
      : options(chosen), m(parameters, 0.0f), v(parameters, 0.0f) {}
  // g is multiplied by `gradient_scale` first (clipping). Without groups all are one.
  void step(Pool& pool, std::span<float> p, std::span<const float> g, double lr,
            double gradient_scale = 1, std::span<const ParameterGroup> groups = {});
};

// √Σ g², tiles of fixed size summed in double and in order. NaN and infinity pass through.
double global_norm(Pool& pool, std::span<const float> g);
// What clip_grad_norm_ multiplies by: min(1, max_norm / (norm + 1e-6)); max_norm 0 does not clip.
double clip_scale(double norm, double max_norm);

enum class Schedule {
  constant,
  linear,
  cosine,
  cosine_with_min_lr,
  cosine_with_restarts,
  polynomial,
  inverse_sqrt,
  warmup_stable_decay,
};
// The ways of warmup_stable_decay up to its peak and down again.
enum class Ramp { linear, cosine, one_minus_sqrt };

// What transformers calls lr_scheduler_kwargs stands below the first line, under its names and with
// its defaults.
struct ScheduleOptions {
  Schedule kind = Schedule::cosine;
  uint64_t warmup = 0, total = 1;   // steps
  double lr = 1;                    // the peak, over which polynomial's lr_end is
  double min_ratio = 0.1;           // of cosine_with_min_lr: its end over its peak
  double num_cycles = 1;            // of cosine_with_restarts
  double lr_end = 1e-7, power = 1;  // of polynomial
  double timescale = 0;             // of inverse_sqrt, in steps; 0: the warm-up, or 10,000
  // Of warmup_stable_decay, in steps; without num_stable_steps what warm-up and decay leave.
  std::optional<double> num_stable_steps, num_decay_steps;
  Ramp warmup_type = Ramp::linear, decay_type = Ramp::cosine;
  double min_lr_ratio = 0;  // what it begins and ends with
};
// The factor on the learning rate at `step`, from 0: step / warmup first, so the very first step of
// a warm-up moves nothing, as in transformers; then the schedule's own curve.
double schedule_factor(const ScheduleOptions& options, uint64_t step);
// Under transformers' names; "constant" is also "constant_with_warmup". Error: usage.
Schedule parse_schedule(std::string_view name);
std::string_view name_of(Schedule schedule);
std::string names_of_schedules();  // "constant, linear, …"
// Takes over what a JSON object says of options.kind under transformers' names, {"power": 2}. Error
// usage: it is none, or the schedule has no such option or no such value of it.
void take_schedule_kwargs(std::string_view json, ScheduleOptions& options);
// All that it would take of this schedule, as JSON; empty if there is nothing.
std::string schedule_kwargs(const ScheduleOptions& options);
// Error usage: what the schedule lacks, or a peak that is not above its end.
void check(const ScheduleOptions& options);

}  // namespace moru
