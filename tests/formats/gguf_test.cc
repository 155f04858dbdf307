#include "formats/gguf.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "support.h"

using namespace moru;

namespace {

// A file under construction, written field by field so that each can be wrong.
struct Builder {
  std::string bytes;

  template <typename T>
  Builder& plain(T value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Builder& u32(uint32_t v) { return plain(v); }
  Builder& u64(uint64_t v) { return plain(v); }
  Builder& text(std::string_view t) {
    u64(t.size());
    bytes += t;
    return *this;
  }
  Builder& header(uint64_t tensors, uint64_t pairs, uint32_t version = 3) {
    bytes += "GGUF";
    return u32(version).u64(tensors).u64(pairs);
  }
  Builder& tensor(std::string_view name, std::vector<uint64_t> dims, uint32_t type,
                  uint64_t offset) {
    text(name).u32(static_cast<uint32_t>(dims.size()));
    for (const uint64_t d : dims) u64(d);
    return u32(type).u64(offset);
  }
  Builder& zeros(size_t count) {
    bytes.append(count, '\0');
    return *this;
  }
  Builder& pad(size_t alignment = 32) {
    return zeros((alignment - bytes.size() % alignment) % alignment);
  }
};

std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}
GgufFile open(const std::string& bytes) { return GgufFile("test.gguf", as_bytes(bytes)); }

// Every kind of value, and two tensors that fill their alignment.
struct Tiny {
  GgufMetadata metadata;
  std::vector<float> weights = std::vector<float>(32, 0.5f);
  std::string blocks = std::string(8 * 36, 'q');
  std::vector<Tensor> tensors;

  Tiny() {
    metadata.where = "tiny";
    auto& m = metadata;
    m.set("general.architecture", GgufScalar(std::string("llama")));
    m.set("t.u8", GgufScalar(uint8_t{200}));
    m.set("t.i8", GgufScalar(int8_t{-3}));
    m.set("t.u16", GgufScalar(uint16_t{60000}));
    m.set("t.i16", GgufScalar(int16_t{-300}));
    m.set("t.u32", GgufScalar(uint32_t{4000000000}));
    m.set("t.i32", GgufScalar(int32_t{-70000}));
    m.set("t.f32", GgufScalar(0.25f));
    m.set("t.bool", GgufScalar(true));
    m.set("t.u64", GgufScalar(std::numeric_limits<uint64_t>::max()));
    m.set("t.i64", GgufScalar(int64_t{-5}));
    m.set("t.f64", GgufScalar(0.1));
    m.set("t.texts", GgufArray(std::vector<std::string>{"a", "", "bc"}));
    m.set("t.floats", GgufArray(std::vector<float>{1, 2}));
    m.set("t.ints", GgufArray(std::vector<int32_t>{-1, 7}));
    m.set("t.bools", GgufArray(std::vector<bool>{true, false}));
    m.set("t.none", GgufArray(std::vector<std::string>{}));
    tensors.push_back({"norm.weight", DType::f32, {32}, std::as_bytes(std::span(weights))});
    tensors.push_back({"blk.0.w.weight", DType::q4_0, {8, 64}, as_bytes(blocks)});
  }
  std::string written(uint32_t version = 3) const {
    const TempDir folder;
    write_gguf(folder.path() / "tiny.gguf", metadata, tensors, version);
    return read_file(folder.path() / "tiny.gguf");
  }
};

// Touches everything that a reader may touch; a sanitizer sees what is outside.
size_t walk(const GgufFile& file) {
  size_t sum = file.metadata().pairs.size();
  for (const Tensor& t : file.tensors()) {
    CHECK(t.data.size() == bytes_of(t.type, t.count()));
    for (const std::byte b : t.data) sum += static_cast<size_t>(b);
  }
  return sum;
}

Error refusal(const Builder& builder) {
  return error_from([&] { open(builder.bytes); });
}

}  // namespace

TEST_CASE("what is written is read back, and written again to the same bytes") {
  for (const uint32_t version : {2u, 3u}) {
    const Tiny tiny;
    const std::string bytes = tiny.written(version);
    const GgufFile file = open(bytes);
    CHECK(file.version() == version);
    CHECK(file.alignment() == 32);
    REQUIRE(file.tensors().size() == 2);
    const Tensor* w = file.find("blk.0.w.weight");
    REQUIRE(w != nullptr);
    CHECK(w->shape == std::vector<size_t>{8, 64});
    CHECK(w->type == DType::q4_0);
    CHECK(std::memcmp(w->data.data(), tiny.blocks.data(), tiny.blocks.size()) == 0);
    CHECK(file.find("absent") == nullptr);
    const TempDir folder;
    write_gguf(folder.path() / "again.gguf", file.metadata(), file.tensors(), file.version());
    CHECK(read_file(folder.path() / "again.gguf") == bytes);
    CHECK(gguf_bytes(file.metadata(), file.tensors()) == bytes.size());
  }
}

TEST_CASE("look-ups convert what fits and refuse another type by key") {
  const std::string bytes = Tiny().written();
  const GgufFile file = open(bytes);
  const GgufMetadata& m = file.metadata();
  CHECK(m.integer("t.u8") == 200);
  CHECK(m.integer("t.u16") == 60000);
  CHECK(m.integer("t.u32") == 4000000000u);
  CHECK(m.integer("t.u64") == std::numeric_limits<uint64_t>::max());
  CHECK(m.number("t.i8") == -3.0);
  CHECK(m.number("t.f32") == 0.25);
  CHECK(m.number("t.f64") == 0.1);
  CHECK(m.boolean("t.bool") == true);
  CHECK(m.text("general.architecture") == "llama");
  CHECK(m.texts("t.texts") == TextList{"a", "", "bc"});
  CHECK(m.texts("t.none").empty());
  const GgufMetadata copy = m;  // shares long values
  CHECK(&copy.texts("t.texts") == &m.texts("t.texts"));
  CHECK(m.floats("t.floats") == std::vector<float>{1, 2});
  CHECK(m.integers("t.ints") == std::vector<int64_t>{-1, 7});
  CHECK(!m.integer("absent"));
  CHECK(m.texts("absent").empty());
  const auto refused = [&](auto&& call, std::string_view key) {
    const Error e = error_from(call);
    CHECK(e.kind() == ErrorKind::bad_input);
    CHECK(e.where() == fmt::format("test.gguf: {}", key));
  };
  refused([&] { m.integer("t.i8"); }, "t.i8");  // negative
  refused([&] { m.integer("t.f32"); }, "t.f32");
  refused([&] { m.integer("t.bool"); }, "t.bool");
  refused([&] { m.text("t.u8"); }, "t.u8");
  refused([&] { m.boolean("t.u8"); }, "t.u8");
  refused([&] { m.number("general.architecture"); }, "general.architecture");
  refused([&] { m.texts("t.ints"); }, "t.ints");
  refused([&] { m.floats("t.texts"); }, "t.texts");
  refused([&] { m.integers("t.u8"); }, "t.u8");
}

TEST_CASE("metadata is replaced in place, appended and erased") {
  Tiny tiny;
  GgufMetadata& m = tiny.metadata;
  m.set("t.u8", GgufScalar(std::string("now a text")));
  CHECK(m.pairs[1].key == "t.u8");
  CHECK(m.text("t.u8") == "now a text");
  m.erase("t.u8");
  CHECK(m.find("t.u8") == nullptr);
}

TEST_CASE("a file cut short at any byte is refused, naming the file") {
  const std::string whole = Tiny().written();
  for (size_t cut = 0; cut < whole.size(); ++cut) {
    CAPTURE(cut);
    const std::string part = whole.substr(0, cut);
    const Error e = error_from([&] { open(part); });
    CHECK(e.kind() == ErrorKind::bad_input);
    CHECK(e.where().starts_with("test.gguf"));
    CHECK(!e.cure().empty());
  }
}

TEST_CASE("any damaged byte of the header gives an Error or a well-formed file") {
  const std::string whole = Tiny().written();
  const size_t header = whole.size() - 32 * 4 - 8 * 36;
  size_t refused = 0;
  for (size_t at = 0; at < header; ++at) {
    for (const unsigned change : {0x01u, 0x80u, 0xffu}) {
      std::string damaged = whole;
      damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ change);
      try {
        walk(open(damaged));
      } catch (const Error& e) {
        CHECK(e.where().starts_with("test.gguf"));
        ++refused;
      }
    }
  }
  CHECK(refused > header);  // most fields cannot be anything else
}

TEST_CASE("what is not a GGUF file that moru reads is refused with the reason") {
  CHECK(refusal(Builder{"PK\3\4 a zip archive"}).problem() == "is not a GGUF file");
  CHECK(refusal(Builder{}).problem() == "is not a GGUF file");
  CHECK(refusal(Builder{}.header(0, 0, 1)).problem() == "is 1; moru reads 2 and 3");
  CHECK(refusal(Builder{}.header(0, 0, 0x03000000)).problem() == "is a big-endian file");
  const Error e = error_from([] { GgufFile(std::filesystem::path("/nonexistent/x.gguf")); });
  CHECK(e.kind() == ErrorKind::not_found);
}

TEST_CASE("hostile counts are refused before anything is allocated for them") {
  const uint64_t huge = std::numeric_limits<uint64_t>::max();
  for (const uint64_t count : {huge, huge / 2, uint64_t{1} << 40}) {
    CHECK(refusal(Builder{}.header(count, 0)).kind() == ErrorKind::bad_input);
    CHECK(refusal(Builder{}.header(0, count)).kind() == ErrorKind::bad_input);
    CHECK(refusal(Builder{}.header(0, 1).u64(count).zeros(64)).kind() == ErrorKind::bad_input);
    for (const uint32_t type : {0u, 4u, 7u, 8u, 12u}) {
      const Error e =
          refusal(Builder{}.header(0, 1).text("k").u32(9).u32(type).u64(count).zeros(64));
      CHECK(e.where() == "test.gguf: k");
    }
    CHECK(refusal(Builder{}.header(1, 0).tensor("t", {count}, 0, 0)).kind() ==
          ErrorKind::bad_input);
  }
  const uint64_t root = uint64_t{1} << 32;
  for (const uint32_t type : {0u, 12u}) {
    const Error e =
        refusal(Builder{}.header(1, 0).tensor("t", {root, root, 2}, type, 0).pad().zeros(64));
    CHECK(e.where() == "test.gguf: tensor t");
  }
}

TEST_CASE("values that the specification does not know are refused by key") {
  CHECK(refusal(Builder{}.header(0, 1).text("k").u32(13).zeros(8)).where() == "test.gguf: k");
  CHECK(refusal(Builder{}.header(0, 1).text("k").u32(7).plain(uint8_t{2})).where() ==
        "test.gguf: k");
  CHECK(refusal(Builder{}.header(0, 1).text("k").u32(9).u32(9).u64(1).u32(0).u64(1).zeros(1))
            .problem() == "is an array of arrays");
  CHECK(refusal(Builder{}.header(0, 1).text("").u32(0).zeros(8)).problem() == "is empty");
  CHECK(refusal(Builder{}.header(0, 2).text("k").u32(0).zeros(1).text("k").u32(0).zeros(1))
            .problem() == "stands twice");
}

TEST_CASE("the alignment key moves the data, and a hostile one is refused") {
  Builder good;
  good.header(1, 1).text("general.alignment").u32(4).u32(64);
  good.tensor("t", {16}, 0, 0).pad(64).zeros(64);
  const GgufFile file = open(good.bytes);
  CHECK(file.alignment() == 64);
  CHECK(file.tensors()[0].data.data() == as_bytes(good.bytes).data() + good.bytes.size() - 64);
  for (const uint32_t bad : {0u, 1u, 48u, 0x80000000u}) {
    const Builder builder = Builder{}.header(0, 1).text("general.alignment").u32(4).u32(bad);
    CHECK(refusal(builder).where() == "test.gguf: general.alignment");
  }
}

TEST_CASE("tensors that cannot be meant are refused by name") {
  const auto one = [](std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
    return Builder{}.header(1, 0).tensor("w", std::move(dims), type, offset).pad().zeros(4096);
  };
  CHECK(refusal(one({}, 0, 0)).problem() == "has 0 dimensions, not 1 to 4");
  CHECK(refusal(one({1, 1, 1, 1, 1}, 0, 0)).problem() == "has 5 dimensions, not 1 to 4");
  CHECK(refusal(one({8, 0}, 0, 0)).problem() == "has a dimension of 0");
  CHECK(refusal(one({288, 2}, 12, 0)).problem() ==
        "has rows of 288 elements, which blocks of 256 (Q4_K) do not divide");
  CHECK(refusal(one({8}, 0, 8)).problem() == "is at offset 8, not a multiple of 32");
  CHECK(refusal(one({8}, 0, 4096)).kind() == ErrorKind::bad_input);
  CHECK(refusal(one({8}, 0, ~uint64_t{31})).kind() == ErrorKind::bad_input);
  CHECK(refusal(one({1025}, 0, 0)).kind() == ErrorKind::bad_input);
  for (const auto& [id, name] : {std::pair{16u, "IQ2_XXS"}, {34u, "TQ1_0"}, {999u, "type 999"}}) {
    const Error e = refusal(one({256}, id, 0));
    CHECK(e.kind() == ErrorKind::unsupported);
    CHECK(e.where() == "test.gguf: tensor w");
    CHECK(e.problem().find(name) != std::string::npos);
    CHECK(!e.cure().empty());
  }
  const auto two = [](std::string_view second, uint64_t at) {
    return Builder{}
        .header(2, 0)
        .tensor("a", {16}, 0, 32)
        .tensor(second, {16}, 0, at)
        .pad()
        .zeros(256);
  };
  CHECK(refusal(two("b", 64)).problem() == "overlaps a");
  CHECK(refusal(two("b", 32)).problem().starts_with("overlaps"));
  CHECK(refusal(two("b", 0)).problem() == "overlaps b");
  CHECK(refusal(two("a", 96)).problem() == "stands twice");
  CHECK(open(two("b", 96).bytes).tensors().size() == 2);
}

TEST_CASE("a failed write leaves the old file") {
  const TempDir folder;
  const auto path = folder.file("model.gguf", "old");
  Tiny tiny;
  tiny.metadata.set("general.alignment", GgufScalar(uint32_t{3}));
  error_from([&] { write_gguf(path, tiny.metadata, tiny.tensors); });
  CHECK(read_file(path) == "old");
}

TEST_CASE("rewriting a model that llama.cpp's tools made gives its bytes") {
  const char* home = std::getenv("HOME");
  const std::filesystem::path models =
      std::filesystem::path(home ? home : "") / ".cache/moru-peers/models";
  size_t seen = 0;
  if (std::filesystem::is_directory(models)) {
    for (const auto& entry : std::filesystem::directory_iterator(models)) {
      if (entry.path().extension() != ".gguf" || entry.file_size() > (size_t{400} << 20)) continue;
      CAPTURE(entry.path().string());
      const GgufFile file(entry.path());
      const TempDir folder;
      write_gguf(folder.path() / "again.gguf", file.metadata(), file.tensors(), file.version());
      const MappedFile before(entry.path()), after(folder.path() / "again.gguf");
      REQUIRE(before.bytes().size() == after.bytes().size());
      CHECK(std::memcmp(before.bytes().data(), after.bytes().data(), before.bytes().size()) == 0);
      ++seen;
    }
  }
  if (seen == 0) MESSAGE("skipped: no GGUF models in " << models.string());
}
