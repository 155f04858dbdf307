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

// Ids of a plain text, with BOS first where the model's tokenizer adds it.
std::vector<TokenId> encode_text(const ModelFiles& files, std::string_view text);

}  // namespace moru
