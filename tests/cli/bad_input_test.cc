// What a person sees when something is wrong: one line that names file, field and cure, an exit
// code that is not 0, and nothing half-written.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/text.h"
#include "program.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

struct Case {
  std::string name;
  std::vector<std::string> words;
  int code;
  std::vector<std::string> says;
};

size_t lines_of(const std::string& text) {
  return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
}

}  // namespace

TEST_CASE("bad input gets one line with file, field and cure, and a code that is not 0") {
  const TempDir folder;
  const auto model = folder.path() / "tiny.gguf";
  write_tiny_model(model);
  const std::string whole = read_file(model);
  const auto cut = folder.file("cut.gguf", whole.substr(0, whole.size() / 2));
  const auto header = folder.file("header.gguf", whole.substr(0, 100));
  std::string hostile = whole;
  hostile.replace(8, 8, std::string(8, '\xff'));  // 2⁶⁴ − 1 tensors
  const auto many = folder.file("many.gguf", hostile);
  const auto text = folder.file("text.gguf", "this is no model at all, only some words\n");
  folder.file("hf/config.json", R"({"architectures": ["GrokForCausalLM"]})");
  folder.file("half/config.json", R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 64})");
  const auto pairs = folder.file("pairs.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n");
  const auto broken =
      folder.file("broken.jsonl", "{\"prompt\": \"a\", \"answer\": \"b\"}\n{\"prom\n");
  const auto unasked = folder.file("unasked.jsonl", "{\"answer\": \"b\"}\n");
  const auto questions = folder.file("questions.jsonl", "{\"prompt\": \"a\", \"answer\": \"b\"}\n");
  const std::string out = (folder.path() / "out").string();

  std::vector<Case> cases = {
      {"no such file", {"info", (folder.path() / "none.gguf").string()}, 66, {"none.gguf"}},
      {"a folder without a model", {"info", folder.path().string()}, 66, {"config.json"}},
      {"a model cut in half", {"info", cut.string()}, 65, {"cut.gguf", "blk.", "again"}},
      {"a model cut in its header", {"run", header.string(), "-p", "x"}, 65, {"header.gguf"}},
      {"a hostile tensor count", {"info", many.string()}, 65, {"many.gguf", "tensor"}},
      {"a file that is no model", {"info", text.string()}, 65, {"text.gguf", "GGUF"}},
      {"a family that is known and not supported",
       {"info", (folder.path() / "hf").string()},
       69,
       {"GrokForCausalLM", "take gpt-oss"}},
      {"a config that lacks keys",
       {"info", (folder.path() / "half").string()},
       65,
       {"config.json", "num_hidden_layers"}},
      {"no chat template", {"run", model.string(), "-p", "hello"}, 64, {"template", "--raw"}},
      {"a broken row of questions",
       {"prove", model.string(), "-q", broken.string()},
       65,
       {"broken.jsonl", "2"}},
      {"a question without a prompt",
       {"prove", model.string(), "-q", unasked.string()},
       65,
       {"unasked.jsonl", "prompt"}},
      {"an unknown size",
       {"forge", "--model", model.string(), "--pairs", pairs.string(), "--questions",
        questions.string(), "--out", out, "--size-ladder", "Q9_X"},
       64,
       {"Q9_X", "Q4_K_M"}},
      {"a goal that cannot be",
       {"forge", "--model", model.string(), "--pairs", pairs.string(), "--questions",
        questions.string(), "--out", out, "--at-least", "1.5"},
       64,
       {"--at-least"}},
      {"a template that cannot be",
       {"forge", "--model", model.string(), "--pairs", pairs.string(), "--questions",
        questions.string(), "--out", out, "--template", "no place for the answer"},
       64,
       {"{completion}"}},
      {"a flag of adapters where there is none",
       {"tune", model.string(), pairs.string(), "--full", "--use-dora"},
       64,
       {"--use-dora", "--full"}},
      {"a flag of pairs where there are none",
       {"tune", model.string(), pairs.string(), "--beta", "3"},
       64,
       {"--beta", "--method"}},
      {"an unknown flag", {"info", model.string(), "--colour"}, 64, {"--colour", "--help"}},
      {"no command", {}, 64, {"--help"}},
      {"a full disk", {"lighten", model.string(), "--out", "/dev/full/x.gguf"}, 74, {"/dev/full"}},
  };
  // Prompts are learnt by supervised tuning alone, and by it not without the other answers.
  for (const char* method : {"text", "dpo", "simpo", "orpo", "kto"})
    cases.push_back({fmt::format("prompts to learn by {}", method),
                     {"tune", "--method", method, model.string(), pairs.string(), "-o", out,
                      "--train-on-prompt"},
                     64,
                     {"--train-on-prompt", "--method sft", "leave it out"}});
  cases.push_back(
      {"prompts to learn, and the last answer alone",
       {"tune", model.string(), pairs.string(), "-o", out, "--last-turn-only", "--train-on-prompt"},
       64,
       {"--train-on-prompt", "--last-turn-only", "leave it out"}});
  for (const Case& item : cases) {
    CAPTURE(item.name);
    const Ended ended = run_program(item.words);
    CAPTURE(ended.output);
    CHECK(ended.code == item.code);
    CHECK(ended.output.starts_with("moru: "));
    CHECK(lines_of(ended.output) == 1);
    for (const std::string& word : item.says) CHECK(ended.output.find(word) != std::string::npos);
  }
  CHECK_FALSE(std::filesystem::exists(out));
}

TEST_CASE("no flag takes an empty value, and those of numbers take finite ones alone") {
  const TempDir folder;
  const auto model = folder.path() / "tiny.gguf";
  write_tiny_model(model);
  const std::string path = model.string();
  const auto pairs = folder.file("pairs.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n");
  const auto schema = folder.file("schema.json", "{\"type\": ");
  const std::vector<Case> cases = {
      {"no seed", {"run", path, "--raw", "-p", "x", "--seed", ""}, 64, {"--seed", "empty"}},
      {"no key", {"serve", path, "--port", "0", "--api-key", ""}, 64, {"--api-key", "empty"}},
      {"no adapter", {"run", path, "--raw", "-p", "x", "--adapter", ""}, 64, {"--adapter"}},
      {"less than no steps",
       {"tune", path, pairs.string(), "--max-steps", "-1"},
       64,
       {"--max-steps", "\"-1\" is no whole number", "moru tune --help"}},
      {"a rate that is no number",
       {"tune", path, pairs.string(), "--lr", "nan"},
       64,
       {"--lr", "\"nan\" is no number"}},
      {"a share that is no number",
       {"pairs", path, "-q", pairs.string(), "--validate-fraction", "nan"},
       64,
       {"--validate-fraction"}},
      {"more than a float holds",
       {"run", path, "--raw", "-p", "x", "--temperature", "1e99"},
       64,
       {"--temperature", "1e99"}},
      {"a number and more", {"run", path, "--seed", "7x"}, 64, {"--seed", "7x"}},
      {"a flag given twice",
       {"run", path, "--seed", "1", "--seed", "2"},
       64,
       {"--seed: is given 2 times"}},
      {"memory of no size", {"run", path, "--cache-memory", "much"}, 64, {"much", "512MiB"}},
      {"negative memory", {"run", path, "--cache-memory", "-1"}, 64, {"-1", "512MiB"}},
      {"memory of no machine", {"run", path, "--cache-memory", "1EiB"}, 64, {"1EiB"}},
      {"memory that this machine has not",
       {"run", path, "--raw", "-p", "x", "--cache-memory", "900000TiB"},
       73,
       {"KV cache", "memory"}},
      {"a word that is no command", {"chat"}, 64, {"chat", "no command", "--help"}},
      {"a flag before the command", {"--fast", "run"}, 64, {"--fast", "no flag"}},
      {"a system message that nothing would read",
       {"run", path, "--raw", "-p", "x", "--system", "y"},
       64,
       {"--raw", "--system"}},
      {"8-bit activations of f32 weights",
       {"run", path, "--raw", "-p", "x", "--precision", "f32", "--activations", "int8"},
       64,
       {"--activations", "--precision f32"}},
      {"a schema that is no JSON",
       {"run", path, "--raw", "-p", "x", "--json-schema", schema.string()},
       65,
       {"schema.json", "JSON"}},
  };
  for (const Case& item : cases) {
    CAPTURE(item.name);
    const Ended ended = run_program(item.words);
    CAPTURE(ended.output);
    CHECK(ended.code == item.code);
    CHECK(ended.output.starts_with("moru: "));
    CHECK(lines_of(ended.output) == 1);
    for (const std::string& word : item.says) CHECK(ended.output.find(word) != std::string::npos);
  }
}

TEST_CASE("sizes of memory are read as people write them") {
  const TempDir folder;
  const auto model = folder.path() / "tiny.gguf";
  write_tiny_model(model);
  for (const char* size : {"67108864", "64MiB", "64 mib", "64Mi", "0.0625GiB", "67MB", "0.067g"}) {
    CAPTURE(size);
    const Ended ended = run_program(
        {"run", model.string(), "--raw", "-p", "x", "--max-tokens", "1", "--cache-memory", size});
    CAPTURE(ended.output);
    CHECK(ended.code == 0);
  }
  const Ended little =
      run_program({"run", model.string(), "--raw", "-p", "x", "--cache-memory", "1k"});
  CAPTURE(little.output);
  CHECK(little.output.find("1000 bytes") != std::string::npos);
}

TEST_CASE("a list of texts ends with its flag's one value") {
  const TempDir folder;
  const auto model = folder.path() / "tiny.gguf";
  write_tiny_model(model);
  CHECK(run_program({"run", "--raw", "--stop", "a", "--stop", "b", model.string(), "-p", "x",
                     "--max-tokens", "1"})
            .code == 0);
}

TEST_CASE("help fits 80 columns, says what each flag is for, and every command has some") {
  const Ended top = run_program({"--help"});
  CHECK(top.code == 0);
  CHECK(run_program({"help"}).output == top.output);
  std::vector<std::string> helps = {top.output};
  for (const std::string command : {"forge", "run", "info", "bench", "lighten", "tune", "adapter",
                                    "pairs", "prove", "gate", "improve", "serve"}) {
    CAPTURE(command);
    CHECK(top.output.find("\n  " + command + " ") != std::string::npos);
    const Ended help = run_program({command, "--help"});
    CHECK(help.code == 0);
    CHECK(help.output.size() > 100);
    CHECK(run_program({"help", command}).output == help.output);
    helps.push_back(help.output);
  }
  for (const std::string& help : helps) {
    std::string flag;  // that still wants its description
    for (size_t at = 0; at < help.size();) {
      const size_t end = help.find('\n', at);
      const std::string line = help.substr(at, end - at);
      at = end + 1;
      CAPTURE(line);
      CHECK(display_width(line) <= 80);
      if (!flag.empty()) CHECK(line.starts_with(std::string(30, ' ')));
      flag = line.starts_with("  -") && (line.size() <= 30 || line[29] != ' ') ? line : "";
    }
  }
  CHECK(run_program({"run", "--help"}).output.find("--seed N ") != std::string::npos);
}

TEST_CASE("a model and its tokens are told, as text and as JSON") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf", {.family = "gemma3", .type = DType::q4_k});
  const std::string path = (folder.path() / "tiny.gguf").string();
  const Ended text = run_program({"info", path});
  CHECK(text.code == 0);
  CHECK(text.output.find("gemma3") != std::string::npos);
  const auto json =
      nlohmann::json::parse(run_program({"info", path, "--json", "--example", "th"}).output);
  CHECK(json["family"] == "gemma3");
  CHECK(json["example"]["ids"] == nlohmann::json({256}));
}
