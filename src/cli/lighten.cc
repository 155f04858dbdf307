#include "lighten/lighten.h"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/files.h"
#include "cli/commands.h"
#include "cli/model_flags.h"
#include "engine/prompt.h"
#include "tune/data.h"

namespace moru {
namespace {

struct LightenFlags {
  ModelFlags model;
  std::string out, type = "Q4_K_M", calibrate, text;
  DataOptions rows;
  size_t calibration_tokens = 32768;
  bool json = false;
};

// Rows of pairs through the template that serves them; or a plain text in pieces of 512 tokens.
std::vector<std::vector<TokenId>> sequences_of(const LightenFlags& flags, const ModelFiles& files) {
  std::vector<std::vector<TokenId>> sequences;
  if (!flags.text.empty()) {
    constexpr size_t kPiece = 512;
    const std::vector<TokenId> ids = encode_text(files, read_file(flags.text));
    for (size_t at = 0; at < ids.size(); at += kPiece)
      sequences.emplace_back(
          ids.begin() + static_cast<ptrdiff_t>(at),
          ids.begin() + static_cast<ptrdiff_t>(std::min(ids.size(), at + kPiece)));
    return sequences;
  }
  for (Example& example : load_dataset(flags.calibrate, files, flags.rows).examples)
    sequences.push_back(std::move(example.ids));
  return sequences;
}

void show(std::string_view what, double done) {
  if (::isatty(STDERR_FILENO)) fmt::print(stderr, "\r\033[K{} {:.0f} %", what, 100 * done);
}

void run_lighten(const CLI::App& cmd, const LightenFlags& flags) {
  const Preset& preset = preset_of(flags.type);
  if (!flags.calibrate.empty() && !flags.text.empty())
    throw Error(ErrorKind::usage, {.where = "--calibrate, --calibrate-text",
                                   .what = "both are given",
                                   .cure = "calibrate on pairs or on text"});
  if (flags.calibrate.empty())
    refuse_given(cmd, {"--prompt-column", "--completion-column", "--template"},
                 "is about --calibrate, which is not given");
  if (flags.calibrate.empty() && flags.text.empty())
    refuse_given(cmd, {"--calibration-tokens", "--precision", "--activations", "--context"},
                 "is about calibrating, and neither --calibrate nor --calibrate-text is given");
  if (is_float(preset.base))
    refuse_given(cmd, {"--calibrate", "--calibrate-text"},
                 fmt::format("is about rounding to blocks, and --type {} has none", preset.name));
  const ModelFiles files = open_model(flags.model.path);
  Pool pool(flags.model.pool_size());
  Importance importance;
  const bool calibrated = !flags.calibrate.empty() || !flags.text.empty();
  if (calibrated) {
    LoadOptions options = flags.model.load_options();
    if (options.context == 0) options.context = 2048;
    const Model model = load_model(pool, files, options);
    Engine engine(pool, model);
    importance = collect_importance(engine, sequences_of(flags, files), flags.calibration_tokens,
                                    [](size_t done, size_t total) {
                                      show("calibrating",
                                           static_cast<double>(done) / static_cast<double>(total));
                                    });
  }
  const LightenResult made =
      lighten_model(pool, files, preset, flags.out,
                    {.importance = calibrated ? &importance : nullptr,
                     .progress = [&](double done) { show(preset.name, done); }});
  if (::isatty(STDERR_FILENO)) fmt::print(stderr, "\r\033[K");
  if (flags.json) {
    fmt::print("{}\n", nlohmann::ordered_json{{"out", flags.out},
                                              {"type", preset.name},
                                              {"bytes", made.file_bytes},
                                              {"bits_per_weight", made.bits_per_weight},
                                              {"bytes_by_type", made.bytes_by_type},
                                              {"calibration_tokens", importance.tokens},
                                              {"notes", made.notes}}
                           .dump(2));
    return;
  }
  for (const std::string& note : made.notes) fmt::print("{}\n", note);
  fmt::print("{}: {:.1f} MB, {:.2f} bits per weight{}\n", flags.out,
             static_cast<double>(made.file_bytes) / 1e6, made.bits_per_weight,
             calibrated ? fmt::format(", calibrated on {} tokens", importance.tokens) : "");
}

}  // namespace

void add_lighten(CLI::App& app) {
  auto flags = std::make_shared<LightenFlags>();
  CLI::App* cmd = app.add_subcommand("lighten", "Make a model smaller: quantize to a GGUF type");
  flags->model.add_to(*cmd);
  cmd->add_option("-o,--out", flags->out, "the lighter model, a GGUF file")->required();
  cmd->add_option("--type", flags->type, "preset, as llama.cpp names them")->capture_default_str();
  cmd->add_option("--calibrate", flags->calibrate, "pairs that show what matters");
  cmd->add_option("--calibrate-text", flags->text, "plain text instead of pairs");
  cmd->add_option("--calibration-tokens", flags->calibration_tokens, "at most")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  cmd->add_option("--prompt-column", flags->rows.prompt_column, "column of the pairs that asks");
  cmd->add_option("--completion-column", flags->rows.completion_column, "column that answers");
  cmd->add_option("--template", flags->rows.plain_template,
                  "\"{prompt}\\n{completion}\" instead of the chat template");
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([cmd, flags] { run_lighten(*cmd, *flags); });
}

}  // namespace moru
