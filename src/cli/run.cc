#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/error.h"
#include "cli/commands.h"
#include "cli/model_flags.h"
#include "engine/forward.h"
#include "engine/generate.h"
#include "engine/prompt.h"

namespace moru {
namespace {

struct RunFlags {
  ModelFlags model;
  std::string prompt, system;
  bool raw = false, json = false;
  size_t max_tokens = 512;
  SamplingOptions sampling;
};

// Answers one prompt, printing as the text comes. Returns the whole answer.
GenerationResult answer(Generator& generator, const ModelFiles& files, const RunFlags& flags,
                        std::vector<TokenId> prompt, bool print) {
  GenerationResult result;
  generator.submit({.prompt = std::move(prompt),
                    .max_tokens = flags.max_tokens,
                    .sampling = flags.sampling,
                    .stop_ids = files.stop_ids});
  while (generator.busy()) {
    generator.step([&](const GenerationEvent& event) {
      result.text += event.text;
      result.prompt_tokens = event.prompt_tokens;
      result.completion_tokens = event.completion_tokens;
      if (event.finish) result.finish = *event.finish;
      if (!print) return;
      std::fwrite(event.text.data(), 1, event.text.size(), stdout);
      std::fflush(stdout);
    });
  }
  return result;
}

void print_json(const GenerationResult& result, double seconds) {
  fmt::print("{}\n",
             nlohmann::ordered_json{{"text", result.text},
                                    {"finish", result.finish == Finish::stop ? "stop" : "length"},
                                    {"prompt_tokens", result.prompt_tokens},
                                    {"completion_tokens", result.completion_tokens},
                                    {"seconds", seconds}}
                 .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

void run(const RunFlags& flags) {
  const ModelFiles files = open_model(flags.model.path);
  if (!flags.raw && !files.chat_template)
    throw Error(ErrorKind::usage, {.where = flags.model.path,
                                   .what = "the model has no chat template",
                                   .cure = "use --raw to complete plain text"});
  Pool pool(flags.model.pool_size());
  const Model model = load_model(pool, files, flags.model.load_options());
  Engine engine(pool, model);
  Generator generator(engine, files.tokenizer);

  nlohmann::ordered_json messages = nlohmann::ordered_json::array();
  if (!flags.system.empty()) messages.push_back({{"role", "system"}, {"content", flags.system}});
  const auto turn = [&](const std::string& text) {
    const Stopwatch watch;
    std::vector<TokenId> prompt;
    if (flags.raw) {
      prompt = encode_text(files, text);
    } else {
      messages.push_back({{"role", "user"}, {"content", text}});
      prompt = encode_chat(files, {.messages = messages, .add_generation_prompt = true});
    }
    const GenerationResult result = answer(generator, files, flags, std::move(prompt), !flags.json);
    messages.push_back({{"role", "assistant"}, {"content", result.text}});
    if (flags.json) print_json(result, watch.seconds());
    if (!flags.json) fmt::print("\n");
  };

  if (!flags.prompt.empty()) return turn(flags.prompt);
  const bool person = ::isatty(STDIN_FILENO) != 0;
  if (person) fmt::print("Type a message and press Enter; Ctrl-D ends.\n");
  std::string line;
  for (;;) {
    if (person) {
      fmt::print("> ");
      std::fflush(stdout);
    }
    if (!std::getline(std::cin, line)) break;
    if (!line.empty()) turn(line);
  }
}

}  // namespace

void add_run(CLI::App& app) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* cmd = app.add_subcommand("run", "Chat with a model, or complete a text");
  flags->model.add_to(*cmd);
  cmd->add_option("-p,--prompt", flags->prompt, "one message; without it, read them line by line");
  cmd->add_option("--system", flags->system, "system message");
  cmd->add_flag("--raw", flags->raw, "complete the text as it is, without the chat template");
  cmd->add_option("--max-tokens", flags->max_tokens, "longest answer")->capture_default_str();
  SamplingOptions& s = flags->sampling;
  cmd->add_option("--temperature", s.temperature, "0: always the most likely token")
      ->capture_default_str();
  cmd->add_option("--top-k", s.top_k, "keep the k most likely tokens")->capture_default_str();
  cmd->add_option("--top-p", s.top_p, "keep the likeliest set with this probability")
      ->capture_default_str();
  cmd->add_option("--min-p", s.min_p, "keep tokens with this share of the best's probability")
      ->capture_default_str();
  cmd->add_option("--repetition-penalty", s.repetition_penalty, "1: none")->capture_default_str();
  cmd->add_option("--seed", s.seed, "same seed, same answer")->capture_default_str();
  cmd->add_flag("--json", flags->json, "print one JSON object an answer");
  cmd->callback([flags] { run(*flags); });
}

}  // namespace moru
