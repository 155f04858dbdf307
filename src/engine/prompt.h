// From a conversation to the ids that a model reads: template, tokens, BOS once.
#pragma once
#include <string>
#include <vector>

#include "engine/model_files.h"
#include "formats/chat_template.h"
#include "formats/tokenizer.h"

namespace moru {

// The rendered conversation, as text. `inputs.bos_token` and `eos_token` are filled in here.
// Errors: unsupported (the model has no template), bad_input (the template refuses).
std::string render_chat(const ModelFiles& files, ChatTemplate::Inputs inputs);

// Its ids. Control tokens come from the template alone: where a message spells one ("<|im_end|>"),
// its text stays text. Errors as above.
std::vector<TokenId> encode_chat(const ModelFiles& files, const ChatTemplate::Inputs& inputs);

// A plain rendering instead of the model's chat template: "{prompt}\n{completion}". {prompt} stands
// for the contents of all messages, one below the other; the answer follows what comes before
// {completion}. Error usage: a template without {completion}.
inline constexpr std::string_view kPlainTemplate = "{prompt}\n{completion}";
std::string render_plain_prompt(std::string_view plain_template,
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
