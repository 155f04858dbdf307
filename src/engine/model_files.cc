#include "engine/model_files.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/files.h"
#include "engine/rope.h"

namespace moru {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

Json read_json(const fs::path& path) {
  Json json = Json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object())
    throw Error(
        ErrorKind::bad_input,
        {.where = path.string(), .what = "is not a JSON object", .cure = "fetch the file again"});
  return json;
}

void add_stop_ids(std::vector<TokenId>& ids, const Json& config, size_t vocab) {
  const auto found = config.find("eos_token_id");
  if (found == config.end()) return;
  const auto add = [&](const Json& id) {
    if (id.is_number_integer() && id >= 0 && id < vocab) ids.push_back(id.get<TokenId>());
  };
  if (found->is_array()) {
    for (const Json& id : *found) add(id);
  } else {
    add(*found);
  }
}

void unite(std::vector<TokenId>& ids, const std::vector<TokenId>& more) {
  ids.insert(ids.end(), more.begin(), more.end());
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
}

// chat_template.jinja, or tokenizer_config.json's chat_template: a text, or a list of named ones of
// which "default" counts.
std::optional<ChatTemplate> folder_template(const fs::path& folder) {
  const fs::path jinja = folder / "chat_template.jinja";
  if (fs::exists(jinja)) return ChatTemplate(jinja.string(), read_file(jinja));
  const fs::path config_path = folder / "tokenizer_config.json";
  if (!fs::exists(config_path)) return std::nullopt;
  const Json config = read_json(config_path);
  const auto found = config.find("chat_template");
  if (found == config.end()) return std::nullopt;
  const std::string where = config_path.string() + ": chat_template";
  if (found->is_string()) return ChatTemplate(where, found->get<std::string>());
  if (found->is_array()) {
    for (const Json& entry : *found)
      if (entry.value("name", "") == "default" && entry.contains("template"))
        return ChatTemplate(where, entry["template"].get<std::string>());
  }
  return std::nullopt;
}

std::vector<float> floats_of(const GgufFile& file, std::string_view name) {
  const Tensor* tensor = file.find(name);
  if (tensor == nullptr) return {};
  std::vector<float> values(tensor->count());
  dequantize(tensor->type, tensor->data, values);
  return values;
}

ModelFiles open_gguf(const fs::path& path) {
  GgufFile file(path);
  const Family& family = family_of_gguf(file.metadata());
  Config config = config_of_gguf(family, file.metadata(),
                                 {.all = floats_of(file, "rope_freqs.weight"),
                                  .short_context = floats_of(file, "rope_factors_short.weight"),
                                  .long_context = floats_of(file, "rope_factors_long.weight")});
  config.tied_head = file.find("output.weight") == nullptr;
  Tokenizer tokenizer = Tokenizer::from_gguf(file.metadata());
  std::optional<ChatTemplate> chat;
  if (const auto source = file.metadata().text("tokenizer.chat_template"))
    chat.emplace(path.string() + ": tokenizer.chat_template", *source);
  std::vector<TokenId> stops = tokenizer.stop_ids();
  unite(stops, {});
  ModelFiles files{.path = path,
                   .family = &family,
                   .config = std::move(config),
                   .tokenizer = std::move(tokenizer),
                   .chat_template = std::move(chat),
                   .stop_ids = std::move(stops),
                   .qk_interleaved = gguf_interleaves_qk(family),
                   .metadata = file.metadata(),
                   .tensors = {file.tensors().begin(), file.tensors().end()}};
  files.gguf = std::move(file);
  return files;
}

// Tensors of a GGUF that say what a folder's config.json says.
void add_rope_factors(ModelFiles& files) {
  const auto add = [&](const char* name, std::vector<float> values) {
    const std::vector<float>& kept = files.made.emplace_back(std::move(values));
    files.tensors.push_back({name, DType::f32, {kept.size()}, std::as_bytes(std::span(kept))});
    files.assemblies.emplace_back();
  };
  const RopeConfig& rope = files.config.rope;
  if (rope.scaling == RopeConfig::Scaling::llama3) add("rope_freqs.weight", llama3_divisors(rope));
  if (rope.scaling == RopeConfig::Scaling::longrope) {
    add("rope_factors_long.weight", rope.long_divisors);
    add("rope_factors_short.weight", rope.divisors);
  }
}

ModelFiles open_folder(const fs::path& folder) {
  const fs::path config_path = folder / "config.json";
  Json json = read_json(config_path);
  const Family& family = family_of_folder(config_path.string(), json);
  if (const auto text = json.find("text_config"); text != json.end() && text->is_object())
    json.update(*text);
  Config config = config_of_folder(family, config_path.string(), json);
  SafetensorsFolder tensors(folder);
  Tokenizer tokenizer = Tokenizer::from_folder(folder);

  ModelFiles files{.path = folder,
                   .family = &family,
                   .config = config,
                   .tokenizer = std::move(tokenizer),
                   .chat_template = folder_template(folder),
                   .qk_interleaved = folder_interleaves_qk(family),
                   .norm_offset = norm_offset_of(family)};
  files.folder = std::move(tensors);
  FolderTensors matched = match_folder_tensors(family, config, *files.folder);
  for (size_t i = 0; i < matched.tensors.size(); ++i) {
    // A tied head is often stored twice; one copy counts.
    if (config.tied_head && matched.tensors[i].name == "output.weight") continue;
    files.tensors.push_back(std::move(matched.tensors[i]));
    files.assemblies.push_back(std::move(matched.assemblies[i]));
  }
  files.unmatched = std::move(matched.unmatched);
  add_rope_factors(files);
  add_stop_ids(files.stop_ids, json, config.vocab);
  if (const fs::path path = folder / "generation_config.json"; fs::exists(path))
    add_stop_ids(files.stop_ids, read_json(path), config.vocab);
  unite(files.stop_ids, files.tokenizer.stop_ids());

  files.metadata = gguf_metadata_of(family, config);
  files.metadata.where = folder.string();
  files.metadata.set("general.name", GgufScalar{folder.filename().string()});
  for (GgufPair& pair : files.tokenizer.gguf_metadata(config.vocab))
    files.metadata.set(pair.key, std::move(pair.value));
  if (files.chat_template)
    files.metadata.set("tokenizer.chat_template", GgufScalar{files.chat_template->source()});
  return files;
}

}  // namespace

size_t interleaved_row(size_t row, size_t head_dim) {
  const size_t head = row / head_dim, within = row % head_dim, half = head_dim / 2;
  return head * head_dim + 2 * (within % half) + within / half;
}

const Tensor* ModelFiles::find(std::string_view name) const {
  const auto found =
      std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

std::span<const std::byte> ModelFiles::row(const Tensor& tensor, size_t row,
                                           std::vector<std::byte>& room) const {
  if (tensor.data.empty()) {
    const auto index = static_cast<size_t>(&tensor - tensors.data());
    MORU_CHECK(index < assemblies.size() && assemblies[index] != nullptr);
    return assembled_row(*assemblies[index], row, room);
  }
  const size_t bytes = bytes_of(tensor.type, tensor.shape.back());
  return tensor.data.subspan(row * bytes, bytes);
}

bool is_query_or_key(std::string_view name) {
  return name.find(".attn_q.") != std::string_view::npos ||
         name.find(".attn_k.") != std::string_view::npos;
}

ModelFiles open_model(const fs::path& path) {
  if (!fs::exists(path))
    throw Error(ErrorKind::not_found, {.where = path.string(),
                                       .what = "there is no such file or folder",
                                       .cure = "give a GGUF file or a Hugging Face folder"});
  if (!fs::is_directory(path)) return open_gguf(path);
  if (fs::exists(path / "config.json")) return open_folder(path);
  if (fs::exists(path / "model.gguf")) return open_gguf(path / "model.gguf");
  throw Error(ErrorKind::not_found,
              {.where = path.string(),
               .what = "the folder holds neither config.json nor model.gguf",
               .cure = "give a GGUF file, a Hugging Face folder or a folder that moru forged"});
}

}  // namespace moru
