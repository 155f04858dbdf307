// Chat templates: an interpreter for the part of Jinja2 that models' templates use, rendering what
// transformers' apply_chat_template renders, to the byte.
#pragma once
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
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

  struct Inputs;
  // Renders the conversation. Error bad_input: the template's own raise_exception, or a message
  // that lacks what the template reads; or the render exceeding its bounds on steps and output.
  std::string render(const Inputs& inputs) const;
  const std::string& source() const;

 private:
  struct Program;
  std::unique_ptr<Program> program_;
};

}  // namespace moru

#include <nlohmann/json.hpp>

namespace moru {

struct ChatTemplate::Inputs {
  nlohmann::ordered_json messages;  // [{"role": "user", "content": "…"}, …], OpenAI's shape
  nlohmann::ordered_json tools;     // null where there are none
  bool add_generation_prompt = false;
  std::string bos_token, eos_token;
  // Further variables: enable_thinking, documents, date_string …
  std::map<std::string, nlohmann::ordered_json> extra;
};

}  // namespace moru
