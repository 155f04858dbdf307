// Counter-based random numbers (Philox 4x32-10, Salmon et al. 2011): a draw is a function of
// (seed, stream, counter), so neither threads nor a resumed run change it.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>

namespace moru {

class Random {
 public:
  // `stream` keeps apart what shares a seed: a layer, an epoch, a sequence.
  explicit Random(uint64_t seed, uint64_t stream = 0, uint64_t counter = 0)
      : seed_(seed), stream_(stream), counter_(counter) {}

  uint32_t u32();
  // Uniform in [0, 1), 24 bits.
  float uniform() { return static_cast<float>(u32() >> 8) * 0x1p-24f; }
  // Uniform in [0, n), n ≥ 1, without modulo bias.
  uint64_t below(uint64_t n);
  // Standard normal (Box-Muller).
  float normal();
  // Fisher-Yates.
  template <typename T>
  void shuffle(std::span<T> items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

  // Draws so far: Random(seed, stream, counter()) goes on from here.
  uint64_t counter() const { return counter_; }

 private:
  uint64_t seed_, stream_, counter_;
};

}  // namespace moru
