#include "tune/run_log.h"

#include <cmath>
#include <cstring>
#include <map>

#include "base/files.h"
#include "support.h"

using namespace moru;

namespace {

using Json = nlohmann::ordered_json;

// A reader of TensorBoard's files of our own: (tag, step) → value, and where restarts were told.
struct Events {
  std::map<std::pair<std::string, int64_t>, float> scalars;
  std::vector<int64_t> restarts;
  std::string version;
};

template <typename T>
T raw(std::string_view bytes) {
  T value;
  REQUIRE(bytes.size() >= sizeof value);
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

uint64_t varint(std::string_view& in) {
  uint64_t value = 0;
  for (unsigned shift = 0;; shift += 7) {
    REQUIRE(!in.empty());
    const auto byte = static_cast<uint8_t>(in[0]);
    in.remove_prefix(1);
    value |= uint64_t{byte & 127u} << shift;
    if (byte < 128) return value;
  }
}

// visit(field, number or fixed bytes, bytes) for every field of a message.
template <typename Visit>
void each_field(std::string_view in, Visit&& visit) {
  while (!in.empty()) {
    const uint64_t key = varint(in);
    uint64_t number = 0;
    std::string_view bytes;
    switch (key & 7) {
      case 0:
        number = varint(in);
        break;
      case 1:
        bytes = in.substr(0, 8);
        break;
      case 2: {
        const uint64_t size = varint(in);
        bytes = in.substr(0, size);
        REQUIRE(bytes.size() == size);
        break;
      }
      case 5:
        bytes = in.substr(0, 4);
        break;
      default:
        FAIL("an unknown wire type");
    }
    in.remove_prefix(bytes.size());
    visit(key >> 3, number, bytes);
  }
}

uint32_t masked(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

Events read_events(const std::filesystem::path& folder) {
  Events out;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string file = read_file(entry.path());
    std::string_view in = file;
    while (!in.empty()) {
      const auto size = raw<uint64_t>(in);
      CHECK(raw<uint32_t>(in.substr(8)) == masked(in.substr(0, 8)));
      const std::string_view event = in.substr(12, size);
      CHECK(raw<uint32_t>(in.substr(12 + size)) == masked(event));
      in.remove_prefix(16 + size);
      int64_t step = 0;
      each_field(event, [&](uint64_t field, uint64_t number, std::string_view bytes) {
        if (field == 1) CHECK(raw<double>(bytes) > 1.6e9);
        if (field == 2) step = static_cast<int64_t>(number);
        if (field == 3) out.version = bytes;
        if (field == 7) out.restarts.push_back(step);
        if (field != 5) return;
        each_field(bytes, [&](uint64_t, uint64_t, std::string_view value) {
          std::string tag;
          each_field(value, [&](uint64_t part, uint64_t, std::string_view content) {
            if (part == 1) tag = content;
            if (part == 2) out.scalars[{tag, step}] = raw<float>(content);
          });
        });
      });
    }
  }
  return out;
}

}  // namespace

TEST_CASE("CRC-32C as RFC 3720's examples have it") {
  CHECK(crc32c("123456789") == 0xE3069283u);
  CHECK(crc32c(std::string(32, '\0')) == 0x8A9136AAu);
  CHECK(crc32c(std::string(32, '\xFF')) == 0x62A8AB43u);
}

TEST_CASE("every number of the log becomes a scalar under the names that people look for") {
  const TempDir dir;
  {
    RunLog log(dir.path(), 0);
    log.write({{"step", 0}, {"val_loss", 3.5}});
    log.write({{"step", 1}, {"loss", 2.5}, {"lr", 1e-4}, {"grad_norm", nullptr}});
    log.write({{"step", 300}, {"loss", 2.25}, {"rewards/margins", -0.5}});
  }
  const Events events = read_events(dir.path() / "tensorboard");
  CHECK(events.version == "brain.Event:2");
  CHECK(events.restarts.empty());
  CHECK(events.scalars ==
        std::map<std::pair<std::string, int64_t>, float>{{{"eval/loss", 0}, 3.5f},
                                                         {{"train/loss", 1}, 2.5f},
                                                         {{"train/learning_rate", 1}, 1e-4f},
                                                         {{"train/loss", 300}, 2.25f},
                                                         {{"train/rewards/margins", 300}, -0.5f}});
}

TEST_CASE("a run that starts again forgets what was written after its checkpoint") {
  const TempDir dir;
  for (const uint64_t start : {0, 2}) {
    RunLog log(dir.path(), start);
    for (uint64_t step = start + 1; step <= 4; ++step) log.write({{"step", step}, {"loss", 1.0}});
  }
  std::istringstream lines(read_file(dir.path() / "log.jsonl"));
  std::vector<uint64_t> steps;
  for (std::string line; std::getline(lines, line);) steps.push_back(Json::parse(line)["step"]);
  CHECK(steps == std::vector<uint64_t>{1, 2, 3, 4});
  CHECK(read_events(dir.path() / "tensorboard").restarts == std::vector<int64_t>{3});
  RunLog anew(dir.path(), 0);
  CHECK(!std::filesystem::exists(dir.path() / "log.jsonl"));
}
