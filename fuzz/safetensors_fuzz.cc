// Any bytes given as a safetensors file: an Error, or tensors that cover the data.
#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "formats/safetensors.h"

using namespace moru;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const SafetensorsFile file("fuzz", std::as_bytes(std::span(data, size)));
    size_t covered = 0;
    for (const Tensor& t : file.tensors()) {
      MORU_CHECK(t.data.size() == bytes_of(t.type, t.count()));
      covered += t.data.size();
    }
    MORU_CHECK(covered <= size);
  } catch (const Error&) {
  }
  return 0;
}
