// Rows of training data in every shape, and dataset_info.json.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "tune/rows.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moru;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto json = nlohmann::ordered_json::parse(text, nullptr, false);
  if (json.is_discarded() || !json.is_object()) return 0;
  for (const auto shape : {RowFormat::Shape::detect, RowFormat::Shape::alpaca,
                           RowFormat::Shape::sharegpt, RowFormat::Shape::openai}) {
    try {
      RowFormat format;
      format.shape = shape;
      prompt_text(read_row(json, format).messages);
    } catch (const UnusableRow&) {
    }
  }
  return 0;
}
