#include "tune/checkpoint.h"

#include <fmt/format.h>

#include <array>
#include <bit>
#include <charconv>
#include <cstring>
#include <map>

#include "base/error.h"
#include "formats/safetensors.h"
#include "tune/guard.h"

namespace moru {
namespace {

constexpr std::string_view kVersion = "2";

// Numbers travel in the header as hexadecimal bits, so that doubles return exactly.
std::string hex(uint64_t bits) { return fmt::format("{:016x}", bits); }

struct Integers {
  const char* name;
  uint64_t TrainingRun::*field;
};
constexpr std::array<Integers, 10> kIntegers = {{
    {"step", &TrainingRun::step},
    {"updates", &TrainingRun::updates},
    {"epoch", &TrainingRun::epoch},
    {"cursor", &TrainingRun::cursor},
    {"skipped", &TrainingRun::skipped},
    {"skipped_in_a_row", &TrainingRun::skipped_in_a_row},
    {"best_step", &TrainingRun::best_step},
    {"without_improvement", &TrainingRun::without_improvement},
    {"loss_count", &TrainingRun::loss_count},
    {"tokens_done", &TrainingRun::tokens_done},
}};
struct Doubles {
  const char* name;
  double TrainingRun::*field;
};
constexpr std::array<Doubles, 5> kDoubles = {{
    {"best_loss", &TrainingRun::best_loss},
    {"first_loss", &TrainingRun::first_loss},
    {"loss_sum", &TrainingRun::loss_sum},
    {"last_epoch_loss", &TrainingRun::last_epoch_loss},
    {"seconds", &TrainingRun::seconds},
}};
struct Vectors {
  const char* name;
  std::vector<float> TrainingRun::*field;
};
constexpr std::array<Vectors, 6> kVectors = {{
    {"values", &TrainingRun::values},
    {"m", &TrainingRun::m},
    {"v", &TrainingRun::v},
    {"best", &TrainingRun::best},
    {"recent_losses", &TrainingRun::recent_losses},
    {"recent_norms", &TrainingRun::recent_norms},
}};
bool is_optional(std::vector<float> TrainingRun::*field) {
  return field != &TrainingRun::values && field != &TrainingRun::m && field != &TrainingRun::v;
}
bool is_recent(std::vector<float> TrainingRun::*field) {
  return field == &TrainingRun::recent_losses || field == &TrainingRun::recent_norms;
}

}  // namespace

void write_checkpoint(const std::filesystem::path& path, const std::string& fingerprint,
                      const TrainingRun& run) {
  std::map<std::string, std::string> header = {{"moru_checkpoint", std::string(kVersion)},
                                               {"fingerprint", fingerprint}};
  for (const auto& [name, field] : kIntegers) header[name] = hex(run.*field);
  for (const auto& [name, field] : kDoubles)
    header[name] = hex(std::bit_cast<uint64_t>(run.*field));
  std::vector<Tensor> tensors;
  for (const auto& [name, field] : kVectors)
    if (!(run.*field).empty())
      tensors.push_back(
          {name, DType::f32, {(run.*field).size()}, std::as_bytes(std::span(run.*field))});
  write_safetensors(path, tensors, header);
}

std::optional<TrainingRun> read_checkpoint(const std::filesystem::path& path,
                                           const std::string& fingerprint, size_t parameters) {
  if (!std::filesystem::exists(path)) return std::nullopt;
  const SafetensorsFile file(path);
  const auto refuse = [&](std::string what) {
    throw Error(
        ErrorKind::bad_input,
        {.where = path.string(), .what = std::move(what), .cure = "start again with --restart"});
  };
  const auto word = [&](const char* name) -> const std::string& {
    const auto found = file.metadata().find(name);
    if (found == file.metadata().end()) refuse(fmt::format("has no {}", name));
    return found->second;
  };
  if (word("moru_checkpoint") != kVersion) refuse("was written by another version of moru");
  if (word("fingerprint") != fingerprint)
    throw Error(ErrorKind::usage,
                {.where = path.string(),
                 .what = "is the checkpoint of a run with other options, model or data",
                 .cure = "give the same options, another --out, or --restart"});
  const auto number = [&](const char* name) {
    const std::string& text = word(name);
    uint64_t bits = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), bits, 16);
    if (failed != std::errc{} || end != text.data() + text.size())
      refuse(fmt::format("{} is not a number", name));
    return bits;
  };
  TrainingRun run;
  for (const auto& [name, field] : kIntegers) run.*field = number(name);
  for (const auto& [name, field] : kDoubles) run.*field = std::bit_cast<double>(number(name));
  for (const auto& [name, field] : kVectors) {
    const Tensor* tensor = file.find(name);
    if (tensor == nullptr && is_optional(field)) continue;
    const bool fits = tensor != nullptr && tensor->type == DType::f32 &&
                      (is_recent(field) ? tensor->count() <= OutlierGuard::kWindow
                                        : tensor->count() == parameters);
    if (!fits) refuse(fmt::format("{} does not fit the run", name));
    (run.*field).resize(tensor->count());
    std::memcpy((run.*field).data(), tensor->data.data(), tensor->data.size());
  }
  return run;
}

void share(Ranks& ranks, TrainingRun& run) {
  for (const auto& [name, field] : kIntegers) share_value(ranks, run.*field);
  for (const auto& [name, field] : kDoubles) share_value(ranks, run.*field);
  for (const auto& [name, field] : kVectors)
    if (field != &TrainingRun::best) share_list(ranks, run.*field);
}

}  // namespace moru
