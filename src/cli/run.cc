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
#include "base/files.h"
#include "cli/adapter_flags.h"
#include "cli/commands.h"
#include "cli/model_flags.h"
#include "engine/constraint.h"
#include "engine/forward.h"
#include "engine/generate.h"
#include "engine/prompt.h"

namespace moru {
namespace {

struct RunFlags {
  ModelFlags model;
  CacheFlags cache;
  AdapterFlags adapter;
  std::string prompt, system;
  std::string json_schema, regex;  // a file, an expression
  bool raw = false, json = false, json_object = false, drafts = true;
  size_t max_tokens = 512;
  std::vector<std::string> stops;
  SamplingOptions sampling;
};

// What the flags hold answers to; nullptr: to nothing.
std::shared_ptr<const Language> language_of(const RunFlags& flags) {
  using Kind = ConstraintSource::Kind;
  if (!flags.json_schema.empty()) {
    ConstraintSource source{Kind::json_schema, read_file(flags.json_schema)};
    try {
      return std::make_shared<Language>(source);
    } catch (const Error& error) {  // knows the place in the file, not its name
      throw Error(error.kind(), {.where = flags.json_schema + ": " + error.where(),
                                 .what = error.problem(),
                                 .cure = error.cure()});
    }
  }
  if (!flags.regex.empty())
    return std::make_shared<Language>(ConstraintSource{Kind::regex, flags.regex});
  if (flags.json_object) return std::make_shared<Language>(ConstraintSource{Kind::json_object, ""});
  return nullptr;
}

// Answers one prompt, printing as the text comes. Returns the whole answer.
GenerationResult answer(Generator& generator, const ModelFiles& files, const RunFlags& flags,
                        const std::shared_ptr<const Language>& language,
                        std::vector<TokenId> prompt, bool print) {
  GenerationResult result;
  generator.submit({.prompt = std::move(prompt),
                    .max_tokens = flags.max_tokens,
                    .sampling = flags.sampling,
                    .stop_ids = files.stop_ids,
                    .stop_texts = flags.stops,
                    .language = language,
                    .drafts = flags.drafts});
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

void run(const CLI::App& cmd, const RunFlags& flags) {
  if (flags.sampling.temperature == 0)
    refuse_given(cmd, {"--top-k", "--top-p", "--min-p", "--typical-p"}, kWithoutSampling);
  if (flags.sampling.dry_multiplier == 0)
    refuse_given(cmd, {"--dry-base", "--dry-allowed-length", "--dry-sequence-breaker"},
                 "is about --dry-multiplier, which is 0: off");
  const std::shared_ptr<const Language> language = language_of(flags);
  const ModelFiles files = open_model(flags.model.path);
  if (!flags.raw && !files.chat_template)
    throw Error(ErrorKind::usage, {.where = flags.model.path,
                                   .what = "the model has no chat template",
                                   .cure = "use --raw to complete plain text"});
  Pool pool(flags.model.pool_size());
  const Model model = load_model(pool, files, flags.model.load_options());
  const std::optional<Adapter> adapter = flags.adapter.load(model.config);
  EngineOptions engine_options = flags.cache.engine_options();
  engine_options.adapter = adapter ? &*adapter : nullptr;
  Engine engine(pool, model, engine_options);
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
    const GenerationResult result =
        answer(generator, files, flags, language, std::move(prompt), !flags.json);
    messages.push_back({{"role", "assistant"}, {"content", result.text}});
    if (flags.json) print_json(result, watch.seconds());
    if (!flags.json) fmt::print("\n");
  };

  if (!flags.prompt.empty()) return turn(flags.prompt);
  const bool person = ::isatty(STDIN_FILENO) != 0;
  if (person)
    fmt::print(
        "Keys and values take at most {} MiB. Type a message and press Enter; Ctrl-D ends.\n",
        engine.cache().bytes() >> 20);
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
  flags->cache.add_to(*cmd);
  flags->adapter.add_to(*cmd);
  cmd->add_option("-p,--prompt", flags->prompt, "one message; without it, read them line by line");
  CLI::Option* system = cmd->add_option("--system", flags->system, "system message");
  cmd->add_flag("--raw", flags->raw, "complete the text as it is, without the chat template")
      ->excludes(system);
  cmd->add_option("--max-tokens", flags->max_tokens, "longest answer")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--stop", flags->stops, "text that ends an answer; may be given again")
      ->allow_extra_args(false);
  SamplingOptions& s = flags->sampling;
  cmd->add_option("--temperature", s.temperature, "0: always the most likely token")
      ->capture_default_str();
  cmd->add_option("--top-k", s.top_k, "keep the k most likely tokens; 0: all")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  cmd->add_option("--top-p", s.top_p, "keep the likeliest set with this probability")
      ->capture_default_str();
  cmd->add_option("--min-p", s.min_p, "keep tokens with this share of the best's probability")
      ->capture_default_str();
  cmd->add_option("--typical-p", s.typical_p, "keep tokens about as surprising as expected")
      ->capture_default_str();
  cmd->add_option("--repetition-penalty", s.repetition_penalty, "1: none")->capture_default_str();
  cmd->add_option("--presence-penalty", s.presence_penalty, "of tokens that the answer has")
      ->capture_default_str();
  cmd->add_option("--frequency-penalty", s.frequency_penalty, "for each time that it has them")
      ->capture_default_str();
  cmd->add_option("--dry-multiplier", s.dry_multiplier, "against repeated sequences; 0: off")
      ->capture_default_str();
  cmd->add_option("--dry-base", s.dry_base, "how steeply that grows with their length")
      ->capture_default_str();
  cmd->add_option("--dry-allowed-length", s.dry_allowed_length, "tokens that may repeat")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--dry-sequence-breaker", s.dry_sequence_breakers,
                  "text at which a repetition ends; may be given again")
      ->allow_extra_args(false);
  cmd->add_option("--seed", s.seed, "same seed, same answer")->capture_default_str();
  ModelFlags::add_draft_to(*cmd, flags->drafts);
  CLI::Option* schema =
      cmd->add_option("--json-schema", flags->json_schema, "file: answer with JSON that it allows");
  CLI::Option* regex =
      cmd->add_option("--regex", flags->regex, "answer with a text that it matches, as a whole")
          ->excludes(schema);
  cmd->add_flag("--json-object", flags->json_object, "answer with a JSON object")
      ->excludes(schema)
      ->excludes(regex);
  cmd->add_flag("--json", flags->json, "print one JSON object an answer");
  cmd->callback([cmd, flags] { run(*cmd, *flags); });
}

}  // namespace moru
