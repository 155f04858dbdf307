#include "formats/gguf.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <unordered_set>

#include "base/cursor.h"
#include "base/error.h"

// How the file is read, from the front:
//
//   magic "GGUF" | version u32 | tensor count u64 | pair count u64
//   pair:   key text | type u32 | value         text: length u64, bytes; array: type u32, count u64
//   tensor: name text | n_dims u32 | dims u64[n_dims], fastest first | type u32 | offset u64
//   zeros up to the alignment; offsets count from here
//
// Every count is held against the bytes that are left before anything is allocated for it, so a
// file of n bytes can cost no more than a small multiple of n in memory.

namespace moru {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF", little endian
constexpr size_t kMaxKeyBytes = 65535;   // the specification's limit
constexpr size_t kMaxNameBytes = 65535;  // ggml's limit is 64, but longer names do no harm here
constexpr uint32_t kMaxDims = 4;
constexpr size_t kMaxAlignment = size_t{1} << 20;
constexpr const char* kConvertAgain = "convert or fetch the model again";

// Ids 0 … 8 and 10 … 12 are the alternatives of GgufScalar in order; 9 is the array.
constexpr uint32_t kArrayId = 9;
constexpr uint32_t kTypeIds = 13;
constexpr uint32_t id_of_alternative(size_t index) {
  return static_cast<uint32_t>(index < kArrayId ? index : index + 1);
}
constexpr std::string_view kTypeNames[kTypeIds] = {
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "text", "array", "u64", "i64", "f64"};

size_t padded(size_t bytes, size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

std::string type_name(const GgufValue& value) {
  if (const auto* array = std::get_if<GgufArray>(&value))
    return fmt::format("array of {}", kTypeNames[id_of_alternative(array->values().index())]);
  return std::string(kTypeNames[id_of_alternative(std::get<GgufScalar>(value).index())]);
}

// --- reading values -------------------------------------------------------------------------

template <typename T>
T read_plain(Cursor& in, std::string_view field) {
  if constexpr (std::is_same_v<T, bool>) {
    const uint8_t byte = in.u8(field);
    if (byte > 1)
      in.refuse(
          {std::string(field), fmt::format("is a bool with the value {}", byte), kConvertAgain});
    return byte != 0;
  } else if constexpr (std::is_same_v<T, std::string>) {
    return std::string(in.text(field, in.left()));
  } else if constexpr (std::is_same_v<T, float>) {
    return in.f32(field);
  } else if constexpr (std::is_same_v<T, double>) {
    return in.f64(field);
  } else if constexpr (sizeof(T) == 1) {
    return static_cast<T>(in.u8(field));
  } else if constexpr (sizeof(T) == 2) {
    return static_cast<T>(in.u16(field));
  } else if constexpr (sizeof(T) == 4) {
    return static_cast<T>(in.u32(field));
  } else {
    return static_cast<T>(in.u64(field));
  }
}

// Calls use(T{}) with the C++ type of a scalar id.
template <typename Use>
auto with_scalar_type(uint32_t id, Use&& use) {
  switch (id) {
    case 0:
      return use(uint8_t{});
    case 1:
      return use(int8_t{});
    case 2:
      return use(uint16_t{});
    case 3:
      return use(int16_t{});
    case 4:
      return use(uint32_t{});
    case 5:
      return use(int32_t{});
    case 6:
      return use(float{});
    case 7:
      return use(bool{});
    case 8:
      return use(std::string{});
    case 10:
      return use(uint64_t{});
    case 11:
      return use(int64_t{});
    default:
      MORU_CHECK(id == 12);
      return use(double{});
  }
}

bool is_scalar_id(uint32_t id) { return id < kTypeIds && id != kArrayId; }

GgufArray read_array(Cursor& in, std::string_view key) {
  const uint32_t element = in.u32(key);
  if (!is_scalar_id(element))
    in.refuse({std::string(key),
               element == kArrayId ? "is an array of arrays"
                                   : fmt::format("is an array of the unknown type {}", element),
               kConvertAgain});
  const uint64_t count = in.u64(key);
  return with_scalar_type(element, [&]<typename T>(T) {
    // What the shortest element takes in the file: a text is at least its length.
    constexpr size_t kLeast = std::is_same_v<T, std::string> ? sizeof(uint64_t) : sizeof(T);
    if (count > in.left() / kLeast)
      in.refuse({std::string(key),
                 fmt::format("claims {} elements, but {} bytes are left", count, in.left()),
                 kConvertAgain});
    if constexpr (std::is_same_v<T, std::string>) {
      Cursor ahead = in;
      size_t bytes = 0;
      for (uint64_t i = 0; i < count; ++i) bytes += ahead.text(key, ahead.left()).size();
      TextList texts;
      if (!texts.has_room(bytes))
        in.refuse({std::string(key), "is longer than 4 GiB", kConvertAgain});
      texts.reserve(count, bytes);
      for (uint64_t i = 0; i < count; ++i) texts.push_back(in.text(key, in.left()));
      return GgufArray(std::move(texts));
    } else {
      std::vector<T> values;
      values.reserve(count);
      for (uint64_t i = 0; i < count; ++i) values.push_back(read_plain<T>(in, key));
      return GgufArray(std::move(values));
    }
  });
}

GgufValue read_value(Cursor& in, std::string_view key) {
  const uint32_t type = in.u32(key);
  if (type == kArrayId) return read_array(in, key);
  if (!is_scalar_id(type))
    in.refuse(
        {std::string(key), fmt::format("has the unknown value type {}", type), kConvertAgain});
  return with_scalar_type(
      type, [&]<typename T>(T) -> GgufValue { return GgufScalar(read_plain<T>(in, key)); });
}

uint32_t read_version(Cursor& in) {
  if (in.left() < sizeof kMagic || in.u32("magic") != kMagic) {
    in.refuse({"magic", "is not a GGUF file",
               "give a .gguf file, or a folder with config.json and safetensors"});
  }
  const uint32_t version = in.u32("version");
  if (version == 2 || version == 3) return version;
  if (version == 0x02000000 || version == 0x03000000)
    in.refuse({"version", "is a big-endian file", "convert the model for little-endian machines"});
  in.refuse({"version", fmt::format("is {}; moru reads 2 and 3", version),
             "convert the model with a current converter"});
}

// A count of items that take at least `least` bytes each.
uint64_t read_count(Cursor& in, std::string_view field, size_t least) {
  const uint64_t count = in.u64(field);
  if (count > in.left() / least)
    in.refuse({std::string(field), fmt::format("is {}, but {} bytes are left", count, in.left()),
               kConvertAgain});
  return count;
}

std::vector<GgufPair> read_pairs(Cursor& in, uint64_t count) {
  std::vector<GgufPair> pairs;
  std::unordered_set<std::string_view> seen;
  for (uint64_t i = 0; i < count; ++i) {
    const std::string_view key = in.text("metadata key", kMaxKeyBytes);
    if (key.empty()) in.refuse({"metadata key", "is empty", kConvertAgain});
    if (!seen.insert(key).second) in.refuse({std::string(key), "stands twice", kConvertAgain});
    pairs.push_back({std::string(key), read_value(in, key)});
  }
  return pairs;
}

size_t read_alignment(const GgufMetadata& metadata) {
  const std::optional<uint64_t> value = metadata.integer("general.alignment");
  if (!value) return 32;
  // The specification asks for a multiple of 8, ggml for a power of two.
  if (*value < 8 || *value > kMaxAlignment || !std::has_single_bit(*value))
    throw Error(ErrorKind::bad_input, {.where = metadata.where + ": general.alignment",
                                       .what = fmt::format("is {}", *value),
                                       .cure = kConvertAgain});
  return *value;
}

struct PlacedTensor {
  Tensor tensor;
  uint64_t offset;  // from the start of the data
};

PlacedTensor read_tensor(Cursor& in) {
  PlacedTensor placed{};
  Tensor& t = placed.tensor;
  t.name = in.text("tensor name", kMaxNameBytes);
  const std::string field = fmt::format("tensor {}", t.name);
  if (t.name.empty()) in.refuse({"tensor name", "is empty", kConvertAgain});
  const uint32_t n_dims = in.u32(field);
  if (n_dims == 0 || n_dims > kMaxDims)
    in.refuse(
        {field, fmt::format("has {} dimensions, not 1 to {}", n_dims, kMaxDims), kConvertAgain});
  size_t count = 1;
  for (uint32_t d = 0; d < n_dims; ++d) {
    t.shape.push_back(in.u64(field));
    if (t.shape.back() == 0) in.refuse({field, "has a dimension of 0", kConvertAgain});
    count = in.times(count, t.shape.back(), field);
  }
  const size_t cols = t.shape.front();
  std::reverse(t.shape.begin(), t.shape.end());
  const uint32_t id = in.u32(field);
  const std::optional<DType> type = dtype_from_ggml(id);
  if (!type)
    throw Error(ErrorKind::unsupported,
                {.where = fmt::format("{}: {}", in.where(), field),
                 .what = fmt::format("is stored as {}, which moru does not read", ggml_name(id)),
                 .cure = "fetch the model in another type, for example Q4_K_M, Q8_0 or BF16"});
  t.type = *type;
  const DTypeTraits& trait = traits(t.type);
  if (cols % trait.block != 0)
    in.refuse({field,
               fmt::format("has rows of {} elements, which blocks of {} ({}) do not divide", cols,
                           trait.block, trait.name),
               kConvertAgain});
  in.times(count / trait.block, trait.block_bytes, field);
  placed.offset = in.u64(field);
  return placed;
}

// Points every tensor to its bytes and refuses what is misaligned, outside or shared.
std::vector<Tensor> place_tensors(const Cursor& in, std::vector<PlacedTensor> placed,
                                  size_t alignment) {
  const size_t start = padded(in.position(), alignment);
  std::vector<const PlacedTensor*> by_offset;
  for (PlacedTensor& p : placed) {
    const std::string field = fmt::format("tensor {}", p.tensor.name);
    if (p.offset % alignment != 0)
      in.refuse({field, fmt::format("is at offset {}, not a multiple of {}", p.offset, alignment),
                 kConvertAgain});
    if (p.offset > std::numeric_limits<size_t>::max() - start)
      in.refuse({field, fmt::format("is at offset {}", p.offset), kConvertAgain});
    p.tensor.data = in.data_at(start + p.offset, bytes_of(p.tensor.type, p.tensor.count()), field);
    by_offset.push_back(&p);
  }
  std::sort(by_offset.begin(), by_offset.end(),
            [](const auto* a, const auto* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < by_offset.size(); ++i) {
    const PlacedTensor &before = *by_offset[i - 1], &here = *by_offset[i];
    if (here.offset - before.offset < before.tensor.data.size())
      in.refuse({fmt::format("tensor {}", here.tensor.name),
                 fmt::format("overlaps {}", before.tensor.name), kConvertAgain});
  }
  std::vector<Tensor> tensors;
  tensors.reserve(placed.size());
  for (PlacedTensor& p : placed) tensors.push_back(std::move(p.tensor));
  return tensors;
}

// --- look-ups -------------------------------------------------------------------------------

template <typename T>
constexpr bool is_integer = std::is_integral_v<T> && !std::is_same_v<T, bool>;

[[noreturn]] void refuse_value(const GgufMetadata& metadata, std::string_view key,
                               std::string what) {
  throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: {}", metadata.where, key),
                                     .what = std::move(what),
                                     .cure = kConvertAgain});
}

[[noreturn]] void refuse_type(const GgufMetadata& metadata, std::string_view key,
                              const GgufValue& value, std::string_view wanted) {
  refuse_value(metadata, key, fmt::format("is {}, not {}", type_name(value), wanted));
}

// The scalar of `key`: convert(T) is tried on its value, and nullopt refuses the type.
template <typename Result, typename Convert>
std::optional<Result> scalar_of(const GgufMetadata& metadata, std::string_view key,
                                std::string_view wanted, Convert&& convert) {
  const GgufValue* value = metadata.find(key);
  if (value == nullptr) return std::nullopt;
  std::optional<Result> result;
  if (const auto* scalar = std::get_if<GgufScalar>(value)) result = std::visit(convert, *scalar);
  if (!result) refuse_type(metadata, key, *value, wanted);
  return result;
}

// The array of `key`: every element through convert(T), nullopt refuses the type.
template <typename Result, typename Convert>
std::vector<Result> array_of(const GgufMetadata& metadata, std::string_view key,
                             std::string_view wanted, Convert&& convert) {
  std::vector<Result> result;
  const GgufValue* value = metadata.find(key);
  if (value == nullptr) return result;
  const auto* array = std::get_if<GgufArray>(value);
  if (array == nullptr) refuse_type(metadata, key, *value, wanted);
  std::visit(
      [&]<typename List>(const List& values) {
        using T = typename List::value_type;
        result.reserve(values.size());
        for (size_t i = 0; i < values.size(); ++i) {
          std::optional<Result> one = convert(static_cast<const T&>(values[i]));
          if (!one) refuse_type(metadata, key, *value, wanted);
          result.push_back(std::move(*one));
        }
      },
      array->values());
  return result;
}

// --- writing --------------------------------------------------------------------------------

template <typename T>
requires std::is_arithmetic_v<T>
void put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}
void put(std::string& out, bool value) { put(out, static_cast<uint8_t>(value)); }
void put(std::string& out, std::string_view text) {
  put(out, static_cast<uint64_t>(text.size()));
  out += text;
}

void put_value(std::string& out, const GgufValue& value) {
  if (const auto* scalar = std::get_if<GgufScalar>(&value)) {
    put(out, id_of_alternative(scalar->index()));
    std::visit([&](const auto& v) { put(out, v); }, *scalar);
    return;
  }
  const GgufArray& array = std::get<GgufArray>(value);
  put(out, kArrayId);
  put(out, id_of_alternative(array.values().index()));
  std::visit(
      [&]<typename List>(const List& values) {
        using T = typename List::value_type;
        put(out, static_cast<uint64_t>(values.size()));
        for (size_t i = 0; i < values.size(); ++i) put(out, static_cast<const T&>(values[i]));
      },
      array.values());
}

// Everything before the data, and where the data ends, counted from its start.
struct Layout {
  size_t alignment;
  std::string header;  // padded
  uint64_t data_bytes;
};
Layout lay_out(const GgufMetadata& metadata, std::span<const Tensor> tensors, uint32_t version) {
  Layout layout{read_alignment(metadata), {}, 0};
  std::string& out = layout.header;
  put(out, kMagic);
  put(out, version);
  put(out, static_cast<uint64_t>(tensors.size()));
  put(out, static_cast<uint64_t>(metadata.pairs.size()));
  for (const GgufPair& pair : metadata.pairs) {
    put(out, pair.key);
    put_value(out, pair.value);
  }
  for (const Tensor& t : tensors) {
    MORU_CHECK(!t.shape.empty() && t.shape.size() <= kMaxDims);
    put(out, t.name);
    put(out, static_cast<uint32_t>(t.shape.size()));
    for (size_t d = t.shape.size(); d-- > 0;) put(out, static_cast<uint64_t>(t.shape[d]));
    put(out, traits(t.type).ggml_id);
    put(out, layout.data_bytes);
    layout.data_bytes += padded(bytes_of(t.type, t.count()), layout.alignment);
  }
  out.resize(padded(out.size(), layout.alignment));
  return layout;
}

}  // namespace

const GgufValue* GgufMetadata::find(std::string_view key) const {
  for (const GgufPair& pair : pairs)
    if (pair.key == key) return &pair.value;
  return nullptr;
}

std::optional<uint64_t> GgufMetadata::integer(std::string_view key) const {
  return scalar_of<uint64_t>(*this, key, "an integer",
                             [&]<typename T>(const T& v) -> std::optional<uint64_t> {
                               if constexpr (is_integer<T>) {
                                 if constexpr (std::is_signed_v<T>)
                                   if (v < 0)
                                     refuse_value(*this, key, fmt::format("is {}, below 0", v));
                                 return static_cast<uint64_t>(v);
                               }
                               return std::nullopt;
                             });
}

std::optional<double> GgufMetadata::number(std::string_view key) const {
  return scalar_of<double>(*this, key, "a number",
                           []<typename T>(const T& v) -> std::optional<double> {
                             if constexpr (is_integer<T> || std::is_floating_point_v<T>)
                               return static_cast<double>(v);
                             return std::nullopt;
                           });
}

std::optional<bool> GgufMetadata::boolean(std::string_view key) const {
  return scalar_of<bool>(*this, key, "a bool", []<typename T>(const T& v) -> std::optional<bool> {
    if constexpr (std::is_same_v<T, bool>) return v;
    return std::nullopt;
  });
}

std::optional<std::string> GgufMetadata::text(std::string_view key) const {
  return scalar_of<std::string>(*this, key, "a text",
                                []<typename T>(const T& v) -> std::optional<std::string> {
                                  if constexpr (std::is_same_v<T, std::string>) return v;
                                  return std::nullopt;
                                });
}

const TextList& GgufMetadata::texts(std::string_view key) const {
  static const TextList none;
  const GgufValue* value = find(key);
  if (value == nullptr) return none;
  const auto* array = std::get_if<GgufArray>(value);
  const auto* texts = array == nullptr ? nullptr : std::get_if<TextList>(&array->values());
  if (texts == nullptr) refuse_type(*this, key, *value, "an array of text");
  return *texts;
}

std::vector<float> GgufMetadata::floats(std::string_view key) const {
  return array_of<float>(*this, key, "an array of floats",
                         []<typename T>(const T& v) -> std::optional<float> {
                           if constexpr (std::is_floating_point_v<T>) return static_cast<float>(v);
                           return std::nullopt;
                         });
}

std::vector<int64_t> GgufMetadata::integers(std::string_view key) const {
  return array_of<int64_t>(*this, key, "an array of integers",
                           [&]<typename T>(const T& v) -> std::optional<int64_t> {
                             if constexpr (is_integer<T>) {
                               if constexpr (std::is_same_v<T, uint64_t>)
                                 if (v > uint64_t{std::numeric_limits<int64_t>::max()})
                                   refuse_value(*this, key, fmt::format("holds {}, too large", v));
                               return static_cast<int64_t>(v);
                             }
                             return std::nullopt;
                           });
}

void GgufMetadata::set(std::string_view key, GgufValue value) {
  for (GgufPair& pair : pairs) {
    if (pair.key != key) continue;
    pair.value = std::move(value);
    return;
  }
  pairs.push_back({std::string(key), std::move(value)});
}

void GgufMetadata::erase(std::string_view key) {
  std::erase_if(pairs, [&](const GgufPair& pair) { return pair.key == key; });
}

size_t Tensor::count() const {
  size_t product = 1;
  for (const size_t n : shape) product *= n;
  return product;
}

GgufFile::GgufFile(const std::filesystem::path& path) : where_(path.string()), file_(path) {
  parse(file_->bytes());
}

GgufFile::GgufFile(std::string where, std::span<const std::byte> bytes) : where_(std::move(where)) {
  parse(bytes);
}

void GgufFile::parse(std::span<const std::byte> bytes) {
  Cursor in(where_, bytes);
  version_ = read_version(in);
  // name length, n_dims, one dim, type, offset; key length, one letter, type, one byte.
  const uint64_t tensor_count = read_count(in, "tensor count", 8 + 4 + 8 + 4 + 8);
  const uint64_t pair_count = read_count(in, "metadata count", 8 + 1 + 4 + 1);
  metadata_.where = where_;
  metadata_.pairs = read_pairs(in, pair_count);
  alignment_ = read_alignment(metadata_);
  std::vector<PlacedTensor> placed;
  for (uint64_t i = 0; i < tensor_count; ++i) placed.push_back(read_tensor(in));
  std::unordered_set<std::string_view> seen;
  for (const PlacedTensor& p : placed)
    if (!seen.insert(p.tensor.name).second)
      in.refuse({fmt::format("tensor {}", p.tensor.name), "stands twice", kConvertAgain});
  forget(bytes.first(in.position()));  // all of it is copied
  tensors_ = place_tensors(in, std::move(placed), alignment_);
}

const Tensor* GgufFile::find(std::string_view name) const {
  for (const Tensor& tensor : tensors_)
    if (tensor.name == name) return &tensor;
  return nullptr;
}

void write_gguf(const std::filesystem::path& path, const GgufMetadata& metadata,
                std::span<const Tensor> tensors, uint32_t version) {
  MORU_CHECK(version == 2 || version == 3);
  const Layout layout = lay_out(metadata, tensors, version);
  const std::string zeros(layout.alignment, '\0');
  AtomicFile file(path);
  file.write(std::string_view(layout.header));
  for (const Tensor& t : tensors) {
    MORU_CHECK(t.data.size() == bytes_of(t.type, t.count()));
    file.write(t.data);
    file.write(
        std::string_view(zeros).substr(0, padded(t.data.size(), layout.alignment) - t.data.size()));
  }
  file.commit();
}

uint64_t gguf_bytes(const GgufMetadata& metadata, std::span<const Tensor> tensors) {
  const Layout layout = lay_out(metadata, tensors, 3);
  return layout.header.size() + layout.data_bytes;
}

}  // namespace moru
