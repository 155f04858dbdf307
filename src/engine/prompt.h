// From a conversation to the ids that a model reads: template, tokens, BOS once.
#pragma once
#include <string>
#include <vector>

#include "engine/model_files.h"
#include "formats/chat_template.h"
#include "formats/tokenizer.h"

namespace moru {

// A text and where it came from messages that spell control tokens ("<|im_end|>"): there it stays
// text. Serving and training both make ids of it, so a model is asked as it was taught.
struct PromptText {
  std::string text;
  std::vector<TextSpan> literal;  // in order and apart

  PromptText first(size_t bytes) const;
  PromptText from(size_t byte) const;
  bool starts_with(const PromptText& start) const;
  void append(const PromptText& more);
};
std::vector<TokenId> encode(const Tokenizer& tokenizer, const PromptText& prompt);

// The rendered conversation. `inputs.bos_token` and `eos_token` are filled in here. Control tokens
// come from the template alone: those that a message, a name, a tool or its arguments spell are
// literal. Errors: unsupported (the model has no template); bad_input (the template refuses, or
// changes a text that spells a control token beyond recognition).
PromptText render_chat(const ModelFiles& files, ChatTemplate::Inputs inputs);
// Its ids, with BOS once.
std::vector<TokenId> encode_chat(const ModelFiles& files, const ChatTemplate::Inputs& inputs);

// A plain rendering instead of the model's chat template: "{prompt}\n{completion}". {prompt} stands
// for the contents of all messages, one below the other; the answer follows what comes before
// {completion}. The contents are literal. Errors: usage (a template without {completion}),
// bad_input (a message without text).
inline constexpr std::string_view kPlainTemplate = "{prompt}\n{completion}";
PromptText render_plain_prompt(std::string_view plain_template,
                               const nlohmann::ordered_json& messages);

// How conversations become prompts: by the chat template, or by a plain one where it is not empty
// or the model has none.
struct PromptStyle {
  std::string plain_template;
  std::string system;  // stands before conversations that have no system message
};
// Ids after which the model is to answer. Errors: those of the renderings.
std::vector<TokenId> encode_prompt(const ModelFiles& files, const PromptStyle& style,
                                   nlohmann::ordered_json messages);

// Ids of a plain text, with BOS first where the model's tokenizer adds it.
std::vector<TokenId> encode_text(const ModelFiles& files, std::string_view text);

}  // namespace moru
