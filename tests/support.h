// What tests of every folder share: throw-away files, and the Error that a call throws.
#pragma once
#include <doctest/doctest.h>
#include <stdlib.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace moru {

// A folder that goes away with the object.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "moru-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::filesystem::path& path() const { return path_; }

  // Writes `content` to `name` in this folder and returns the whole path.
  std::filesystem::path file(std::string_view name, std::string_view content) const {
    const std::filesystem::path where = path_ / name;
    std::filesystem::create_directories(where.parent_path());
    std::ofstream out(where, std::ios::binary);
    out.write(content.data(), static_cast<std::streamsize>(content.size()));
    return where;
  }

 private:
  std::filesystem::path path_;
};

// The Error that `call` throws; the test fails if it throws none.
template <typename Call>
Error error_from(Call&& call) {
  try {
    std::forward<Call>(call)();
  } catch (const Error& error) {
    return error;
  }
  FAIL("no Error was thrown");
  std::abort();
}

}  // namespace moru
