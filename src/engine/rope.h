// Rotary frequencies and their tables, with the ways to stretch them to longer contexts.
#pragma once
#include <cstddef>
#include <vector>

#include "engine/config.h"
#include "engine/row_ops.h"

namespace moru {

struct RopeTables {
  std::vector<float> cosines, sines;  // [positions, dims / 2]
  size_t dims = 0;
  RopeTable view() const { return {cosines.data(), sines.data(), dims}; }
};

// Longrope has two sets of factors: with more positions than it was first trained for, all of them
// turn by the long one.
RopeTables make_rope_tables(const RopeConfig& rope, size_t positions);

// Llama 3's scaling as divisors of the plain frequencies, [dims / 2]: what a GGUF stores.
std::vector<float> llama3_divisors(const RopeConfig& rope);

}  // namespace moru
