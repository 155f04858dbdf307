// The table of model families: how each one's files spell the fields of Config and the names of
// tensors. Adding a family of plain blocks is adding a row in families.cc.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "engine/config.h"
#include "formats/gguf.h"

namespace moru {

struct Family;  // a row of the table

// By GGUF's general.architecture. Error unsupported: known and not implemented, or unknown.
const Family& family_of_gguf(const GgufMetadata& metadata);
// By config.json's architectures[0]. Errors as above.
const Family& family_of_folder(const std::string& where, const nlohmann::json& config);

std::string_view name_of(const Family& family);
// Whether a GGUF of the family keeps rows of q and k in adjacent pairs.
bool interleaves_qk(const Family& family);
// What must be added to a folder's norm gains (Gemma stores them minus one).
float norm_offset_of(const Family& family);

// Config from a GGUF's metadata or a folder's config.json. Error bad_input names a missing or
// impossible key; unsupported names a flag and its value that moru does not implement.
Config config_of_gguf(const Family& family, const GgufMetadata& metadata);
Config config_of_folder(const Family& family, const std::string& where,
                        const nlohmann::json& config);
// Metadata that a GGUF of this config needs, without the tokenizer's.
GgufMetadata gguf_metadata_of(const Family& family, const Config& config);
// config.json of this config.
nlohmann::ordered_json folder_config_of(const Family& family, const Config& config);

// GGUF's name of a folder's tensor, or "" if the family has no such tensor; and back.
std::string gguf_name_of(const Family& family, std::string_view folder_name);
std::string folder_name_of(const Family& family, std::string_view gguf_name);

}  // namespace moru
