// moru adapter: an adapter in another form.
#include "tune/adapter.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/flag_rules.h"

namespace moru {
namespace {

struct AdapterCommandFlags {
  std::string model, adapter, out, to = "gguf-adapter", type = "bf16";
  size_t shard_mb = 5000;
};

// Only a merged model has numbers and files that can be chosen.
void refuse_idle_flags(const CLI::App& cmd, const std::string& to) {
  if (to != "gguf" && to != "hf")
    refuse_given(cmd, {"--type"}, "is about --to gguf or hf, not " + to);
  if (to != "hf") refuse_given(cmd, {"--shard-mb"}, "is about --to hf, not " + to);
}

void convert_adapter(const CLI::App& cmd, const AdapterCommandFlags& flags) {
  refuse_idle_flags(cmd, flags.to);
  const ModelFiles files = open_model(flags.model);
  const Lora lora = read_peft_adapter(flags.adapter, files.config);
  const DType type = *dtype_from_name(flags.type);
  if (flags.to == "gguf-adapter")
    write_gguf_adapter(flags.out, files, lora);
  else if (flags.to == "gguf")
    write_merged_gguf(flags.out, files, lora, type);
  else if (flags.to == "hf")
    write_merged_folder(flags.out, files, lora, type, flags.shard_mb * 1'000'000);
  else
    write_peft_adapter(flags.out, lora, files.config, flags.model);
  fmt::print("{}\n", flags.out);
}

}  // namespace

void add_adapter(CLI::App& app) {
  auto flags = std::make_shared<AdapterCommandFlags>();  // shared with the callback
  CLI::App* cmd =
      app.add_subcommand("adapter", "Merge a LoRA adapter, or write it in another form");
  cmd->add_option("model", flags->model, "the base: GGUF file or Hugging Face folder")->required();
  cmd->add_option("adapter", flags->adapter, "PEFT folder")->required();
  cmd->add_option("-o,--out", flags->out, "file or folder to write")->required();
  cmd->add_option("--to", flags->to,
                  "gguf-adapter (for llama.cpp's --lora), peft, or the merged model as gguf or hf")
      ->check(CLI::IsMember({"gguf-adapter", "peft", "gguf", "hf"}))
      ->capture_default_str();
  cmd->add_option("--type", flags->type, "numbers of a merged model")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}))
      ->capture_default_str();
  cmd->add_option("--shard-mb", flags->shard_mb, "largest file of a merged folder")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  cmd->callback([cmd, flags] { convert_adapter(*cmd, *flags); });
}

}  // namespace moru
