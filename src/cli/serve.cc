#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>

#include "cli/commands.h"
#include "cli/model_flags.h"
#include "serve/server.h"

namespace moru {
namespace {

struct ServeFlags {
  ModelFlags model;
  CacheFlags cache;
  ServeOptions options;
  std::string log;
  double grace_s = 30, step_ms = 200;
};

void run_server(const ServeFlags& flags) {
  ServeOptions options = flags.options;
  options.backend.model = flags.model.path;
  options.backend.threads = flags.model.threads;
  options.backend.load = flags.model.load_options();
  options.backend.engine = flags.cache.engine_options();
  options.backend.step_seconds = flags.step_ms / 1000;
  options.grace = std::chrono::milliseconds(static_cast<int64_t>(flags.grace_s * 1000));
  options.log = flags.log;
  serve(options);
}

}  // namespace

void add_serve(CLI::App& app) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* cmd = app.add_subcommand("serve", "Serve a model by OpenAI's API");
  flags->model.add_to(*cmd);
  flags->cache.add_to(*cmd);
  ServeOptions& o = flags->options;
  cmd->add_option("--host", o.host, "IP address to listen on; 0.0.0.0: all")->capture_default_str();
  cmd->add_option("--port", o.port, "0: a free one, which is printed")->capture_default_str();
  cmd->add_option("--api-key", o.api_key, "ask every client for this key")->envname("MORU_API_KEY");
  cmd->add_option("--model-name", o.model_name, "what clients call it; default: the file's name");
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
