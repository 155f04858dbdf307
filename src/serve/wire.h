// OpenAI's wire format, between JSON text and plain structs: what a request asks for, and what its
// answers look like, whole or as a stream of chunks. Spec: OpenAI's OpenAPI document,
// version 2.3.0.
//
// Fields of a wrong type or out of range are refused by name, and so are those that ask for what
// moru cannot do (tools). Fields that OpenAI does not have are ignored, as it does, but for the
// usual extensions, named as llama.cpp and vLLM name them: top_k, min_p, typical_p,
// repetition_penalty, dry_*, guided_json and guided_regex.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "engine/constraint.h"
#include "engine/generate.h"
#include "serve/api_error.h"

namespace moru {

template <typename T>
using Parsed = std::variant<T, ApiError>;

// What chat and completion requests have in common.
struct AnswerOptions {
  std::string model;  // empty: not named
  std::optional<size_t> max_tokens;
  SamplingOptions sampling;  // the seed is the first choice's
  std::vector<std::string> stop;
  size_t choices = 1;  // per prompt
  std::optional<size_t> top_logprobs;
  // What the answer is held to, and the field that asked for it.
  std::optional<ConstraintSource> constraint;
  std::string constraint_field;
  bool stream = false, include_usage = false;
};

struct ChatRequest {
  AnswerOptions options;
  nlohmann::ordered_json messages;  // roles and contents checked, text parts joined
};

struct CompletionRequest {
  AnswerOptions options;
  std::vector<std::variant<std::string, std::vector<TokenId>>> prompts;  // not empty
  bool echo = false;
};

struct WireLimits {
  size_t vocab = 0;        // token ids are below it
  size_t max_choices = 0;  // of one request, over all prompts
};

// `random_seed` counts where the request names no seed.
Parsed<ChatRequest> parse_chat(std::string_view body, const WireLimits& limits,
                               uint64_t random_seed);
Parsed<CompletionRequest> parse_completion(std::string_view body, const WireLimits& limits,
                                           uint64_t random_seed);
// The seed of choice `index`: the request's own for the first.
uint64_t seed_of_choice(uint64_t seed, size_t index);

// Bytes of a token as text; control tokens as the vocabulary spells them.
using TokenBytes = std::function<std::string(TokenId)>;

struct Usage {
  size_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
};

// One choice, whole.
struct Answer {
  std::string text;
  std::vector<TokenLogprob> logprobs;
  Finish finish = Finish::stop;
};

// Writes the replies to one request.
class ReplyWriter {
 public:
  struct Head {
    bool chat = true;
    std::string id;       // "chatcmpl-…" or "cmpl-…"
    int64_t created = 0;  // Unix time
    std::string model, fingerprint;
    bool logprobs = false;       // was asked for them
    bool include_usage = false;  // of the stream
  };
  ReplyWriter(Head head, TokenBytes token_bytes);

  std::string whole(std::span<const Answer> choices, const Usage& usage) const;

  // Chunks of a stream, in this order. Chat has an opening chunk for each choice.
  std::string opening(size_t choice) const;
  // `text_offset`: code points of the choice that went before.
  std::string part(size_t choice, std::string_view text, std::span<const TokenLogprob> logprobs,
                   size_t text_offset) const;
  std::string closing(size_t choice, Finish finish) const;
  std::string usage(const Usage& usage) const;

 private:
  using Json = nlohmann::ordered_json;
  Json logprobs_json(std::span<const TokenLogprob> logprobs, size_t text_offset) const;
  Json chat_logprobs(std::span<const TokenLogprob> logprobs) const;
  Json completion_logprobs(std::span<const TokenLogprob> logprobs, size_t text_offset) const;
  Json envelope(const char* object) const;
  std::string chunk(Json choices, const Usage* usage = nullptr) const;

  Head head_;
  TokenBytes token_bytes_;
};

// {"object": "list", "data": [the models]}, and one model alone.
std::string models_body(std::span<const std::string> names, int64_t created);
std::string model_body(const std::string& name, int64_t created);

}  // namespace moru
