// The log of a training run, a JSON line and TensorBoard scalars for every step and validation.
//
//   FOLDER/log.jsonl                            {"step": 3, "loss": 1.2, …}, and "skipped":
//                                               true where an outlier was not learnt from
//   FOLDER/tensorboard/events.out.tfevents.*    the same numbers; one file a start of the run
//
// TensorBoard's files are TFRecords: u64 length, masked CRC-32C of it, an Event (protocol buffer),
// masked CRC-32C of that.
#pragma once
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace moru {

class RunLog {
 public:
  // Goes on after `step`: what a killed run wrote beyond it is forgotten, and TensorBoard is told
  // so. Step 0 begins anew. Errors: io, no_space.
  RunLog(const std::filesystem::path& folder, uint64_t step);
  // An object with "step"; its numbers become scalars: val_loss is eval/loss, lr is
  // train/learning_rate, the others train/NAME.
  void write(const nlohmann::ordered_json& line);

 private:
  void write_event(std::string_view event);

  std::filesystem::path log_;
  std::filesystem::path events_path_;
  std::ofstream events_;
};

// An Event of TensorBoard's event.proto.
std::string scalar_event(double unix_seconds, int64_t step,
                         std::span<const std::pair<std::string, double>> scalars);
// One record around it.
std::string tf_record(std::string_view data);
// Castagnoli's CRC-32, as RFC 3720 has it.
uint32_t crc32c(std::string_view bytes);

}  // namespace moru
