#include "engine/prompt.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

// Calls `visit` on every text that a message carries: its content, or its content's text parts.
template <typename Visit>
void each_content(Json& messages, Visit&& visit) {
  for (Json& message : messages) {
    if (!message.is_object() || !message.contains("content")) continue;
    Json& content = message["content"];
    if (content.is_string()) {
      visit(content.get_ref<std::string&>());
    } else if (content.is_array()) {
      for (Json& part : content)
        if (part.is_object() && part.contains("text") && part["text"].is_string())
          visit(part["text"].get_ref<std::string&>());
    }
  }
}

bool spells_control(const Tokenizer& tokenizer, std::string_view text) {
  const std::vector<TokenId> ids = tokenizer.encode(text, Tokenizer::Specials::parse);
  return std::any_of(ids.begin(), ids.end(), [&](TokenId id) { return tokenizer.is_control(id); });
}

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

// A stand-in for content `index` that no template or tokenizer touches (private-use code points).
std::string stand_in(size_t index) { return fmt::format("\uE0F0{}\uE0F1", index); }

// Ids of the conversation where some content spells control tokens: rendered with stand-ins, then
// each content is encoded literally in its place.
std::vector<TokenId> encode_literally(const ModelFiles& files, ChatTemplate::Inputs inputs) {
  const std::string whole = render_chat(files, inputs);
  std::vector<std::string> contents;
  each_content(inputs.messages, [&](std::string& text) {
    contents.push_back(text);
    text = stand_in(contents.size() - 1);
  });
  const std::string frame = render_chat(files, std::move(inputs));

  std::vector<TokenId> ids;
  std::string rebuilt;
  size_t at = 0;
  const auto add = [&](std::string_view text, Tokenizer::Specials specials) {
    rebuilt += text;
    const std::vector<TokenId> more = files.tokenizer.encode(text, specials);
    ids.insert(ids.end(), more.begin(), more.end());
  };
  for (size_t i = 0; i < contents.size(); ++i) {
    const std::string mark = stand_in(i);
    const size_t found = frame.find(mark, at);
    if (found == std::string::npos) continue;  // the template leaves this message out
    add(std::string_view(frame).substr(at, found - at), Tokenizer::Specials::parse);
    // Templates that trim did trim the stand-in, which shows in nothing; the whole rendering does.
    const bool untouched = std::string_view(whole).substr(rebuilt.size()).starts_with(contents[i]);
    add(untouched ? std::string_view(contents[i]) : trimmed(contents[i]),
        Tokenizer::Specials::literal);
    at = found + mark.size();
  }
  add(std::string_view(frame).substr(at), Tokenizer::Specials::parse);
  if (rebuilt == whole) return ids;
  throw Error(ErrorKind::bad_input, {.where = "messages",
                                     .what = "a message spells a control token of the model",
                                     .cure = "take it out of the text"});
}

void put_bos_once(const Tokenizer& tokenizer, std::vector<TokenId>& ids) {
  if (!tokenizer.adds_bos() || !tokenizer.bos()) return;
  if (ids.empty() || ids.front() != *tokenizer.bos()) ids.insert(ids.begin(), *tokenizer.bos());
}

}  // namespace

std::string render_chat(const ModelFiles& files, ChatTemplate::Inputs inputs) {
  if (!files.chat_template)
    throw Error(ErrorKind::unsupported, {.where = files.path.string(),
                                         .what = "the model has no chat template",
                                         .cure = "give plain text instead of messages"});
  const Tokenizer& tokenizer = files.tokenizer;
  if (tokenizer.bos()) inputs.bos_token = std::string(tokenizer.piece(*tokenizer.bos()));
  if (tokenizer.eos()) inputs.eos_token = std::string(tokenizer.piece(*tokenizer.eos()));
  return files.chat_template->render(inputs);
}

std::vector<TokenId> encode_chat(const ModelFiles& files, const ChatTemplate::Inputs& inputs) {
  bool spelled = false;
  Json messages = inputs.messages;
  each_content(messages, [&](const std::string& text) {
    spelled = spelled || spells_control(files.tokenizer, text);
  });
  std::vector<TokenId> ids = spelled ? encode_literally(files, inputs)
                                     : files.tokenizer.encode(render_chat(files, inputs));
  put_bos_once(files.tokenizer, ids);
  return ids;
}

std::string render_plain_prompt(std::string_view plain_template, const Json& messages) {
  constexpr std::string_view kPrompt = "{prompt}", kCompletion = "{completion}";
  const size_t end = plain_template.find(kCompletion);
  if (end == std::string_view::npos)
    throw Error(ErrorKind::usage,
                {.where = "--template",
                 .what = fmt::format("\"{}\" has no {}", plain_template, kCompletion),
                 .cure = "for example \"{prompt}\\n{completion}\""});
  std::string contents;
  for (const Json& message : messages) {
    const auto content = message.find("content");
    if (content == message.end() || !content->is_string())
      throw Error(ErrorKind::bad_input, {.where = "messages",
                                         .what = "a message has no text",
                                         .cure = "a plain template takes texts alone"});
    if (!contents.empty()) contents += "\n";
    contents += content->get_ref<const std::string&>();
  }
  std::string text(plain_template.substr(0, end));
  const size_t at = text.find(kPrompt);
  return at == std::string::npos ? text : text.replace(at, kPrompt.size(), contents);
}

std::vector<TokenId> encode_prompt(const ModelFiles& files, const PromptStyle& style,
                                   Json messages) {
  const bool has_system = !messages.empty() && messages.front().value("role", "") == "system";
  if (!style.system.empty() && !has_system)
    messages.insert(messages.begin(), {{"role", "system"}, {"content", style.system}});
  if (style.plain_template.empty() && files.chat_template)
    return encode_chat(files, {.messages = std::move(messages), .add_generation_prompt = true});
  return encode_text(
      files, render_plain_prompt(
                 style.plain_template.empty() ? kPlainTemplate : style.plain_template, messages));
}

std::vector<TokenId> encode_text(const ModelFiles& files, std::string_view text) {
  std::vector<TokenId> ids = files.tokenizer.encode(text);
  put_bos_once(files.tokenizer, ids);
  return ids;
}

}  // namespace moru
