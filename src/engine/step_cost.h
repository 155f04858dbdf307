// How long a step will take, learnt from the steps before it:
//
//   seconds ≈ fixed + per_token · tokens + per_pair · pairs
//
// where a pair is a token and a key that it sees. Recent steps of every size are kept, also when
// only small ones come for a while; the fit is by relative error, so that a step of one token
// counts as much as one of 512, and robust, so that a step that was held up by another program does
// not.
#pragma once
#include <array>
#include <cstddef>

namespace moru {

struct StepWork {
  size_t tokens = 0;
  double pairs = 0;

  // `count` tokens from `position` on.
  void add(size_t count, size_t position) {
    const auto n = static_cast<double>(count);
    tokens += count;
    pairs += n * (static_cast<double>(position) + (n + 1) / 2);
  }
};

class StepCost {
 public:
  void learn(const StepWork& work, double seconds);
  // Before anything was learnt: 0.
  double seconds(const StepWork& work) const;
  // How many more tokens from `position` on, at most `most`, may join `work` so that the step takes
  // at most `seconds_max`. Never a step more than twice as large as any before it, or than 32
  // tokens: further the fit is not to be trusted.
  size_t affordable(const StepWork& work, size_t position, size_t most, double seconds_max) const;

 private:
  struct Observation {
    StepWork work;
    double seconds;
  };
  static constexpr size_t kSizes = 16, kPerSize = 8;

  void fit();

  std::array<std::array<Observation, kPerSize>, kSizes> kept_{};  // by log2 of tokens
  std::array<size_t, kSizes> seen_{};
  size_t largest_ = 0;  // tokens of a step
  double fixed_ = 0, per_token_ = 0, per_pair_ = 0;
};

}  // namespace moru
