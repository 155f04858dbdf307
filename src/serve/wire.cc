#include "serve/wire.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "base/text.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

// Far past any honest request. Objects are kept in order and looked up one member after the other,
// so that their size is a cost.
constexpr int kMaxDepth = 64;
constexpr size_t kMaxMembers = 512;
constexpr size_t kMaxStops = 4;
constexpr size_t kMaxStopBytes = 256;
constexpr size_t kMaxBreakers = 32;
constexpr int kMaxChatLogprobs = 20, kMaxCompletionLogprobs = 5;
constexpr size_t kDefaultCompletionTokens = 16;
// JSON has no infinity; this is what OpenAI sends for one.
constexpr float kLeastLogprob = -9999;

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

const char* type_of(const Json& value) {
  if (value.is_null()) return "null";
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array";
  if (value.is_string()) return "a string";
  if (value.is_boolean()) return "a boolean";
  return value.is_number_float() ? "a number" : "an integer";
}

// Reads the fields of one object. The first that cannot be meant is kept as the problem; what is
// read after it counts for nothing.
class Fields {
 public:
  Fields(const Json& object, std::string path, std::optional<ApiError>& problem)
      : object_(object), path_(std::move(path)), problem_(problem) {}

  // nullptr where it is absent or null.
  const Json* find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  std::optional<double> number(const char* name, double low, double high) {
    const Json* value = find(name);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number()) return wrong_type(name, "a number", *value), std::nullopt;
    const double number = value->get<double>();
    if (!(number >= low && number <= high))
      return out_of_range(name, fmt::format("{}", number), low, high), std::nullopt;
    return number;
  }

  std::optional<int64_t> integer(const char* name, int64_t low, int64_t high) {
    const Json* value = find(name);
    if (value == nullptr) return std::nullopt;
    const auto number = as_integer(*value);
    if (!number) return wrong_type(name, "an integer", *value), std::nullopt;
    if (*number < low || *number > high)
      return out_of_range(name, value->dump(), low, high), std::nullopt;
    return number;
  }

  bool flag(const char* name) {
    const Json* value = find(name);
    if (value == nullptr) return false;
    if (!value->is_boolean()) return wrong_type(name, "a boolean", *value), false;
    return value->get<bool>();
  }

  std::string text(const char* name) {
    const Json* value = find(name);
    if (value == nullptr) return {};
    if (!value->is_string()) return wrong_type(name, "a string", *value), std::string();
    return value->get<std::string>();
  }

  void wrong_type(std::string_view name, const char* wanted, const Json& got) {
    refuse(name, fmt::format("expected {}, but got {} instead.", wanted, type_of(got)),
           "invalid_type", "Invalid type for");
  }

  void refuse(std::string_view name, std::string_view what, const char* code = "invalid_value",
              const char* opening = "Invalid") {
    if (problem_) return;
    const std::string field = path_ + std::string(name);
    problem_ = ApiError{
        .message = fmt::format("{} '{}': {}", opening, field, what), .param = field, .code = code};
  }
  void missing(std::string_view name) {
    refuse(name, "it is required.", "missing_required_parameter", "Missing");
  }
  void unsupported(std::string_view name, std::string_view what) {
    refuse(name, what, "unsupported_parameter", "Unsupported");
  }

  // Integers, also those written as 5.0; nullopt for anything else.
  static std::optional<int64_t> as_integer(const Json& value) {
    if (value.is_number_unsigned())
      return static_cast<int64_t>(
          std::min<uint64_t>(value.get<uint64_t>(), std::numeric_limits<int64_t>::max()));
    if (value.is_number_integer()) return value.get<int64_t>();
    if (!value.is_number_float()) return std::nullopt;
    const double number = value.get<double>();
    if (std::floor(number) != number || std::abs(number) > 0x1p53) return std::nullopt;
    return static_cast<int64_t>(number);
  }

  const std::string& path() const { return path_; }
  std::optional<ApiError>& problem() { return problem_; }

 private:
  template <typename T>
  void out_of_range(const char* name, std::string_view got, T low, T high) {
    if (high < T(std::numeric_limits<int32_t>::max())) {
      refuse(name, fmt::format("{} is not between {} and {}.", got, low, high));
    } else {
      refuse(name, fmt::format("{} is not {} or more.", got, low));
    }
  }

  const Json& object_;
  std::string path_;  // of the object: "messages[2]."
  std::optional<ApiError>& problem_;
};

// The body as one object, or what is wrong with it.
Parsed<Json> parse_object(std::string_view body) {
  const auto refuse = [](std::string message) {
    return ApiError{.message = std::move(message), .code = "invalid_json"};
  };
  bool too_large = false;
  std::array<size_t, kMaxDepth + 2> members{};
  const auto watch = [&](int depth, Json::parse_event_t event, Json&) {
    if (depth > kMaxDepth) {
      too_large = true;
    } else if (event == Json::parse_event_t::object_start) {
      members[static_cast<size_t>(depth) + 1] = 0;
    } else if (event == Json::parse_event_t::key) {
      too_large = too_large || ++members[static_cast<size_t>(depth)] > kMaxMembers;
    }
    return !too_large;  // what is left is read past, not kept
  };
  try {
    Json json = Json::parse(body.begin(), body.end(), watch);
    if (too_large)
      return refuse(
          fmt::format("The body is nested deeper than {} or has an object of more than "
                      "{} members.",
                      kMaxDepth, kMaxMembers));
    if (!json.is_object())
      return refuse(fmt::format("The body must be a JSON object, not {}.", type_of(json)));
    return json;
  } catch (const Json::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, column 5: …"
    const std::string_view what = error.what();
    const size_t at = what.find("] ");
    return refuse(fmt::format("The body is not JSON: {}.",
                              what.substr(at == std::string_view::npos ? 0 : at + 2)));
  }
}

void read_stop(Fields& in, std::vector<std::string>& stops) {
  const Json* value = in.find("stop");
  if (value == nullptr) return;
  if (!value->is_string() && !value->is_array())
    return in.wrong_type("stop", "a string or an array of strings", *value);
  const auto add = [&](const Json& stop) {
    if (!stop.is_string()) return in.wrong_type("stop", "strings", stop);
    stops.push_back(stop.get<std::string>());
    if (stops.back().empty()) in.refuse("stop", "a stop text is empty.");
    if (stops.back().size() > kMaxStopBytes)
      in.refuse("stop", fmt::format("a stop text is longer than {} bytes.", kMaxStopBytes));
  };
  if (value->is_string()) return add(*value);
  if (value->size() > kMaxStops)
    return in.refuse("stop", fmt::format("{} texts are more than {}.", value->size(), kMaxStops));
  for (const Json& stop : *value) add(stop);
}

void read_breakers(Fields& in, std::vector<std::string>& breakers) {
  const Json* value = in.find("dry_sequence_breakers");
  if (value == nullptr) return;
  if (!value->is_array())
    return in.wrong_type("dry_sequence_breakers", "an array of strings", *value);
  if (value->size() > kMaxBreakers)
    return in.refuse("dry_sequence_breakers",
                     fmt::format("{} texts are more than {}.", value->size(), kMaxBreakers));
  breakers.clear();
  for (const Json& text : *value) {
    if (!text.is_string()) return in.wrong_type("dry_sequence_breakers", "strings", text);
    breakers.push_back(text.get<std::string>());
    if (breakers.back().empty() || breakers.back().size() > kMaxStopBytes)
      in.refuse("dry_sequence_breakers",
                fmt::format("a text is empty or longer than {} bytes.", kMaxStopBytes));
  }
}

void read_logit_bias(Fields& in, size_t vocab, SamplingOptions& sampling) {
  const Json* value = in.find("logit_bias");
  if (value == nullptr) return;
  if (!value->is_object()) return in.wrong_type("logit_bias", "an object", *value);
  for (const auto& [key, bias] : value->items()) {
    const bool digits =
        !key.empty() && key.size() <= 9 &&
        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    const int id = digits ? std::stoi(key) : -1;
    if (id < 0 || static_cast<size_t>(id) >= vocab)
      return in.refuse("logit_bias", fmt::format("'{}' is not the id of a token; they are 0 to {}.",
                                                 truncate_to_width(key, 40), vocab - 1));
    if (!bias.is_number()) return in.wrong_type("logit_bias." + key, "a number", bias);
    const double number = bias.get<double>();
    if (!(std::abs(number) <= 100))
      return in.refuse("logit_bias." + key, fmt::format("{} is not between -100 and 100.", number));
    sampling.logit_bias.emplace_back(static_cast<TokenId>(id), static_cast<float>(number));
  }
}

// {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}, and the shorter forms.
void read_response_format(Fields& in, AnswerOptions& out) {
  const Json* format = in.find("response_format");
  if (format == nullptr) return;
  if (!format->is_object()) return in.wrong_type("response_format", "an object", *format);
  Fields fields(*format, "response_format.", in.problem());
  const std::string type = fields.text("type");
  if (type.empty()) return fields.refuse("type", "it must be a string.");
  if (type == "text") return;
  using Kind = ConstraintSource::Kind;
  out.constraint_field = "response_format";
  if (type == "json_object") {
    out.constraint = ConstraintSource{Kind::json_object, ""};
    return;
  }
  if (type != "json_schema")
    return fields.refuse("type", fmt::format("'{}' is not one of text, json_object and "
                                             "json_schema.",
                                             truncate_to_width(type, 40)));
  const Json* named = fields.find("json_schema");
  if (named == nullptr) return fields.missing("json_schema");
  if (!named->is_object()) return fields.wrong_type("json_schema", "an object", *named);
  Fields inner(*named, "response_format.json_schema.", in.problem());
  inner.text("name");
  inner.flag("strict");  // always
  const Json* schema = inner.find("schema");
  if (schema == nullptr) return inner.missing("schema");
  if (!schema->is_object() && !schema->is_boolean())
    return inner.wrong_type("schema", "an object", *schema);
  out.constraint_field = "response_format.json_schema.schema";
  out.constraint = ConstraintSource{Kind::json_schema, dump(*schema)};
}

// What the answer is held to, by OpenAI's field or by those of vLLM and llama.cpp.
void read_constraint(Fields& in, AnswerOptions& out) {
  using Kind = ConstraintSource::Kind;
  read_response_format(in, out);
  const auto take = [&](const char* name, Kind kind, std::string text) {
    if (out.constraint)
      return in.refuse(
          name, fmt::format("'{}' already says what the answer is held to.", out.constraint_field));
    out.constraint_field = name;
    out.constraint = ConstraintSource{kind, std::move(text)};
  };
  for (const char* name : {"guided_json", "json_schema"}) {
    const Json* schema = in.find(name);
    if (schema == nullptr) continue;
    if (schema->is_string()) {
      take(name, Kind::json_schema, schema->get<std::string>());
    } else if (schema->is_object()) {
      take(name, Kind::json_schema, dump(*schema));
    } else {
      in.wrong_type(name, "an object or its JSON text", *schema);
    }
  }
  if (in.find("guided_regex") != nullptr)
    take("guided_regex", Kind::regex, in.text("guided_regex"));
  for (const char* name : {"guided_grammar", "guided_choice", "grammar", "structured_outputs"})
    if (in.find(name) != nullptr)
      in.unsupported(name, "use response_format, guided_json or guided_regex.");
}

AnswerOptions read_options(Fields& in, const WireLimits& limits, uint64_t random_seed) {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  AnswerOptions out;
  out.model = in.text("model");
  SamplingOptions& s = out.sampling;
  s.temperature = static_cast<float>(in.number("temperature", 0, 2).value_or(1));
  // 0 means "the best token alone", which the smallest positive share also gives.
  s.top_p = std::max(static_cast<float>(in.number("top_p", 0, 1).value_or(1)), 1e-9f);
  s.top_k = static_cast<size_t>(std::max<int64_t>(in.integer("top_k", -1, kAny).value_or(0), 0));
  s.min_p = static_cast<float>(in.number("min_p", 0, 1).value_or(0));
  s.repetition_penalty = static_cast<float>(in.number("repetition_penalty", 0.01, 100).value_or(1));
  s.presence_penalty = static_cast<float>(in.number("presence_penalty", -2, 2).value_or(0));
  s.frequency_penalty = static_cast<float>(in.number("frequency_penalty", -2, 2).value_or(0));
  // As with top_p, 0 keeps the one token that is nearest.
  s.typical_p = std::max(static_cast<float>(in.number("typical_p", 0, 1).value_or(1)), 1e-9f);
  s.dry_multiplier = static_cast<float>(in.number("dry_multiplier", 0, 100).value_or(0));
  s.dry_base = static_cast<float>(in.number("dry_base", 1, 100).value_or(1.75));
  s.dry_allowed_length = static_cast<size_t>(in.integer("dry_allowed_length", 0, kAny).value_or(2));
  read_breakers(in, s.dry_sequence_breakers);
  read_logit_bias(in, limits.vocab, s);
  const auto seed = in.integer("seed", std::numeric_limits<int64_t>::min(), kAny);
  s.seed = seed ? static_cast<uint64_t>(*seed) : random_seed;
  out.choices = static_cast<size_t>(
      in.integer("n", 1, static_cast<int64_t>(std::min<size_t>(limits.max_choices, 128)))
          .value_or(1));
  read_stop(in, out.stop);
  read_constraint(in, out);
  out.stream = in.flag("stream");
  if (const Json* options = in.find("stream_options")) {
    if (!options->is_object()) {
      in.wrong_type("stream_options", "an object", *options);
    } else if (!out.stream) {
      in.refuse("stream_options", "it is only allowed when 'stream' is true.");
    } else {
      Fields inner(*options, "stream_options.", in.problem());
      out.include_usage = inner.flag("include_usage");
    }
  }
  return out;
}

// What no model here can do is refused, never silently left out.
void refuse_what_is_missing(Fields& in) {
  const Json* choice = in.find("tool_choice");
  const bool no_tools = choice != nullptr && *choice == "none";
  for (const char* name : {"tools", "functions"}) {
    const Json* tools = in.find(name);
    if (tools == nullptr) continue;
    if (!tools->is_array()) return in.wrong_type(name, "an array", *tools);
    if (!tools->empty() && !no_tools)
      in.unsupported(name,
                     "tool calls are not served. Leave it out or set 'tool_choice' to "
                     "'none'.");
  }
  if (choice != nullptr && !no_tools && *choice != "auto")
    in.unsupported("tool_choice", "tool calls are not served; only 'none' and 'auto' are taken.");
  if (in.find("audio") != nullptr) in.unsupported("audio", "only text is served.");
  if (const Json* modalities = in.find("modalities"))
    if (*modalities != Json::array({"text"})) in.unsupported("modalities", "only text is served.");
}

// Text of a content: a string, or parts of type text, which are joined.
std::optional<std::string> read_content(Fields& message, const Json& content) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    return message.wrong_type("content", "a string or an array of parts", content), std::nullopt;
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const std::string at = fmt::format("content[{}]", i);
    if (!content[i].is_object())
      return message.wrong_type(at, "an object", content[i]), std::nullopt;
    Fields part(content[i], message.path() + at + ".", message.problem());
    const std::string type = part.text("type");
    if (type.empty()) {
      part.missing("type");
    } else if (type != "text" && type != "refusal") {
      part.unsupported("type", fmt::format("'{}' parts are not served; only text is.",
                                           truncate_to_width(type, 40)));
    } else if (part.find(type.c_str()) == nullptr) {
      part.missing(type);
    } else {
      text += part.text(type.c_str());
    }
  }
  return text;
}

// Templates read a call's arguments as an object, where OpenAI's clients send its JSON text.
Json read_tool_calls(Fields& message, const Json& calls) {
  if (!calls.is_array()) return message.wrong_type("tool_calls", "an array", calls), Json();
  Json out = Json::array();
  for (size_t i = 0; i < calls.size(); ++i) {
    const std::string at = fmt::format("tool_calls[{}]", i);
    if (!calls[i].is_object()) return message.wrong_type(at, "an object", calls[i]), Json();
    out.push_back(calls[i]);
    Fields call(calls[i], message.path() + at + ".", message.problem());
    const Json* function = call.find("function");
    if (function == nullptr) return call.missing("function"), Json();
    if (!function->is_object()) return call.wrong_type("function", "an object", *function), Json();
    Fields inner(*function, call.path() + "function.", message.problem());
    if (inner.text("name").empty()) inner.missing("name");
    if (const Json* arguments = inner.find("arguments");
        arguments != nullptr && arguments->is_string()) {
      Parsed<Json> object = parse_object(arguments->get_ref<const std::string&>());
      if (Json* json = std::get_if<Json>(&object))
        out.back()["function"]["arguments"] = std::move(*json);
    }
  }
  return out;
}

Json read_message(Fields& in, const Json& message, size_t index) {
  const std::string at = fmt::format("messages[{}]", index);
  if (!message.is_object()) return in.wrong_type(at, "an object", message), Json();
  Fields fields(message, at + ".", in.problem());
  const std::string role = fields.text("role");
  constexpr std::array kRoles = {"system", "developer", "user", "assistant", "tool", "function"};
  if (role.empty()) return fields.missing("role"), Json();
  if (std::find(kRoles.begin(), kRoles.end(), role) == kRoles.end())
    return fields.refuse("role", fmt::format("'{}' is not one of system, developer, user, "
                                             "assistant, tool and function.",
                                             truncate_to_width(role, 40))),
           Json();

  // Open models' templates know the developer by his old name.
  Json out = {{"role", role == "developer" ? "system" : role}, {"content", ""}};
  const Json* calls = fields.find("tool_calls");
  if (const Json* content = fields.find("content")) {
    if (auto text = read_content(fields, *content)) out["content"] = std::move(*text);
  } else if (role != "assistant" || (calls == nullptr && !message.contains("content"))) {
    return fields.missing("content"), Json();
  }
  for (const char* name : {"name", "tool_call_id"})
    if (fields.find(name) != nullptr) out[name] = fields.text(name);
  if (calls != nullptr) out["tool_calls"] = read_tool_calls(fields, *calls);
  return out;
}

Json read_messages(Fields& in) {
  const Json* messages = in.find("messages");
  if (messages == nullptr) return in.missing("messages"), Json();
  if (!messages->is_array()) return in.wrong_type("messages", "an array", *messages), Json();
  if (messages->empty()) return in.refuse("messages", "it is empty."), Json();
  Json out = Json::array();
  for (size_t i = 0; i < messages->size() && !in.problem(); ++i)
    out.push_back(read_message(in, (*messages)[i], i));
  return out;
}

using Prompt = std::variant<std::string, std::vector<TokenId>>;

std::optional<std::vector<TokenId>> read_ids(Fields& in, const std::string& at, const Json& ids,
                                             size_t vocab) {
  std::vector<TokenId> out;
  if (ids.empty()) return in.refuse(at, "it has no tokens."), std::nullopt;
  for (const Json& value : ids) {
    const auto id = Fields::as_integer(value);
    if (!id) return in.wrong_type(at, "token ids", value), std::nullopt;
    if (*id < 0 || static_cast<size_t>(*id) >= vocab)
      return in.refuse(at, fmt::format("there is no token {}; ids are 0 to {}.", *id, vocab - 1)),
             std::nullopt;
    out.push_back(static_cast<TokenId>(*id));
  }
  return out;
}

// A text, its ids, or an array of either.
std::vector<Prompt> read_prompts(Fields& in, size_t vocab) {
  const Json* value = in.find("prompt");
  if (value == nullptr) return in.missing("prompt"), std::vector<Prompt>();
  if (value->is_string()) return {value->get<std::string>()};
  if (!value->is_array())
    return in.wrong_type("prompt", "a string or an array", *value), std::vector<Prompt>();
  if (value->empty()) return in.refuse("prompt", "it is empty."), std::vector<Prompt>();
  std::vector<Prompt> out;
  if ((*value)[0].is_number()) {
    if (auto ids = read_ids(in, "prompt", *value, vocab)) out.emplace_back(std::move(*ids));
    return out;
  }
  for (size_t i = 0; i < value->size() && !in.problem(); ++i) {
    const Json& one = (*value)[i];
    const std::string at = fmt::format("prompt[{}]", i);
    if (one.is_string()) {
      out.emplace_back(one.get<std::string>());
    } else if (!one.is_array()) {
      in.wrong_type(at, "a string or an array of token ids", one);
    } else if (auto ids = read_ids(in, at, one, vocab)) {
      out.emplace_back(std::move(*ids));
    }
  }
  return out;
}

// A token as completions name it: its text, or its bytes where they are no text of their own.
std::string completion_token(const std::string& bytes) {
  if (!find_invalid_utf8(bytes)) return bytes;
  std::string out = "bytes:";
  for (const char c : bytes) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  return out;
}

float finite(float logprob) { return std::max(logprob, kLeastLogprob); }

const char* name_of(Finish finish) { return finish == Finish::stop ? "stop" : "length"; }

Json usage_json(const Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}}};
}

}  // namespace

Parsed<ChatRequest> parse_chat(std::string_view body, const WireLimits& limits,
                               uint64_t random_seed) {
  Parsed<Json> parsed = parse_object(body);
  if (ApiError* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  std::optional<ApiError> problem;
  Fields in(std::get<Json>(parsed), "", problem);

  ChatRequest out{.options = read_options(in, limits, random_seed), .messages = read_messages(in)};
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  // max_tokens is the older name of the same field.
  for (const char* name : {"max_tokens", "max_completion_tokens"})
    if (const auto most = in.integer(name, 1, kAny))
      out.options.max_tokens = static_cast<size_t>(*most);
  const auto top = in.integer("top_logprobs", 0, kMaxChatLogprobs);
  if (in.flag("logprobs")) {
    out.options.top_logprobs = static_cast<size_t>(top.value_or(0));
  } else if (top) {
    in.refuse("top_logprobs", "it is only allowed when 'logprobs' is true.");
  }
  refuse_what_is_missing(in);
  if (problem) return std::move(*problem);
  return out;
}

Parsed<CompletionRequest> parse_completion(std::string_view body, const WireLimits& limits,
                                           uint64_t random_seed) {
  Parsed<Json> parsed = parse_object(body);
  if (ApiError* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  std::optional<ApiError> problem;
  Fields in(std::get<Json>(parsed), "", problem);

  CompletionRequest out{.options = read_options(in, limits, random_seed),
                        .prompts = read_prompts(in, limits.vocab),
                        .echo = in.flag("echo")};
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  out.options.max_tokens = static_cast<size_t>(
      in.integer("max_tokens", 0, kAny).value_or(int64_t{kDefaultCompletionTokens}));
  if (const auto top = in.integer("logprobs", 0, kMaxCompletionLogprobs))
    out.options.top_logprobs = static_cast<size_t>(*top);
  if (out.echo && out.options.top_logprobs)
    in.unsupported("echo", "log-probabilities of the prompt are not served.");
  if (const Json* suffix = in.find("suffix"); suffix != nullptr && *suffix != "")
    in.unsupported("suffix", "filling in the middle is not served.");
  const auto best_of = in.integer("best_of", 0, kAny);
  if (best_of && *best_of != static_cast<int64_t>(out.options.choices))
    in.unsupported("best_of", "it must equal 'n'.");
  if (out.prompts.size() > limits.max_choices / out.options.choices)
    in.refuse("prompt", fmt::format("{} prompts of {} choices are more than the {} answers that "
                                    "one request may ask for.",
                                    out.prompts.size(), out.options.choices, limits.max_choices));
  if (problem) return std::move(*problem);
  return out;
}

uint64_t seed_of_choice(uint64_t seed, size_t index) {
  return seed + 0x9E3779B97F4A7C15u * uint64_t{index};  // far apart for neighbouring seeds
}

ReplyWriter::ReplyWriter(Head head, TokenBytes token_bytes)
    : head_(std::move(head)), token_bytes_(std::move(token_bytes)) {}

ReplyWriter::Json ReplyWriter::chat_logprobs(std::span<const TokenLogprob> logprobs) const {
  const auto entry = [&](TokenId id, float logprob) {
    const std::string bytes = token_bytes_(id);
    Json numbers = Json::array();
    for (const char c : bytes) numbers.push_back(static_cast<unsigned char>(c));
    return Json{
        {"token", repair_utf8(bytes)}, {"logprob", finite(logprob)}, {"bytes", std::move(numbers)}};
  };
  Json content = Json::array();
  for (const TokenLogprob& token : logprobs) {
    content.push_back(entry(token.id, token.logprob));
    Json& top = content.back()["top_logprobs"] = Json::array();
    for (const auto& [id, logprob] : token.top) top.push_back(entry(id, logprob));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

ReplyWriter::Json ReplyWriter::completion_logprobs(std::span<const TokenLogprob> logprobs,
                                                   size_t text_offset) const {
  Json tokens = Json::array(), values = Json::array(), tops = Json::array(),
       offsets = Json::array();
  for (const TokenLogprob& token : logprobs) {
    const std::string bytes = token_bytes_(token.id);
    const std::string name = completion_token(bytes);
    Json top = Json::object();
    for (const auto& [id, logprob] : token.top)
      top[completion_token(token_bytes_(id))] = finite(logprob);
    top[name] = finite(token.logprob);
    tokens.push_back(name);
    values.push_back(finite(token.logprob));
    tops.push_back(std::move(top));
    offsets.push_back(text_offset);
    text_offset += count_code_points(bytes);
  }
  return {{"tokens", std::move(tokens)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

ReplyWriter::Json ReplyWriter::logprobs_json(std::span<const TokenLogprob> logprobs,
                                             size_t text_offset) const {
  if (!head_.logprobs) return nullptr;
  return head_.chat ? chat_logprobs(logprobs) : completion_logprobs(logprobs, text_offset);
}

ReplyWriter::Json ReplyWriter::envelope(const char* object) const {
  return {{"id", head_.id},
          {"object", object},
          {"created", head_.created},
          {"model", head_.model},
          {"system_fingerprint", head_.fingerprint}};
}

std::string ReplyWriter::whole(std::span<const Answer> choices, const Usage& usage) const {
  Json json = envelope(head_.chat ? "chat.completion" : "text_completion");
  Json& list = json["choices"] = Json::array();
  for (size_t i = 0; i < choices.size(); ++i) {
    const Answer& answer = choices[i];
    Json choice = {{"index", i}};
    if (head_.chat) {
      choice["message"] = {{"role", "assistant"}, {"content", answer.text}, {"refusal", nullptr}};
    } else {
      choice["text"] = answer.text;
    }
    choice["logprobs"] = logprobs_json(answer.logprobs, 0);
    choice["finish_reason"] = name_of(answer.finish);
    list.push_back(std::move(choice));
  }
  json["usage"] = usage_json(usage);
  return dump(json);
}

std::string ReplyWriter::chunk(Json choices, const Usage* usage) const {
  Json json = envelope(head_.chat ? "chat.completion.chunk" : "text_completion");
  json["choices"] = std::move(choices);
  if (head_.include_usage) json["usage"] = usage != nullptr ? usage_json(*usage) : Json();
  return dump(json);
}

std::string ReplyWriter::opening(size_t choice) const {
  return chunk(Json::array({{{"index", choice},
                             {"delta", {{"role", "assistant"}, {"content", ""}}},
                             {"logprobs", nullptr},
                             {"finish_reason", nullptr}}}));
}

std::string ReplyWriter::part(size_t choice, std::string_view text,
                              std::span<const TokenLogprob> logprobs, size_t text_offset) const {
  Json json = {{"index", choice}};
  if (head_.chat) {
    json["delta"] = {{"content", text}};
  } else {
    json["text"] = text;
  }
  json["logprobs"] = logprobs_json(logprobs, text_offset);
  json["finish_reason"] = nullptr;
  return chunk(Json::array({std::move(json)}));
}

std::string ReplyWriter::closing(size_t choice, Finish finish) const {
  Json json = {{"index", choice}};
  if (head_.chat) {
    json["delta"] = Json::object();
  } else {
    json["text"] = "";
  }
  json["logprobs"] = nullptr;
  json["finish_reason"] = name_of(finish);
  return chunk(Json::array({std::move(json)}));
}

std::string ReplyWriter::usage(const Usage& usage) const { return chunk(Json::array(), &usage); }

std::string model_body(const std::string& name, int64_t created) {
  return dump({{"id", name}, {"object", "model"}, {"created", created}, {"owned_by", "moru"}});
}

std::string models_body(std::span<const std::string> names, int64_t created) {
  std::vector<std::string> bodies;
  for (const std::string& name : names) bodies.push_back(model_body(name, created));
  return fmt::format(R"({{"object":"list","data":[{}]}})", fmt::join(bodies, ","));
}

}  // namespace moru
