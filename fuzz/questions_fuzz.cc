// The first line is a row of questions (JSON), what follows an answer to it: either the row is
// refused with an Error, or the answer is judged.
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "prove/questions.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moru;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t line = std::min(input.find('\n'), size);
  Row row{.line = 1, .value = nlohmann::ordered_json::parse(input.substr(0, line), nullptr, false)};
  // What RecordReader lets through: objects of valid UTF-8 with bounded depth.
  if (!row.value.is_object() || line > 10'000) return 0;
  const std::string_view answer = input.substr(line);
  try {
    const Question question = question_from_row("fuzz", row);
    if (question.expected.check != Check::choice) {
      judge(question.expected, answer);
    } else {
      const std::vector<double> logprobs(question.expected.choices.size(), -1.0);
      judge_written_choice(question.expected, answer);
      judge_choice(question.expected,
                   best_choice(question.expected, logprobs, ChoiceScore::per_character));
    }
  } catch (const Error&) {
  }
  return 0;
}
