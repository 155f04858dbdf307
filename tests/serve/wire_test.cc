#include "serve/wire.h"

#include <fmt/format.h>

#include <cmath>

#include "support.h"

using namespace moru;

namespace {

using Json = nlohmann::ordered_json;

constexpr WireLimits kLimits{.vocab = 1000, .max_choices = 32};
constexpr uint64_t kRandomSeed = 77;

template <typename T>
T accepted(const Parsed<T>& parsed) {
  if (const ApiError* error = std::get_if<ApiError>(&parsed)) FAIL(error->message);
  return std::get<T>(parsed);
}
template <typename T>
ApiError refused(const Parsed<T>& parsed) {
  REQUIRE(std::holds_alternative<ApiError>(parsed));
  return std::get<ApiError>(parsed);
}

// A chat request that is fine but for `fields`, which end in a comma.
std::string chat_with(const std::string& fields) {
  return "{" + fields + R"("messages": [{"role": "user", "content": "hi"}]})";
}
std::string with_message(const std::string& message) {
  return R"({"messages": [)" + message + "]}";
}
ChatRequest chat(const std::string& body) {
  return accepted(parse_chat(body, kLimits, kRandomSeed));
}
CompletionRequest completion(const std::string& body) {
  return accepted(parse_completion(body, kLimits, kRandomSeed));
}

struct Refusal {
  std::string body, param, code, says;
};

std::string token_bytes(TokenId id) {
  switch (id) {
    case 1:
      return "안";
    case 2:
      return "\xEB\x85";  // the beginning of a syllable
    default:
      return "<|im_end|>";
  }
}

ReplyWriter writer(ReplyWriter::Head head) {
  head.id = "id-1";
  head.created = 1700000000;
  head.model = "tiny";
  head.fingerprint = "fp_0";
  return ReplyWriter(head, token_bytes);
}

}  // namespace

TEST_CASE("a chat request without options has OpenAI's defaults") {
  const ChatRequest r = chat(chat_with(""));
  CHECK(r.options.model.empty());
  CHECK(!r.options.max_tokens);
  CHECK(r.options.sampling.temperature == 1);
  CHECK(r.options.sampling.top_p == 1);
  CHECK(r.options.sampling.top_k == 0);
  CHECK(r.options.sampling.typical_p == 1);
  CHECK(r.options.sampling.dry_multiplier == 0);
  CHECK(r.options.sampling.seed == kRandomSeed);
  CHECK(r.options.choices == 1);
  CHECK(r.options.stop.empty());
  CHECK(!r.options.top_logprobs);
  CHECK(!r.options.stream);
  CHECK(r.messages == Json::parse(R"([{"role": "user", "content": "hi"}])"));
}

TEST_CASE("every option of a chat request arrives") {
  const AnswerOptions o = chat(chat_with(R"(
      "model": "m", "max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 40, "min_p": 0.125,
      "typical_p": 0.75, "dry_multiplier": 0.5, "dry_base": 2, "dry_allowed_length": 3,
      "dry_sequence_breakers": ["나"], "repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 2, "seed": -1, "n": 3,
      "stop": ["a", "나"], "stream": true, "stream_options": {"include_usage": true},
      "logprobs": true, "top_logprobs": 7, "logit_bias": {"5": -100, "999": 0.5}, "user": "u",)"))
                              .options;
  CHECK(o.model == "m");
  CHECK(o.max_tokens == 5);
  CHECK(o.sampling.temperature == 0.5f);
  CHECK(o.sampling.top_p == 0.25f);
  CHECK(o.sampling.top_k == 40);
  CHECK(o.sampling.min_p == 0.125f);
  CHECK(o.sampling.typical_p == 0.75f);
  CHECK(o.sampling.dry_multiplier == 0.5f);
  CHECK(o.sampling.dry_base == 2);
  CHECK(o.sampling.dry_allowed_length == 3);
  CHECK(o.sampling.dry_sequence_breakers == std::vector<std::string>{"나"});
  CHECK(o.sampling.repetition_penalty == 1.5f);
  CHECK(o.sampling.presence_penalty == -2);
  CHECK(o.sampling.frequency_penalty == 2);
  CHECK(o.sampling.seed == ~uint64_t{0});
  CHECK(o.choices == 3);
  CHECK(o.stop == std::vector<std::string>{"a", "나"});
  CHECK(o.stream);
  CHECK(o.include_usage);
  CHECK(o.top_logprobs == 7);
  REQUIRE(o.sampling.logit_bias.size() == 2);
  CHECK(o.sampling.logit_bias[0] == std::pair<TokenId, float>{5, -100.0f});
  CHECK(o.sampling.logit_bias[1] == std::pair<TokenId, float>{999, 0.5f});
}

TEST_CASE("null is as good as absent, unknown fields are ignored, 5.0 is an integer") {
  const AnswerOptions o =
      chat(chat_with(R"("model": null, "stop": null, "seed": null, "tools": null, "n": 2.0,
                        "response_format": null, "brand_new": {"x": [1]}, "metadata": {"a": "b"},)"))
          .options;
  CHECK(o.choices == 2);
  CHECK(o.sampling.seed == kRandomSeed);
}

TEST_CASE("what an answer is held to, by each field that can say it") {
  using Kind = ConstraintSource::Kind;
  const auto held = [](const std::string& fields) { return chat(chat_with(fields)).options; };
  const AnswerOptions schema = held(R"("response_format": {"type": "json_schema", "json_schema":
      {"name": "n", "strict": true, "schema": {"type": "object"}}},)");
  CHECK(schema.constraint == ConstraintSource{Kind::json_schema, R"({"type":"object"})"});
  CHECK(schema.constraint_field == "response_format.json_schema.schema");
  CHECK(held(R"("response_format": {"type": "json_object"},)").constraint ==
        ConstraintSource{Kind::json_object, ""});
  CHECK(!held(R"("response_format": {"type": "text"},)").constraint);
  for (const char* field : {"guided_json", "json_schema"}) {
    const std::string name = std::string("\"") + field + "\": ";
    CHECK(held(name + R"({"a": 1},)").constraint ==
          ConstraintSource{Kind::json_schema, R"({"a":1})"});
    CHECK(held(name + R"("{ }",)").constraint == ConstraintSource{Kind::json_schema, "{ }"});
  }
  CHECK(held(R"("guided_regex": "[0-9]+",)").constraint == ConstraintSource{Kind::regex, "[0-9]+"});
  CHECK(completion(R"({"prompt": "a", "guided_regex": "b"})").options.constraint ==
        ConstraintSource{Kind::regex, "b"});
}

TEST_CASE("max_completion_tokens is max_tokens' newer name and wins") {
  CHECK(chat(chat_with(R"("max_completion_tokens": 9,)")).options.max_tokens == 9);
  CHECK(chat(chat_with(R"("max_tokens": 5, "max_completion_tokens": 9,)")).options.max_tokens == 9);
}

TEST_CASE("what asks for nothing special is taken: text format, no tools") {
  chat(chat_with(R"("response_format": {"type": "text"},)"));
  chat(chat_with(R"("tools": [], "tool_choice": "auto",)"));
  chat(chat_with(R"("tools": [{"type": "function"}], "tool_choice": "none",)"));
  chat(chat_with(R"("modalities": ["text"],)"));
  chat(chat_with(R"("logprobs": false,)"));
}

TEST_CASE("messages keep what templates read") {
  const Json messages = chat(R"({"messages": [
      {"role": "developer", "content": "be brief", "name": "ops"},
      {"role": "user", "content": [{"type": "text", "text": "안녕"}, {"type": "text", "text": "!"}]},
      {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
          "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}}]},
      {"role": "tool", "tool_call_id": "c1", "content": "42"},
      {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]})")
                            .messages;
  CHECK(messages == Json::parse(R"([
      {"role": "system", "content": "be brief", "name": "ops"},
      {"role": "user", "content": "안녕!"},
      {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function",
          "function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]},
      {"role": "tool", "content": "42", "tool_call_id": "c1"},
      {"role": "assistant", "content": "no"}])"));
}

TEST_CASE("a chat request that cannot be meant is refused by field") {
  const std::vector<Refusal> table = {
      {"", "", "invalid_json", "not JSON"},
      {"{", "", "invalid_json", "not JSON"},
      {"[]", "", "invalid_json", "must be a JSON object, not an array"},
      {"{\"a\xFF\": 1}", "", "invalid_json", "not JSON"},
      {chat_with("\"user\": \"\xED\x95\","), "", "invalid_json", "not JSON"},
      {chat_with(R"("user": "\ud800",)"), "", "invalid_json", "not JSON"},
      {chat_with(R"("temperature": 1e999,)"), "", "invalid_json", "not JSON"},
      {chat_with("\"x\": " + std::string(100'000, '[') + std::string(100'000, ']') + ","), "",
       "invalid_json", "nested deeper"},
      {"{}", "messages", "missing_required_parameter", "required"},
      {R"({"messages": "hi"})", "messages", "invalid_type", "expected an array, but got a string"},
      {R"({"messages": []})", "messages", "invalid_value", "empty"},
      {with_message("1"), "messages[0]", "invalid_type", "an object"},
      {with_message("{}"), "messages[0].role", "missing_required_parameter", ""},
      {with_message(R"({"role": 1})"), "messages[0].role", "invalid_type", "a string"},
      {with_message(R"({"role": "king", "content": "x"})"), "messages[0].role", "invalid_value",
       "king"},
      {with_message(R"({"role": "user"})"), "messages[0].content", "missing_required_parameter",
       ""},
      {with_message(R"({"role": "user", "content": null})"), "messages[0].content",
       "missing_required_parameter", ""},
      {with_message(R"({"role": "user", "content": 5})"), "messages[0].content", "invalid_type",
       ""},
      {with_message(R"({"role": "user", "content": ["x"]})"), "messages[0].content[0]",
       "invalid_type", ""},
      {with_message(R"({"role": "user", "content": [{"type": "image_url", "image_url": {}}]})"),
       "messages[0].content[0].type", "unsupported_parameter", "image_url"},
      {with_message(R"({"role": "user", "content": [{"type": "text"}]})"),
       "messages[0].content[0].text", "missing_required_parameter", ""},
      {with_message(R"({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]})"),
       "messages[0].tool_calls[0].function", "missing_required_parameter", ""},
      {with_message(R"({"role": "assistant", "tool_calls": [{"function": {"name": 1}}]})"),
       "messages[0].tool_calls[0].function.name", "invalid_type", ""},
      {with_message(R"({"role": "user", "content": "a"}, {"role": "user", "content": {}})"),
       "messages[1].content", "invalid_type", "an object"},
      {chat_with(R"("model": 5,)"), "model", "invalid_type", "expected a string"},
      {chat_with(R"("temperature": "1",)"), "temperature", "invalid_type", "expected a number"},
      {chat_with(R"("temperature": 2.5,)"), "temperature", "invalid_value", "between 0 and 2"},
      {chat_with(R"("top_p": -0.5,)"), "top_p", "invalid_value", ""},
      {chat_with(R"("top_k": 1.5,)"), "top_k", "invalid_type", "expected an integer"},
      {chat_with(R"("min_p": 2,)"), "min_p", "invalid_value", ""},
      {chat_with(R"("typical_p": 1.5,)"), "typical_p", "invalid_value", ""},
      {chat_with(R"("dry_multiplier": -1,)"), "dry_multiplier", "invalid_value", ""},
      {chat_with(R"("dry_base": 0.5,)"), "dry_base", "invalid_value", ""},
      {chat_with(R"("dry_sequence_breakers": "x",)"), "dry_sequence_breakers", "invalid_type", ""},
      {chat_with(R"("dry_sequence_breakers": [""],)"), "dry_sequence_breakers", "invalid_value",
       "empty"},
      {chat_with(R"("presence_penalty": 3,)"), "presence_penalty", "invalid_value", ""},
      {chat_with(R"("frequency_penalty": true,)"), "frequency_penalty", "invalid_type", ""},
      {chat_with(R"("max_tokens": 0,)"), "max_tokens", "invalid_value", "1 or more"},
      {chat_with(R"("max_completion_tokens": -3,)"), "max_completion_tokens", "invalid_value", ""},
      {chat_with(R"("n": 0,)"), "n", "invalid_value", ""},
      {chat_with(R"("n": 33,)"), "n", "invalid_value", "between 1 and 32"},
      {chat_with(R"("seed": "a",)"), "seed", "invalid_type", ""},
      {chat_with(R"("stop": 5,)"), "stop", "invalid_type", ""},
      {chat_with(R"("stop": ["a", 1],)"), "stop", "invalid_type", ""},
      {chat_with(R"("stop": "",)"), "stop", "invalid_value", "empty"},
      {chat_with(R"("stop": ["1", "2", "3", "4", "5"],)"), "stop", "invalid_value", "5"},
      {chat_with("\"stop\": \"" + std::string(257, 'x') + "\","), "stop", "invalid_value", "256"},
      {chat_with(R"("stream": "yes",)"), "stream", "invalid_type", "expected a boolean"},
      {chat_with(R"("stream_options": {},)"), "stream_options", "invalid_value", "'stream'"},
      {chat_with(R"("stream": true, "stream_options": {"include_usage": 1},)"),
       "stream_options.include_usage", "invalid_type", ""},
      {chat_with(R"("logprobs": 3,)"), "logprobs", "invalid_type", "expected a boolean"},
      {chat_with(R"("top_logprobs": 3,)"), "top_logprobs", "invalid_value", "'logprobs'"},
      {chat_with(R"("logprobs": true, "top_logprobs": 21,)"), "top_logprobs", "invalid_value", ""},
      {chat_with(R"("logit_bias": [],)"), "logit_bias", "invalid_type", ""},
      {chat_with(R"("logit_bias": {"1000": 1},)"), "logit_bias", "invalid_value", "0 to 999"},
      {chat_with(R"("logit_bias": {"a": 1},)"), "logit_bias", "invalid_value", "'a'"},
      {chat_with(R"("logit_bias": {"99999999999999999999": 1},)"), "logit_bias", "invalid_value",
       ""},
      {chat_with(R"("logit_bias": {"1": 101},)"), "logit_bias.1", "invalid_value", ""},
      {chat_with(R"("logit_bias": {"1": "x"},)"), "logit_bias.1", "invalid_type", ""},
      {chat_with(R"("response_format": {"type": "xml"},)"), "response_format.type", "invalid_value",
       "xml"},
      {chat_with(R"("response_format": {},)"), "response_format.type", "invalid_value", ""},
      {chat_with(R"("response_format": {"type": "json_schema"},)"), "response_format.json_schema",
       "missing_required_parameter", ""},
      {chat_with(R"("response_format": {"type": "json_schema", "json_schema": {"name": "a"}},)"),
       "response_format.json_schema.schema", "missing_required_parameter", ""},
      {chat_with(R"("response_format": {"type": "json_schema", "json_schema": {"schema": 5}},)"),
       "response_format.json_schema.schema", "invalid_type", ""},
      {chat_with(R"("guided_json": 5,)"), "guided_json", "invalid_type", ""},
      {chat_with(R"("guided_regex": 5,)"), "guided_regex", "invalid_type", ""},
      {chat_with(R"("guided_regex": "a", "response_format": {"type": "json_object"},)"),
       "guided_regex", "invalid_value", "response_format"},
      {chat_with(R"("guided_grammar": "root ::= x",)"), "guided_grammar", "unsupported_parameter",
       "guided_json"},
      {chat_with(R"("response_format": "json",)"), "response_format", "invalid_type", ""},
      {chat_with(R"("tools": [{"type": "function", "function": {"name": "f"}}],)"), "tools",
       "unsupported_parameter", "tool"},
      {chat_with(R"("tools": {},)"), "tools", "invalid_type", ""},
      {chat_with(R"("functions": [{"name": "f"}],)"), "functions", "unsupported_parameter", ""},
      {chat_with(R"("tool_choice": "required",)"), "tool_choice", "unsupported_parameter", ""},
      {chat_with(R"("modalities": ["text", "audio"],)"), "modalities", "unsupported_parameter", ""},
  };
  for (const Refusal& row : table) {
    CAPTURE(row.body.substr(0, 200));
    const ApiError error = refused(parse_chat(row.body, kLimits, 0));
    CHECK(error.status == 400);
    CHECK(error.type == "invalid_request_error");
    CHECK(error.param == row.param);
    CHECK(error.code == row.code);
    CHECK(error.message.find(row.says) != std::string::npos);
    CHECK(Json::accept(body_of(error)));
  }
}

TEST_CASE("an object of very many members is refused before it costs anything") {
  std::string body = R"({"messages": [], "x": {)";
  for (int i = 0; i < 200'000; ++i) body += fmt::format("\"{}\": 0,", i);
  body += R"("z": 0}})";
  CHECK(refused(parse_chat(body, kLimits, 0)).message.find("members") != std::string::npos);
}

TEST_CASE("the prompts of a completion are a text, ids, or arrays of either") {
  using Ids = std::vector<TokenId>;
  const auto one = completion(R"({"prompt": "안녕"})");
  REQUIRE(one.prompts.size() == 1);
  CHECK(std::get<std::string>(one.prompts[0]) == "안녕");
  CHECK(one.options.max_tokens == 16);
  CHECK(!one.echo);

  const auto ids = completion(R"({"prompt": [1, 2, 999]})");
  REQUIRE(ids.prompts.size() == 1);
  CHECK(std::get<Ids>(ids.prompts[0]) == Ids{1, 2, 999});

  const auto mixed = completion(R"({"prompt": ["a", [3], ""], "echo": true, "max_tokens": 0,
                                    "best_of": 2, "n": 2, "logprobs": null})");
  REQUIRE(mixed.prompts.size() == 3);
  CHECK(std::get<std::string>(mixed.prompts[0]) == "a");
  CHECK(std::get<Ids>(mixed.prompts[1]) == Ids{3});
  CHECK(mixed.echo);
  CHECK(mixed.options.max_tokens == 0);

  CHECK(completion(R"({"prompt": "a", "logprobs": 0})").options.top_logprobs == 0);
}

TEST_CASE("a completion request that cannot be meant is refused by field") {
  const std::vector<Refusal> table = {
      {"{}", "prompt", "missing_required_parameter", ""},
      {R"({"prompt": 5})", "prompt", "invalid_type", ""},
      {R"({"prompt": []})", "prompt", "invalid_value", "empty"},
      {R"({"prompt": [[]]})", "prompt[0]", "invalid_value", "no tokens"},
      {R"({"prompt": [1, "a"]})", "prompt", "invalid_type", ""},
      {R"({"prompt": ["a", 1]})", "prompt[1]", "invalid_type", ""},
      {R"({"prompt": [1000]})", "prompt", "invalid_value", "no token 1000"},
      {R"({"prompt": [-1]})", "prompt", "invalid_value", ""},
      {R"({"prompt": [18446744073709551615]})", "prompt", "invalid_value", ""},
      {R"({"prompt": "a", "logprobs": 6})", "logprobs", "invalid_value", ""},
      {R"({"prompt": "a", "logprobs": true})", "logprobs", "invalid_type", ""},
      {R"({"prompt": "a", "echo": true, "logprobs": 1})", "echo", "unsupported_parameter", ""},
      {R"({"prompt": "a", "suffix": "b"})", "suffix", "unsupported_parameter", ""},
      {R"({"prompt": "a", "best_of": 3})", "best_of", "unsupported_parameter", ""},
      {R"({"prompt": ["a", "b", "c"], "n": 16})", "prompt", "invalid_value", "32"},
  };
  for (const Refusal& row : table) {
    CAPTURE(row.body);
    const ApiError error = refused(parse_completion(row.body, kLimits, 0));
    CHECK(error.param == row.param);
    CHECK(error.code == row.code);
    CHECK(error.message.find(row.says) != std::string::npos);
  }
}

TEST_CASE("choices have seeds of their own, the first the request's") {
  CHECK(seed_of_choice(5, 0) == 5);
  CHECK(seed_of_choice(5, 1) != seed_of_choice(6, 0));
}

TEST_CASE("an error object has all four keys") {
  CHECK(Json::parse(body_of({.message = "m"})) ==
        Json::parse(R"({"error": {"message": "m", "type": "invalid_request_error", "param": null,
                                  "code": null}})"));
  CHECK(
      Json::parse(body_of({.message = "a\xFF", .type = "t", .param = "p", .code = "c"})) ==
      Json::parse(R"({"error": {"message": "a\ufffd", "type": "t", "param": "p", "code": "c"}})"));
}

TEST_CASE("a whole chat reply") {
  const std::vector<Answer> answers = {{.text = "안녕", .finish = Finish::stop},
                                       {.text = "", .finish = Finish::length}};
  CHECK(Json::parse(writer({.chat = true})
                        .whole(answers,
                               {.prompt_tokens = 5, .cached_tokens = 2, .completion_tokens = 3})) ==
        Json::parse(R"({
    "id": "id-1", "object": "chat.completion", "created": 1700000000, "model": "tiny",
    "system_fingerprint": "fp_0",
    "choices": [
      {"index": 0, "message": {"role": "assistant", "content": "안녕", "refusal": null},
       "logprobs": null, "finish_reason": "stop"},
      {"index": 1, "message": {"role": "assistant", "content": "", "refusal": null},
       "logprobs": null, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
              "prompt_tokens_details": {"cached_tokens": 2}}})"));
}

TEST_CASE("chat logprobs give each token's bytes, also where they are half a character") {
  const std::vector<TokenLogprob> logprobs = {
      {.id = 1, .logprob = -0.25f, .top = {{1, -0.25f}, {4, -2.0f}}},
      {.id = 2, .logprob = -INFINITY, .top = {}}};
  const std::vector<Answer> answers = {{.text = "안녕", .logprobs = logprobs}};
  const Json reply = Json::parse(writer({.chat = true, .logprobs = true}).whole(answers, {}));
  CHECK(reply["choices"][0]["logprobs"] == Json::parse(R"({"content": [
    {"token": "안", "logprob": -0.25, "bytes": [236, 149, 136], "top_logprobs": [
      {"token": "안", "logprob": -0.25, "bytes": [236, 149, 136]},
      {"token": "<|im_end|>", "logprob": -2.0, "bytes": [60,124,105,109,95,101,110,100,124,62]}]},
    {"token": "\ufffd", "logprob": -9999.0, "bytes": [235, 133], "top_logprobs": []}],
    "refusal": null})"));
}

TEST_CASE("completion logprobs have OpenAI's older form") {
  const std::vector<TokenLogprob> logprobs = {{.id = 1, .logprob = -1, .top = {{4, -0.5f}}},
                                              {.id = 2, .logprob = -2, .top = {}}};
  const std::vector<Answer> answers = {
      {.text = "x", .logprobs = logprobs, .finish = Finish::length}};
  const Json reply = Json::parse(writer({.chat = false, .logprobs = true}).whole(answers, {}));
  CHECK(reply["object"] == "text_completion");
  CHECK(reply["choices"][0] == Json::parse(R"({"index": 0, "text": "x", "logprobs": {
    "tokens": ["안", "bytes:\\xeb\\x85"], "token_logprobs": [-1.0, -2.0],
    "top_logprobs": [{"<|im_end|>": -0.5, "안": -1.0}, {"bytes:\\xeb\\x85": -2.0}],
    "text_offset": [0, 1]}, "finish_reason": "length"})"));
}

TEST_CASE("the chunks of a chat stream") {
  const ReplyWriter w = writer({.chat = true});
  const auto choice = [](const std::string& chunk) {
    const Json json = Json::parse(chunk);
    CHECK(json["object"] == "chat.completion.chunk");
    CHECK(!json.contains("usage"));
    return json["choices"][0];
  };
  CHECK(choice(w.opening(1)) ==
        Json::parse(R"({"index": 1, "delta": {"role": "assistant", "content": ""},
                        "logprobs": null, "finish_reason": null})"));
  CHECK(choice(w.part(1, "안", {}, 0)) == Json::parse(R"({"index": 1, "delta": {"content": "안"},
                        "logprobs": null, "finish_reason": null})"));
  CHECK(choice(w.closing(1, Finish::length)) ==
        Json::parse(R"({"index": 1, "delta": {}, "logprobs": null, "finish_reason": "length"})"));
}

TEST_CASE("with usage asked for, every chunk says null and the last has no choices") {
  for (const bool chat : {true, false}) {
    const ReplyWriter w = writer({.chat = chat, .include_usage = true});
    CHECK(Json::parse(w.part(0, "a", {}, 0)).at("usage").is_null());
    const Json last = Json::parse(w.usage({.prompt_tokens = 2, .completion_tokens = 1}));
    CHECK(last["choices"] == Json::array());
    CHECK(last["usage"]["total_tokens"] == 3);
  }
}

TEST_CASE("the models") {
  const std::string names[] = {"모델", "adapter"};
  CHECK(Json::parse(models_body(names, 5)) == Json::parse(R"({"object": "list", "data": [
          {"id": "모델", "object": "model", "created": 5, "owned_by": "moru"},
          {"id": "adapter", "object": "model", "created": 5, "owned_by": "moru"}]})"));
}
