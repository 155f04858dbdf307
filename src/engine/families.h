// The table of model families: how each one's files spell the fields of Config and the names of
// tensors. Adding a family of known parts is adding a row in families.cc (docs/adding-a-family.md).
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config.h"
#include "formats/gguf.h"

namespace moru {

struct Family;  // a row of the table: family_table.h

// By GGUF's general.architecture. Error unsupported: known and not implemented, or unknown.
const Family& family_of_gguf(const GgufMetadata& metadata);
// By config.json's architectures[0]. Errors as above.
const Family& family_of_folder(const std::string& where, const nlohmann::json& config);
// The row that a Config was made by.
const Family& family_of(const Config& config);

// Whether a GGUF, or a folder, of the family keeps rows of q and k in adjacent pairs.
bool gguf_interleaves_qk(const Family& family);
bool folder_interleaves_qk(const Family& family);
// What must be added to a folder's norm gains (Gemma stores them minus one).
float norm_offset_of(const Family& family);

// Divisors of the rotary frequencies that a GGUF keeps as tensors; empty where it has none.
struct RopeFactors {
  std::vector<float> all;                          // rope_freqs.weight
  std::vector<float> short_context, long_context;  // rope_factors_short.weight, …_long.weight
};

// Config from a GGUF's metadata or a folder's config.json. Error bad_input names a missing or
// impossible key; unsupported names a flag and its value that moru does not implement.
Config config_of_gguf(const Family& family, const GgufMetadata& metadata, RopeFactors factors = {});
Config config_of_folder(const Family& family, const std::string& where,
                        const nlohmann::json& config);
// Metadata that a GGUF of this config needs, without the tokenizer's.
GgufMetadata gguf_metadata_of(const Family& family, const Config& config);

// A folder's name of a GGUF's tensor that both store alike, or "".
std::string folder_name_of(const Family& family, std::string_view gguf_name);
// And back.
std::string gguf_name_of(const Family& family, std::string_view folder_name);

}  // namespace moru
