#include "tune/rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>

#include "base/error.h"
#include "base/files.h"

namespace moru {
namespace {

using nlohmann::ordered_json;
using Kind = TrainingRow::Kind;
using Shape = RowFormat::Shape;

// The text of a cell. Numbers and booleans are taken as they are written.
std::string text_of(const ordered_json& row, const std::string& field) {
  const auto found = row.find(field);
  if (found == row.end()) throw UnusableRow{field, "is missing"};
  if (found->is_string()) return found->get<std::string>();
  if (found->is_null()) return {};
  if (found->is_number() || found->is_boolean()) return found->dump();
  throw UnusableRow{field, "is not a text"};
}
std::string text_or_empty(const ordered_json& row, const std::string& field) {
  return row.contains(field) ? text_of(row, field) : std::string();
}

// True where the field is there and says something: null and "" do not.
bool has(const ordered_json& row, const std::string& field) {
  const auto found = field.empty() ? row.end() : row.find(field);
  return found != row.end() && !found->is_null() && !(found->is_string() && found->empty());
}

ordered_json message(const std::string& role, const std::string& content) {
  return {{"role", role}, {"content", content}};
}

// ShareGPT's words for roles, and OpenAI's.
std::string known_role(const std::string& word) {
  static const std::map<std::string, std::string, std::less<>> kRoles = {
      {"human", "user"},
      {"user", "user"},
      {"gpt", "assistant"},
      {"model", "assistant"},
      {"assistant", "assistant"},
      {"bing", "assistant"},
      {"system", "system"},
      {"chatgpt", "assistant"},
      {"developer", "system"},
      {"tool", "tool"},
      {"observation", "tool"},
      {"function", "tool"},
      {"function_call", "assistant"}};
  const auto found = kRoles.find(word);
  if (found == kRoles.end()) throw UnusableRow{"role", fmt::format("\"{}\" is no role", word)};
  return found->second;
}

// A call as ShareGPT writes it, {"name": …, "arguments": …} or a list of such, as OpenAI does.
// Text that is no such JSON stays the answer's content.
ordered_json calling_message(const std::string& value) {
  ordered_json calls = ordered_json::parse(value, nullptr, false);
  if (calls.is_object()) calls = ordered_json::array({calls});
  ordered_json out = message("assistant", value);
  if (!calls.is_array() || calls.empty()) return out;
  ordered_json list = ordered_json::array();
  for (const ordered_json& call : calls) {
    if (!call.is_object() || !call.contains("name") || !call["name"].is_string()) return out;
    list.push_back({{"type", "function"},
                    {"function",
                     {{"name", call["name"]},
                      {"arguments",
                       call.contains("arguments") ? call["arguments"] : ordered_json::object()}}}});
  }
  out["content"] = "";
  out["tool_calls"] = std::move(list);
  return out;
}

// One turn in OpenAI's shape, whatever words it uses.
ordered_json message_of(const ordered_json& turn, const RowFormat& format) {
  if (!turn.is_object()) throw UnusableRow{"messages", "a turn is not an object"};
  const RowTags& tags = format.tags;
  const bool tagged = turn.contains(tags.role) && turn.contains(tags.content);
  const std::string role_field = tagged ? tags.role : turn.contains("from") ? "from" : "role";
  const std::string content_field = role_field == "from" && !tagged ? "value"
                                    : tagged                        ? tags.content
                                                                    : "content";
  const std::string word = text_of(turn, role_field);
  const std::array<std::pair<std::string_view, const char*>, 5> tagged_roles = {{
      {tags.user, "user"},
      {tags.assistant, "assistant"},
      {tags.observation, "tool"},
      {tags.function, "function_call"},
      {tags.system, "system"},
  }};
  std::string role;
  for (const auto& [tag, meaning] : tagged_roles)
    if (role.empty() && word == tag) role = meaning;
  if (role == "function_call" || (role.empty() && word == "function_call"))
    return calling_message(text_of(turn, content_field));
  if (role.empty()) role = known_role(word);

  if (role_field == "role" && content_field == "content") {
    ordered_json out = turn;  // with names, tool calls, reasoning: what its template reads
    out["role"] = role;
    if (!out.contains("content") && !out.contains("tool_calls"))
      throw UnusableRow{"content", "is missing"};
    return out;
  }
  return message(role, text_of(turn, content_field));
}

ordered_json messages_of(const ordered_json& list, const std::string& field,
                         const RowFormat& format) {
  if (!list.is_array() || list.empty()) throw UnusableRow{field, "is not a list of turns"};
  ordered_json out = ordered_json::array();
  for (const ordered_json& turn : list) out.push_back(message_of(turn, format));
  return out;
}

// ShareGPT's turns take turns: who asks (or a tool that reports) stands first, who answers second.
void check_order(const ordered_json& messages, const std::string& field) {
  size_t place = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string role = messages[i]["role"];
    if (role == "system" && i == 0) continue;
    const bool answers = role == "assistant";
    if (role == "system" || answers != (place % 2 == 1))
      throw UnusableRow{field, fmt::format("turn {} is the {}'s, out of order", i + 1, role)};
    ++place;
  }
}

// What answers: a text, a turn, or turns.
ordered_json answers_of(const ordered_json& row, const std::string& field,
                        const RowFormat& format) {
  const ordered_json& value = row[field];
  if (value.is_object()) return ordered_json::array({message_of(value, format)});
  if (value.is_array()) return messages_of(value, field, format);
  return ordered_json::array({message("assistant", text_of(row, field))});
}

ordered_json tools_of(const ordered_json& row, const std::string& field) {
  if (!has(row, field)) return {};
  const ordered_json& value = row[field];
  if (!value.is_string()) return value;
  ordered_json parsed = ordered_json::parse(value.get_ref<const std::string&>(), nullptr, false);
  if (parsed.is_discarded()) throw UnusableRow{field, "is not JSON"};
  return parsed;
}

// true, false, and what spreadsheets make of them.
std::optional<bool> truth_of(const ordered_json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number_integer() && (value == 0 || value == 1)) return value == 1;
  if (value.is_string())
    for (const auto& [word, truth] : {std::pair{"true", true},
                                      {"True", true},
                                      {"1", true},
                                      {"false", false},
                                      {"False", false},
                                      {"0", false}})
      if (value == word) return truth;
  return std::nullopt;
}

// Length of the longest common start that ends between characters.
size_t common_bytes(std::string_view a, std::string_view b) {
  size_t n = 0;
  while (n < a.size() && n < b.size() && a[n] == b[n]) ++n;
  const auto inside = [](std::string_view s, size_t at) {
    return at < s.size() && (static_cast<unsigned char>(s[at]) & 0xC0) == 0x80;
  };
  while (n > 0 && (inside(a, n) || inside(b, n))) --n;
  return n;
}

// Moves the turns that both answers begin with to the end of the question.
void take_common_turns(TrainingRow& row) {
  size_t n = 0;
  const size_t most = std::min(row.chosen.size(), row.rejected.size()) - 1;
  while (n < most && row.chosen[n] == row.rejected[n]) ++n;
  for (size_t i = 0; i < n; ++i) row.messages.push_back(row.chosen[i]);
  row.chosen.erase(row.chosen.begin(), row.chosen.begin() + static_cast<std::ptrdiff_t>(n));
  row.rejected.erase(row.rejected.begin(), row.rejected.begin() + static_cast<std::ptrdiff_t>(n));
}

void add_alpaca_question(const ordered_json& row, const RowColumns& columns,
                         ordered_json& messages) {
  if (has(row, columns.history)) {
    const ordered_json& history = row[columns.history];
    if (!history.is_array()) throw UnusableRow{columns.history, "is not a list"};
    for (const ordered_json& pair : history) {
      if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_string())
        throw UnusableRow{columns.history, "is not a list of [question, answer]"};
      messages.push_back(message("user", pair[0].get<std::string>()));
      messages.push_back(message("assistant", pair[1].get<std::string>()));
    }
  }
  const std::string prompt = text_of(row, columns.prompt);
  const std::string query = columns.query.empty() ? "" : text_or_empty(row, columns.query);
  messages.push_back(message("user", query.empty() ? prompt : prompt + "\n" + query));
}

// {instruction, input, output, …}
TrainingRow alpaca_row(const ordered_json& row, const RowFormat& format) {
  const RowColumns& c = format.columns;
  TrainingRow out;
  if (!row.contains(c.response) && !format.ranking && format.shape == Shape::alpaca &&
      c.kto_tag.empty() && !row.contains(c.chosen)) {
    // A data set for pre-training names the column of its text as the prompt.
    out.kind = Kind::text;
    out.text = text_of(row, c.prompt);
    return out;
  }
  add_alpaca_question(row, c, out.messages);
  const auto output = row.find(c.response);
  const bool comparison = output != row.end() && output->is_array();
  if (comparison) {
    if (output->size() != 2 || !(*output)[0].is_string() || !(*output)[1].is_string())
      throw UnusableRow{c.response, "is a list, but not of a chosen and a rejected text"};
    out.kind = Kind::preference;
    out.chosen = ordered_json::array({message("assistant", (*output)[0].get<std::string>())});
    out.rejected = ordered_json::array({message("assistant", (*output)[1].get<std::string>())});
  } else if (format.ranking || (has(row, c.chosen) && has(row, c.rejected))) {
    for (const std::string& field : {c.chosen, c.rejected})
      if (!row.contains(field)) throw UnusableRow{field, "is missing"};
    out.kind = Kind::preference;
    out.chosen = answers_of(row, c.chosen, format);
    out.rejected = answers_of(row, c.rejected, format);
  } else {
    out.messages.push_back(message("assistant", text_of(row, c.response)));
  }
  return out;
}

// {conversations} or {messages}, perhaps with {chosen, rejected}.
TrainingRow conversation_row(const ordered_json& row, const std::string& field,
                             const RowFormat& format, bool strict) {
  if (!row.contains(field)) throw UnusableRow{field, "is missing"};
  TrainingRow out;
  out.messages = messages_of(row[field], field, format);
  if (strict) check_order(out.messages, field);
  const RowColumns& c = format.columns;
  if (!format.ranking && !(has(row, c.chosen) && has(row, c.rejected))) return out;
  for (const std::string& name : {c.chosen, c.rejected})
    if (!row.contains(name)) throw UnusableRow{name, "is missing"};
  out.kind = Kind::preference;
  out.chosen = answers_of(row, c.chosen, format);
  out.rejected = answers_of(row, c.rejected, format);
  return out;
}

// {prompt, completion}
TrainingRow completion_row(const ordered_json& row, const RowFormat& format) {
  TrainingRow out;
  if (row["prompt"].is_array())
    out.messages = messages_of(row["prompt"], "prompt", format);
  else
    out.messages.push_back(message("user", text_of(row, "prompt")));
  for (ordered_json& turn : answers_of(row, "completion", format))
    out.messages.push_back(std::move(turn));
  return out;
}

// {prompt, chosen, rejected}, or chosen and rejected alone.
TrainingRow preference_row(const ordered_json& row, const RowFormat& format) {
  TrainingRow out;
  out.kind = Kind::preference;
  const bool texts = row["chosen"].is_string() && row["rejected"].is_string();
  if (!row.contains("prompt") && texts) {
    const std::string chosen = row["chosen"], rejected = row["rejected"];
    size_t same = common_bytes(chosen, rejected);
    // A space belongs to the word that follows it.
    if (same > 0 && chosen[same - 1] == ' ') --same;
    out.messages.push_back(message("user", chosen.substr(0, same)));
    out.chosen = ordered_json::array({message("assistant", chosen.substr(same))});
    out.rejected = ordered_json::array({message("assistant", rejected.substr(same))});
    return out;
  }
  out.chosen = answers_of(row, "chosen", format);
  out.rejected = answers_of(row, "rejected", format);
  const bool whole = out.chosen[0]["role"] != "assistant";  // they hold the question too
  if (!whole) {
    if (!row.contains("prompt")) throw UnusableRow{"prompt", "is missing"};
    if (row["prompt"].is_array())
      out.messages = messages_of(row["prompt"], "prompt", format);
    else
      out.messages.push_back(message("user", text_of(row, "prompt")));
  }
  take_common_turns(out);
  return out;
}

TrainingRow shaped_row(const ordered_json& row, const RowFormat& format) {
  const RowColumns& c = format.columns;
  switch (format.shape) {
    case Shape::alpaca:
      return alpaca_row(row, format);
    case Shape::sharegpt:
      return conversation_row(row, c.messages.empty() ? "conversations" : c.messages, format, true);
    case Shape::openai:
      return conversation_row(row, c.messages.empty() ? "messages" : c.messages, format, false);
    case Shape::pair: {
      TrainingRow out;
      out.messages.push_back(message("user", text_of(row, c.prompt)));
      out.messages.push_back(message("assistant", text_of(row, c.response)));
      return out;
    }
    case Shape::detect:
      break;
  }
  if (row.contains("messages")) return conversation_row(row, "messages", format, false);
  if (row.contains("conversations")) return conversation_row(row, "conversations", format, true);
  if (row.contains("instruction")) return alpaca_row(row, format);
  if (has(row, "chosen") && has(row, "rejected")) return preference_row(row, format);
  if (row.contains("prompt") && row.contains("completion")) return completion_row(row, format);
  if (row.contains("text")) {
    TrainingRow out;
    out.kind = Kind::text;
    out.text = text_of(row, "text");
    return out;
  }
  throw UnusableRow{"",
                    "has neither messages, conversations, prompt and completion, instruction and "
                    "output, chosen and rejected, nor text"};
}

// Turns the conversation's last answer into a rated one where the row says whether it is wanted.
void rate(const ordered_json& row, const RowFormat& format, TrainingRow& out) {
  if (out.kind != Kind::conversation || format.shape == Shape::pair) return;
  std::string field = format.columns.kto_tag;
  std::optional<bool> wanted;
  if (!field.empty()) {
    if (!row.contains(field)) throw UnusableRow{field, "is missing"};
    wanted = truth_of(row[field]);
    if (!wanted) throw UnusableRow{field, "is neither true nor false"};
  } else if (format.shape == Shape::detect) {
    for (const char* name : {"label", "kto_tag"})
      if (!wanted && row.contains(name) && row[name].is_boolean()) wanted = row[name].get<bool>();
  }
  if (!wanted) return;
  if (out.messages.empty() || out.messages.back()["role"] != "assistant")
    throw UnusableRow{"messages", "the last turn is not the assistant's"};
  out.kind = Kind::rated;
  out.desirable = *wanted;
  out.chosen = ordered_json::array({out.messages.back()});
  out.messages.erase(out.messages.size() - 1);
}

void check_answers(const ordered_json& answers, const char* field) {
  if (answers.empty() || answers.back()["role"] != "assistant")
    throw UnusableRow{field, "does not end with the assistant's turn"};
}

}  // namespace

ordered_json to_json(const RowFormat& f) {
  const RowColumns& c = f.columns;
  const RowTags& t = f.tags;
  return {static_cast<int>(f.shape),
          f.ranking,
          {c.prompt, c.query, c.response, c.history, c.messages, c.system, c.tools, c.chosen,
           c.rejected, c.kto_tag},
          {t.role, t.content, t.user, t.assistant, t.observation, t.function, t.system}};
}

TrainingRow read_row(const ordered_json& row, const RowFormat& format) {
  TrainingRow out = shaped_row(row, format);
  if (out.kind == Kind::text) return out;
  rate(row, format, out);
  out.tools = tools_of(row, format.columns.tools);
  if (const std::string system =
          format.columns.system.empty() ? std::string() : text_or_empty(row, format.columns.system);
      !system.empty() && (out.messages.empty() || out.messages.front()["role"] != "system"))
    out.messages.insert(out.messages.begin(), message("system", system));
  if (out.kind == Kind::preference) {
    check_answers(out.chosen, "chosen");
    check_answers(out.rejected, "rejected");
    if (out.chosen == out.rejected) throw UnusableRow{"rejected", "is the chosen answer"};
  }
  if (out.kind == Kind::conversation &&
      std::none_of(out.messages.begin(), out.messages.end(),
                   [](const ordered_json& m) { return m["role"] == "assistant"; }))
    throw UnusableRow{"messages", "no turn is the assistant's"};
  return out;
}

std::string prompt_text(const ordered_json& messages) {
  std::string text;
  for (const ordered_json& m : messages) {
    if (m["role"] == "assistant") break;
    if (m["role"] == "system" || !m.contains("content")) continue;
    const ordered_json& content = m["content"];
    text += (content.is_string() ? content.get<std::string>() : content.dump()) + "\n";
  }
  return text;
}

std::vector<DataSetInfo> read_dataset_info(const std::filesystem::path& path,
                                           const std::vector<std::string>& names) {
  const ordered_json whole = ordered_json::parse(read_file(path), nullptr, false);
  const auto refuse = [&](const std::string& key, std::string what, std::string cure,
                          ErrorKind kind = ErrorKind::bad_input) {
    throw Error(kind, {.where = fmt::format("{}: {}", path.string(), key),
                       .what = std::move(what),
                       .cure = std::move(cure)});
  };
  if (!whole.is_object()) refuse("file", "is not a JSON object", "see LLaMA-Factory's data/README");
  for (const std::string& name : names) {
    if (whole.contains(name)) continue;
    std::string known;
    for (const auto& [key, value] : whole.items()) known += (known.empty() ? "" : ", ") + key;
    refuse(name, "there is no such data set", "of " + known);
  }

  const auto text = [&](const ordered_json& from, const std::string& at, const char* key,
                        std::string& into) {
    const auto found = from.find(key);
    if (found == from.end() || found->is_null()) return;
    if (!found->is_string()) refuse(at + "." + key, "is not a text", "give a name");
    into = found->get<std::string>();
  };
  std::vector<DataSetInfo> sets;
  for (const auto& [name, info] : whole.items()) {
    if (!names.empty() && std::find(names.begin(), names.end(), name) == names.end()) continue;
    if (!info.is_object()) refuse(name, "is not an object", "see LLaMA-Factory's data/README");
    DataSetInfo set{.name = name};
    std::string file, formatting = "alpaca";
    text(info, name, "file_name", file);
    if (file.empty())
      refuse(name, "has no file_name", "fetch the data set and name its file",
             ErrorKind::unsupported);
    set.file = path.parent_path() / file;
    text(info, name, "formatting", formatting);
    RowFormat& format = set.format;
    if (formatting == "alpaca") {
      format.shape = Shape::alpaca;
    } else if (formatting == "sharegpt") {
      format.shape = Shape::sharegpt;
    } else if (formatting == "openai") {
      format.shape = Shape::openai;
      format.tags = {.role = "role",
                     .content = "content",
                     .user = "user",
                     .assistant = "assistant",
                     .observation = "tool",
                     .function = "function_call",
                     .system = "system"};
    } else {
      refuse(name + ".formatting", fmt::format("is \"{}\"", formatting),
             "alpaca, sharegpt or openai", ErrorKind::unsupported);
    }
    if (const auto found = info.find("ranking"); found != info.end())
      format.ranking = found->is_boolean() && found->get<bool>();
    if (const auto found = info.find("num_samples"); found != info.end() && !found->is_null()) {
      if (!found->is_number_unsigned())
        refuse(name + ".num_samples", "is not a count", "give how many rows to take");
      set.num_samples = found->get<uint64_t>();
    }
    if (const auto columns = info.find("columns"); columns != info.end()) {
      const std::string at = name + ".columns";
      if (!columns->is_object()) refuse(at, "is not an object", "map names to columns");
      for (const char* media : {"images", "videos", "audios"})
        if (columns->contains(media))
          refuse(at, fmt::format("has {}", media), "models here read text alone",
                 ErrorKind::unsupported);
      // A map leaves out what the rows do not have.
      RowColumns& c = format.columns;
      c.query = c.history = c.system = c.tools = "";
      for (const auto& [key, into] : {std::pair{"prompt", &c.prompt},
                                      {"query", &c.query},
                                      {"response", &c.response},
                                      {"history", &c.history},
                                      {"messages", &c.messages},
                                      {"system", &c.system},
                                      {"tools", &c.tools},
                                      {"chosen", &c.chosen},
                                      {"rejected", &c.rejected},
                                      {"kto_tag", &c.kto_tag}})
        text(*columns, at, key, *into);
      if (format.shape == Shape::alpaca && !columns->contains("response") && !format.ranking &&
          !columns->contains("chosen") && c.kto_tag.empty())
        c.response = "";  // text to learn as it stands
    }
    if (const auto tags = info.find("tags"); tags != info.end() && tags->is_object()) {
      RowTags& t = format.tags;
      for (const auto& [key, into] : {std::pair{"role_tag", &t.role},
                                      {"content_tag", &t.content},
                                      {"user_tag", &t.user},
                                      {"assistant_tag", &t.assistant},
                                      {"observation_tag", &t.observation},
                                      {"function_tag", &t.function},
                                      {"system_tag", &t.system}})
        text(*tags, name + ".tags", key, *into);
    }
    sets.push_back(std::move(set));
  }
  return sets;
}

}  // namespace moru
