// Rotary frequencies and their tables, with the ways to stretch them to longer contexts.
#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "base/memory.h"
#include "engine/config.h"
#include "engine/row_ops.h"

namespace moru {

// Cosines and sines of every position, computed when a position is first reached: a context of
// 32,768 positions of 256 dimensions would take 33 MB, and few conversations get
// there.
class RopeTables {
 public:
  RopeTables() = default;
  // Room for `positions`. Longrope has two sets of factors: with more positions than it was first
  // trained for, all of them turn by the long one. Error: no_space.
  RopeTables(const RopeConfig& rope, size_t positions);
  // Positions below `count`, at most those there is room for, are there from now on. Any thread may
  // call; threads that read what others reached must have waited for them.
  void reach(size_t count) const;
  RopeTable view() const {
    return {static_cast<const float*>(made_->cosines.data()),
            static_cast<const float*>(made_->sines.data()), dims_};
  }

 private:
  struct Made {
    std::mutex mutex;
    std::atomic<size_t> positions = 0;
    PageBuffer cosines, sines;  // [room, dims / 2]
  };
  std::vector<float> frequencies_;  // [dims / 2]
  float magnitude_ = 1;
  size_t dims_ = 0, room_ = 0;
  std::unique_ptr<Made> made_;
};

// Llama 3's scaling as divisors of the plain frequencies, [dims / 2]: what a GGUF stores.
std::vector<float> llama3_divisors(const RopeConfig& rope);

}  // namespace moru
