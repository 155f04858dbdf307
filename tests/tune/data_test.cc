#include "tune/data.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "support.h"

using namespace moru;

namespace {

// A byte-level vocabulary with ChatML's control tokens and template.
const ModelFiles& model() {
  static const ModelFiles files = open_model(MORU_SOURCE_DIR "/tests/golden/tune/llama");
  return files;
}

// The same with a template that leaves out the answers of earlier turns.
ModelFiles rewriting_model() {
  ModelFiles files = open_model(MORU_SOURCE_DIR "/tests/golden/tune/llama");
  files.chat_template.emplace(
      "rewriting",
      "{% for m in messages %}{{ m.role }}:"
      "{% if m.role != 'assistant' %}{{ m.content }}{% elif loop.last %}{{ m.content }}<|im_end|>"
      "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}");
  return files;
}

// The text of an example with what is learnt in brackets.
std::string marked(const Example& e) {
  std::string out;
  for (size_t at = 0; at < e.ids.size();) {
    size_t end = at;
    while (end < e.ids.size() && e.trained[end] == e.trained[at]) ++end;
    const std::string text = model().tokenizer.decode(std::span(e.ids).subspan(at, end - at), true);
    out += e.trained[at] != 0 ? "[" + text + "]" : text;
    at = end;
  }
  return out;
}

Dataset made(const std::string& json, const DataOptions& options = {}) {
  Dataset data;
  ExampleMaker(model(), options).add({7, nlohmann::ordered_json::parse(json)}, data);
  return data;
}

std::string rendered(const std::string& json, const DataOptions& options = {}) {
  const Dataset data = made(json, options);
  REQUIRE_MESSAGE(data.examples.size() == 1, json);
  return marked(data.examples[0]);
}

const std::string kPair =
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n[An anvil.<|im_end|>]";

}  // namespace

TEST_CASE("every format of pairs gives the same example") {
  for (const char* row : {R"({"prompt": "What is it?", "completion": "An anvil."})",
                          R"({"prompt": [{"role": "user", "content": "What is it?"}],
               "completion": [{"role": "assistant", "content": "An anvil."}]})",
                          R"({"messages": [{"role": "user", "content": "What is it?"},
                            {"role": "assistant", "content": "An anvil."}]})",
                          R"({"conversations": [{"from": "human", "value": "What is it?"},
                                 {"from": "gpt", "value": "An anvil."}]})",
                          R"({"instruction": "What is it?", "input": "", "output": "An anvil."})"})
    CHECK(rendered(row) == kPair);
  CHECK(rendered(R"({"text": "What is it?", "category": "An anvil."})",
                 {.prompt_column = "text", .completion_column = "category"}) == kPair);
}

TEST_CASE("instructions with an input, a history and a system text keep them all") {
  CHECK(rendered(R"({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count.",
                     "history": [["Hi", "Ho"]]})") ==
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[Ho<|im_end|>]\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n"
        "<|im_start|>assistant\n[3<|im_end|>]");
}

TEST_CASE("a system message is given to rows that have none") {
  CHECK(rendered(R"({"prompt": "What is it?", "completion": "An anvil."})", {.system = "Say."}) ==
        "<|im_start|>system\nSay.<|im_end|>\n" + kPair);
  const char* own = R"({"messages": [{"role": "system", "content": "Own."},
      {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "An anvil."}]})";
  CHECK(rendered(own, {.system = "Say."}) == "<|im_start|>system\nOwn.<|im_end|>\n" + kPair);
}

TEST_CASE("all answers of a conversation are learnt, or the last alone") {
  const char* row = R"({"messages": [
      {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
      {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
      {"role": "user", "content": "never answered"}]})";
  const std::string user = "<|im_start|>user\n", assistant = "<|im_start|>assistant\n";
  CHECK(rendered(row) == user + "a<|im_end|>\n" + assistant + "[b<|im_end|>]\n" + user +
                             "c<|im_end|>\n" + assistant + "[d<|im_end|>]");
  CHECK(rendered(row, {.last_turn_only = true}) == user + "a<|im_end|>\n" + assistant +
                                                       "b<|im_end|>\n" + user + "c<|im_end|>\n" +
                                                       assistant + "[d<|im_end|>]");
}

TEST_CASE("with prompts learnt, everything is, and the ids stay those of answers alone") {
  const DataOptions all{.train_on_prompt = true};
  const std::string user = "<|im_start|>user\n", assistant = "<|im_start|>assistant\n";
  // Between turns the template's own text too, but nothing after the last end of turn.
  const char* chat = R"({"messages": [
      {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
      {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
      {"role": "assistant", "content": "d"}, {"role": "user", "content": "never answered"}]})";
  // The first token, which is BOS here, has nothing before it to be learnt from.
  CHECK(rendered(chat, all) == "<|im_start|>[system\ns<|im_end|>\n" + user + "a<|im_end|>\n" +
                                   assistant + "b<|im_end|>\n" + user + "c<|im_end|>\n" +
                                   assistant + "d<|im_end|>]");
  const char* pair = R"({"prompt": "What is it?", "completion": "An anvil."})";
  CHECK(rendered(pair, all) ==
        "<|im_start|>[user\nWhat is it?<|im_end|>\n" + assistant + "An anvil.<|im_end|>]");
  // An end of turn that a plain template has before the answer does not end it.
  CHECK(rendered(pair, {.plain_template = "Q: {prompt}<|im_end|>\nA: {completion}",
                        .train_on_prompt = true}) ==
        "[Q: What is it?<|im_end|>\nA: An anvil.<|im_end|>]");
  CHECK(rendered(R"({"text": "all of it"})", all) == "[all of it<|im_end|>]");
  // A cut that leaves no answer leaves a prompt to learn.
  CHECK(rendered(pair, {.plain_template = "{prompt}{completion}",
                        .max_length = 7,
                        .train_on_prompt = true}) == "[What is]");
  for (const char* row : {chat, pair}) {
    CHECK(made(row, all).examples.at(0).ids == made(row).examples.at(0).ids);
    CHECK(made(row, all).examples.at(0).hash == made(row).examples.at(0).hash);
  }
}

TEST_CASE("where a template rewrites earlier turns, prompts are learnt once, as they end") {
  const ModelFiles files = rewriting_model();
  const auto row = nlohmann::ordered_json::parse(R"({"messages": [
      {"role": "user", "content": "a"}, {"role": "assistant", "content": "old"},
      {"role": "user", "content": "c"}, {"role": "assistant", "content": "new"}]})");
  Dataset turns, whole;
  ExampleMaker(files, {}).add({1, row}, turns);
  ExampleMaker(files, {.train_on_prompt = true}).add({1, row}, whole);
  REQUIRE(turns.examples.size() == 2);
  CHECK(turns.counts.split_by_turn == 1);
  REQUIRE(whole.examples.size() == 1);
  CHECK(whole.counts.split_by_turn == 0);
  CHECK(marked(whole.examples[0]) == "[user:a\nassistant:\nuser:c\nassistant:new<|im_end|>]");
  CHECK(whole.examples[0].ids == turns.examples[1].ids);
}

TEST_CASE("a plain template is rendered as it stands and ends with EOS") {
  CHECK(rendered(R"({"prompt": "2+2", "completion": "4"})",
                 {.plain_template = "Q: {prompt}\nA: {completion}"}) == "Q: 2+2\nA: [4<|im_end|>]");
  CHECK(error_from([] { ExampleMaker(model(), {.plain_template = "{prompt}"}); }).kind() ==
        ErrorKind::usage);
  CHECK(rendered(R"({"text": "all of it"})") == "[all of it<|im_end|>]");
}

TEST_CASE("the ids of a prompt are those that the model is asked with") {
  // "An anvil" alone would merge otherwise than after a newline with a space; the prompt's ids
  // must be a start of the example's.
  const Dataset data = made(R"({"prompt": "the other", "completion": "then"})");
  const std::vector<TokenId> asked =
      model().tokenizer.encode("<|im_start|>user\nthe other<|im_end|>\n<|im_start|>assistant\n");
  const Example& e = data.examples.at(0);
  REQUIRE(e.ids.size() > asked.size());
  CHECK(std::equal(asked.begin(), asked.end(), e.ids.begin()));
  CHECK(e.trained[asked.size() - 1] == 0);
  CHECK(e.trained[asked.size()] == 1);
}

TEST_CASE("what is trained is what is served, also where a row spells control tokens") {
  // Messages, then the message that answers: what serving encodes before the answer must be what
  // training reads before it.
  const char* rows[] = {
      R"([{"role": "user", "content": "say <|im_end|>"},
          {"role": "assistant", "content": "<|im_start|>no<|im_end|> it is"}])",
      R"([{"role": "system", "content": "<|im_end|>\n<|im_start|>user"},
          {"role": "user", "content": "the <|im_start|>system"},
          {"role": "assistant", "content": "then"},
          {"role": "user", "content": "<|im_end|><|im_end|>"},
          {"role": "assistant", "content": "the other"}])"};
  for (const char* row : rows) {
    CAPTURE(row);
    const auto messages = nlohmann::ordered_json::parse(row);
    const Dataset data = made(nlohmann::ordered_json{{"messages", messages}}.dump());
    const Example& e = data.examples.at(0);
    for (size_t i = 0; i < messages.size(); ++i) {
      if (messages[i]["role"] != "assistant") continue;
      const auto at = static_cast<std::ptrdiff_t>(i);
      const std::vector<TokenId> asked = encode_chat(
          model(), {.messages = nlohmann::ordered_json(messages.begin(), messages.begin() + at),
                    .add_generation_prompt = true});
      REQUIRE(e.ids.size() > asked.size());
      CHECK(std::equal(asked.begin(), asked.end(), e.ids.begin()));
      CHECK(e.trained[asked.size() - 1] == 0);
      CHECK(e.trained[asked.size()] == 1);
    }
    // Control tokens: two a message, less the end of line after the last.
    const auto controls = std::count_if(
        e.ids.begin(), e.ids.end(), [&](TokenId id) { return model().tokenizer.is_control(id); });
    CHECK(static_cast<size_t>(controls) == 2 * messages.size());
  }
  // The same under a plain template.
  const DataOptions plain{.plain_template = "Q: {prompt}\nA: {completion}<|im_end|>"};
  const Dataset data = made(R"({"prompt": "a<|im_end|>b", "completion": "c<|im_end|>d"})", plain);
  const std::vector<TokenId> asked = encode_prompt(
      model(), {.plain_template = plain.plain_template},
      nlohmann::ordered_json::parse(R"([{"role": "user", "content": "a<|im_end|>b"}])"));
  const Example& e = data.examples.at(0);
  REQUIRE(e.ids.size() > asked.size());
  CHECK(std::equal(asked.begin(), asked.end(), e.ids.begin()));
  CHECK(std::count_if(e.ids.begin(), e.ids.end(),
                      [&](TokenId id) { return model().tokenizer.is_control(id); }) == 1);
}

TEST_CASE("long rows are cut as asked and rows left without an answer are counted") {
  const char* row = R"({"prompt": "0123456789", "completion": "abcdef"})";
  const DataOptions plain{.plain_template = "{prompt}{completion}", .max_length = 12};
  CHECK(rendered(row, plain) == "0123456789[ab]");
  DataOptions keep_end = plain;
  keep_end.truncation = Truncation::keep_end;
  CHECK(rendered(row, keep_end) == "56789[abcdef<|im_end|>]");
  DataOptions short_rows = plain;
  short_rows.max_length = 10;
  const Dataset data = made(row, short_rows);
  CHECK(data.examples.empty());
  CHECK(data.counts.without_answer == 1);
  CHECK(data.counts.truncated == 1);
}

TEST_CASE("a cut never falls inside a character") {
  // Each Hangul syllable is three byte tokens.
  for (const size_t length : {4, 5, 6}) {
    const Dataset data = made(R"({"prompt": "x", "completion": "모루모루"})",
                              {.plain_template = "{prompt}{completion}", .max_length = length});
    CHECK(data.examples.at(0).ids.size() == 4);
  }
}

TEST_CASE("rows that are no pairs are told by line and field, and do not stop the others") {
  for (const char* row : {R"({"question": "?"})", R"({"messages": []})",
                          R"({"messages": [{"role": "king", "content": "x"}]})",
                          R"({"messages": [{"role": "user", "content": "x"}]})",
                          R"({"prompt": {"a": 1}, "completion": "x"})",
                          R"({"instruction": "x", "output": ["a", "b"]})"}) {
    CAPTURE(row);
    const Dataset data = made(row);
    CHECK(data.examples.empty());
    CHECK(data.counts.bad == 1);
    REQUIRE(data.problems.size() == 1);
    CHECK(data.problems[0].line == 7);
  }
  const TempDir dir;
  const auto path = dir.file("rows.csv", "ask,category\nhello,greet\nbye,leave\n,\n");
  const Dataset data =
      load_dataset(path, model(), {.prompt_column = "ask", .completion_column = "category"});
  CHECK(data.examples.size() == 3);
  const Error e = error_from([&] { load_dataset(path, model(), {}); });
  CHECK(e.kind() == ErrorKind::bad_input);
  CHECK(e.cure().find("--prompt-column") != std::string::npos);
}

TEST_CASE("packing wastes little and loses nothing") {
  std::vector<size_t> lengths;
  for (size_t i = 0; i < 500; ++i) lengths.push_back(1 + i * 37 % 90);
  lengths.push_back(300);  // longer than a batch: alone
  const auto batches = pack(lengths, 256);
  std::set<uint32_t> seen;
  for (const auto& batch : batches) {
    size_t tokens = 0;
    for (const uint32_t i : batch) {
      CHECK(seen.insert(i).second);
      tokens += lengths[i];
    }
    CHECK((tokens <= 256 || batch.size() == 1));
  }
  CHECK(seen.size() == lengths.size());
  const size_t total = std::accumulate(lengths.begin(), lengths.end(), size_t{0});
  CHECK(batches.size() <= total / 256 + 2);
}

TEST_CASE("epochs are different permutations, the same for the same seed") {
  const auto order_of = [](uint64_t seed, uint64_t epoch) {
    const Permutation order = epoch_order(100, seed, epoch);
    std::vector<size_t> all;
    for (size_t i = 0; i < order.size(); ++i) all.push_back(order[i]);
    return all;
  };
  std::vector<size_t> order = order_of(1, 0);
  CHECK(order == order_of(1, 0));
  CHECK(order != order_of(1, 1));
  CHECK(order != order_of(2, 0));
  std::sort(order.begin(), order.end());
  for (size_t i = 0; i < 100; ++i) CHECK(order[i] == i);
}
