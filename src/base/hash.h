// Content hashes: what a result was computed from.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace moru {

// Lower-case hex SHA-256.
std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);
// The first 64 bits of it, for keys in memory.
uint64_t short_sha256(std::span<const std::byte> bytes);
uint64_t short_sha256(std::string_view text);
// Of the whole file; for a folder, of its sorted file names and their hashes. Errors: not_found,
// io.
std::string sha256_of_path(const std::filesystem::path& path);
// The same. That of a large file is remembered in the text file `memo`, and believed while the
// file's size, inode and time of change are what they were: a run that starts again does not read
// 10 GB to learn that nothing has changed.
std::string remembered_sha256(const std::filesystem::path& path, const std::filesystem::path& memo);

}  // namespace moru
