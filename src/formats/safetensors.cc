#include "formats/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "base/cursor.h"
#include "base/error.h"

namespace moru {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxHeaderBytes = 100'000'000;  // the specification's limit
constexpr const char* kFetchAgain = "fetch or save the model again";
constexpr std::string_view kMetadataKey = "__metadata__";

// In the order in which the reference implementation lays out a file: widest first, then by name,
// so that every tensor is aligned to its element.
struct DTypeRow {
  std::string_view name;
  DType type;
};
constexpr DTypeRow kDTypes[] = {
    {"I64", DType::i64},   {"F64", DType::f64}, {"F32", DType::f32}, {"I32", DType::i32},
    {"BF16", DType::bf16}, {"F16", DType::f16}, {"I16", DType::i16}, {"I8", DType::i8},
    {"U8", DType::i8},  // bytes that someone packed; written as I8
};

const DTypeRow& row_of(DType type) {
  const auto* row = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                 [&](const DTypeRow& r) { return r.type == type; });
  MORU_CHECK(row != std::end(kDTypes));
  return *row;
}

// Parses a JSON object in which no key stands twice.
Json parse_object(const Cursor& in, std::string_view field, std::string_view text) {
  std::vector<std::unordered_set<std::string>> open_objects;
  const auto watch = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) open_objects.emplace_back();
    if (event == Json::parse_event_t::object_end) open_objects.pop_back();
    if (event == Json::parse_event_t::key) {
      const std::string& key = parsed.get_ref<const std::string&>();
      if (!open_objects.back().insert(key).second)
        in.refuse({std::string(field), fmt::format("has {} twice", key), kFetchAgain});
    }
    return true;
  };
  try {
    Json parsed = Json::parse(text.begin(), text.end(), watch);
    if (parsed.is_object()) return parsed;
  } catch (const Json::exception& e) {
    in.refuse({std::string(field), fmt::format("is not JSON: {}", e.what()), kFetchAgain});
  }
  in.refuse({std::string(field), "is not a JSON object", kFetchAgain});
}

struct PlacedTensor {
  Tensor tensor;
  size_t begin, end;  // from the start of the data
};

DType read_dtype(const Cursor& in, const std::string& field, const Json& entry) {
  const auto found = entry.find("dtype");
  if (found == entry.end() || !found->is_string()) in.refuse({field, "has no dtype", kFetchAgain});
  const std::string& name = found->get_ref<const std::string&>();
  for (const DTypeRow& row : kDTypes)
    if (row.name == name) return row.type;
  throw Error(ErrorKind::unsupported,
              {.where = fmt::format("{}: {}", in.where(), field),
               .what = fmt::format("is stored as {}, which moru does not read", name),
               .cure = "save the model as BF16, F16 or F32"});
}

// The unsigned integers of entry[key].
std::vector<size_t> read_sizes(const Cursor& in, const std::string& field, const Json& entry,
                               const char* key) {
  const auto found = entry.find(key);
  if (found == entry.end() || !found->is_array())
    in.refuse({field, fmt::format("has no {}", key), kFetchAgain});
  std::vector<size_t> sizes;
  for (const Json& item : *found) {
    if (!item.is_number_unsigned())
      in.refuse({field, fmt::format("has a {} that is no size", key), kFetchAgain});
    sizes.push_back(item.get<size_t>());
  }
  return sizes;
}

PlacedTensor read_tensor(const Cursor& in, std::span<const std::byte> data, const std::string& name,
                         const Json& entry) {
  const std::string field = fmt::format("tensor {}", name);
  if (!entry.is_object()) in.refuse({field, "is not a JSON object", kFetchAgain});
  PlacedTensor placed{};
  placed.tensor.name = name;
  placed.tensor.type = read_dtype(in, field, entry);
  placed.tensor.shape = read_sizes(in, field, entry, "shape");
  size_t bytes = traits(placed.tensor.type).block_bytes;
  for (const size_t n : placed.tensor.shape) bytes = in.times(bytes, n, field);
  const std::vector<size_t> offsets = read_sizes(in, field, entry, "data_offsets");
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data.size())
    in.refuse({field, fmt::format("has data_offsets outside of the {} bytes of data", data.size()),
               kFetchAgain});
  placed.begin = offsets[0];
  placed.end = offsets[1];
  if (placed.end - placed.begin != bytes)
    in.refuse(
        {field,
         fmt::format("has {} bytes, but its shape needs {}", placed.end - placed.begin, bytes),
         kFetchAgain});
  placed.tensor.data = data.subspan(placed.begin, bytes);
  return placed;
}

// Tensors in the order of their data, which they must cover without a hole or an overlap.
std::vector<Tensor> in_data_order(const Cursor& in, std::vector<PlacedTensor> placed,
                                  size_t data_bytes) {
  std::sort(placed.begin(), placed.end(), [](const PlacedTensor& a, const PlacedTensor& b) {
    return std::tie(a.begin, a.end, a.tensor.name) < std::tie(b.begin, b.end, b.tensor.name);
  });
  std::vector<Tensor> tensors;
  tensors.reserve(placed.size());
  size_t at = 0;
  for (PlacedTensor& p : placed) {
    if (p.begin != at)
      in.refuse({fmt::format("tensor {}", p.tensor.name),
                 fmt::format("begins at {}, but the data before it ends at {}", p.begin, at),
                 kFetchAgain});
    at = p.end;
    tensors.push_back(std::move(p.tensor));
  }
  if (at != data_bytes)
    in.refuse({"data", fmt::format("has {} bytes that belong to no tensor", data_bytes - at),
               kFetchAgain});
  return tensors;
}

std::map<std::string, std::string> read_metadata(const Cursor& in, const Json& entry) {
  std::map<std::string, std::string> metadata;
  if (!entry.is_object())
    in.refuse({std::string(kMetadataKey), "is not a JSON object", kFetchAgain});
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string())
      in.refuse(
          {std::string(kMetadataKey), fmt::format("has {}, which is not text", key), kFetchAgain});
    metadata.emplace(key, value.get<std::string>());
  }
  return metadata;
}

const Tensor* find_in(std::span<const Tensor> tensors, std::string_view name) {
  for (const Tensor& tensor : tensors)
    if (tensor.name == name) return &tensor;
  return nullptr;
}

// --- folders --------------------------------------------------------------------------------

struct ShardMap {
  std::map<std::string, std::string> shard_of_tensor;
  std::vector<std::string> shards;  // sorted, each once
};

ShardMap read_index(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  const Cursor in(path.string(), std::as_bytes(std::span(text)));
  const Json index = parse_object(in, "index", text);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty())
    in.refuse({"weight_map", "is missing or empty", kFetchAgain});
  ShardMap result;
  for (const auto& [name, file] : map->items()) {
    // A shard stands beside its index: a path could point anywhere.
    if (!file.is_string() || file.get<std::string>().find('/') != std::string::npos ||
        !file.get<std::string>().ends_with(".safetensors"))
      in.refuse({"weight_map", fmt::format("names no .safetensors file beside it for {}", name),
                 kFetchAgain});
    result.shards.push_back(file.get<std::string>());
    result.shard_of_tensor.emplace(name, result.shards.back());
  }
  std::sort(result.shards.begin(), result.shards.end());
  result.shards.erase(std::unique(result.shards.begin(), result.shards.end()), result.shards.end());
  return result;
}

[[noreturn]] void no_weights(const std::filesystem::path& folder, std::string_view stem) {
  if (!std::filesystem::is_directory(folder))
    throw Error(ErrorKind::not_found,
                {.where = folder.string(), .what = "is not a folder", .cure = "check the path"});
  const bool pickled = std::filesystem::exists(folder / "pytorch_model.bin") ||
                       std::filesystem::exists(folder / "pytorch_model.bin.index.json");
  throw Error(
      ErrorKind::not_found,
      {.where = folder.string(),
       .what = fmt::format("has neither {0}.safetensors nor {0}.safetensors.index.json", stem),
       .cure = pickled ? "save the model as safetensors: pickled .bin weights can run code"
                       : "give the folder that holds the weights"});
}

// --- writing --------------------------------------------------------------------------------

std::string quoted(const std::filesystem::path& path, const std::string& text) {
  try {
    return Json(text).dump();
  } catch (const Json::exception&) {
    throw Error(ErrorKind::bad_input, {.where = path.string(),
                                       .what = "cannot hold a name that is not UTF-8",
                                       .cure = "rename the tensor"});
  }
}

std::vector<const Tensor*> in_file_order(std::span<const Tensor* const> tensors) {
  std::vector<const Tensor*> order(tensors.begin(), tensors.end());
  std::sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) {
    const DTypeRow *left = &row_of(a->type), *right = &row_of(b->type);
    return left != right ? left < right : a->name < b->name;
  });
  return order;
}

void write_one(const std::filesystem::path& path, std::span<const Tensor* const> tensors,
               const std::map<std::string, std::string>& metadata) {
  const std::vector<const Tensor*> order = in_file_order(tensors);
  std::string header = "{";
  if (!metadata.empty()) {
    header += fmt::format("\"{}\":{{", kMetadataKey);
    for (const auto& [key, value] : metadata)
      header += fmt::format("{}:{},", quoted(path, key), quoted(path, value));
    header.back() = '}';
    header += ',';
  }
  size_t at = 0;
  for (const Tensor* t : order) {
    MORU_CHECK(t->data.size() == bytes_of(t->type, t->count()));
    header += fmt::format("{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}},",
                          quoted(path, t->name), row_of(t->type).name, fmt::join(t->shape, ","), at,
                          at + t->data.size());
    at += t->data.size();
  }
  if (header.size() > 1) header.pop_back();
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');  // the data stays aligned

  AtomicFile file(path);
  const uint64_t header_bytes = header.size();
  file.write(std::as_bytes(std::span(&header_bytes, 1)));
  file.write(std::string_view(header));
  for (const Tensor* t : order) file.write(t->data);
  file.commit();
}

std::vector<const Tensor*> pointers_to(std::span<const Tensor> tensors) {
  std::vector<const Tensor*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(&t);
  return pointers;
}

// Tensors in the given order, cut wherever the next would pass `shard_bytes`.
std::vector<std::vector<const Tensor*>> cut_into_shards(std::span<const Tensor> tensors,
                                                        size_t shard_bytes) {
  std::vector<std::vector<const Tensor*>> shards(1);
  size_t used = 0;
  for (const Tensor& t : tensors) {
    if (!shards.back().empty() && t.data.size() > shard_bytes - std::min(used, shard_bytes)) {
      shards.emplace_back();
      used = 0;
    }
    shards.back().push_back(&t);
    used += t.data.size();
  }
  return shards;
}

void remove_if_there(const std::filesystem::path& path) {
  std::error_code code;
  std::filesystem::remove(path, code);
  if (code)
    throw Error(ErrorKind::io, {.where = path.string(),
                                .what = fmt::format("cannot remove: {}", code.message()),
                                .cure = "check the permissions"});
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : where_(path.string()), file_(path) {
  parse(file_->bytes());
}

SafetensorsFile::SafetensorsFile(std::string where, std::span<const std::byte> bytes)
    : where_(std::move(where)) {
  parse(bytes);
}

void SafetensorsFile::parse(std::span<const std::byte> bytes) {
  Cursor in(where_, bytes);
  const std::string_view text = in.text("header", kMaxHeaderBytes);
  if (!text.starts_with('{')) in.refuse({"header", "is not a JSON object", kFetchAgain});
  const Json header = parse_object(in, "header", text);
  const auto data = bytes.subspan(in.position());
  std::vector<PlacedTensor> placed;
  for (const auto& [name, entry] : header.items()) {
    if (name == kMetadataKey)
      metadata_ = read_metadata(in, entry);
    else
      placed.push_back(read_tensor(in, data, name, entry));
  }
  tensors_ = in_data_order(in, std::move(placed), data.size());
}

const Tensor* SafetensorsFile::find(std::string_view name) const { return find_in(tensors_, name); }

SafetensorsFolder::SafetensorsFolder(const std::filesystem::path& folder, std::string_view stem) {
  const auto single = folder / fmt::format("{}.safetensors", stem);
  if (std::filesystem::exists(single)) {
    files_.emplace_back(single);
    return;
  }
  const auto index_path = folder / fmt::format("{}.safetensors.index.json", stem);
  if (!std::filesystem::exists(index_path)) no_weights(folder, stem);
  const ShardMap index = read_index(index_path);
  std::map<std::string_view, std::string_view> shard_of;  // as found, against doubles
  for (const std::string& shard : index.shards) {
    if (!std::filesystem::exists(folder / shard))
      throw Error(ErrorKind::not_found, {.where = (folder / shard).string(),
                                         .what = "is listed in the index, but not there",
                                         .cure = "fetch the missing shard"});
    files_.emplace_back(folder / shard);
    for (const Tensor& t : files_.back().tensors()) {
      const auto [other, fresh] = shard_of.emplace(t.name, shard);
      if (!fresh)
        throw Error(ErrorKind::bad_input,
                    {.where = fmt::format("{}: tensor {}", (folder / shard).string(), t.name),
                     .what = fmt::format("stands in {} too", other->second),
                     .cure = kFetchAgain});
    }
  }
  for (const auto& [name, shard] : index.shard_of_tensor) {
    const auto found = shard_of.find(name);
    if (found == shard_of.end() || found->second != shard)
      throw Error(ErrorKind::bad_input,
                  {.where = fmt::format("{}: tensor {}", index_path.string(), name),
                   .what = fmt::format("is not in {}", shard),
                   .cure = kFetchAgain});
  }
}

std::vector<const Tensor*> SafetensorsFolder::tensors() const {
  std::vector<const Tensor*> all;
  for (const SafetensorsFile& file : files_)
    for (const Tensor& t : file.tensors()) all.push_back(&t);
  return all;
}

const Tensor* SafetensorsFolder::find(std::string_view name) const {
  for (const SafetensorsFile& file : files_)
    if (const Tensor* found = file.find(name)) return found;
  return nullptr;
}

void write_safetensors(const std::filesystem::path& path, std::span<const Tensor> tensors,
                       const std::map<std::string, std::string>& metadata) {
  write_one(path, pointers_to(tensors), metadata);
}

void write_safetensors_folder(const std::filesystem::path& folder, std::span<const Tensor> tensors,
                              size_t shard_bytes) {
  make_folder(folder);
  const std::map<std::string, std::string> metadata = {{"format", "pt"}};
  const auto single = folder / "model.safetensors";
  const auto index_path = folder / "model.safetensors.index.json";
  const auto shards = cut_into_shards(tensors, shard_bytes);
  if (shards.size() == 1) {
    write_one(single, shards[0], metadata);
    remove_if_there(index_path);
    return;
  }
  Json weight_map = Json::object();
  size_t total = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    write_one(folder / name, shards[i], metadata);
    for (const Tensor* t : shards[i]) {
      weight_map[t->name] = name;
      total += t->data.size();
    }
  }
  const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  write_file(index_path, index.dump(2) + "\n");
  // Readers prefer the single file, so an older one goes once the new index is whole.
  remove_if_there(single);
}

}  // namespace moru
