// Any bytes given as a GGUF file: an Error, or a file whose values all read and whose tensors all
// decode.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "formats/gguf.h"

using namespace moru;

namespace {

void use(const GgufFile& file) {
  const GgufMetadata& metadata = file.metadata();
  for (const GgufPair& pair : metadata.pairs) {
    try {
      metadata.integer(pair.key);
      metadata.texts(pair.key);
    } catch (const Error&) {  // another type
    }
    try {
      metadata.integers(pair.key);
    } catch (const Error&) {
    }
  }
  for (const Tensor& t : file.tensors()) {
    MORU_CHECK(t.data.size() == bytes_of(t.type, t.count()));
    if (!is_float(t.type) && !is_quantized(t.type)) continue;
    std::vector<float> values(t.count());
    dequantize(t.type, t.data, values);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    use(GgufFile("fuzz", std::as_bytes(std::span(data, size))));
  } catch (const Error&) {
  }
  return 0;
}
