#include "base/files.h"

#include <cstring>
#include <string>
#include <vector>

#include "base/memory.h"
#include "support.h"

using namespace moru;

TEST_CASE("forgotten pages of a mapping read as before, and other memory is left alone") {
  const TempDir folder;
  std::string content(5 * 4096 + 123, 'a');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>('a' + i % 23);
  write_file(folder.path() / "data", content);
  const MappedFile file(folder.path() / "data");
  const auto same = [&] {
    return std::memcmp(file.bytes().data(), content.data(), content.size()) == 0;
  };
  CHECK(same());
  file.forget(file.bytes().subspan(100, 3 * 4096));
  CHECK(same());
  file.forget(file.bytes());
  CHECK(same());
  std::vector<std::byte> other(3 * 4096, std::byte{7});
  file.forget(other);
  for (const std::byte b : other) REQUIRE(b == std::byte{7});
}

TEST_CASE("pieces of any size reach a file in order, and large ones are not copied") {
  const TempDir folder;
  const std::filesystem::path path = folder.path() / "pieces";
  const std::string large(size_t{64} << 20, 'b');
  const size_t before = peak_memory_bytes();
  AtomicFile file(path);
  file.write("a");
  file.write(large);
  file.write("c");
  file.write(std::string(size_t{1} << 20, 'd'));
  CHECK(file.size() == large.size() + 2 + (size_t{1} << 20));
  file.commit();
  CHECK(peak_memory_bytes() - before < large.size() / 4);
  const MappedFile whole(path);
  const auto at = [&](size_t i) { return static_cast<char>(whole.bytes()[i]); };
  REQUIRE(whole.bytes().size() == file.size());
  CHECK(at(0) == 'a');
  CHECK(at(1) == 'b');
  CHECK(at(large.size()) == 'b');
  CHECK(at(large.size() + 1) == 'c');
  CHECK(at(file.size() - 1) == 'd');
}
