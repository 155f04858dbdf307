// Any bytes as a JSON Schema or a regular expression: it becomes a language or is refused with an
// Error, and what a walk through the language spells, its own bytes choosing the way, is accepted
// by it; for schemas it is JSON.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "engine/automaton.h"
#include "engine/constraint.h"

namespace {

using namespace moru;

void walk(const Language& language, std::string_view choices, bool json) {
  constexpr size_t kHorizon = 4;
  Automaton exact(language.program());
  std::string text;
  Automaton::State state = exact.start();
  for (size_t step = 0; step < 200; ++step) {
    // From here on a short-sighted automaton sees the same next bytes.
    Automaton near(language.program(), kHorizon);
    Automaton::State seen = near.import(exact, state), ahead = state;
    std::optional<uint8_t> chosen;
    const size_t wish = choices.empty() ? 0 : static_cast<uint8_t>(choices[step % choices.size()]);
    for (size_t i = 0; i < 256; ++i) {
      const auto byte = static_cast<uint8_t>(wish + i);
      const bool possible = exact.next(state, byte) != Automaton::kDead;
      MORU_CHECK(possible == (near.next(seen, byte) != Automaton::kDead));
      if (possible && !chosen) chosen = byte;
    }
    for (size_t i = 0; i < kHorizon && i < choices.size(); ++i) {
      const auto byte = static_cast<uint8_t>(choices[(step + i) % choices.size()]);
      ahead = exact.next(ahead, byte);
      seen = near.next(seen, byte);
      MORU_CHECK((ahead == Automaton::kDead) == (seen == Automaton::kDead));
      MORU_CHECK(exact.accepts(ahead) == near.accepts(seen));
    }
    if (exact.accepts(state)) {
      MORU_CHECK(language.accepts(text));
      if (json) MORU_CHECK(nlohmann::json::accept(text));
    }
    if (!chosen) {
      MORU_CHECK(exact.accepts(state));
      return;
    }
    state = exact.next(state, *chosen);
    text += static_cast<char>(*chosen);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const bool json = input[0] % 2 == 0;
  const std::string_view source = input.substr(1, 4000);
  try {
    const Language language(
        {json ? ConstraintSource::Kind::json_schema : ConstraintSource::Kind::regex,
         std::string(source)});
    walk(language, source, json);
  } catch (const Error&) {
  }
  return 0;
}
