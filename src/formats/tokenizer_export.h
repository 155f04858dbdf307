// The tokenizer that a GGUF's metadata describes, as a Hugging Face folder holds it.
#pragma once
#include <nlohmann/json.hpp>

#include "formats/gguf.h"

namespace moru {

struct TokenizerFolder {
  nlohmann::ordered_json tokenizer;  // tokenizer.json
  nlohmann::ordered_json config;     // tokenizer_config.json, with the chat template
};
// Errors: those of Tokenizer::from_gguf; unsupported where tokenizer.json cannot say what the GGUF
// does, which is found out by reading it back and comparing ids on texts of many scripts.
TokenizerFolder tokenizer_folder_of(const GgufMetadata& metadata);

}  // namespace moru
