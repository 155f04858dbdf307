// What a person sees when something is wrong: one line that names file, field and cure, an exit
// code that is not 0, and nothing half-written.
#include <doctest/doctest.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <iterator>
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
      {"a folder of rows",
       {"tune", model.string(), folder.path().string()},
       64,
       {"is a folder", "name the files"}},
      {"a folder of questions",
       {"prove", model.string(), "-q", folder.path().string()},
       74,
       {"name a file"}},
      {"more threads than there can be",
       {"tune", model.string(), pairs.string(), "--threads", "100000"},
       64,
       {"--threads"}},
      {"a method that is none",
       {"tune", model.string(), pairs.string(), "--method", "ppo"},
       64,
       {"--method", "simpo"}},
      {"a type of numbers where nothing is merged",
       {"tune", model.string(), pairs.string(), "--merge-type", "f16"},
       64,
       {"--merge-type", "--merge"}},
      {"a merged adapter where there is none",
       {"tune", model.string(), pairs.string(), "--full", "--merge", "gguf"},
       64,
       {"--merge", "--full"}},
      {"examples and tokens of a step",
       {"tune", model.string(), pairs.string(), "--batch-size", "4", "--batch-tokens", "99"},
       64,
       {"--batch-size", "--batch-tokens"}},
      {"rows to validate on, and a share of the others",
       {"tune", model.string(), pairs.string(), "--validation", "v", "--val-fraction", "0.1"},
       64,
       {"--val-fraction", "--validation"}},
      {"a weight that leaves no example",
       {"tune", model.string(), pairs.string() + "*0.001", "-o",
        (folder.path() / "with-rows-read").string(), "--template", "{prompt}{completion}"},
       65,
       {"pairs.jsonl", "no example"}},
      {"numbers of an adapter that is not merged",
       {"adapter", model.string(), folder.path().string(), "-o", out, "--type", "f16"},
       64,
       {"--type", "gguf or hf"}},
      {"a share of nothing",
       {"forge", "--model", model.string(), "--pairs", pairs.string(), "--questions",
        questions.string(), "--out", out, "--at-least", "0"},
       64,
       {"--at-least"}},
      {"one column of the pairs",
       {"forge", "--model", model.string(), "--pairs", pairs.string(), "--questions",
        questions.string(), "--out", out, "--completion-column", "b"},
       64,
       {"--prompt-column", "--completion-column"}},
      {"vendors without prices",
       {"forge", "--model", model.string(), "--pairs", pairs.string(), "--questions",
        questions.string(), "--out", out, "--vendors", "a"},
       64,
       {"--vendors", "--vendor-prices"}},
      {"results where nothing is asked",
       {"prove", model.string(), "--text", text.string(), "--results", out},
       64,
       {"--results", "--questions"}},
      {"a reference where nothing is measured",
       {"prove", model.string(), "-q", questions.string(), "--chunks", "2"},
       64,
       {"--chunks", "--text"}},
      {"tokens to calibrate on, and no text",
       {"lighten", model.string(), "-o", out, "--calibration-tokens", "9"},
       64,
       {"--calibration-tokens", "--calibrate"}},
      {"a rate of what is not learnt by",
       {"improve", model.string(), "-q", questions.string(), "-o", out, "--dpo-lr", "1"},
       64,
       {"--dpo-lr", "--method"}},
      {"an adapter to go on from, and the rank of a new one",
       {"tune", model.string(), pairs.string(), "--adapter", out, "--lora-r", "4"},
       64,
       {"--lora-r", "--adapter"}},
      {"DoRA of an adapter that is there",
       {"tune", model.string(), pairs.string(), "--adapter", out, "--use-dora"},
       64,
       {"--use-dora", "--adapter"}},
      {"a template of raw text",
       {"tune", "--method", "text", model.string(), pairs.string(), "--template", "{completion}"},
       64,
       {"--template", "--method text"}},
      {"a system message of raw text",
       {"tune", "--method", "text", model.string(), pairs.string(), "--system", "x"},
       64,
       {"--system", "--method text"}},
      {"which part of a text stays, all of which does",
       {"tune", "--method", "text", model.string(), pairs.string(), "--truncation-mode",
        "keep_end"},
       64,
       {"--truncation-mode", "--method text"}},
      {"the columns of pairs",
       {"tune", "--method", "dpo", model.string(), pairs.string(), "--prompt-column", "a",
        "--completion-column", "b"},
       64,
       {"--prompt-column", "--dataset-info"}},
      {"patience without validation",
       {"tune", model.string(), pairs.string(), "--val-fraction", "0", "--patience", "2"},
       64,
       {"--patience", "--val-fraction"}},
      {"validations of no rows",
       {"tune", model.string(), pairs.string(), "--val-fraction", "0", "--eval-steps", "2"},
       64,
       {"--eval-steps", "--val-fraction"}},
      {"passes and steps",
       {"tune", model.string(), pairs.string(), "--epochs", "2", "--max-steps", "2"},
       64,
       {"--epochs", "--max-steps"}},
      {"data sets that nothing names",
       {"tune", model.string(), pairs.string(), "--dataset-info", pairs.string()},
       64,
       {"--dataset-info", "data are files"}},
      {"what was found where nothing is learnt",
       {"tune", model.string(), pairs.string(), "--check", "1", "--json"},
       64,
       {"--json", "--check"}},
      {"options that cannot be, where nothing is learnt",
       {"tune", model.string(), pairs.string(), "--check", "1", "--lr", "0"},
       64,
       {"--lr", "above 0"}},
      {"packed weights that are all learnt",
       {"tune", "--preset", "qlora", model.string(), pairs.string(), "--full"},
       64,
       {"--preset qlora", "--full"}},
      {"importances of types that have no blocks",
       {"lighten", model.string(), "-o", out, "--type", "F16", "--calibrate", pairs.string()},
       64,
       {"--calibrate", "--type F16"}},
      {"a text to calibrate on, likewise",
       {"lighten", model.string(), "-o", out, "--type", "bf16", "--calibrate-text", text.string()},
       64,
       {"--calibrate-text", "--type BF16"}},
      {"answers to questions of a gate without any",
       {"gate", model.string(), model.string(), "--limit", "2"},
       64,
       {"--limit", "--questions"}},
      {"pairs that nothing learns from",
       {"improve", model.string(), "-q", questions.string(), "-o", out, "--rejected-filter",
        "logp-below-mean"},
       64,
       {"--rejected-filter", "dpo"}},
      {"passes and steps of an iteration",
       {"improve", model.string(), "-q", questions.string(), "-o", out, "--epochs", "2",
        "--max-steps", "2"},
       64,
       {"--epochs", "--max-steps"}},
      {"a likeliest set that nothing is sampled from",
       {"pairs", model.string(), "-q", questions.string(), "-o", out, "--temperature", "0",
        "--top-p", "0.9"},
       64,
       {"--top-p", "--temperature 0"}},
      {"likewise of one answer",
       {"run", model.string(), "--raw", "-p", "x", "--top-k", "5"},
       64,
       {"--top-k", "--temperature 0"}},
      {"how steeply nothing grows",
       {"run", model.string(), "--raw", "-p", "x", "--dry-base", "2"},
       64,
       {"--dry-base", "--dry-multiplier"}},
      {"a model's flags without a model",
       {"bench", "--machine", "--kv-type", "f16"},
       64,
       {"--kv-type", "--machine"}},
      {"answers together, of which there are none",
       {"bench", model.string(), "-n", "0", "--batch", "4"},
       64,
       {"--batch", "--new-tokens 0"}},
      {"no token to answer with",
       {"prove", model.string(), "-q", questions.string(), "--max-tokens", "0"},
       64,
       {"--max-tokens"}},
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

TEST_CASE("what is about quantized weights is refused of a model that has none") {
  const TempDir folder;
  const auto quantized = folder.path() / "q8.gguf", plain = folder.path() / "plain.gguf";
  write_tiny_model(quantized);
  write_tiny_model(plain, {.type = DType::bf16});
  const std::string path = plain.string(), out = (folder.path() / "out").string();
  const std::string rows =
      folder.file("rows.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\", \"answer\": \"b\"}\n")
          .string();
  using Words = std::vector<std::string>;
  std::vector<std::pair<std::string, Words>> cases;
  for (const char* flag : {"--activations int8", "--precision exact"}) {
    const std::string text = flag;
    const size_t space = text.find(' ');
    for (Words words :
         {Words{"run", path, "--raw", "-p", "x"}, Words{"serve", path, "--port", "0"},
          Words{"prove", path, "-q", rows}, Words{"prove", path, "--text", rows},
          Words{"gate", path, path}, Words{"pairs", path, "-q", rows, "-o", out},
          Words{"lighten", path, "-o", out, "--calibrate", rows}, Words{"bench", path}}) {
      words.insert(words.end(), {text.substr(0, space), text.substr(space + 1)});
      cases.emplace_back(text, words);
    }
  }
  cases.insert(cases.end(),
               {{"--qlora", {"tune", path, rows, "-o", out, "--qlora"}},
                {"--qlora", {"tune", path, rows, "-o", out, "--qlora", "--check", "1"}},
                {"--preset qlora", {"tune", "--preset", "qlora", path, rows, "-o", out}},
                {"--reference-precision exact",
                 {"prove", quantized.string(), "--text", rows, "--reference", path,
                  "--reference-precision", "exact"}}});
  for (const auto& [flag, words] : cases) {
    const std::string command = fmt::format("{}", fmt::join(words, " "));
    CAPTURE(command);
    const Ended ended = run_program(words);
    CAPTURE(ended.output);
    CHECK(ended.code == 64);
    CHECK(ended.output.starts_with("moru: "));
    CHECK(lines_of(ended.output) == 1);
    for (const std::string& part : {flag, path, std::string("leave it out")})
      CHECK(ended.output.find(part) != std::string::npos);
  }
  CHECK_FALSE(std::filesystem::exists(out));
  // Of two models one may have none: the flag is for the other.
  const std::string none = (folder.path() / "none.jsonl").string();
  for (const Words& models : {Words{path, quantized.string()}, Words{quantized.string(), path}}) {
    const Ended ended =
        run_program({"gate", models[0], models[1], "--activations", "int8", "-q", none});
    CAPTURE(ended.output);
    CHECK(ended.code == 66);
    CHECK(ended.output.find("none.jsonl") != std::string::npos);
  }
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

TEST_CASE("what keeps its answers says on Ctrl-C how to go on, and ends by the signal") {
  const TempDir folder;
  const auto model = folder.path() / "tiny.gguf";
  write_tiny_model(model);
  const std::string never = (folder.path() / "questions.jsonl").string();
  REQUIRE(::mkfifo(never.c_str(), 0600) == 0);  // nobody writes into it
  const std::string kept = (folder.path() / "kept").string();
  const std::string path = model.string();
  const std::vector<std::vector<std::string>> commands = {
      {"prove", path, "-q", never, "--results", kept},
      {"gate", path, path, "-q", never, "--kept", kept},
      {"pairs", path, "-q", never, "-o", kept},
      {"improve", path, "-q", never, "-o", kept + "s"},
      {"forge", "--model", path, "--pairs", never, "--questions", never, "-o", kept + "f"}};
  for (const std::vector<std::string>& words : commands) {
    CAPTURE(words[0]);
    Program program(words);
    // Until the program, no longer this test that forked, catches the signal: bit 1 of the mask.
    for (int tries = 0; tries < 6000; ++tries) {
      std::ifstream file(fmt::format("/proc/{}/status", program.pid()));
      const std::string status(std::istreambuf_iterator<char>(file), {});
      const size_t at =
          status.starts_with("Name:\tmoru\n") ? status.find("SigCgt:") : std::string::npos;
      if (at != std::string::npos && (std::stoull(status.substr(at + 7), nullptr, 16) & 2) != 0)
        break;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ::kill(program.pid(), SIGINT);
    const Ended ended = program.wait();
    CHECK(ended.code == 128 + SIGINT);
    CHECK(ended.output.find("run the same command again") != std::string::npos);
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
