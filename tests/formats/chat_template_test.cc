#include "formats/chat_template.h"

#include <doctest/doctest.h>
#include <stdlib.h>
#include <time.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/files.h"
#include "base/hash.h"
#include "support.h"

using namespace moru;
using nlohmann::ordered_json;
namespace fs = std::filesystem;

namespace {

constexpr int64_t kNoon =
    1'769'860'800;  // 2026-01-31 12:00 UTC, as tests/parity/expect_chat_templates.py

const fs::path kGolden = fs::path(MORU_SOURCE_DIR) / "tests/golden";

void set_utc() {
  ::setenv("TZ", "UTC", 1);
  ::tzset();
}

ordered_json read_json(const fs::path& path) { return ordered_json::parse(read_file(path)); }

ChatTemplate::Inputs inputs_of(const ordered_json& conversation) {
  ChatTemplate::Inputs inputs;
  inputs.messages = conversation["messages"];
  if (conversation.contains("tools")) inputs.tools = conversation["tools"];
  inputs.add_generation_prompt = conversation.value("add_generation_prompt", false);
  inputs.bos_token = "<s>";
  inputs.eos_token = "</s>";
  if (conversation.contains("extra"))
    for (const auto& [name, value] : conversation["extra"].items()) inputs.extra[name] = value;
  inputs.now = kNoon;
  return inputs;
}

// What the conversation renders to; null where it is refused.
ordered_json outcome(const std::string& source, const ChatTemplate::Inputs& inputs) {
  try {
    return ChatTemplate("test", source).render(inputs);
  } catch (const Error&) {
    return nullptr;
  }
}

std::string render(std::string_view source, const ordered_json& messages = ordered_json::array()) {
  ChatTemplate::Inputs inputs;
  inputs.messages = messages;
  inputs.now = kNoon;
  return ChatTemplate("test", source).render(inputs);
}

Error refusal(std::string_view source, const ordered_json& messages = ordered_json::array()) {
  return error_from([&] { render(source, messages); });
}

std::vector<fs::path> template_folders() {
  std::vector<fs::path> folders;
  if (const char* peers = std::getenv("MORU_PEERS")) {
    folders.emplace_back(peers);
  } else if (const char* home = std::getenv("HOME")) {
    folders.push_back(fs::path(home) / ".cache/moru-peers");
  }
  if (const char* more = std::getenv("MORU_TEMPLATES")) {
    std::string_view list = more;
    while (!list.empty()) {
      const size_t end = std::min(list.find(':'), list.size());
      if (end > 0) folders.emplace_back(list.substr(0, end));
      list.remove_prefix(std::min(end + 1, list.size()));
    }
  }
  return folders;
}

// Templates of real models on this machine, by the hash of their text.
std::map<std::string, std::string> find_templates() {
  std::map<std::string, std::string> found;
  const auto add = [&](const std::string& source) { found.emplace(sha256(source), source); };
  for (const fs::path& folder : template_folders()) {
    if (!fs::is_directory(folder)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
      const fs::path& path = entry.path();
      if (path.extension() == ".jinja" && path.stem().extension() != ".py") add(read_file(path));
      if (path.filename() != "tokenizer_config.json" && path.filename() != "chat_template.json")
        continue;
      const ordered_json config = read_json(path);
      if (!config.contains("chat_template")) continue;
      const ordered_json& templates = config["chat_template"];
      if (templates.is_string()) add(templates.get<std::string>());
      if (templates.is_array())
        for (const auto& named : templates) add(named["template"].get<std::string>());
    }
  }
  return found;
}

}  // namespace

TEST_CASE("small templates render what Jinja2 renders, and fail where it fails") {
  set_utc();
  const ordered_json golden = read_json(kGolden / "jinja.json");
  ChatTemplate::Inputs inputs;
  inputs.messages = golden["variables"]["messages"];
  inputs.now = kNoon;
  for (const auto& [name, value] : golden["variables"].items())
    if (name != "messages") inputs.extra[name] = value;
  REQUIRE(golden["cases"].size() > 200);
  for (const auto& example : golden["cases"]) {
    const auto source = example["template"].get<std::string>();
    CAPTURE(source);
    CHECK(outcome(source, inputs) == example["output"]);
  }
}

TEST_CASE("templates of real models render what transformers renders, to the byte") {
  set_utc();
  const std::map<std::string, std::string> templates = find_templates();
  const ordered_json golden = read_json(kGolden / "chat_templates.json");
  const std::string conversations_text = read_file(kGolden / "chat_conversations.json");
  REQUIRE(golden["conversations"] == sha256(conversations_text));
  const ordered_json conversations = ordered_json::parse(conversations_text);
  size_t compared = 0, unknown = 0;
  for (const auto& [hash, source] : templates) {
    if (!golden["templates"].contains(hash)) {
      ++unknown;
      continue;
    }
    const ordered_json& expected = golden["templates"][hash];
    REQUIRE(expected.size() == conversations.size());
    size_t i = 0;
    for (const auto& [name, conversation] : conversations.items()) {
      // Bindings cannot be captured by what CAPTURE makes of them.
      INFO("template ", std::string(hash), ", conversation ", std::string(name));
      const ordered_json output = outcome(source, inputs_of(conversation));
      const ordered_json digest =
          output.is_null() ? output : ordered_json(sha256(output.get<std::string>()).substr(0, 12));
      CHECK(digest == expected[i++]);
      ++compared;
    }
  }
  if (compared == 0)
    MESSAGE("skipped: no known template below MORU_PEERS or MORU_TEMPLATES");
  else
    MESSAGE("compared ", compared, " outputs; ", unknown, " templates without golden outputs");
}

TEST_CASE("an error names the file, the line and what is wrong") {
  Error error = error_from([] { ChatTemplate("model.gguf: chat template", "a\n\n{{ 1 + }}"); });
  CHECK(error.kind() == ErrorKind::bad_input);
  CHECK(error.where() == "model.gguf: chat template: line 3");
  CHECK(error.problem() == "}} where an expression belongs");
  error = refusal("a\n{% for m in messages %}\n{{ m.content.text }}\n{% endfor %}",
                  {{{"role", "user"}}});
  CHECK(error.where() == "test: line 3");
  CHECK(error.problem() == "'dict object' has no attribute 'content'");
  error = refusal("{% if true %}\n{% if true %}\n{% endif %}");
  CHECK(error.problem() == "the template ends before {% endif %} of line 1");
  error = refusal("x\n{{ raise_exception('roles must alternate') }}");
  CHECK(error.problem() == "roles must alternate");
  CHECK(error.where() == "test: line 2");
  CHECK(refusal("{{ 'x'|nofilter }}").problem() == "there is no filter 'nofilter'");
  CHECK(refusal("{{ f(1) }}").problem() == "'f' is undefined");
  CHECK(refusal("{{ messages.append(1) }}").problem().find("cannot change") != std::string::npos);
  CHECK(refusal("{% include 'other' %}").kind() == ErrorKind::unsupported);
}

TEST_CASE("tokens that a model lacks are undefined for its template") {
  ChatTemplate::Inputs inputs;
  inputs.bos_token = "<s>";
  const ChatTemplate both("test", "{{ bos_token }}{{ eos_token is defined }}");
  CHECK(both.render(inputs) == "<s>False");
}

TEST_CASE("tools and documents that are not given are none, not undefined") {
  CHECK(render("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}") ==
        "TrueTrueFalse");
}

TEST_CASE("reasoning is found under each of its names") {
  const ordered_json messages = ordered_json::parse(
      R"([{"role":"assistant","reasoning":"r","content":"c"},{"role":"user","content":"u"}])");
  CHECK(render("{{ messages|tojson }}", messages) ==
        R"([{"thinking": "r", "role": "assistant", "reasoning": "r", "content": "c", )"
        R"("reasoning_content": "r"}, {"role": "user", "content": "u"}])");
}

TEST_CASE("text that is not UTF-8 renders with U+FFFD in its place") {
  ordered_json messages = ordered_json::array();
  messages.push_back({{"content", "a\xFFz"}});
  CHECK(render("{{ messages[0].content|length }}{{ messages[0].content }}\xFF", messages) ==
        "3a\uFFFDz\uFFFD");
}

TEST_CASE("the date comes from the inputs where they give one, else from the clock") {
  set_utc();
  CHECK(render("{{ strftime_now('%d %b %Y') }}") == "31 Jan 2026");
  const ChatTemplate year("test", "{{ strftime_now('%Y')|int > 2024 }}");
  CHECK(year.render({}) == "True");
}

TEST_CASE("one template renders in several threads at once") {
  const ChatTemplate source("test", "{% for m in messages %}{{ 'a' ~ m.content }}{% endfor %}");
  ChatTemplate::Inputs inputs;
  for (int i = 0; i < 50; ++i) inputs.messages.push_back({{"content", "b"}});
  const std::string expected = source.render(inputs);
  std::vector<std::string> rendered(4);
  std::vector<std::thread> threads;
  for (std::string& text : rendered)
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) text = source.render(inputs);
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : rendered) CHECK(text == expected);
}

TEST_CASE("a hostile template is stopped, whatever it tries") {
  const std::string in_loops =
      "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
  std::string deep_list, deep_sum = "{{ 1";
  for (int i = 0; i < 20'000; ++i) {
    deep_list += '[';
    deep_sum += "+1";
  }
  const std::vector<std::string> templates = {
      in_loops,
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}",
      "{{ 'x' * 10**15 }}",
      "{{ [0] * 10**12 }}",
      "{{ 'x'|center(10**15) }}",
      "{{ '%1000000000000d' % 1 }}",
      "{{ '{:1000000000000}'.format(1) }}",
      "{{ '%.999999999f' % 1.5 }}",
      "{{ 'a\nb'|indent(10**14) }}",
      "{{ [1]|tojson(indent=10**14) }}",
      "{{ 'x'.ljust(2**62) }}",
      "{% set ns = namespace(s='x') %}{% for i in range(99999) %}{% set ns.s = ns.s ~ ns.s %}"
      "{% endfor %}",
      "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, ns.l] %}"
      "{% endfor %}",
      "{% set ns = namespace(l=[0]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ns.l %}"
      "{% endfor %}",
      "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx"
      "{% endfor %}{% endfor %}{% endset %}",
      "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
      "{{ 2 ** 10 ** 19 }}",
      "{{ 9 ** 9 ** 9 ** 9 }}",
      "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
      "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
      "{{ (',' * 60000000).split(',')|length }}",
      "{{ range(99999)|batch(10**15, 1)|list }}",
      "{{ range(10)|slice(10**15)|list }}",
      "{{ " + deep_list,
      deep_sum + " }}",
      "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns == ns }}{{ [ns] }}{{ ns|tojson }}",
  };
  for (const std::string& source : templates) {
    CAPTURE(source.substr(0, 100));
    CHECK(refusal(source).kind() == ErrorKind::bad_input);
  }
}

TEST_CASE("a long conversation is within the bounds") {
  ordered_json messages = ordered_json::array();
  for (int i = 0; i < 5'000; ++i)
    messages.push_back({{"role", i % 2 ? "assistant" : "user"}, {"content", "some words to say"}});
  const std::string text = render(
      "{% set ns = namespace(out='') %}{% for m in messages %}{% for n in messages[loop.index0:] %}"
      "{% if loop.index > 20 %}{% break %}{% endif %}{% set ns.out = n.content|trim|upper %}"
      "{% endfor %}{{ '<' ~ m.role ~ '>' ~ m.content }}{% endfor %}",
      messages);
  CHECK(text.size() == 2'500 * (std::string("<user>some words to say").size() +
                                std::string("<assistant>some words to say").size()));
}
