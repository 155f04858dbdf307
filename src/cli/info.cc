#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/hash.h"
#include "cli/commands.h"
#include "engine/model_files.h"
#include "engine/prompt.h"

namespace moru {
namespace {

struct InfoFlags {
  std::string model;
  std::string example = "안녕하세요! How are you?";
  bool tensors = false, json = false;
};

std::string join_ids(std::span<const TokenId> ids) {
  return fmt::format("{}", fmt::join(ids, " "));
}

// 80 columns: long lists of ids break between ids.
void print_wrapped(std::string_view label, std::string_view text) {
  constexpr size_t kLabel = 16, kWidth = 80 - kLabel;
  bool first = true;
  while (!text.empty()) {
    size_t end = text.size();
    if (end > kWidth) {
      end = text.rfind(' ', kWidth);
      if (end == std::string_view::npos || end == 0) end = kWidth;
    }
    fmt::print("{:<{}}{}\n", first ? label : "", kLabel, text.substr(0, end));
    text.remove_prefix(std::min(text.size(), end + (end < text.size() && text[end] == ' ')));
    first = false;
  }
}

void info(const InfoFlags& flags) {
  const ModelFiles files = open_model(flags.model);
  const Config& c = files.config;

  struct Share {
    size_t tensors = 0, elements = 0, bytes = 0;
  };
  std::map<std::string, Share> by_type;
  Share all;
  for (const Tensor& tensor : files.tensors) {
    for (Share* share : {&by_type[std::string(traits(tensor.type).name)], &all}) {
      ++share->tensors;
      share->elements += tensor.count();
      share->bytes += bytes_of(tensor.type, tensor.count());  // data may be in several places
    }
  }
  const nlohmann::ordered_json message = {{{"role", "user"}, {"content", flags.example}}};
  const std::vector<TokenId> plain = files.tokenizer.encode(flags.example);
  const std::vector<TokenId> chat =
      files.chat_template ? encode_chat(files, {.messages = message, .add_generation_prompt = true})
                          : std::vector<TokenId>();

  if (flags.json) {
    nlohmann::ordered_json out = {
        {"path", files.path.string()},
        {"family", c.family},
        {"parameters", all.elements},
        {"bytes", all.bytes},
        {"layers", c.layers},
        {"width", c.width},
        {"ffn_width", c.ffn_width},
        {"heads", c.heads},
        {"kv_heads", c.kv_heads},
        {"head_dim", c.head_dim},
        {"vocab", c.vocab},
        {"context", c.context},
        {"tied_head", c.tied_head},
        {"chat_template", files.chat_template.has_value()},
        {"stop_ids", files.stop_ids},
        {"example", {{"text", flags.example}, {"ids", plain}, {"chat_ids", chat}}},
        {"unmatched", files.unmatched},
    };
    for (const auto& [type, share] : by_type)
      out["types"][type] = {{"tensors", share.tensors}, {"bytes", share.bytes}};
    for (const Tensor& tensor : files.tensors)
      if (flags.tensors)
        out["tensors"].push_back({{"name", tensor.name},
                                  {"type", traits(tensor.type).name},
                                  {"shape", tensor.shape},
                                  {"bytes", bytes_of(tensor.type, tensor.count())}});
    fmt::print("{}\n", out.dump(2));
    return;
  }

  const auto line = [](std::string_view label, const std::string& text) {
    fmt::print("{:<16}{}\n", label, text);
  };
  line("path", files.path.string());
  line("family", c.family);
  line("parameters", fmt::format("{:.1f} M", static_cast<double>(all.elements) / 1e6));
  line("bytes",
       fmt::format("{:.1f} MB, {:.2f} bits per weight", static_cast<double>(all.bytes) / 1e6,
                   8.0 * static_cast<double>(all.bytes) /
                       static_cast<double>(std::max<size_t>(all.elements, 1))));
  line("shape", fmt::format("{} layers, width {}, ffn {}, {} heads of {}, {} KV heads", c.layers,
                            c.width, c.ffn_width, c.heads, c.head_dim, c.kv_heads));
  line("vocabulary",
       fmt::format("{}{}", c.vocab, c.tied_head ? ", head tied to the embedding" : ""));
  line("context",
       fmt::format("{} tokens{}", c.context,
                   c.window ? fmt::format(", window of {} on some layers", c.window) : ""));
  for (const auto& [type, share] : by_type)
    line("  " + type, fmt::format("{:4} tensors, {:8.1f} MB", share.tensors,
                                  static_cast<double>(share.bytes) / 1e6));
  std::string stops;
  for (const TokenId id : files.stop_ids)
    stops += fmt::format("{}{} ({})", stops.empty() ? "" : ", ", files.tokenizer.piece(id), id);
  line("stops at", stops);
  line("chat template", files.chat_template ? "yes" : "none");
  line("example", flags.example);
  print_wrapped("  ids", join_ids(plain));
  if (!chat.empty()) print_wrapped("  as a chat", join_ids(chat));
  if (!files.unmatched.empty())
    print_wrapped("not used", fmt::format("{}", fmt::join(files.unmatched, " ")));
  if (!flags.tensors) return;
  for (const Tensor& tensor : files.tensors)
    fmt::print("{:<36} {:<7} [{}]\n", tensor.name, traits(tensor.type).name,
               fmt::join(tensor.shape, ", "));
}

}  // namespace

void add_info(CLI::App& app) {
  auto flags = std::make_shared<InfoFlags>();
  CLI::App* cmd = app.add_subcommand("info", "What is in a model: shape, types, template, tokens");
  cmd->add_option("model", flags->model, "GGUF file or Hugging Face folder")->required();
  cmd->add_option("--example", flags->example, "a text to show the token ids of");
  cmd->add_flag("--tensors", flags->tensors, "list every tensor");
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([flags] { info(*flags); });
}

}  // namespace moru
