// Bodies of requests: whatever comes, it is a request within its limits or one of OpenAI's errors.
#include <cstdint>
#include <string_view>
#include <variant>

#include "base/error.h"
#include "serve/wire.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moru;
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  const WireLimits limits{.vocab = 1000, .max_choices = 16};
  const auto chat = parse_chat(body, limits, 7);
  if (const auto* request = std::get_if<ChatRequest>(&chat)) {
    MORU_CHECK(request->messages.is_array() && !request->messages.empty());
    MORU_CHECK(request->options.choices >= 1 && request->options.choices <= limits.max_choices);
  }
  const auto completion = parse_completion(body, limits, 7);
  if (const auto* request = std::get_if<CompletionRequest>(&completion)) {
    MORU_CHECK(!request->prompts.empty());
    for (const auto& prompt : request->prompts) {
      const auto* ids = std::get_if<std::vector<TokenId>>(&prompt);
      if (ids == nullptr) continue;
      for (const TokenId id : *ids) MORU_CHECK(id >= 0 && static_cast<size_t>(id) < limits.vocab);
    }
  }
  return 0;
}
