// Any bytes as a chat template: it renders or is refused with an Error, within its bounds, and what
// it renders is UTF-8.
#include <cstdint>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "formats/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const moru::ChatTemplate::Inputs inputs = [] {
    moru::ChatTemplate::Inputs made;
    made.messages = nlohmann::ordered_json::parse(
        R"([{"role":"system","content":"s"},{"role":"user","content":"한글 <b>"},
            {"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function",
             "function":{"name":"f","arguments":{"a":[1,2.5,true,{"b":null}]}}}]}])");
    made.tools = nlohmann::ordered_json::parse(R"([{"type":"function","function":{"name":"f"}}])");
    made.bos_token = "<s>";
    made.eos_token = "</s>";
    made.now = 0;
    return made;
  }();
  try {
    const moru::ChatTemplate chat("fuzz", {reinterpret_cast<const char*>(data), size});
    MORU_CHECK(!moru::find_invalid_utf8(chat.render(inputs)));
  } catch (const moru::Error&) {
  }
  return 0;
}
