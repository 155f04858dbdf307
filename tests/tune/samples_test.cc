#include "tune/samples.h"

#include <fmt/format.h>

#include <set>

#include "base/files.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

// A quantized random model; answers end at a vowel.
struct Tiny {
  TempDir folder;
  std::filesystem::path path = folder.path() / "tiny.gguf";
  ModelFiles files;
  std::vector<Question> questions;
  std::vector<const Question*> asked;

  Tiny() : files((write_tiny_model(path, {.embedding_gain = 1}), open_model(path))) {
    for (int i = 0; i < 40; ++i) {
      const nlohmann::ordered_json row = {
          {"prompt", fmt::format("Question number {} of a longer list", i)}, {"answer", "th"}};
      questions.push_back(question_from_row("q", {.line = 1, .value = row}));
    }
    for (const Question& q : questions) asked.push_back(&q);
  }

  std::vector<PromptSamples> sample(
      const std::filesystem::path& kept, size_t threads = 1, SampleOptions options = {},
      const std::function<void(const SampleProgress&)>& progress = {}) const {
    options.answers = 3;
    options.limits = {.max_tokens = 10, .stop = {"a", "e", "i", "o", "u"}};
    Pool pool(threads);
    const Model model = load_model(pool, files, {.context = 256});
    Engine engine(pool, model);
    return sample_answers(asked, engine, files, "hash", {}, options, kept, progress);
  }
};

std::string all_of(const std::vector<PromptSamples>& prompts) {
  std::string text;
  for (const PromptSamples& p : prompts) {
    text += p.prompt_sha256;
    for (const Sample& s : p.samples)
      text += fmt::format("\n{} {} {} {} {}", s.text, s.logp, s.tokens, s.cut, s.seed);
    if (p.reference) text += fmt::format("\n= {} {}", p.reference->text, p.reference->logp);
  }
  return text;
}

}  // namespace

TEST_CASE("samples are the same for any number of threads and answers at once") {
  const Tiny tiny;
  const auto file = [&](const char* name) { return tiny.folder.path() / name; };
  const std::string one = all_of(tiny.sample(file("1"), 1));
  CHECK(one == all_of(tiny.sample(file("2"), 3)));
  CHECK(one == all_of(tiny.sample(file("3"), 2, {.sequences = 1})));
  CHECK(one == all_of(tiny.sample(file("4"), 2, {.sequences = 100})));
  CHECK(read_file(file("1")) == read_file(file("3")));
  CHECK(one != all_of(tiny.sample(file("5"), 2, {.seed = 43})));
}

TEST_CASE("answers to one prompt differ, and each can be found by its seed") {
  const Tiny tiny;
  const std::vector<PromptSamples> prompts = tiny.sample(tiny.folder.path() / "kept");
  REQUIRE(prompts.size() == 40);
  std::set<std::string> texts;
  for (const PromptSamples& p : prompts) {
    REQUIRE(p.samples.size() == 3);
    for (size_t n = 0; n < 3; ++n) {
      CHECK(p.samples[n].seed == sample_seed(42, p.prompt_sha256, n));
      CHECK(p.samples[n].seed < uint64_t{1} << 53);
      CHECK(p.samples[n].logp <= 0);
      texts.insert(p.samples[n].text);
    }
    REQUIRE(p.reference);
    CHECK(p.reference->text == "th");
    CHECK(p.reference->tokens == 1);
    CHECK(p.reference->logp < 0);
  }
  CHECK(texts.size() > 60);
}

TEST_CASE("a run that is killed goes on to the same answers") {
  const Tiny tiny;
  const std::filesystem::path whole = tiny.folder.path() / "whole",
                              killed = tiny.folder.path() / "killed";
  const std::string expected = all_of(tiny.sample(whole));
  struct Kill {};
  CHECK_THROWS_AS(tiny.sample(killed, 1, {}, [](const SampleProgress&) { throw Kill(); }), Kill);
  const std::string part = read_file(killed);
  CHECK(part.size() < read_file(whole).size());
  // What the file held when the kill came while its last line was written.
  for (const size_t cut : {part.size(), part.size() - 1, part.size() / 2, size_t{5}, size_t{0}}) {
    CAPTURE(cut);
    write_file(killed, part.substr(0, cut));
    size_t prompts_done = 0;
    CHECK(all_of(tiny.sample(killed, 1, {}, [&](const SampleProgress& p) {
            if (prompts_done == 0) prompts_done = p.prompts;
          })) == expected);
    if (cut == part.size()) CHECK(prompts_done == 40);
    CHECK(read_file(killed) == read_file(whole));
  }
}

TEST_CASE("answers of other prompts or settings are not gone on with; other files are refused") {
  const Tiny tiny;
  const std::filesystem::path kept = tiny.folder.path() / "kept";
  const std::string expected = all_of(tiny.sample(kept));
  tiny.sample(kept, 1, {.temperature = 0.5});
  CHECK(all_of(tiny.sample(kept)) == expected);
  write_file(kept, "{\"moru\": \"results\"}\n");
  const Error e = error_from([&] { tiny.sample(kept); });
  CHECK(e.kind() == ErrorKind::bad_input);
  CHECK(e.where() == kept.string());
}
