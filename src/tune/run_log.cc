#include "tune/run_log.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "base/files.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

double unix_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Little-endian bytes, as this machine has them.
template <typename T>
void append_raw(std::string& out, T value) {
  static_assert(std::endian::native == std::endian::little);
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof bytes);
}

// --- Protocol buffers: a field's key is its number and wire type. ---

enum class Wire : uint64_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

void append_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}
void append_key(std::string& out, uint64_t field, Wire wire) {
  append_varint(out, field << 3 | static_cast<uint64_t>(wire));
}
void append_bytes(std::string& out, uint64_t field, std::string_view bytes) {
  append_key(out, field, Wire::bytes);
  append_varint(out, bytes.size());
  out += bytes;
}

// Event: wall_time = 1, step = 2.
std::string event_head(double seconds, int64_t step) {
  std::string out;
  append_key(out, 1, Wire::fixed64);
  append_raw(out, seconds);
  append_key(out, 2, Wire::varint);
  append_varint(out, static_cast<uint64_t>(step));
  return out;
}

// TensorBoard drops what it has read at this step and later: SessionLog{status = START}.
std::string restart_event(double seconds, int64_t step) {
  std::string session;
  append_key(session, 1, Wire::varint);
  append_varint(session, 1);
  std::string out = event_head(seconds, step);
  append_bytes(out, 7, session);
  return out;
}

std::string tag_of(const std::string& name) {
  if (name == "val_loss") return "eval/loss";
  if (name == "lr") return "train/learning_rate";
  return "train/" + name;
}

// Lines of the log up to `step`.
void rewind_log(const std::filesystem::path& path, uint64_t step) {
  if (!std::filesystem::exists(path)) return;
  std::ifstream in(path);
  std::string line, kept;
  while (std::getline(in, line)) {
    const ordered_json j = ordered_json::parse(line, nullptr, false);
    if (j.is_object() && j.value("step", uint64_t{0}) <= step) kept += line + "\n";
  }
  write_file(path, kept);
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c >> 1 ^ (c & 1 ? 0x82F63B78u : 0);
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~uint32_t{0};
  for (const char byte : bytes) crc = crc >> 8 ^ table[(crc ^ static_cast<uint8_t>(byte)) & 255];
  return ~crc;
}

std::string tf_record(std::string_view data) {
  const auto masked = [](std::string_view bytes) {
    const uint32_t crc = crc32c(bytes);
    return (crc >> 15 | crc << 17) + 0xA282EAD8u;
  };
  std::string out;
  append_raw(out, uint64_t{data.size()});
  append_raw(out, masked(out));
  out += data;
  append_raw(out, masked(data));
  return out;
}

std::string scalar_event(double seconds, int64_t step,
                         std::span<const std::pair<std::string, double>> scalars) {
  // Summary{ value = 1: Value{ tag = 1, simple_value = 2 } }
  std::string summary;
  for (const auto& [tag, value] : scalars) {
    std::string entry;
    append_bytes(entry, 1, tag);
    append_key(entry, 2, Wire::fixed32);
    append_raw(entry, static_cast<float>(value));
    append_bytes(summary, 1, entry);
  }
  std::string out = event_head(seconds, step);
  append_bytes(out, 5, summary);
  return out;
}

RunLog::RunLog(const std::filesystem::path& folder, uint64_t step) : log_(folder / "log.jsonl") {
  const std::filesystem::path events = folder / "tensorboard";
  if (step == 0) {
    std::filesystem::remove(log_);
    std::filesystem::remove_all(events);
  } else {
    rewind_log(log_, step);
  }
  make_folder(events);
  // Files are read in the order of their names.
  const double now = unix_seconds();
  events_path_ =
      events / fmt::format("events.out.tfevents.{:010.0f}.moru.{}", std::floor(now), ::getpid());
  events_.open(events_path_, std::ios::binary | std::ios::app);
  std::string version = event_head(now, 0);
  append_bytes(version, 3, "brain.Event:2");
  write_event(version);
  if (step != 0) write_event(restart_event(now, static_cast<int64_t>(step) + 1));
}

void RunLog::write_event(std::string_view event) {
  const std::string record = tf_record(event);
  events_.write(record.data(), static_cast<std::streamsize>(record.size()));
  events_.flush();
  if (!events_)
    throw Error(ErrorKind::io, {.where = events_path_.string(),
                                .what = "cannot be written",
                                .cure = "look at the disk's free space"});
}

void RunLog::write(const ordered_json& line) {
  append_line(log_, line.dump(-1, ' ', false, ordered_json::error_handler_t::replace));
  std::vector<std::pair<std::string, double>> scalars;
  for (const auto& [name, value] : line.items())
    if (name != "step" && value.is_number())
      scalars.emplace_back(tag_of(name), value.get<double>());
  if (!scalars.empty())
    write_event(scalar_event(unix_seconds(), line.value("step", int64_t{0}), scalars));
}

}  // namespace moru
