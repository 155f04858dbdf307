// The journal of a forge run: which stages are done, so that a run killed at any moment goes on
// where it was and ends in the same result.
//
//   OUT/journal/lock            held while a process works here
//   OUT/journal/01-measure.json  one for each finished stage, written whole or not at all
//   OUT/journal/01-measure/      what the stage keeps to resume within itself (checkpoints,
//   answers)
//
// A stage is known by a key: the hash of its inputs and of the keys of all stages before it. Run
// again, a stage with an equal key is not done again but its output is read back. The first one
// whose key differs, or whose files are no longer what it wrote, is done anew, and so is all after
// it.
#pragma once
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/files.h"

namespace moru {

class Journal {
 public:
  // Makes the folder and takes its lock. Errors: usage if another process works there, io.
  explicit Journal(std::filesystem::path folder);

  const std::filesystem::path& folder() const { return folder_; }

  struct Product {
    nlohmann::ordered_json output;  // what later stages and the report need of this one
    // Files it wrote, relative to the folder; each already synced (base/files.h: AtomicFile).
    std::vector<std::filesystem::path> files = {};
  };
  struct Stage {
    nlohmann::ordered_json output;
    double seconds = 0;  // of the process that finished it
    bool reused = false;
  };
  // Runs `work` unless this stage is finished already. `work` gets a folder of its own, empty at
  // first and as it left it when killed half-way with the same key. What it throws goes through,
  // and the stage stays unfinished. Names are lower-case words.
  Stage run(std::string_view name, const nlohmann::ordered_json& inputs,
            const std::function<Product(const std::filesystem::path& scratch)>& work);

 private:
  std::filesystem::path path_of(size_t number, std::string_view name) const;
  void forget_from(size_t number) const;

  std::filesystem::path folder_, journal_;
  std::optional<FolderLock> lock_;
  size_t stages_ = 0;
  std::string key_;  // of the last stage
};

}  // namespace moru
