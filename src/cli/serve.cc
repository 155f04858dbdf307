#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/model_flags.h"
#include "serve/server.h"
#include "tune/adapter.h"

namespace moru {
namespace {

struct ServeFlags {
  ModelFlags model;
  CacheFlags cache;
  ServeOptions options;
  std::vector<std::string> adapters;
  std::string log;
  double grace_s = 30, step_ms = 200;
};

// NAME=FOLDER, or a folder whose last name clients use.
std::vector<NamedAdapter> load_adapters(const ServeFlags& flags) {
  std::vector<NamedAdapter> adapters;
  if (flags.adapters.empty()) return adapters;
  const Config config = open_model(flags.model.path).config;
  for (const std::string& text : flags.adapters) {
    const size_t equals = text.find('=');
    std::filesystem::path folder = text.substr(equals == std::string::npos ? 0 : equals + 1);
    if (folder.filename().empty()) folder = folder.parent_path();
    std::string name =
        equals == std::string::npos ? folder.filename().string() : text.substr(0, equals);
    const bool taken = std::any_of(adapters.begin(), adapters.end(),
                                   [&](const NamedAdapter& other) { return other.name == name; });
    if (name.empty() || taken)
      throw Error(ErrorKind::usage, {.where = "--adapter " + text,
                                     .what = name.empty() ? "has no name" : "its name is taken",
                                     .cure = "give NAME=FOLDER"});
    adapters.push_back({std::move(name), read_peft_adapter(folder, config)});
  }
  return adapters;
}

void run_server(const ServeFlags& flags) {
  ServeOptions options = flags.options;
  options.backend.model = flags.model.path;
  options.backend.threads = flags.model.threads;
  options.backend.load = flags.model.load_options();
  options.backend.engine = flags.cache.engine_options();
  options.backend.step_seconds = flags.step_ms / 1000;
  options.grace = std::chrono::milliseconds(static_cast<int64_t>(flags.grace_s * 1000));
  options.backend.adapters = load_adapters(flags);
  options.log = flags.log;
  serve(std::move(options));
}

}  // namespace

void add_serve(CLI::App& app) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* cmd = app.add_subcommand("serve", "Serve a model by OpenAI's API");
  flags->model.add_to(*cmd);
  flags->cache.add_to(*cmd);
  ServeOptions& o = flags->options;
  cmd->add_option("--host", o.host, "IP address to listen on; 0.0.0.0: all")->capture_default_str();
  cmd->add_option("--port", o.port, "0: a free one, which is printed")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  cmd->add_option("--api-key", o.api_key, "ask every client for this key")->envname("MORU_API_KEY");
  cmd->add_option("--model-name", o.model_name, "what clients call it; default: the file's name");
  cmd->add_option("--adapter", flags->adapters,
                  "NAME=FOLDER: a LoRA adapter (PEFT) that requests choose as their model; repeat "
                  "for more")
      ->allow_extra_args(false);
  cmd->add_option("--max-sequences", o.backend.sequences, "answers computed at once")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  ModelFlags::add_draft_to(*cmd, o.backend.drafts);
  cmd->add_option("--max-waiting", o.waiting, "answers that may wait; more are refused")
      ->check(CLI::Range(0, 100'000))
      ->capture_default_str();
  cmd->add_option("--step-ms", flags->step_ms,
                  "what a step should take at most: long prompts wait for short ones and for "
                  "answers no longer than that; 0: as long as it likes")
      ->check(CLI::Range(0.0, 60'000.0))
      ->capture_default_str();
  cmd->add_option("--grace", flags->grace_s, "seconds for answers under way when it stops")
      ->check(CLI::Range(0.0, 86'400.0))
      ->capture_default_str();
  cmd->add_option("--log", flags->log, "append a JSON line a request to this file; -: stderr");
  cmd->callback([flags] { run_server(*flags); });
}

}  // namespace moru
