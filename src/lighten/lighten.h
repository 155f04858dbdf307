// A whole model into a smaller file: the plan of its preset, every row rounded by what its error
// costs, written as a GGUF that llama.cpp loads too.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/threads.h"
#include "engine/model_files.h"
#include "lighten/calibrate.h"
#include "lighten/plan.h"

namespace moru {

struct LightenOptions {
  const Importance* importance = nullptr;          // null: all channels alike
  std::function<void(double done)> progress = {};  // 0 to 1
};

struct LightenResult {
  uint64_t file_bytes = 0;
  double bits_per_weight = 0;
  std::map<std::string, size_t> bytes_by_type;
  std::vector<std::string> notes;  // fallbacks, a line each
};

// `files` may be quantized itself: its values are what is rounded. The file appears at `out` whole
// or not at all. Errors: bad_input (NaN in a weight, naming it), io, no_space.
LightenResult lighten_model(Pool& pool, const ModelFiles& files, const Preset& preset,
                            const std::filesystem::path& out, const LightenOptions& options = {});

// Error usage for a name that is no preset, listing those that are.
const Preset& preset_of(std::string_view name);

}  // namespace moru
