#include "formats/safetensors.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "support.h"

using namespace moru;

namespace {

std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string with_header(std::string_view json, std::string_view data = {}) {
  const uint64_t length = json.size();
  std::string bytes(reinterpret_cast<const char*>(&length), sizeof length);
  bytes += json;
  bytes += data;
  return bytes;
}

SafetensorsFile open(const std::string& bytes) {
  return SafetensorsFile("test.safetensors", as_bytes(bytes));
}
Error refusal(const std::string& bytes) {
  return error_from([&] { open(bytes); });
}

struct Tiny {
  std::vector<float> weights = {1, 2, 3, 4, 5, 6};
  std::string halfs = "abcdefgh";
  std::vector<int64_t> ids = {7, 8};
  std::vector<Tensor> tensors = {
      {"b.weight", DType::f32, {2, 3}, std::as_bytes(std::span(weights))},
      {"a.weight", DType::bf16, {4}, as_bytes(halfs)},
      {"\"ids\"", DType::i64, {2}, std::as_bytes(std::span(ids))},
      {"scalar", DType::f32, {}, std::as_bytes(std::span(weights)).first(4)},
  };
  std::string written() const {
    const TempDir folder;
    write_safetensors(folder.path() / "tiny.safetensors", tensors, {{"format", "pt"}});
    return read_file(folder.path() / "tiny.safetensors");
  }
};

size_t walk(const SafetensorsFile& file) {
  size_t sum = file.metadata().size();
  for (const Tensor& t : file.tensors()) {
    CHECK(t.data.size() == bytes_of(t.type, t.count()));
    for (const std::byte b : t.data) sum += static_cast<size_t>(b);
  }
  return sum;
}

}  // namespace

TEST_CASE("what is written is read back, aligned, and written again to the same bytes") {
  const Tiny tiny;
  const std::string bytes = tiny.written();
  const SafetensorsFile file = open(bytes);
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}});
  REQUIRE(file.tensors().size() == 4);
  CHECK(file.tensors()[0].name == "\"ids\"");  // the widest first
  CHECK(file.tensors()[3].name == "a.weight");
  for (const Tensor& t : tiny.tensors) {
    const Tensor* found = file.find(t.name);
    REQUIRE(found != nullptr);
    CHECK(found->shape == t.shape);
    CHECK(found->type == t.type);
    CHECK(std::memcmp(found->data.data(), t.data.data(), t.data.size()) == 0);
    const auto at = static_cast<size_t>(found->data.data() - as_bytes(bytes).data());
    CHECK(at % traits(t.type).block_bytes == 0);
  }
  CHECK(file.find("absent") == nullptr);
  const TempDir folder;
  write_safetensors(folder.path() / "again", file.tensors(), file.metadata());
  CHECK(read_file(folder.path() / "again") == bytes);
}

TEST_CASE("no tensors and no metadata is a file too") {
  const TempDir folder;
  write_safetensors(folder.path() / "none", {}, {});
  const SafetensorsFile file(folder.path() / "none");
  CHECK(file.tensors().empty());
}

TEST_CASE("a file cut short at any byte is refused, naming the file") {
  const std::string whole = Tiny().written();
  for (size_t cut = 0; cut < whole.size(); ++cut) {
    CAPTURE(cut);
    const Error e = refusal(whole.substr(0, cut));
    CHECK(e.kind() == ErrorKind::bad_input);
    CHECK(e.where().starts_with("test.safetensors"));
    CHECK(!e.cure().empty());
  }
}

TEST_CASE("any damaged byte of the header gives an Error or a well-formed file") {
  const std::string whole = Tiny().written();
  uint64_t header = 0;
  std::memcpy(&header, whole.data(), sizeof header);
  size_t refused = 0;
  for (size_t at = 0; at < 8 + header; ++at) {
    for (const unsigned change : {0x01u, 0x10u, 0x80u, 0xffu}) {
      std::string damaged = whole;
      damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ change);
      try {
        walk(open(damaged));
      } catch (const Error& e) {
        CHECK(e.where().starts_with("test.safetensors"));
        ++refused;
      }
    }
  }
  CHECK(refused > header);
}

TEST_CASE("headers that cannot be meant are refused with the field") {
  const std::string four = "1234";
  const auto one = [&](std::string_view entry) {
    return with_header(fmt::format("{{\"w\":{}}}", entry), four);
  };
  const auto field = [](const std::string& bytes) { return refusal(bytes).where(); };
  const std::string w = "test.safetensors: tensor w";
  CHECK(open(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})")).tensors().size() == 1);
  CHECK(field(one(R"([])")) == w);
  CHECK(field(one(R"({"shape":[1],"data_offsets":[0,4]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","data_offsets":[0,4]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[1]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,4]})")) == w);
  CHECK(field(one(R"({"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,4]})")) ==
        w);
  CHECK(field(one(R"({"dtype":"F16","shape":[1],"data_offsets":[2,4]})")) == w);  // a hole
  CHECK(field(one(R"({"dtype":"F16","shape":[1],"data_offsets":[0,2]})")) ==
        "test.safetensors: data");
  CHECK(field(with_header("[]")) == "test.safetensors: header");
  CHECK(field(with_header(" {}")) == "test.safetensors: header");
  CHECK(field(with_header("{\"a\":")) == "test.safetensors: header");
  CHECK(field(with_header(R"({"__metadata__":{"a":1}})")) == "test.safetensors: __metadata__");
  CHECK(field(with_header(std::string(100'000, '['))) == "test.safetensors: header");
  const std::string overlap = with_header(
      R"({"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"I8","shape":[3],"data_offsets":[1,4]}})",
      four);
  CHECK(field(overlap) == "test.safetensors: tensor b");
  CHECK(refusal(with_header(R"({"__metadata__":{},"__metadata__":{}})")).problem() ==
        "has __metadata__ twice");
  const Error e = refusal(one(R"({"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]})"));
  CHECK(e.kind() == ErrorKind::unsupported);
  CHECK(e.problem().find("F8_E4M3") != std::string::npos);
}

TEST_CASE("a folder is read alike from one file or many shards") {
  const Tiny tiny;
  for (const size_t shard_bytes : {size_t{1}, size_t{30}, size_t{1000}}) {
    CAPTURE(shard_bytes);
    const TempDir folder;
    write_safetensors_folder(folder.path(), tiny.tensors, shard_bytes);
    CHECK(std::filesystem::exists(folder.path() / "model.safetensors") == (shard_bytes == 1000));
    const SafetensorsFolder read(folder.path());
    CHECK(read.tensors().size() == tiny.tensors.size());
    for (const Tensor& t : tiny.tensors) {
      const Tensor* found = read.find(t.name);
      REQUIRE(found != nullptr);
      CHECK(std::memcmp(found->data.data(), t.data.data(), t.data.size()) == 0);
    }
  }
}

TEST_CASE("writing a folder again leaves no older weights that a reader would prefer") {
  const Tiny tiny;
  const TempDir folder;
  for (const size_t shard_bytes : {size_t{1000}, size_t{1}, size_t{1000}}) {
    write_safetensors_folder(folder.path(), tiny.tensors, shard_bytes);
    const bool single = std::filesystem::exists(folder.path() / "model.safetensors");
    CHECK(single != std::filesystem::exists(folder.path() / "model.safetensors.index.json"));
  }
}

TEST_CASE("a broken folder is refused with what is missing") {
  const Tiny tiny;
  const auto kind_of = [](const TempDir& folder) {
    return error_from([&] { SafetensorsFolder{folder.path()}; }).kind();
  };
  const TempDir empty;
  CHECK(kind_of(empty) == ErrorKind::not_found);
  empty.file("pytorch_model.bin", "x");
  CHECK(error_from([&] { SafetensorsFolder{empty.path()}; }).cure().find("safetensors") !=
        std::string::npos);
  const TempDir lost_shard;
  write_safetensors_folder(lost_shard.path(), tiny.tensors, 1);
  std::filesystem::remove(lost_shard.path() / "model-00002-of-00004.safetensors");
  CHECK(kind_of(lost_shard) == ErrorKind::not_found);
  const TempDir outside;
  outside.file("model.safetensors.index.json", R"({"weight_map":{"w":"../w.safetensors"}})");
  CHECK(kind_of(outside) == ErrorKind::bad_input);
  const TempDir absent_tensor;
  write_safetensors(absent_tensor.path() / "a.safetensors", tiny.tensors, {});
  absent_tensor.file("model.safetensors.index.json", R"({"weight_map":{"w":"a.safetensors"}})");
  CHECK(kind_of(absent_tensor) == ErrorKind::bad_input);
  const TempDir twice;
  write_safetensors(twice.path() / "a.safetensors", tiny.tensors, {});
  write_safetensors(twice.path() / "b.safetensors", tiny.tensors, {});
  twice.file("model.safetensors.index.json",
             R"({"weight_map":{"a.weight":"a.safetensors","b.weight":"b.safetensors"}})");
  CHECK(kind_of(twice) == ErrorKind::bad_input);
}

TEST_CASE("a name that is not UTF-8 cannot be written") {
  std::vector<Tensor> tensors = {{"\xff", DType::i8, {0}, {}}};
  const TempDir folder;
  const Error e = error_from([&] { write_safetensors(folder.path() / "x", tensors, {}); });
  CHECK(e.kind() == ErrorKind::bad_input);
  CHECK(!std::filesystem::exists(folder.path() / "x"));
}

TEST_CASE("rewriting a file that the safetensors package wrote gives its bytes") {
  const char* home = std::getenv("HOME");
  const std::filesystem::path models =
      std::filesystem::path(home ? home : "") / ".cache/moru-peers/models";
  size_t seen = 0;
  if (std::filesystem::is_directory(models)) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(models)) {
      if (entry.path().extension() != ".safetensors") continue;
      CAPTURE(entry.path().string());
      const SafetensorsFile file(entry.path());
      const TempDir folder;
      write_safetensors(folder.path() / "again", file.tensors(), file.metadata());
      const MappedFile before(entry.path()), after(folder.path() / "again");
      REQUIRE(before.bytes().size() == after.bytes().size());
      CHECK(std::memcmp(before.bytes().data(), after.bytes().data(), before.bytes().size()) == 0);
      ++seen;
    }
  }
  if (seen == 0) MESSAGE("skipped: no safetensors models in " << models.string());
}
