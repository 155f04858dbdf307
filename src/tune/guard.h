// Keeps bad steps from spoiling a run: a loss or a gradient norm that stands far above those of the
// last steps is an outlier, whose update is left out (llm.c does so).
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

namespace moru {

class OutlierGuard {
 public:
  static constexpr size_t kWindow = 128;  // steps remembered
  static constexpr size_t kFewest = 32;   // before that, nothing is an outlier

  // Values so far, oldest first, at most kWindow: f32, so that a checkpoint holds them exactly.
  std::vector<float> values;

  // (value − mean) / standard deviation of the window; 0 while it is short or flat.
  double z_score(double value) const {
    if (values.size() < kFewest) return 0;
    double mean = 0, variance = 0;
    for (const float v : values) mean += double{v};
    mean /= static_cast<double>(values.size());
    for (const float v : values) variance += (double{v} - mean) * (double{v} - mean);
    variance /= static_cast<double>(values.size());
    return variance > 0 ? (value - mean) / std::sqrt(variance) : 0;
  }
  void add(double value) {
    if (values.size() == kWindow) values.erase(values.begin());
    values.push_back(static_cast<float>(value));
  }
};

}  // namespace moru
