// Real models and programs of others that some tests compare with: not part of the project. Tests
// that need them say so and pass where they are absent.
#pragma once
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

namespace moru {

// MORU_PEERS, or ~/.cache/moru-peers.
inline std::filesystem::path peers_folder() {
  if (const char* set = std::getenv("MORU_PEERS")) return set;
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home == nullptr ? "/" : home) / ".cache/moru-peers";
}

// models/NAME there; says that it is skipped where there is none.
inline std::optional<std::filesystem::path> peer_model(const std::string& name) {
  const std::filesystem::path path = peers_folder() / "models" / name;
  if (std::filesystem::exists(path)) return path;
  MESSAGE("skipped: there is no " << path.string());
  return std::nullopt;
}

}  // namespace moru
