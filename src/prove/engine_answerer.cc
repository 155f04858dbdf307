#include "prove/engine_answerer.h"

#include <memory>

#include "base/hash.h"
#include "engine/generate.h"

namespace moru {
namespace {

const char* name_of(Profile profile) {
  switch (profile) {
    case Profile::exact:
      return "exact";
    case Profile::bf16:
      return "bf16";
    case Profile::f32:
      return "f32";
  }
  return "?";
}

// The end of an answer as the model is trained to say it: the first stop id.
std::vector<TokenId> choice_ids(const ModelFiles& files, const PromptStyle& style,
                                const std::string& choice) {
  std::vector<TokenId> ids = files.tokenizer.encode(choice, Tokenizer::Specials::literal);
  const bool chat = style.plain_template.empty() && files.chat_template;
  if (chat && !files.stop_ids.empty()) ids.push_back(files.stop_ids.front());
  return ids;
}

}  // namespace

std::string describe_engine(const Engine& engine, const ModelFiles& files,
                            const PromptStyle& style) {
  const std::string frame = files.chat_template ? files.chat_template->source() : "";
  const bool int8 = engine.model().activations == Activations::int8;
  return std::string(name_of(engine.model().profile)) + (int8 ? " int8 " : " ") +
         sha256(frame + "\n" + style.plain_template + "\n" + style.system);
}

Answerer make_answerer(std::string name, std::string model_sha256, Engine& engine,
                       const ModelFiles& files, const PromptStyle& style) {
  Answerer answerer{.name = std::move(name),
                    .model_sha256 = std::move(model_sha256),
                    .engine = describe_engine(engine, files, style),
                    .threads = engine.pool().size()};
  const auto generator = std::make_shared<Generator>(engine, files.tokenizer,
                                                     GeneratorOptions{.sequences = answerer.batch});
  answerer.generate = [generator, &files, style](QuestionBatch questions,
                                                 const AnswerLimits& limits) {
    std::vector<GenerationRequest> requests;
    for (const Question* question : questions)
      requests.push_back({.prompt = encode_prompt(files, style, question->messages),
                          .max_tokens = limits.max_tokens,
                          .stop_ids = files.stop_ids,
                          .stop_texts = limits.stop});
    std::vector<Reply> replies;
    for (GenerationResult& result : generate_all(*generator, std::move(requests)))
      replies.push_back({.text = std::move(result.text),
                         .tokens_in = result.prompt_tokens,
                         .tokens_out = result.completion_tokens,
                         .cut = result.finish == Finish::length});
    return replies;
  };
  answerer.score = [generator, &engine, &files, style](QuestionBatch questions) {
    generator->forget();
    std::vector<ChoiceReply> replies;
    for (const Question* question : questions) {
      const std::vector<TokenId> prompt = encode_prompt(files, style, question->messages);
      std::vector<Continuation> continuations;
      ChoiceReply reply{.tokens_in = prompt.size()};
      for (const std::string& choice : question->expected.choices) {
        continuations.push_back({.prefix = prompt, .tokens = choice_ids(files, style, choice)});
        reply.tokens_out += continuations.back().tokens.size();
      }
      for (const ContinuationScore& score : score_continuations(engine, continuations))
        reply.logprobs.push_back(score.logprob);
      replies.push_back(std::move(reply));
    }
    return replies;
  };
  return answerer;
}

}  // namespace moru
