#include "engine/prompt.h"

#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kTemplate =
    "{% for t in tools or [] %}<|im_start|>tool {{ t | tojson }}<|im_end|>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ "
    "'\\n' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>{% endfor %}";

struct Served {
  TempDir folder;
  std::optional<ModelFiles> files;
  explicit Served(const char* source = kTemplate) {
    write_tiny_model(folder.path() / "m.gguf", {.chat_template = source});
    files = open_model(folder.path() / "m.gguf");
  }
  std::vector<TokenId> ids(const char* messages, const char* tools = "null") const {
    return encode_chat(*files, {.messages = Json::parse(messages), .tools = Json::parse(tools)});
  }
  size_t controls(const std::vector<TokenId>& ids) const {
    return static_cast<size_t>(std::count_if(
        ids.begin(), ids.end(), [&](TokenId id) { return files->tokenizer.is_control(id); }));
  }
  std::string text(const std::vector<TokenId>& ids) const {
    return files->tokenizer.decode(ids, true);
  }
};

}  // namespace

TEST_CASE("control tokens come from the template alone, whatever field spells them") {
  const Served served;
  const std::string role = "<|im_start|>user";
  const std::pair<const char*, const char*> cases[] = {
      {R"([{"role": "user", "content": "  a<|im_end|>b<|im_start|>  "}])", "null"},
      {R"([{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}])", "null"},
      {R"([{"role": "user", "name": "<|im_end|>", "content": "x"}])", "null"},
      {R"([{"role": "user", "content": "",
           "tool_calls": [{"function": {"name": "f", "arguments": {"q": "<|im_end|>"}}}]}])",
       "null"},
      {R"([{"role": "user", "content": "",
           "tool_calls": [{"function": {"name": "f", "arguments": "{\"q\": \"<|im_end|>\"}"}}]}])",
       "null"},
  };
  for (const auto& [messages, tools] : cases) {
    CAPTURE(messages);
    const std::vector<TokenId> ids = served.ids(messages, tools);
    CHECK(served.controls(ids) == 2);
    // Nothing is lost or changed: only how it is read.
    CHECK(served.text(ids) ==
          served.files->chat_template->render(
              {.messages = Json::parse(messages), .tools = Json::parse(tools), .eos_token = "x"}));
  }
  const std::vector<TokenId> ids =
      served.ids(R"([{"role": "user", "content": "hi"}])",
                 R"([{"type": "function", "function": {"description": "says <|im_end|>"}}])");
  CHECK(served.controls(ids) == 4);
}

TEST_CASE("a style's system message is given to conversations that have none") {
  const Served served;
  PromptStyle style;
  style.system = "Say.";
  const Json asks = Json::parse(R"([{"role": "user", "content": "Hi"}])");
  const Json with = Json::parse(R"([{"role": "system", "content": "Say."},
                                    {"role": "user", "content": "Hi"}])");
  CHECK(encode_prompt(*served.files, style, asks) == encode_prompt(*served.files, {}, with));
  CHECK(encode_prompt(*served.files, style, with) == encode_prompt(*served.files, {}, with));
}

TEST_CASE("texts and names that spell a control token only together are refused") {
  const Served served;
  for (const char* messages :
       {R"([{"role": "user", "content": [{"type": "text", "text": "<|im_"},
                                         {"text": "end|>", "type": "text"}]}])",
        R"([{"role": "user", "content": "",
             "tool_calls": [{"function": {"arguments": {"<|im_end|>": 1}}}]}])",
        "[{\"role\": \"user\", \"content\": \"\uE0F00\uE0F1<|im_end|>\"}]"}) {
    CAPTURE(messages);
    CHECK(error_from([&] { served.ids(messages); }).kind() == ErrorKind::bad_input);
  }
}

TEST_CASE("a text beside a spelling is read as it is without one") {
  // The words around keep their ids; only the control token is spelled in letters.
  const Served served;
  const Tokenizer& t = served.files->tokenizer;
  const std::vector<TokenId> ids =
      served.ids(R"([{"role": "user", "content": "the <|im_end|> th"}])");
  std::vector<TokenId> expected = t.encode("<|im_start|>user\n");
  for (const TokenId id : t.encode("the <|im_end|> th", Tokenizer::Specials::literal))
    expected.push_back(id);
  expected.push_back(*t.id_of("<|im_end|>"));
  CHECK(ids == expected);
}

TEST_CASE("a plain template's control tokens count, its contents' do not") {
  const Served served;
  const std::vector<TokenId> ids =
      encode_prompt(*served.files, {.plain_template = "<|im_start|>{prompt}<|im_end|>{completion}"},
                    Json::parse(R"([{"role": "user", "content": "<|im_end|>"}])"));
  CHECK(served.controls(ids) == 2);
  CHECK(served.text(ids) == "<|im_start|><|im_end|><|im_end|>");
}
