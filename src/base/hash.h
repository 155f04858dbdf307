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
// Of the whole file; for a folder, of its sorted file names and their hashes. Errors: not_found,
// io.
std::string sha256_of_path(const std::filesystem::path& path);

}  // namespace moru
