#include "base/files.h"

#include <cstring>
#include <string>
#include <vector>

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
