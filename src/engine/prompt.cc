#include "engine/prompt.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

// Calls `on_text(key, text)` on every text that messages and tools bring in, with the name of the
// member that holds it, and `on_key` on the names of members.
template <typename OnText, typename OnKey>
void each_text(Json& value, const std::string& key, const OnText& on_text, const OnKey& on_key) {
  if (value.is_string()) return on_text(key, value.get_ref<std::string&>());
  if (value.is_object()) {
    for (auto item = value.begin(); item != value.end(); ++item) {
      on_key(item.key());
      each_text(*item, item.key(), on_text, on_key);
    }
  } else if (value.is_array()) {
    for (Json& item : value) each_text(item, key, on_text, on_key);
  }
}

[[noreturn]] void refuse_spelling() {
  throw Error(ErrorKind::bad_input, {.where = "messages",
                                     .what = "a message spells a control token of the model",
                                     .cure = "take it out of the text"});
}

// A stand-in for spelling `index` that no template or tokenizer touches (private-use characters).
constexpr std::string_view kMarkBegin = "\uE0F0", kMarkEnd = "\uE0F1";
std::string stand_in(size_t index) { return fmt::format("{}{}{}", kMarkBegin, index, kMarkEnd); }

// The rendering whose stand-ins give way to what they stand for.
PromptText put_back(std::string_view frame, std::span<const std::string> spellings) {
  PromptText out;
  for (;;) {
    const size_t at = frame.find(kMarkBegin);
    out.text += frame.substr(0, at);
    if (at == frame.npos) return out;
    frame.remove_prefix(at + kMarkBegin.size());
    size_t index = 0;
    const auto [end, failed] = std::from_chars(frame.data(), frame.data() + frame.size(), index);
    frame.remove_prefix(static_cast<size_t>(end - frame.data()));
    if (failed != std::errc{} || !frame.starts_with(kMarkEnd) || index >= spellings.size())
      refuse_spelling();  // a message holds the stand-in's own characters
    frame.remove_prefix(kMarkEnd.size());
    out.literal.push_back({out.text.size(), out.text.size() + spellings[index].size()});
    out.text += spellings[index];
  }
}

void put_bos_once(const Tokenizer& tokenizer, std::vector<TokenId>& ids) {
  if (!tokenizer.adds_bos() || !tokenizer.bos()) return;
  if (ids.empty() || ids.front() != *tokenizer.bos()) ids.insert(ids.begin(), *tokenizer.bos());
}

}  // namespace

PromptText PromptText::first(size_t bytes) const {
  PromptText out{text.substr(0, bytes), {}};
  for (const TextSpan& span : literal)
    if (span.begin < bytes) out.literal.push_back({span.begin, std::min(span.end, bytes)});
  return out;
}

PromptText PromptText::from(size_t byte) const {
  PromptText out{text.substr(byte), {}};
  for (const TextSpan& span : literal)
    if (span.end > byte)
      out.literal.push_back({std::max(span.begin, byte) - byte, span.end - byte});
  return out;
}

bool PromptText::starts_with(const PromptText& start) const {
  return text.starts_with(start.text) && first(start.text.size()).literal == start.literal;
}

void PromptText::append(const PromptText& more) {
  for (const TextSpan& span : more.literal)
    literal.push_back({text.size() + span.begin, text.size() + span.end});
  text += more.text;
}

std::vector<TokenId> encode(const Tokenizer& tokenizer, const PromptText& prompt) {
  return tokenizer.encode(prompt.text, prompt.literal);
}

PromptText render_chat(const ModelFiles& files, ChatTemplate::Inputs inputs) {
  if (!files.chat_template)
    throw Error(ErrorKind::unsupported, {.where = files.path.string(),
                                         .what = "the model has no chat template",
                                         .cure = "give plain text instead of messages"});
  const Tokenizer& tokenizer = files.tokenizer;
  if (tokenizer.bos()) inputs.bos_token = std::string(tokenizer.piece(*tokenizer.bos()));
  if (tokenizer.eos()) inputs.eos_token = std::string(tokenizer.piece(*tokenizer.eos()));
  const std::string whole = files.chat_template->render(inputs);

  std::vector<std::string> spellings;
  size_t in_contents = 0;
  std::string contents;  // as a template may join the parts of one
  const auto mark = [&](const std::string& key, std::string& text) {
    const bool part = key == "content" || key == "text";
    if (part) contents += text;
    const std::vector<TextSpan> spans = tokenizer.control_spans(text);
    if (part) in_contents += spans.size();
    for (size_t i = spans.size(); i-- > 0;) {
      const auto [begin, end] = spans[i];
      spellings.push_back(text.substr(begin, end - begin));
      text.replace(begin, end - begin, stand_in(spellings.size() - 1));
    }
  };
  const auto check_key = [&](const std::string& key) {
    if (!tokenizer.control_spans(key).empty()) refuse_spelling();
  };
  each_text(inputs.messages, "", mark, check_key);
  each_text(inputs.tools, "", mark, check_key);
  if (tokenizer.control_spans(contents).size() > in_contents) refuse_spelling();
  if (spellings.empty()) return {whole, {}};
  PromptText marked = put_back(files.chat_template->render(inputs), spellings);
  if (marked.text != whole) refuse_spelling();
  return marked;
}

std::vector<TokenId> encode_chat(const ModelFiles& files, const ChatTemplate::Inputs& inputs) {
  std::vector<TokenId> ids = encode(files.tokenizer, render_chat(files, inputs));
  put_bos_once(files.tokenizer, ids);
  return ids;
}

PromptText render_plain_prompt(std::string_view plain_template, const Json& messages) {
  constexpr std::string_view kPrompt = "{prompt}", kCompletion = "{completion}";
  const size_t end = plain_template.find(kCompletion);
  if (end == std::string_view::npos)
    throw Error(ErrorKind::usage,
                {.where = "--template",
                 .what = fmt::format("\"{}\" has no {}", plain_template, kCompletion),
                 .cure = "for example \"{prompt}\\n{completion}\""});
  PromptText contents;
  for (const Json& message : messages) {
    const auto content = message.find("content");
    if (content == message.end() || !content->is_string())
      throw Error(ErrorKind::bad_input, {.where = "messages",
                                         .what = "a message has no text",
                                         .cure = "a plain template takes texts alone"});
    if (!contents.text.empty()) contents.text += "\n";
    contents.text += content->get_ref<const std::string&>();
  }
  contents.literal = {{0, contents.text.size()}};
  const std::string_view before = plain_template.substr(0, end);
  const size_t at = before.find(kPrompt);
  PromptText out{std::string(before.substr(0, at)), {}};
  if (at == before.npos) return out;
  out.append(contents);
  out.append({std::string(before.substr(at + kPrompt.size())), {}});
  return out;
}

std::vector<TokenId> encode_prompt(const ModelFiles& files, const PromptStyle& style,
                                   Json messages) {
  const bool has_system = !messages.empty() && messages.front().value("role", "") == "system";
  if (!style.system.empty() && !has_system)
    messages.insert(messages.begin(),
                    Json::object({{"role", "system"}, {"content", style.system}}));
  if (style.plain_template.empty() && files.chat_template)
    return encode_chat(files, {.messages = std::move(messages), .add_generation_prompt = true});
  std::vector<TokenId> ids =
      encode(files.tokenizer,
             render_plain_prompt(
                 style.plain_template.empty() ? kPlainTemplate : style.plain_template, messages));
  put_bos_once(files.tokenizer, ids);
  return ids;
}

std::vector<TokenId> encode_text(const ModelFiles& files, std::string_view text) {
  std::vector<TokenId> ids = files.tokenizer.encode(text);
  put_bos_once(files.tokenizer, ids);
  return ids;
}

}  // namespace moru
