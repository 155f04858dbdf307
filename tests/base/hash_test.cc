#include "base/hash.h"

#include <sys/stat.h>

#include <chrono>

#include "base/files.h"
#include "support.h"

using namespace moru;

TEST_CASE("the hash of a large file is remembered until the file changes") {
  const TempDir dir;
  const std::filesystem::path memo = dir.path() / "hashes.txt", path = dir.path() / "large";
  const auto set_age = [&](int seconds) {
    std::filesystem::last_write_time(
        path, std::filesystem::file_time_type::clock::now() - std::chrono::seconds(seconds));
  };
  dir.file("large", "x");
  std::filesystem::resize_file(path, size_t{65} << 20);
  set_age(60);
  const std::string hash = sha256_of_path(path);
  CHECK(remembered_sha256(path, memo) == hash);
  REQUIRE(std::filesystem::exists(memo));
  // What is remembered is believed.
  std::string lines = read_file(memo);
  REQUIRE(lines.starts_with(hash));
  lines[0] = lines[0] == '0' ? '1' : '0';
  write_file(memo, lines);
  CHECK(remembered_sha256(path, memo) == lines.substr(0, 64));
  // Also among a folder's files.
  const std::string folder = remembered_sha256(dir.path(), memo);
  CHECK(folder != sha256_of_path(dir.path()));
  set_age(30);
  CHECK(remembered_sha256(path, memo) == hash);
  // Not what may still be changing, nor what is small.
  std::filesystem::remove(memo);
  set_age(0);
  CHECK(remembered_sha256(path, memo) == hash);
  std::filesystem::resize_file(path, 1000);
  set_age(60);
  CHECK(remembered_sha256(path, memo) == sha256_of_path(path));
  CHECK(!std::filesystem::exists(memo));
}
