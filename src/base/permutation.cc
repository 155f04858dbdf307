#include "base/permutation.h"

#include <numeric>
#include <span>

#include "base/random.h"

namespace moru {
namespace {

// SplitMix64's finaliser: every bit of the result depends on every bit of x.
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

Permutation::Permutation(size_t count, uint64_t seed, uint64_t stream) : count_(count) {
  Random random(seed, stream);
  if (count <= kListed) {
    list_.resize(count);
    std::iota(list_.begin(), list_.end(), 0u);
    random.shuffle(std::span(list_));
    return;
  }
  while (size_t{1} << (2 * half_bits_) < count) ++half_bits_;
  for (uint64_t& key : keys_) key = uint64_t{random.u32()} << 32 | random.u32();
}

size_t Permutation::operator[](size_t i) const {
  if (!list_.empty()) return list_[i];
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t x = i;
  do {
    uint64_t left = x >> half_bits_, right = x & mask;
    for (const uint64_t key : keys_) {
      const uint64_t next = left ^ (mixed(right ^ key) & mask);
      left = right;
      right = next;
    }
    x = left << half_bits_ | right;
  } while (x >= count_);
  return x;
}

}  // namespace moru
