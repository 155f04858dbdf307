#include "tune/samples.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>

#include "base/clock.h"
#include "base/error.h"
#include "base/hash.h"
#include "base/text.h"
#include "engine/generate.h"
#include "formats/kept_lines.h"
#include "prove/engine_answerer.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

// Prompts whose answers are written together; a kill loses at most these.
constexpr size_t kWindow = 32;

Json to_json(const Sample& s) {
  Json json = {{"text", s.text}, {"logp", s.logp}, {"tokens", s.tokens}};
  if (s.cut) json["cut"] = true;
  json["seed"] = s.seed;
  return json;
}

Sample sample_from(const Json& json) {
  return {.text = json.at("text"),
          .logp = json.at("logp"),
          .tokens = json.at("tokens"),
          .cut = json.value("cut", false),
          .seed = json.at("seed")};
}

Json to_json(const PromptSamples& p) {
  Json json = {{"prompt_sha256", p.prompt_sha256}, {"samples", Json::array()}};
  for (const Sample& s : p.samples) json["samples"].push_back(to_json(s));
  if (p.reference) json["reference"] = to_json(*p.reference);
  return json;
}

PromptSamples prompt_samples_from(const Json& json) {
  PromptSamples p{.prompt_sha256 = json.at("prompt_sha256")};
  for (const Json& s : json.at("samples")) p.samples.push_back(sample_from(s));
  if (json.contains("reference")) p.reference = sample_from(json["reference"]);
  return p;
}

PromptSamples read_line(const Json& line, std::span<const Question* const> questions, size_t at,
                        const std::filesystem::path& path) {
  try {
    PromptSamples p = prompt_samples_from(line);
    if (at < questions.size() && p.prompt_sha256 == questions[at]->prompt_sha256) return p;
  } catch (const nlohmann::json::exception&) {
  }
  throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: line {}", path.string(), at + 2),
                                     .what = "is not what was sampled for this prompt",
                                     .cure = "remove the file, and the answers are sampled again"});
}

Sample sample_of(const GenerationResult& result, uint64_t seed) {
  Sample sample{.text = repair_utf8(result.text),
                .tokens = result.logprobs.size(),
                .cut = result.finish == Finish::length,
                .seed = seed};
  for (const TokenLogprob& token : result.logprobs) sample.logp += double{token.logprob};
  sample.logp /= static_cast<double>(std::max<size_t>(1, sample.tokens));
  return sample;
}

// All answers to a window of prompts. A prompt's other answers wait until its first one has begun:
// from then on they fork its keys and values.
std::vector<PromptSamples> generate_window(std::span<const Question* const> questions,
                                           Generator& generator, const ModelFiles& files,
                                           const PromptStyle& style, const SampleOptions& options) {
  struct Request {
    size_t question, number;
    GenerationResult result;
  };
  std::unordered_map<uint64_t, Request> requests;
  std::vector<std::vector<TokenId>> prompts;
  const auto submit = [&](size_t question, size_t number) {
    GenerationRequest request{.prompt = prompts[question],
                              .max_tokens = options.limits.max_tokens,
                              .stop_ids = files.stop_ids,
                              .stop_texts = options.limits.stop,
                              .top_logprobs = 0};
    request.sampling.temperature = static_cast<float>(options.temperature);
    request.sampling.top_p = static_cast<float>(options.top_p);
    request.sampling.seed = sample_seed(options.seed, questions[question]->prompt_sha256, number);
    requests[generator.submit(std::move(request))] = {question, number, {}};
  };

  std::vector<PromptSamples> window;
  std::vector<bool> begun(questions.size());
  for (const Question* question : questions) {
    prompts.push_back(encode_prompt(files, style, question->messages));
    window.push_back({.prompt_sha256 = question->prompt_sha256});
    window.back().samples.resize(options.answers);
    submit(window.size() - 1, 0);
  }
  std::vector<size_t> to_fork;
  while (generator.busy()) {
    generator.step([&](const GenerationEvent& event) {
      Request& request = requests.at(event.request);
      if (!begun[request.question]) to_fork.push_back(request.question);
      begun[request.question] = true;
      request.result.text += event.text;
      request.result.logprobs.insert(request.result.logprobs.end(), event.logprobs.begin(),
                                     event.logprobs.end());
      if (!event.finish) return;
      request.result.finish = *event.finish;
      const Question& question = *questions[request.question];
      window[request.question].samples[request.number] = sample_of(
          request.result, sample_seed(options.seed, question.prompt_sha256, request.number));
      requests.erase(event.request);
    });
    for (const size_t question : to_fork)
      for (size_t number = 1; number < options.answers; ++number) submit(question, number);
    to_fork.clear();
  }
  return window;
}

void score_references(std::span<const Question* const> questions, Engine& engine,
                      const ModelFiles& files, const PromptStyle& style,
                      std::vector<PromptSamples>& window) {
  std::vector<Continuation> continuations;
  std::vector<size_t> owners;
  for (size_t i = 0; i < questions.size(); ++i) {
    std::vector<TokenId> ids =
        files.tokenizer.encode(questions[i]->reference, Tokenizer::Specials::literal);
    if (ids.empty()) continue;
    continuations.push_back(
        {.prefix = encode_prompt(files, style, questions[i]->messages), .tokens = std::move(ids)});
    owners.push_back(i);
  }
  const std::vector<ContinuationScore> scores = score_continuations(engine, continuations);
  for (size_t i = 0; i < scores.size(); ++i) {
    const size_t tokens = continuations[i].tokens.size();
    window[owners[i]].reference = Sample{.text = questions[owners[i]]->reference,
                                         .logp = scores[i].logprob / static_cast<double>(tokens),
                                         .tokens = tokens};
  }
}

}  // namespace

uint64_t sample_seed(uint64_t run_seed, const std::string& prompt_sha256, size_t number) {
  const std::string hash = sha256(fmt::format("{} {} {}", run_seed, prompt_sha256, number));
  return std::stoull(hash.substr(0, 16), nullptr, 16) >> 11;
}

std::vector<PromptSamples> sample_answers(
    std::span<const Question* const> questions, Engine& engine, const ModelFiles& files,
    const std::string& model_sha256, const PromptStyle& style, const SampleOptions& options,
    const std::filesystem::path& kept, const std::function<void(const SampleProgress&)>& progress) {
  MORU_CHECK(options.answers > 0);
  std::string asked;
  for (const Question* q : questions) asked += Json{q->prompt_sha256, q->reference}.dump() + '\n';
  const Json key = {{"model_sha256", model_sha256},
                    {"engine", describe_engine(engine, files, style)},
                    {"asked_sha256", sha256(asked)},
                    {"answers", options.answers},
                    {"temperature", options.temperature},
                    {"top_p", options.top_p},
                    {"seed", options.seed},
                    {"max_tokens", options.limits.max_tokens},
                    {"stop", options.limits.stop}};
  KeptLines file(kept, "samples", key);
  std::vector<PromptSamples> all;
  for (const Json& line : file.lines()) all.push_back(read_line(line, questions, all.size(), kept));

  Generator generator(engine, files.tokenizer, {.sequences = options.sequences});
  SampleProgress done{.prompts = all.size(), .of = questions.size()};
  const Stopwatch watch;
  while (all.size() < questions.size()) {
    const auto next =
        questions.subspan(all.size(), std::min(kWindow, questions.size() - all.size()));
    std::vector<PromptSamples> window = generate_window(next, generator, files, style, options);
    generator.forget();
    score_references(next, engine, files, style, window);
    std::vector<Json> lines;
    for (PromptSamples& p : window) {
      lines.push_back(to_json(p));
      for (const Sample& s : p.samples) done.tokens += s.tokens;
      done.answers += p.samples.size();
      all.push_back(std::move(p));
    }
    file.add(lines);
    done.prompts = all.size();
    done.seconds = watch.seconds();
    if (progress) progress(done);
  }
  return all;
}

}  // namespace moru
