// Chat templates: an interpreter for Jinja2 as models' templates use it, rendering what
// transformers' apply_chat_template renders, to the byte. The parts are in jinja/: lexer, parser,
// values, interpreter, filters, tests, methods.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace moru {

class ChatTemplate {
 public:
  // Parses `source`; Error bad_input or unsupported names `where`, line and construct.
  ChatTemplate(std::string where, std::string_view source);
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  struct Inputs {
    nlohmann::ordered_json messages;  // [{"role": "user", "content": "…"}, …], OpenAI's shape
    nlohmann::ordered_json tools;     // null where there are none
    bool add_generation_prompt = false;
    std::string bos_token, eos_token;  // not defined for the template where empty
    // Further variables: enable_thinking, documents, date_string …
    std::map<std::string, nlohmann::ordered_json> extra;
    // What strftime_now tells, in seconds since 1970; the clock where absent. Templates print the
    // date, so what must give the same prompt tomorrow sets this.
    std::optional<int64_t> now;
  };
  // Renders the conversation; safe to call from several threads. Error bad_input: the template's
  // own raise_exception, or a message that lacks what the template reads; or the render exceeding
  // its bounds on steps, recursion and memory, which grow with the conversation.
  std::string render(const Inputs& inputs) const;
  const std::string& source() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
