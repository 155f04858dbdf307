#include "base/hash.h"

#include <fmt/format.h>
#include <openssl/evp.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <memory>
#include <vector>

#include "base/error.h"
#include "base/files.h"

namespace moru {

namespace {

std::string hex_of(std::span<const unsigned char> digest) {
  std::string hex;
  for (const unsigned char byte : digest) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

std::array<unsigned char, 32> digest_of(std::span<const std::byte> bytes) {
  std::array<unsigned char, 32> digest{};
  unsigned int length = 0;
  MORU_CHECK(EVP_Digest(bytes.data(), bytes.size(), digest.data(), &length, EVP_sha256(), nullptr));
  return digest;
}

// Of a file, a piece at a time: a mapping of a large one would count as memory of the process.
std::string sha256_of_file(const std::filesystem::path& path) {
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  const std::unique_ptr<std::FILE, Close> file(std::fopen(path.c_str(), "rbe"));
  if (!file) {
    const bool absent = errno == ENOENT || errno == ENOTDIR;
    throw Error(absent ? ErrorKind::not_found : ErrorKind::io,
                {.where = path.string(),
                 .what = fmt::format("cannot open: {}", std::strerror(errno)),
                 .cure = absent ? "check the path" : ""});
  }
  const std::unique_ptr<EVP_MD_CTX, Close> context(EVP_MD_CTX_new());
  MORU_CHECK(context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr));
  std::vector<char> piece(size_t{1} << 20);
  while (const size_t n = std::fread(piece.data(), 1, piece.size(), file.get()))
    MORU_CHECK(EVP_DigestUpdate(context.get(), piece.data(), n));
  if (std::ferror(file.get()))
    throw Error(ErrorKind::io, {.where = path.string(), .what = "cannot be read", .cure = ""});
  std::array<unsigned char, 32> digest{};
  unsigned int length = 0;
  MORU_CHECK(EVP_DigestFinal_ex(context.get(), digest.data(), &length));
  return hex_of(digest);
}

// Of a file, or of a folder's files.
template <typename OfFile>
std::string sha256_of(const std::filesystem::path& path, OfFile&& of_file) {
  if (!std::filesystem::is_directory(path)) return of_file(path);
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(path))
    if (entry.is_regular_file()) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::string manifest;
  for (const auto& file : files)
    manifest += std::filesystem::relative(file, path).string() + " " + of_file(file) + "\n";
  return sha256(manifest);
}

// ---- what is remembered ----
//
// A line a file: its hash, size, inode, time of change in nanoseconds, path.

constexpr off_t kLarge = off_t{64} << 20;
// A file that has just changed may change again within the same tick of the clock.
constexpr time_t kSettled = 2;

std::string state_of(const std::filesystem::path& path, const struct stat& status) {
  return fmt::format(" {} {} {}{:09} {}", status.st_size, status.st_ino, status.st_mtim.tv_sec,
                     status.st_mtim.tv_nsec, std::filesystem::absolute(path).string());
}

std::string remembered_of_file(const std::filesystem::path& path,
                               const std::filesystem::path& memo) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode) || status.st_size < kLarge)
    return sha256_of_file(path);
  const std::string state = state_of(path, status);
  constexpr size_t kDigits = 64;
  std::ifstream lines(memo);
  for (std::string line; std::getline(lines, line);)
    if (line.size() > kDigits && line.substr(kDigits) == state) return line.substr(0, kDigits);
  const std::string hash = sha256_of_file(path);
  struct stat after {};
  if (::stat(path.c_str(), &after) == 0 && state_of(path, after) == state &&
      ::time(nullptr) > status.st_mtim.tv_sec + kSettled)
    append_line(memo, hash + state);
  return hash;
}

}  // namespace

std::string sha256(std::span<const std::byte> bytes) { return hex_of(digest_of(bytes)); }

std::string sha256(std::string_view text) {
  return sha256(std::as_bytes(std::span(text.data(), text.size())));
}

uint64_t short_sha256(std::span<const std::byte> bytes) {
  const auto digest = digest_of(bytes);
  uint64_t bits = 0;
  for (size_t i = 0; i < 8; ++i) bits = bits << 8 | digest[i];
  return bits;
}

uint64_t short_sha256(std::string_view text) {
  return short_sha256(std::as_bytes(std::span(text.data(), text.size())));
}

std::string sha256_of_path(const std::filesystem::path& path) {
  return sha256_of(path, sha256_of_file);
}

std::string remembered_sha256(const std::filesystem::path& path,
                              const std::filesystem::path& memo) {
  return sha256_of(
      path, [&](const std::filesystem::path& file) { return remembered_of_file(file, memo); });
}

}  // namespace moru
