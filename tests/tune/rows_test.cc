#include "tune/rows.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <fstream>

#include "support.h"
#include "tune/examples.h"
#include "tune/preference_data.h"

using namespace moru;

namespace {

using Json = nlohmann::ordered_json;
using Kind = TrainingRow::Kind;

TrainingRow row(const char* json, const RowFormat& format = {}) {
  return read_row(Json::parse(json), format);
}
Json json(const char* text) { return Json::parse(text); }

std::string field_of_problem(const char* text, const RowFormat& format = {}) {
  try {
    row(text, format);
  } catch (const UnusableRow& problem) {
    CHECK(!problem.what.empty());
    return problem.field;
  }
  return "(usable)";
}

const Json kAsked = json(R"([{"role": "user", "content": "q"}])");
const Json kAnswered = json(R"([{"role": "user", "content": "q"},
                                {"role": "assistant", "content": "a"}])");
const Json kGood = json(R"([{"role": "assistant", "content": "good"}])");
const Json kBad = json(R"([{"role": "assistant", "content": "bad"}])");

// ChatML over a byte vocabulary.
const ModelFiles& model() {
  static const ModelFiles files = open_model(MORU_SOURCE_DIR "/tests/golden/tune/llama");
  return files;
}

LoadedExamples load(LoadExamples request) {
  Pool pool(2);
  return load_examples(pool, model(), request);
}
LoadedExamples load(const std::filesystem::path& path) {
  return load({.sources = {{.path = path}}});
}

LoadedExamples pairs_of(const LoadExamples& request) {
  Pool pool(2);
  return load_pairs(pool, model(), request);
}
LoadedExamples labelled_of(const LoadExamples& request) {
  Pool pool(2);
  return load_labelled(pool, model(), request);
}

std::string text_of(const ExampleView& e) { return model().tokenizer.decode(e.ids, true); }

}  // namespace

TEST_CASE("golden rows: conversations of every format are the same conversation") {
  for (
      const char* text :
      {R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})",
       R"({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})",
       R"({"conversations": [{"role": "user", "content": "q"},
                              {"role": "assistant", "content": "a"}]})",
       R"({"prompt": "q", "completion": "a"})",
       R"({"prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}]})",
       R"({"instruction": "q", "output": "a"})",
       R"({"instruction": "q", "input": "", "output": "a", "history": [], "system": ""})",
       R"({"instruction": "q", "input": null, "output": "a", "history": null})"}) {
    CAPTURE(text);
    const TrainingRow r = row(text);
    CHECK(r.kind == Kind::conversation);
    CHECK(r.messages == kAnswered);
    CHECK(r.tools.is_null());
  }
  CHECK(row(R"({"text": "all"})").text == "all");
  CHECK(row(R"({"instruction": "Add.", "input": "1 2", "output": 3, "system": "s",
                "history": [["h", "i"]]})")
            .messages ==
        json(R"([{"role": "system", "content": "s"}, {"role": "user", "content": "h"},
                 {"role": "assistant", "content": "i"}, {"role": "user", "content": "Add.\n1 2"},
                 {"role": "assistant", "content": "3"}])"));
}

TEST_CASE("golden rows: tools, calls and their results") {
  const Json tools = json(R"([{"type": "function", "function": {"name": "f"}}])");
  // OpenAI's own shape passes as it is.
  const char* openai = R"({"messages": [{"role": "user", "content": "q"},
      {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
        "function": {"name": "f", "arguments": {"x": 1}}}]},
      {"role": "tool", "tool_call_id": "1", "name": "f", "content": "2"},
      {"role": "assistant", "content": "a"}],
      "tools": [{"type": "function", "function": {"name": "f"}}]})";
  CHECK(row(openai).messages == json(openai)["messages"]);
  CHECK(row(openai).tools == tools);
  // ShareGPT's words become it.
  const TrainingRow r = row(R"({"conversations": [{"from": "human", "value": "q"},
      {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
      {"from": "observation", "value": "2"}, {"from": "gpt", "value": "a"}],
      "system": "s", "tools": "[{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]"})");
  CHECK(r.messages == json(R"([{"role": "system", "content": "s"},
      {"role": "user", "content": "q"},
      {"role": "assistant", "content": "", "tool_calls": [{"type": "function",
        "function": {"name": "f", "arguments": {"x": 1}}}]},
      {"role": "tool", "content": "2"}, {"role": "assistant", "content": "a"}])"));
  CHECK(r.tools == tools);
}

TEST_CASE("golden rows: preferences in every shape") {
  for (const char* text :
       {R"({"prompt": "q", "chosen": "good", "rejected": "bad"})",
        R"({"prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}]})",
        // Implicit prompts, and a prompt that the answers repeat.
        R"({"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "q"},
                         {"role": "assistant", "content": "bad"}]})",
        R"({"prompt": "q",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "q"},
                         {"role": "assistant", "content": "bad"}]})",
        // LLaMA-Factory's two, and a comparison.
        R"({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"})",
        R"({"conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"}})",
        R"({"instruction": "q", "input": "", "output": ["good", "bad"]})"}) {
    CAPTURE(text);
    const TrainingRow r = row(text);
    CHECK(r.kind == Kind::preference);
    CHECK(r.messages == kAsked);
    CHECK(r.chosen == kGood);
    CHECK(r.rejected == kBad);
  }
  const TrainingRow implicit = row(R"({"chosen": "Q: 하나? A: 네", "rejected": "Q: 하나? A: 넷"})");
  CHECK(implicit.messages[0]["content"] == "Q: 하나? A:");
  CHECK(implicit.chosen[0]["content"] == " 네");
  CHECK(implicit.rejected[0]["content"] == " 넷");
}

TEST_CASE("golden rows: rated answers") {
  for (const auto& [text, wanted] :
       {std::pair{R"({"prompt": "q", "completion": "a", "label": true})", true},
        {R"({"prompt": "q", "completion": "a", "label": false})", false},
        {R"({"messages": [{"role": "user", "content": "q"},
                          {"role": "assistant", "content": "a"}], "kto_tag": false})",
         false},
        {R"({"instruction": "q", "output": "a", "kto_tag": true})", true}}) {
    CAPTURE(text);
    const TrainingRow r = row(text);
    CHECK(r.kind == Kind::rated);
    CHECK(r.desirable == wanted);
    CHECK(r.messages == kAsked);
    CHECK(r.chosen == json(R"([{"role": "assistant", "content": "a"}])"));
  }
  // A label that is no truth is another column of an ordinary pair.
  CHECK(row(R"({"prompt": "q", "completion": "a", "label": "sports"})").kind == Kind::conversation);
}

TEST_CASE("rows that cannot be used name the field") {
  for (const auto& [text, field] : {
           std::pair{R"({"question": "?"})", ""},
           {R"({"messages": []})", "messages"},
           {R"({"messages": [{"role": "king", "content": "x"}]})", "role"},
           {R"({"messages": [{"role": "user", "content": "x"}]})", "messages"},
           {R"({"messages": [{"role": "user"}]})", "content"},
           {R"({"prompt": {"a": 1}, "completion": "x"})", "prompt"},
           {R"({"instruction": "x", "output": [1, 2]})", "output"},
           {R"({"instruction": "x", "output": "y", "history": [["a"]]})", "history"},
           {R"({"instruction": "x", "output": "y", "tools": "[{"})", "tools"},
           {R"({"prompt": "q", "chosen": "a", "rejected": "a"})", "rejected"},
           // ShareGPT's order: two questions, two answers, an answer first, a late system text.
           {R"({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"},
                                  {"from": "gpt", "value": "c"}]})",
            "conversations"},
           {R"({"conversations": [{"from": "gpt", "value": "a"}]})", "conversations"},
           {R"({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                  {"from": "gpt", "value": "c"}]})",
            "conversations"},
           {R"({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                  {"from": "system", "value": "c"},
                                  {"from": "gpt", "value": "d"}]})",
            "conversations"},
       }) {
    CAPTURE(text);
    CHECK(field_of_problem(text) == field);
  }
}

TEST_CASE("a dataset_info.json names files, columns, tags and how many rows") {
  const TempDir dir;
  const auto path = dir.file("dataset_info.json", R"({
    "plain": {"file_name": "a.json"},
    "mapped": {"file_name": "sub/b.jsonl", "num_samples": 3,
               "columns": {"prompt": "ask", "query": "more", "response": "say", "system": "sys"}},
    "chats": {"file_name": "c.json", "formatting": "sharegpt",
              "columns": {"messages": "talk"},
              "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "guest",
                       "assistant_tag": "host", "system_tag": "house"}},
    "oa": {"file_name": "d.json", "formatting": "openai"},
    "ranked": {"file_name": "e.json", "ranking": true,
               "columns": {"prompt": "q", "chosen": "yes", "rejected": "no"}},
    "rated": {"file_name": "f.json", "formatting": "sharegpt",
              "columns": {"messages": "messages", "kto_tag": "ok"},
              "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                       "assistant_tag": "assistant"}},
    "raw": {"file_name": "g.txt.jsonl", "columns": {"prompt": "text"}},
    "far": {"hf_hub_url": "someone/something"},
    "seen": {"file_name": "h.json", "columns": {"images": "images"}}
  })");
  const auto format = [&](const char* name) {
    return read_dataset_info(path, {name}).at(0).format;
  };
  const auto mapped = read_dataset_info(path, {"mapped"}).at(0);
  CHECK(mapped.file == dir.path() / "sub/b.jsonl");
  CHECK(mapped.num_samples == 3);
  CHECK(row(R"({"ask": "q", "more": "m", "say": "a", "sys": "s", "input": "not this"})",
            mapped.format)
            .messages ==
        json(R"([{"role": "system", "content": "s"}, {"role": "user", "content": "q\nm"},
                 {"role": "assistant", "content": "a"}])"));
  CHECK(row(R"({"instruction": "q", "output": "a"})", format("plain")).messages == kAnswered);
  CHECK(row(R"({"talk": [{"who": "house", "says": "s"}, {"who": "guest", "says": "q"},
                         {"who": "host", "says": "a"}]})",
            format("chats"))
            .messages ==
        json(R"([{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                 {"role": "assistant", "content": "a"}])"));
  CHECK(row(R"({"messages": [{"role": "user", "content": "q"},
                             {"role": "assistant", "content": "a"}]})",
            format("oa"))
            .messages == kAnswered);
  CHECK(row(R"({"q": "q", "yes": "good", "no": "bad"})", format("ranked")).chosen == kGood);
  CHECK(field_of_problem(R"({"q": "q", "yes": "good"})", format("ranked")) == "no");
  CHECK(row(R"({"messages": [{"role": "user", "content": "q"},
                             {"role": "assistant", "content": "a"}], "ok": "false"})",
            format("rated"))
            .desirable == false);
  CHECK(row(R"({"text": "all"})", format("raw")).text == "all");
  for (const char* name : {"far", "seen"})
    CHECK(error_from([&] { format(name); }).kind() == ErrorKind::unsupported);
  CHECK(error_from([&] { format("none"); }).cure().find("plain") != std::string::npos);
  for (const char* broken : {"[]", "{\"a\": 1}", "{\"a\": {\"file_name\": 1}}", "{",
                             "{\"a\": {\"file_name\": \"x\", \"formatting\": \"odd\"}}",
                             "{\"a\": {\"file_name\": \"x\", \"columns\": []}}",
                             "{\"a\": {\"file_name\": \"x\", \"num_samples\": -1}}"}) {
    CAPTURE(broken);
    const auto file = dir.file("broken.json", broken);
    CHECK(error_from([&] { read_dataset_info(file); }).where().starts_with(file.string()));
  }
}

TEST_CASE("JSON Lines, arrays, CSV and gzip are found by content and give the same examples") {
  const TempDir dir;
  const std::string lines =
      "{\"prompt\": \"q\", \"completion\": \"a\"}\n{\"prompt\": \"Q\", \"completion\": \"A\"}\n";
  const auto zipped = dir.path() / "zipped";  // no name tells
  const gzFile out = gzopen(zipped.c_str(), "wb");
  gzwrite(out, lines.data(), static_cast<unsigned>(lines.size()));
  gzclose(out);
  std::string crlf = "\xEF\xBB\xBF" + lines;
  for (size_t at = 0; (at = crlf.find('\n', at)) != std::string::npos; at += 2)
    crlf.replace(at, 1, "\r\n");
  const std::filesystem::path files[] = {
      dir.file("a.jsonl", lines),
      dir.file("b.json",
               "[{\"prompt\": \"q\", \"completion\": \"a\"},\n"
               " {\"prompt\": \"Q\", \"completion\": \"A\"}]"),
      dir.file("c.csv", "\xEF\xBB\xBFprompt,completion\r\nq,a\r\n\"Q\",\"A\"\r\n"),
      dir.file("d.jsonl", crlf), zipped};
  for (const auto& file : files) {
    CAPTURE(file);
    const LoadedExamples loaded = load(file);
    REQUIRE(loaded.examples.size() == 2);
    CHECK(loaded.counts.bad == 0);
    CHECK(text_of(loaded.examples[0]).find("q<|im_end|>") != std::string::npos);
    CHECK(text_of(loaded.examples[1]).find("A<|im_end|>") != std::string::npos);
  }
}

TEST_CASE("bad rows are counted with file, line and field, and too many stop the run") {
  const TempDir dir;
  const auto file = dir.file("rows.jsonl",
                             "{\"prompt\": \"q\", \"completion\": \"a\"}\n"
                             "{\"prompt\": \"q\", \"completion\": [1]}\n"
                             "{\"prompt\": \"\xFF\", \"completion\": \"a\"}\n"
                             "not JSON\n"
                             "{\"prompt\": \"q\", \"completion\": \"b\"}\n");
  const LoadedExamples loaded = load({.sources = {{.path = file}}, .max_bad = 3});
  CHECK(loaded.examples.size() == 2);
  CHECK(loaded.counts.bad == 3);
  CHECK(loaded.counts.rows == 5);
  REQUIRE(loaded.problems.size() == 3);
  CHECK(loaded.problems[0].file == file);
  const Error e = error_from([&] { load({.sources = {{.path = file}}, .max_bad = 2}); });
  CHECK(e.kind() == ErrorKind::bad_input);
  CHECK(e.where().find("rows.jsonl: line ") != std::string::npos);
  CHECK(e.cure().find("--max-bad") != std::string::npos);
}

TEST_CASE("every method's reader takes BOM and CRLF, and names file, line and field of bad text") {
  const TempDir dir;
  const auto refused = [&](const char* method, const std::filesystem::path& file, auto&& read) {
    const int line = file.extension() == ".csv" ? 4 : 3;  // after a header
    CAPTURE(method);
    LoadExamples request{.sources = {{.path = file}}, .max_bad = 0};
    const Error e = error_from([&] { read(request); });
    CHECK(e.kind() == ErrorKind::bad_input);
    CHECK(e.where().starts_with(fmt::format("{}: line {}: ", file.string(), line)));
    CHECK(e.problem().find("not UTF-8") != std::string::npos);
    request.max_bad = 1;
    CHECK(read(request) == 2);
    return e.where().substr(e.where().rfind(' ') + 1);
  };
  // A good row, a blank line, a broken row, a good row.
  const auto file = [&](const char* name, const char* first, const char* broken, const char* last) {
    return dir.file(name, fmt::format("\xEF\xBB\xBF{}\r\n\r\n{}\r\n{}\r\n", first, broken, last));
  };
  CHECK(refused("sft",
                file("sft.jsonl", R"({"prompt": "p", "completion": "a"})",
                     "{\"prompt\": \"p\", \"completion\": \"\xC3(\"}",
                     R"({"prompt": "q", "completion": "b"})"),
                [](const LoadExamples& r) { return load(r).examples.size(); }) == "completion");
  CHECK(refused("csv", file("sft.csv", "prompt,completion\r\np,a", "\xFF,b", "q,b"),
                [](const LoadExamples& r) { return load(r).examples.size(); }) == "prompt");
  CHECK(refused("text",
                file("text.jsonl", R"({"text": "one"})", "{\"text\": \"\xED\xA0\x80\"}",
                     R"({"text": "two"})"),
                [](LoadExamples r) {
                  r.raw_text = true;
                  return load(r).examples.size();
                }) == "text");
  CHECK(refused("dpo",
                file("dpo.jsonl", R"({"prompt": "p", "chosen": "a", "rejected": "b"})",
                     "{\"prompt\": \"p\", \"chosen\": \"a\", \"rejected\": \"\xFF\"}",
                     R"({"prompt": "q", "chosen": "a", "rejected": "b"})"),
                [](const LoadExamples& r) { return pairs_of(r).examples.size() / 2; }) ==
        "rejected");
  CHECK(refused("kto",
                file("kto.jsonl", R"({"prompt": "p", "completion": "a", "label": true})",
                     "{\"prompt\": \"\xFF\", \"completion\": \"a\", \"label\": true}",
                     R"({"prompt": "q", "completion": "a", "label": false})"),
                [](const LoadExamples& r) { return labelled_of(r).examples.size(); }) == "prompt");
}

TEST_CASE("a line of 100 MB is a row like any other") {
  const TempDir dir;
  const auto file = dir.path() / "rows.jsonl";
  {
    std::ofstream out(file);
    out << "{\"prompt\": \"q\", \"completion\": \"a\"}\n{\"notes\": \"";
    const std::string part(1 << 20, 'x');
    for (size_t i = 0; i < 100; ++i) out << part;
    out << "\", \"prompt\": \"q\", \"completion\": \"b\"}\n"
        << "{\"prompt\": \"q\", \"completion\": \"c\"}\n";
  }
  const LoadedExamples loaded = load(file);
  REQUIRE(loaded.examples.size() == 3);
  CHECK(loaded.examples[1].line == 2);
  CHECK(text_of(loaded.examples[2]).find("c<|im_end|>") != std::string::npos);
}

TEST_CASE("weights repeat and thin sources, and the seed chooses which") {
  const TempDir dir;
  std::string a, b;
  for (int i = 0; i < 100; ++i)
    a += fmt::format("{{\"prompt\": \"{}\", \"completion\": \"a\"}}\n", i);
  for (int i = 0; i < 10; ++i)
    b += fmt::format("{{\"prompt\": \"{}\", \"completion\": \"b\"}}\n", i);
  const auto first = dir.file("a.jsonl", a), second = dir.file("b.jsonl", b);
  const auto picked = [&](double wa, double wb, uint64_t samples, uint64_t seed) {
    const LoadedExamples l =
        load({.sources = {{.path = first, .weight = wa, .num_samples = samples},
                          {.path = second, .weight = wb}},
              .seed = seed});
    std::array<size_t, 2> counts{};
    std::vector<uint64_t> lines;
    for (size_t i = 0; i < l.examples.size(); ++i) {
      ++counts[l.examples[i].source];
      lines.push_back(l.examples[i].line);
    }
    return std::pair(counts, lines);
  };
  CHECK(picked(1, 1, 0, 1).first == std::array<size_t, 2>{100, 10});
  CHECK(picked(0.25, 2.5, 0, 1).first == std::array<size_t, 2>{25, 25});
  CHECK(picked(1, 1, 30, 1).first == std::array<size_t, 2>{30, 10});
  CHECK(picked(2, 1, 30, 1).first == std::array<size_t, 2>{60, 10});
  CHECK(picked(0.25, 1, 0, 1) == picked(0.25, 1, 0, 1));
  CHECK(picked(0.25, 1, 0, 1).second != picked(0.25, 1, 0, 2).second);
}

TEST_CASE("equal examples are learnt once where that is asked") {
  const TempDir dir;
  const auto file = dir.file("rows.jsonl",
                             "{\"prompt\": \"q\", \"completion\": \"a\"}\n"
                             "{\"prompt\": \"q\", \"completion\": \"b\"}\n"
                             "{\"instruction\": \"q\", \"output\": \"a\"}\n");
  CHECK(load(file).examples.size() == 3);
  const LoadedExamples once = load({.sources = {{.path = file}}, .deduplicate = true});
  CHECK(once.examples.size() == 2);
  CHECK(once.counts.duplicates == 1);
  CHECK(once.examples[1].line == 2);
}

TEST_CASE("decomposed Korean is counted, and composed only where that is asked") {
  const TempDir dir;
  const auto file =
      dir.file("rows.jsonl", "{\"prompt\": \"q\", \"completion\": \"\u1112\u1161\u11AB\"}\n");
  const LoadedExamples as_is = load(file);
  CHECK(as_is.counts.not_nfc == 1);
  CHECK(text_of(as_is.examples[0]).find("\u1112\u1161\u11AB") != std::string::npos);
  const LoadedExamples composed = load({.sources = {{.path = file}}, .rows = {.nfc = true}});
  CHECK(text_of(composed.examples[0]).find("한") != std::string::npos);

  // Whatever the rows are.
  const auto pairs = dir.file("pairs.jsonl",
                              "{\"prompt\": \"q\", \"chosen\": \"\u1112\u1161\u11AB\", "
                              "\"rejected\": \"no\"}\n");
  const auto labelled = dir.file("labelled.jsonl",
                                 "{\"prompt\": \"q\", \"completion\": "
                                 "\"\u1112\u1161\u11AB\", \"label\": true}\n");
  const auto raw = dir.file("raw.jsonl", "{\"text\": \"\u1112\u1161\u11AB\"}\n");
  for (const bool nfc : {false, true}) {
    const auto request = [&](const std::filesystem::path& path) {
      return LoadExamples{.sources = {{.path = path}}, .rows = {.nfc = nfc}};
    };
    LoadExamples text = request(raw);
    text.raw_text = true;
    for (const LoadedExamples& found :
         {pairs_of(request(pairs)), labelled_of(request(labelled)), load(text)}) {
      CAPTURE(nfc);
      CHECK(found.counts.not_nfc == 1);
      CHECK((text_of(found.examples[0]).find("한") != std::string::npos) == nfc);
    }
  }
}

TEST_CASE(
    "examples that memory should not hold are the same from their files, and are used again") {
  const TempDir dir;
  std::string lines;
  for (int i = 0; i < 3000; ++i)
    lines += fmt::format("{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n", i, i * i);
  const auto file = dir.file("rows.jsonl", lines);
  LoadExamples request{.sources = {{.path = file}}};
  const Examples held = load(request).examples;
  request.spill = dir.path() / "examples";
  request.memory_bytes = 10'000;
  request.key = "one";
  for (const bool again : {false, true}) {
    CAPTURE(again);
    if (again) std::filesystem::resize_file(file, 0);  // it is not read again
    const LoadedExamples mapped = load(request);
    CHECK(std::filesystem::exists(dir.path() / "examples.index"));
    CHECK(mapped.counts.rows == 3000);
    REQUIRE(mapped.examples.size() == held.size());
    for (size_t i = 0; i < held.size(); ++i) {
      const ExampleView a = held[i], b = mapped.examples[i];
      REQUIRE(std::ranges::equal(a.ids, b.ids));
      REQUIRE(std::ranges::equal(a.trained, b.trained));
      REQUIRE(a.line == b.line);
      REQUIRE(a.hash == b.hash);
      REQUIRE(a.trained_tokens() == b.trained_tokens());
    }
  }
  request.key = "another";
  CHECK(error_from([&] { load(request); }).kind() == ErrorKind::bad_input);
}

TEST_CASE("rows of many batches come in order, bad ones too, for any number of threads") {
  const TempDir dir;
  std::string lines;
  for (int i = 0; i < 5000; ++i)
    lines += i % 1000 == 7 ? "{broken\n"
             : i % 1000 == 9
                 ? "{\"prompt\": 1}\n"
                 : fmt::format("{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n", i, i * i);
  const LoadExamples request{.sources = {{.path = dir.file("rows.jsonl", lines)}}};
  for (const size_t threads : {1, 3}) {
    CAPTURE(threads);
    Pool pool(threads);
    const LoadedExamples data = load_examples(pool, model(), request);
    CHECK(data.counts.rows == 5000);
    CHECK(data.counts.bad == 10);
    REQUIRE(data.problems.size() == 10);
    REQUIRE(data.examples.size() == 4990);
    uint64_t line = 0;
    for (size_t i = 0; i < data.examples.size(); ++i) {
      const ExampleView e = data.examples[i];
      REQUIRE(e.line > line);
      line = e.line;
      REQUIRE(text_of(e).find(fmt::format("{}", (line - 1) * (line - 1))) != std::string::npos);
    }
    LoadExamples strict = request;
    strict.max_bad = 3;
    CHECK(error_from([&] { load_examples(pool, model(), strict); }).where().find("line 8") !=
          std::string::npos);
  }
}

TEST_CASE("splits, mixtures and what is learnt once are the same lists in memory and in files") {
  const TempDir dir;
  std::string lines, more;
  for (int i = 0; i < 3000; ++i)
    lines += fmt::format("{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n", i % 2500, i % 7);
  for (int i = 0; i < 900; ++i)
    more += fmt::format("{{\"prompt\": \"{}\", \"completion\": \"{}\"}}\n", 2 * i, 2 * i % 7);
  const auto one = dir.file("one.jsonl", lines), two = dir.file("two.jsonl", more);
  const auto check_same = [](const Examples& a, const Examples& b) {
    REQUIRE(a.size() == b.size());
    std::vector<uint64_t> in_order;
    b.each([&](size_t i, const ExampleView& e) {
      REQUIRE(i == in_order.size());
      in_order.push_back(e.content);
    });
    for (size_t i = 0; i < a.size(); ++i) {
      REQUIRE(a[i].content == b[i].content);
      REQUIRE(a[i].line == b[i].line);
      REQUIRE(std::ranges::equal(a[i].ids, b[i].ids));
      REQUIRE(in_order[i] == b[i].content);
      REQUIRE(b.length(i) == b[i].ids.size());
    }
  };
  for (const bool once : {false, true}) {
    CAPTURE(once);
    LoadExamples request{.sources = {{.path = one, .weight = 1.5}, {.path = two, .weight = 0.25}},
                         .deduplicate = once};
    const LoadedExamples held = load(request);
    request.spill = dir.path() / (once ? "once" : "all");
    request.memory_bytes = 10'000;
    request.key = "key";
    for (const bool again : {false, true}) {
      CAPTURE(again);
      const LoadedExamples mapped = load(request);
      check_same(held.examples, mapped.examples);
      CHECK(held.counts.duplicates == mapped.counts.duplicates);
      const ExampleSplit a = split_by_hash(held.examples, 0.1),
                         b = split_by_hash(mapped.examples, 0.1);
      CHECK(b.validation.size() > 200);
      check_same(a.train, b.train);
      check_same(a.validation, b.validation);
      CHECK(b.train_stats.lengths == b.train.stats().lengths);
      CHECK(b.train_stats.tokens == a.train.stats().tokens);
      CHECK(b.validation_stats.learnt == b.validation.stats().learnt);
    }
    // Lists leave no files behind, nor does a killed process for long.
    for (const auto& entry : std::filesystem::directory_iterator(dir.path()))
      CHECK(entry.path().extension() != ".places");
    const auto left = dir.file((once ? "once" : "all") + std::string(".0x1.places.partial"), "x");
    remove_examples(request.spill);
    CHECK(!std::filesystem::exists(left));
  }
}

TEST_CASE("pairs and rated answers are the same lists in memory and in files") {
  const TempDir dir;
  std::string pairs, rated;
  for (int i = 0; i < 2000; ++i) {
    pairs +=
        fmt::format("{{\"prompt\": \"{}\", \"chosen\": \"yes {}\", \"rejected\": \"yet{}\"}}\n",
                    i % 900, i % 1800, std::string(static_cast<size_t>(i % 1800) % 9, 'x'));
    rated += fmt::format("{{\"prompt\": \"{}\", \"completion\": \"{}\", \"label\": {}}}\n", i % 900,
                         std::string(static_cast<size_t>(i % 7) + 1, 'y'), i % 3 == 0);
  }
  const auto same = [](const ExampleView& a, const ExampleView& b) {
    REQUIRE(std::ranges::equal(a.ids, b.ids));
    REQUIRE(std::ranges::equal(a.trained, b.trained));
    REQUIRE(a.line == b.line);
  };
  LoadExamples request{.sources = {{.path = dir.file("pairs.jsonl", pairs)}}};
  LoadExamples rates{.sources = {{.path = dir.file("rated.jsonl", rated)}}};
  const LoadedExamples held = pairs_of(request), held_rates = labelled_of(rates);
  for (LoadExamples* r : {&request, &rates}) {
    r->spill = dir.path() / (r == &request ? "pairs" : "rates");
    r->memory_bytes = 10'000;
    r->key = "key";
  }
  for (const bool again : {false, true}) {
    CAPTURE(again);
    const LoadedExamples mapped = pairs_of(request), mapped_rates = labelled_of(rates);
    CHECK(std::filesystem::exists(dir.path() / "pairs.index"));
    CHECK(std::filesystem::exists(dir.path() / "rates.index"));
    const PreferenceList a(held.examples), b(mapped.examples);
    REQUIRE(a.size() == 2000);
    REQUIRE(b.size() == 2000);
    ExampleStats stats;
    for (size_t i = 0; i < a.size(); ++i) {
      same(a[i].chosen, b[i].chosen);
      same(a[i].rejected, b[i].rejected);
      REQUIRE(a[i].shared == b[i].shared);
      // What they share is the same in both, and stands before both answers.
      REQUIRE(std::ranges::equal(b[i].chosen.ids.first(b[i].shared),
                                 b[i].rejected.ids.first(b[i].shared)));
      REQUIRE(b[i].shared > 10);
      REQUIRE(b[i].chosen.trained[b[i].shared] == 0);
      stats.add(b[i].tokens(), b[i].chosen.learnt + b[i].rejected.learnt);
    }
    CHECK(b.stats().lengths == stats.lengths);
    CHECK(b.stats().learnt == stats.learnt);
    // A split takes no pair apart.
    const ExampleSplit split = split_by_hash(mapped.examples, 0.1);
    const PreferenceList validation(split.validation);
    CHECK(validation.size() > 100);
    for (size_t i = 0; i < validation.size(); ++i)
      REQUIRE(validation[i].chosen.line == validation[i].rejected.line);

    const LabelledList c(held_rates.examples), d(mapped_rates.examples);
    REQUIRE(d.size() == 2000);
    for (const size_t length : {size_t{40}, size_t{1000}}) {
      size_t longest = 0;
      for (size_t i = 0; i < d.size(); ++i) {
        same(c[i].example, d[i].example);
        REQUIRE(d[i].desirable == (i % 3 == 0));
        REQUIRE(d[i].example.trained[d[i].prompt] == 1);
        REQUIRE(d[i].example.trained[d[i].prompt - 1] == 0);
        const Example e = d.mismatched(i, length);
        const LabelledView other = d[(i + d.size() - 1) % d.size()];
        REQUIRE(e.ids.size() ==
                std::min(length, d[i].prompt + other.example.ids.size() - other.prompt));
        REQUIRE(e.trained_tokens() == e.ids.size() - d[i].prompt);
        longest = std::max({longest, e.ids.size(), d[i].example.ids.size()});
      }
      CHECK(d.longest(length) == longest);
    }
  }
  request.deduplicate = true;
  const LoadedExamples once = pairs_of(request);
  CHECK(PreferenceList(once.examples).size() == 1800);
  for (size_t i = 0; i < 1800; ++i) {
    const PreferenceView pair = PreferenceList(once.examples)[i];
    REQUIRE(pair.chosen.line == i + 1);
    REQUIRE(pair.rejected.line == i + 1);
  }
  request.sources[0].weight = 0.5;
  CHECK(error_from([&] { pairs_of(request); }).kind() == ErrorKind::usage);
}

TEST_CASE("raw text is kept in files too, and weighed like other rows") {
  const TempDir dir;
  std::string lines;
  for (int i = 0; i < 500; ++i) lines += fmt::format("{{\"text\": \"number {}\"}}\n", i);
  LoadExamples request{.sources = {{.path = dir.file("text.jsonl", lines), .weight = 0.5}},
                       .raw_text = true};
  const Examples held = load(request).examples;
  CHECK(held.size() == 250);
  request.spill = dir.path() / "examples";
  request.memory_bytes = 1000;
  const Examples mapped = load(request).examples;
  REQUIRE(std::filesystem::exists(dir.path() / "examples.index"));
  REQUIRE(mapped.size() == held.size());
  for (size_t i = 0; i < held.size(); ++i) REQUIRE(text_of(held[i]) == text_of(mapped[i]));
}

TEST_CASE("a split keeps equal prompts together and does not depend on other rows") {
  std::vector<Example> examples;
  for (uint64_t i = 0; i < 2000; ++i)
    examples.push_back(
        {.ids = {1, 2}, .trained = {0, 1}, .line = i, .hash = (i / 2) * 0x9E3779B97F4A7C15u});
  const ExampleSplit split = split_by_hash(Examples(examples), 0.1);
  CHECK(split.train.size() + split.validation.size() == 2000);
  CHECK(split.validation.size() > 100);
  CHECK(split.validation.size() < 300);
  std::vector<uint64_t> held;
  for (size_t i = 0; i < split.validation.size(); ++i) held.push_back(split.validation[i].hash);
  const auto is_held = [&](uint64_t hash) { return std::ranges::count(held, hash) != 0; };
  for (size_t i = 0; i < split.train.size(); ++i) CHECK(!is_held(split.train[i].hash));
  examples.resize(1000);
  const Examples fewer = split_by_hash(Examples(examples), 0.1).validation;
  for (size_t i = 0; i < fewer.size(); ++i) CHECK(is_held(fewer[i].hash));
}

TEST_CASE("a split leaves at least one prompt on each side") {
  std::vector<Example> examples(3, {.ids = {1, 2}, .trained = {0, 1}});
  for (size_t i = 0; i < 3; ++i) examples[i].hash = i * 0x5555555555555555u;
  CHECK(split_by_hash(Examples(examples), 0.01).validation.size() == 1);
  CHECK(split_by_hash(Examples(examples), 0.99).train.size() == 1);
  CHECK(split_by_hash(Examples(examples), 0).validation.empty());
  examples.resize(1);
  CHECK(split_by_hash(Examples(examples), 0.5).train.size() == 1);
}
