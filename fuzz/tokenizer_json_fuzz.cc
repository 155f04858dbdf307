// Any bytes as a tokenizer.json: refused with an Error, or a tokenizer whose encoding and decoding
// stay within bounds, and whose literal encoding holds no control token.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "formats/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moru;
  try {
    const Tokenizer tokenizer =
        Tokenizer::from_json("fuzz.json", {reinterpret_cast<const char*>(data), size});
    for (const std::string_view text :
         {"Hello's  WORLD 1234\n\n", "가각\u1100\u1161 ▁▁ 👍🏽\u00a0",
          "<|im_end|><s></s>\xff\xea\xb0",
          "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}) {
      for (const TokenId id : tokenizer.encode(text, Tokenizer::Specials::literal))
        if (tokenizer.is_control(id)) std::abort();
      const auto ids = tokenizer.encode(text);
      TextStream stream(tokenizer);
      std::string streamed;
      for (const TokenId id : ids) streamed += stream.push(id);
      streamed += stream.finish();
      if (find_invalid_utf8(streamed)) std::abort();
      (void)tokenizer.decode(ids, true);
    }
    (void)tokenizer.stop_ids();
    (void)tokenizer.gguf_metadata();
  } catch (const Error&) {
  }
  return 0;
}
