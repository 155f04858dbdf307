// A permutation of [0, count) that a seed chooses, whose elements are found one by one: an order of
// any number of rows that a run may enter anywhere.
//
// Up to kListed elements it is a list, shuffled by Fisher-Yates. Beyond that nothing is stored: a
// Feistel network permutes the next power of four, and is applied again until it lands below count
// (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), twice on
// average.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moru {

class Permutation {
 public:
  static constexpr size_t kListed = size_t{1} << 20;

  Permutation() = default;
  Permutation(size_t count, uint64_t seed, uint64_t stream);

  size_t size() const { return count_; }
  size_t operator[](size_t i) const;  // i < size()

 private:
  static constexpr size_t kRounds = 8;
  size_t count_ = 0;
  std::vector<uint32_t> list_;  // empty: computed
  unsigned half_bits_ = 0;      // the network permutes 2^(2 half_bits)
  std::array<uint64_t, kRounds> keys_{};
};

}  // namespace moru
