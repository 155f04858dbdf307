// Flags that every command with a model has.
#pragma once
#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "base/cpu.h"
#include "base/error.h"
#include "cli/flag_rules.h"
#include "engine/forward.h"
#include "engine/model.h"

namespace moru {

struct ModelFlags {
  std::string path, precision = "auto", activations = "int16";
  size_t threads = 0, context = 0;

  void add_to(CLI::App& cmd) {
    cmd.add_option("model", path, "GGUF file or Hugging Face folder")->required();
    add_computing_to(cmd);
  }
  void add_computing_to(CLI::App& cmd) {
    cmd.add_option("--precision", precision,
                   "exact (quantized weights as stored), bf16 or f32; auto: by the file")
        ->check(CLI::IsMember({"auto", "exact", "bf16", "f32"}))
        ->capture_default_str();
    cmd.add_option("--activations", activations,
                   "of quantized models: int16 (as good as f32) or int8 (faster, less exact)")
        ->check(CLI::IsMember({"int16", "int8"}))
        ->capture_default_str();
    cmd.add_option("--threads", threads, "0: all that this process may use")
        ->check(CLI::Range(0, 1024))
        ->capture_default_str();
    cmd.add_option("--context", context, "longest sequence in tokens; 0: the model's")
        ->check(CLI::Range(0, 1 << 20))
        ->capture_default_str();
  }

  // --draft of commands that generate.
  static void add_draft_to(CLI::App& cmd, bool& drafts) {
    cmd.add_option_function<std::string>(
           "--draft", [&drafts](const std::string& kind) { drafts = kind == "lookup"; },
           "lookup: with quantized weights, guess at tokens that the text already had, never "
           "another answer; off")
        ->check(CLI::IsMember({"lookup", "off"}))
        ->default_str("lookup");
  }

  size_t pool_size() const { return threads != 0 ? threads : usable_threads(); }
  LoadOptions load_options() const {
    LoadOptions options{.context = context};
    if (activations == "int8") {
      if (precision == "bf16" || precision == "f32")
        throw Error(ErrorKind::usage, {.where = "--activations int8",
                                       .what = "is about weights that stay quantized",
                                       .cure = "leave out --precision " + precision});
      options.activations = Activations::int8;
    }
    if (precision == "exact") options.profile = Profile::exact;
    if (precision == "bf16") options.profile = Profile::bf16;
    if (precision == "f32") options.profile = Profile::f32;
    return options;
  }
};

// Flags of the cache that holds keys and values.
struct CacheFlags {
  uint64_t memory = 0;
  std::string type = "i16";

  void add_to(CLI::App& cmd) {
    cmd.add_option("--cache-memory", memory,
                   "most memory for keys and values, as 512MiB; 0: what 16,384 tokens take")
        ->transform(memory_size());
    add_type_to(cmd);
  }
  void add_type_to(CLI::App& cmd) {
    cmd.add_option(
           "--kv-type", type,
           "what keys and values are rounded to: i16 (as good as exact, fastest), f16, bf16, "
           "or q8_0 (half the memory)")
        ->check(CLI::IsMember({"i16", "f16", "bf16", "q8_0"}))
        ->capture_default_str();
  }

  EngineOptions engine_options() const {
    EngineOptions options;
    options.cache_bytes = memory;
    if (type == "f16") options.kv_type = KvType::f16;
    if (type == "bf16") options.kv_type = KvType::bf16;
    if (type == "q8_0") options.kv_type = KvType::q8_0;
    return options;
  }
};

}  // namespace moru
