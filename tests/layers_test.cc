// Includes point down the list of layers only (CONTRIBUTING.md, "Layout").
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;

// A folder and those it may include, itself aside.
const std::map<std::string, std::vector<std::string>> kMayInclude = {
    {"base", {}},
    {"formats", {"base"}},
    {"engine", {"base", "formats"}},
    {"prove", {"base", "formats", "engine"}},
    {"tune", {"base", "formats", "engine", "prove"}},
    {"lighten", {"base", "formats", "engine"}},
    {"serve", {"base", "formats", "engine"}},
    {"forge", {"base", "formats", "engine", "prove", "tune", "lighten"}},
    {"cli", {"base", "formats", "engine", "prove", "tune", "lighten", "serve", "forge"}},
};

}  // namespace

TEST_CASE("every include points to the same folder or a lower one") {
  size_t seen = 0;
  for (const auto& entry : fs::recursive_directory_iterator(MORU_SOURCE_DIR "/src")) {
    const std::string ending = entry.path().extension().string();
    if (ending != ".h" && ending != ".cc") continue;
    const std::string folder = fs::relative(entry.path(), MORU_SOURCE_DIR "/src").begin()->string();
    REQUIRE_MESSAGE(kMayInclude.count(folder) == 1, folder << " is not in the list of layers");
    const auto& allowed = kMayInclude.at(folder);
    std::ifstream in(entry.path());
    for (std::string line; std::getline(in, line);) {
      if (!line.starts_with("#include \"")) continue;
      const std::string target = line.substr(10, line.find('"', 10) - 10);
      const std::string target_folder = target.substr(0, target.find('/'));
      ++seen;
      const bool fine = target_folder == folder ||
                        std::find(allowed.begin(), allowed.end(), target_folder) != allowed.end();
      CHECK_MESSAGE(fine, entry.path().string() << " includes " << target);
    }
  }
  CHECK(seen > 50);
}
