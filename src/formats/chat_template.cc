#include "formats/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <ctime>
#include <utility>
#include <vector>

#include "base/error.h"
#include "formats/jinja/interpreter.h"
#include "formats/jinja/parser.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

constexpr size_t kMaxDepth = 500;

// Bytes of text and number of values in a document, near enough to scale bounds by.
size_t size_of(const std::string& where, const ordered_json& json, size_t depth = 0) {
  if (depth > kMaxDepth)
    throw Error(ErrorKind::bad_input,
                {.where = where,
                 .what = fmt::format("the conversation nests deeper than {}", kMaxDepth),
                 .cure = ""});
  size_t size = 8;
  if (json.is_string()) size += json.get_ref<const std::string&>().size();
  if (json.is_structured())
    for (const auto& item : json) size += size_of(where, item, depth + 1);
  return size;
}

constexpr std::array<const char*, 3> kReasoning = {"reasoning_content", "thinking", "reasoning"};

bool reasons(const ordered_json& message) {
  return message.is_object() &&
         std::any_of(kReasoning.begin(), kReasoning.end(),
                     [&](const char* field) { return message.contains(field); });
}

// Reasoning goes by several names. Whichever a message has, templates find it as
// reasoning_content, and gpt-oss's as thinking: transformers fills them in like this.
ordered_json with_reasoning(const ordered_json& message) {
  if (!message.is_object()) return message;
  for (const char* field : kReasoning) {
    const auto at = message.find(field);
    if (at == message.end() || at->is_null()) continue;
    ordered_json::object_t filled;
    // Appended to the vector that it is: looking up each key would cost their square.
    const auto append = [&](const std::string& key, const ordered_json& value) {
      filled.Container::emplace_back(key, value);
    };
    append("thinking", message.value("thinking", *at));
    for (const auto& [key, value] : message.items()) {
      if (key == "thinking") continue;
      append(key, key == "reasoning_content" ? *at : value);
    }
    if (!message.contains("reasoning_content")) append("reasoning_content", *at);
    return filled;
  }
  return message;
}

}  // namespace

struct ChatTemplate::State {
  std::string source;
  jinja::Program program;
};

ChatTemplate::ChatTemplate(std::string where, std::string_view source)
    : state_(std::make_unique<State>()) {
  state_->source = source;
  state_->program = jinja::parse(std::move(where), source);
}
ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

const std::string& ChatTemplate::source() const { return state_->source; }

std::string ChatTemplate::render(const Inputs& inputs) const {
  const std::string& where = state_->program.where;
  size_t size = size_of(where, inputs.messages) + size_of(where, inputs.tools);
  for (const auto& [name, value] : inputs.extra) size += size_of(where, value);
  jinja::Runtime runtime(where, size);

  // Copies only where a message reasons.
  const bool plain = inputs.messages.is_array() &&
                     std::none_of(inputs.messages.begin(), inputs.messages.end(), reasons);
  ordered_json filled = ordered_json::array();
  if (!plain)
    for (const ordered_json& message : inputs.messages) filled.push_back(with_reasoning(message));
  const ordered_json& messages = plain ? inputs.messages : filled;
  std::vector<jinja::Interpreter::Variable> variables = {
      {"messages", jinja::from_json(runtime, messages)},
      {"tools", jinja::from_json(runtime, inputs.tools)},
      {"add_generation_prompt", inputs.add_generation_prompt},
  };
  if (!inputs.bos_token.empty()) variables.push_back({"bos_token", runtime.text(inputs.bos_token)});
  if (!inputs.eos_token.empty()) variables.push_back({"eos_token", runtime.text(inputs.eos_token)});
  if (!inputs.extra.contains("documents")) variables.push_back({"documents", jinja::None{}});
  for (const auto& [name, value] : inputs.extra)
    variables.push_back({name, jinja::from_json(runtime, value)});

  const int64_t now = inputs.now.value_or(static_cast<int64_t>(std::time(nullptr)));
  return jinja::Interpreter(state_->program, runtime, now).run(variables);
}

}  // namespace moru
