#include "engine/rope.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace moru {
namespace {

double plain_frequency(const RopeConfig& rope, size_t i) {
  const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(rope.dims);
  return 1.0 / std::pow(double{rope.theta}, exponent);
}

// How many times a frequency's wave turns within the original context.
double turns_within(const RopeConfig& rope, double frequency) {
  return static_cast<double>(rope.original_context) * frequency / (2 * M_PI);
}

// Long waves turn slower by `factor`, short ones as they did, a ramp between.
double llama3_divisor(const RopeConfig& rope, double frequency) {
  const double low = double{rope.low_freq_factor}, high = double{rope.high_freq_factor};
  const double ramp = std::clamp((turns_within(rope, frequency) - low) / (high - low), 0.0, 1.0);
  return 1 / ((1 - ramp) / double{rope.factor} + ramp);
}

// YaRN (arXiv:2309.00071): the same idea with a ramp over dimensions, between those that turn
// beta_fast and beta_slow times within the original context.
double yarn_divisor(const RopeConfig& rope, size_t i) {
  const auto dimension_of = [&](float turns) {
    return static_cast<double>(rope.dims) *
           std::log(static_cast<double>(rope.original_context) / (double{turns} * 2 * M_PI)) /
           (2 * std::log(double{rope.theta}));
  };
  double low = dimension_of(rope.beta_fast), high = dimension_of(rope.beta_slow);
  if (rope.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(rope.dims) - 1);
  if (low == high) high += 0.001;
  const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  return 1 / (ramp / double{rope.factor} + (1 - ramp));
}

}  // namespace

std::vector<float> llama3_divisors(const RopeConfig& rope) {
  std::vector<float> divisors(rope.dims / 2);
  for (size_t i = 0; i < divisors.size(); ++i)
    divisors[i] = static_cast<float>(llama3_divisor(rope, plain_frequency(rope, i)));
  return divisors;
}

// Frequencies as transformers has them: f32 from the powers on, so that long positions turn by the
// same angles as in training.
RopeTables::RopeTables(const RopeConfig& rope, size_t positions)
    : magnitude_(rope.magnitude), dims_(rope.dims), room_(positions), made_(new Made) {
  const size_t half = rope.dims / 2;
  const bool is_long =
      rope.scaling == RopeConfig::Scaling::longrope && positions > rope.original_context;
  const std::vector<float>& divisors = is_long ? rope.long_divisors : rope.divisors;
  frequencies_.resize(half);
  for (size_t i = 0; i < half; ++i) {
    const double plain = plain_frequency(rope, i);
    float f = static_cast<float>(plain);
    if (rope.scaling == RopeConfig::Scaling::linear) f /= rope.factor;
    if (rope.scaling == RopeConfig::Scaling::llama3)
      f = static_cast<float>(double{f} / llama3_divisor(rope, double{f}));
    if (rope.scaling == RopeConfig::Scaling::yarn)
      f = static_cast<float>(plain / yarn_divisor(rope, i));
    if (!divisors.empty()) f /= divisors[i];
    frequencies_[i] = f;
  }
  made_->cosines = PageBuffer(positions * half * sizeof(float));
  made_->sines = PageBuffer(positions * half * sizeof(float));
}

void RopeTables::reach(size_t count) const {
  if (made_ == nullptr || count <= made_->positions.load(std::memory_order_acquire)) return;
  constexpr size_t kAtATime = 256;
  const std::lock_guard lock(made_->mutex);
  MORU_CHECK(count <= room_);
  const size_t end = std::min((count + kAtATime - 1) / kAtATime * kAtATime, room_);
  const size_t half = dims_ / 2;
  auto* cosines = static_cast<float*>(made_->cosines.data());
  auto* sines = static_cast<float*>(made_->sines.data());
  for (size_t p = made_->positions.load(std::memory_order_relaxed); p < end; ++p) {
    for (size_t i = 0; i < half; ++i) {
      const double angle = double{static_cast<float>(p) * frequencies_[i]};
      cosines[p * half + i] = static_cast<float>(std::cos(angle)) * magnitude_;
      sines[p * half + i] = static_cast<float>(std::sin(angle)) * magnitude_;
    }
  }
  made_->positions.store(end, std::memory_order_release);
}

}  // namespace moru
