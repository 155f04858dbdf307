#include "forge/journal.h"

#include <fmt/format.h>

#include <cstring>
#include <optional>

#include "base/clock.h"
#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Json describe_files(const std::filesystem::path& folder,
                    const std::vector<std::filesystem::path>& files) {
  Json list = Json::array();
  for (const std::filesystem::path& file : files)
    list.push_back({{"path", file.string()},
                    {"bytes", std::filesystem::file_size(folder / file)},
                    {"sha256", sha256_of_path(folder / file)}});
  return list;
}

bool is_as_written(const std::filesystem::path& folder, const Json& file) {
  const std::filesystem::path path = folder / file.at("path").get<std::string>();
  std::error_code missing;
  const auto bytes = std::filesystem::file_size(path, missing);
  return !missing && bytes == file.at("bytes").get<uint64_t>() &&
         sha256_of_path(path) == file.at("sha256").get<std::string>();
}

// A finished stage with this key whose files are all there; nullopt for anything else, which
// includes a journal file that something other than moru has touched.
std::optional<Journal::Stage> read_finished(const std::filesystem::path& path,
                                            const std::filesystem::path& folder,
                                            const std::string& key) {
  if (!std::filesystem::exists(path)) return std::nullopt;
  const Json json = Json::parse(read_file(path), nullptr, false);
  try {
    if (json.at("key") != key) return std::nullopt;
    for (const Json& file : json.at("files"))
      if (!is_as_written(folder, file)) return std::nullopt;
    return Journal::Stage{json.at("output"), json.at("seconds").get<double>(), true};
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;
  }
}

// The stage's own folder, emptied if it was left by a stage with another key.
void prepare_scratch(const std::filesystem::path& scratch, const std::string& key) {
  const std::filesystem::path mark = scratch / "key";
  if (std::filesystem::exists(mark) && read_file(mark) == key) return;
  std::filesystem::remove_all(scratch);
  make_folder(scratch);
  write_file(mark, key);
}

}  // namespace

Journal::Journal(std::filesystem::path folder)
    : folder_(std::move(folder)), journal_(folder_ / "journal") {
  make_folder(journal_);
  lock_.emplace(folder_, journal_ / "lock");
}

std::filesystem::path Journal::path_of(size_t number, std::string_view name) const {
  return journal_ / fmt::format("{:02}-{}", number, name);
}

// Removes stages from `number` on, the last first: a kill in between leaves a shorter journal,
// never one with a hole.
void Journal::forget_from(size_t number) const {
  std::vector<std::filesystem::path> stale;
  for (const auto& entry : std::filesystem::directory_iterator(journal_)) {
    const std::string name = entry.path().filename().string();
    const size_t digits = std::min(name.find_first_not_of("0123456789"), name.size());
    if (digits < 2 || digits > 6 || digits == name.size() || name[digits] != '-') continue;
    if (entry.path().extension() == ".json" && std::stoul(name.substr(0, digits)) >= number)
      stale.push_back(entry.path());
  }
  std::sort(stale.rbegin(), stale.rend());
  for (const std::filesystem::path& path : stale) std::filesystem::remove(path);
}

Journal::Stage Journal::run(std::string_view name, const Json& inputs,
                            const std::function<Product(const std::filesystem::path&)>& work) {
  MORU_CHECK(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz-") == std::string_view::npos);
  const size_t number = ++stages_;
  key_ = sha256(fmt::format("{}\n{}\n{}", key_, name, dump(inputs)));
  const std::filesystem::path scratch = path_of(number, name);
  std::filesystem::path finished = scratch;
  finished += ".json";
  if (std::optional<Stage> stage = read_finished(finished, folder_, key_)) return *std::move(stage);

  forget_from(number);
  prepare_scratch(scratch, key_);
  const Stopwatch watch;
  Product product = work(scratch);
  Stage stage{std::move(product.output), watch.seconds(), false};
  write_file(finished, Json({{"stage", name},
                             {"key", key_},
                             {"inputs", inputs},
                             {"output", stage.output},
                             {"files", describe_files(folder_, product.files)},
                             {"seconds", stage.seconds},
                             {"finished", utc_now()}})
                               .dump(2, ' ', false, Json::error_handler_t::replace) +
                           "\n");
  return stage;
}

}  // namespace moru
