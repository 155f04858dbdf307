// --adapter of commands that compute with a model.
#pragma once
#include <CLI/CLI.hpp>
#include <filesystem>
#include <optional>
#include <string>

#include "engine/adapter.h"
#include "engine/forward.h"
#include "tune/adapter.h"

namespace moru {

// One adapter over the weights as they are. `options` for the engine that computes with it.
struct AdapterFlags {
  std::string folder;

  void add_to(CLI::App& cmd) {
    cmd.add_option("--adapter", folder, "LoRA adapter to compute with, unmerged: a PEFT folder");
  }
  std::optional<Adapter> load(const Config& config) const {
    if (folder.empty()) return std::nullopt;
    return make_adapter(read_peft_adapter(folder, config));
  }
};

}  // namespace moru
