#include "formats/tokenizer.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "base/text.h"
#include "formats/bpe.h"
#include "formats/pretokenizer.h"
#include "support.h"

using namespace moru;

namespace {

using Json = nlohmann::json;
using Ids = std::vector<TokenId>;

std::string letter(unsigned byte) {
  std::string spelled;
  append_utf8(spelled, byte_letter(static_cast<uint8_t>(byte)));
  return spelled;
}

// In the order of their ranks; each piece they make takes the next id after the 256 bytes.
const std::vector<std::string> kMerges = {"h e",     "l l", "he ll", "hell o", "Ġ w", "o r",
                                          "Ġw or",   "l d", "1 2",   "12 3",   "ê °", "ê° Ģ",
                                          "Ġ hello", "a a", "aa a",  "Ġwor ld"};

std::string joined(std::string merge) {
  merge.erase(merge.find(' '), 1);
  return merge;
}

Json added_token(int id, const char* content, bool special) {
  return {{"id", id},
          {"content", content},
          {"special", special},
          {"normalized", false},
          {"single_word", false},
          {"lstrip", false},
          {"rstrip", false}};
}

// A byte-level tokenizer.json. Ids below were given for it by Hugging Face tokenizers 0.23.
Json tiny_bytes() {
  Json vocab;
  for (unsigned b = 0; b < 256; ++b) vocab[letter(b)] = b;
  for (const std::string& merge : kMerges) vocab[joined(merge)] = vocab.size();
  Json tool = added_token(273, "<tool>", false), cat = added_token(274, "cat", false),
       composed = added_token(275, "é!", false);
  tool["lstrip"] = tool["rstrip"] = true;
  cat["single_word"] = true;
  composed["normalized"] = true;
  return {{"version", "1.0"},
          {"added_tokens", {added_token(272, "<|im_end|>", true), tool, cat, composed}},
          {"normalizer", {{"type", "NFC"}}},
          {"pre_tokenizer",
           {{"type", "Sequence"},
            {"pretokenizers",
             {{{"type", "Digits"}, {"individual_digits", false}},
              {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}}}}},
          {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model", {{"type", "BPE"}, {"fuse_unk", false}, {"vocab", vocab}, {"merges", kMerges}}}};
}

Tokenizer tokenizer_of(const Json& json) { return Tokenizer::from_json("t.json", json.dump()); }

// The same as a GGUF: what GGUF cannot say (strip flags …) left out.
GgufMetadata tiny_bytes_gguf(const char* pre) {
  std::vector<std::string> tokens;
  for (unsigned b = 0; b < 256; ++b) tokens.push_back(letter(b));
  for (const std::string& merge : kMerges) tokens.push_back(joined(merge));
  std::vector<int32_t> types(tokens.size(), 1);
  tokens.push_back("<|im_end|>");
  types.push_back(3);
  tokens.push_back("<tool>");
  types.push_back(4);
  GgufMetadata m;
  m.where = "t.gguf";
  m.set("tokenizer.ggml.model", GgufScalar(std::string("gpt2")));
  if (pre != nullptr) m.set("tokenizer.ggml.pre", GgufScalar(std::string(pre)));
  m.set("tokenizer.ggml.tokens", GgufArray(tokens));
  m.set("tokenizer.ggml.token_type", GgufArray(types));
  m.set("tokenizer.ggml.merges", GgufArray(kMerges));
  m.set("tokenizer.ggml.eos_token_id", GgufScalar(uint32_t{272}));
  return m;
}

// SentencePiece as a GGUF. The tokenizer.json that the same scores give (a merge for every way two
// pieces spell a third, by score) had these ids from Hugging Face tokenizers 0.23.
GgufMetadata tiny_sentencepiece(bool space_prefix) {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  for (unsigned b = 0; b < 256; ++b) {
    tokens.push_back(fmt::format("<0x{:02X}>", b));
    types.push_back(6);
  }
  std::vector<float> scores(tokens.size(), 0);
  const auto add = [&](const char* piece, float score, int32_t type) {
    tokens.emplace_back(piece);
    scores.push_back(score);
    types.push_back(type);
  };
  for (const char* piece : {"▁", "a", "b", "c"}) add(piece, 0, 1);
  add("▁a", -1, 1);
  add("ab", -2, 1);
  add("abc", -4, 1);
  add("▁ab", -5, 1);
  add("bc", -3, 1);
  add("\n\n", -1000, 4);
  add("가", 0, 1);
  add("▁▁", -6, 1);
  add("▁▁▁", -7, 1);
  GgufMetadata m;
  m.where = "s.gguf";
  m.set("tokenizer.ggml.model", GgufScalar(std::string("llama")));
  m.set("tokenizer.ggml.tokens", GgufArray(tokens));
  m.set("tokenizer.ggml.token_type", GgufArray(types));
  m.set("tokenizer.ggml.scores", GgufArray(scores));
  m.set("tokenizer.ggml.bos_token_id", GgufScalar(uint32_t{1}));
  m.set("tokenizer.ggml.eos_token_id", GgufScalar(uint32_t{2}));
  m.set("tokenizer.ggml.unknown_token_id", GgufScalar(uint32_t{0}));
  if (!space_prefix) m.set("tokenizer.ggml.add_space_prefix", GgufScalar(false));
  return m;
}

std::vector<std::string> words_of(const PreTokenizer& pre, std::string_view text) {
  std::vector<std::string> words;
  pre.split(text, true, [&](std::string_view word) { words.emplace_back(word); });
  return words;
}

const KnownPre& known_pre(std::string_view name) {
  for (const KnownPre& pre : known_pres())
    if (pre.name == name) return pre;
  FAIL("no pre-tokenizer ", name);
  std::abort();
}

// Text that stirs every class of the patterns.
std::string random_text(std::mt19937_64& random, size_t characters) {
  static const std::vector<std::string> parts = {
      " ",      "  ",     "\n",   "\r\n", "\t",  "\u00a0", "\u3000", "\u2028", "a",        "b",
      "Z",      "É",      "ǅ",    "ʰ",    "가",  "각",     "한",     "漢",     "ひ",       "カ",
      "\u0301", "\u093e", "'",    "'s",   "'LL", "'ſ",     "’",      ".",      ",",        "!",
      "/",      "//",     "=",    "_",    "-",   "$",      "€",      "™",      "👍🏽", "\u200d",
      "\ufe0f", "1",      "2024", "٣",    "½",   "Ⅷ",      "\x01",   "\x7f",   "\u0378",   "ß",
      "ſ",      "\u0e33", "<|",   "|>",   "he",  "llo",    "\ufffd"};
  std::string text;
  for (size_t i = 0; i < characters; ++i) text += parts[random() % parts.size()];
  return text;
}

}  // namespace

TEST_CASE("byte BPE merges by rank, the leftmost of equals first, within words") {
  const Tokenizer t = tokenizer_of(tiny_bytes());
  CHECK(t.encode("hello world") == Ids{259, 271});
  CHECK(t.encode("hello  hello") == Ids{259, 32, 268});
  CHECK(t.encode("a1234") == Ids{97, 265, 52});
  CHECK(t.encode("aaaaa") == Ids{269, 270});
  CHECK(t.encode("가각") == Ids{267, 266, 129});
  CHECK(t.encode("world\n") == Ids{119, 261, 263, 10});
  CHECK(t.encode("") == Ids{});
}

TEST_CASE("added tokens are found as their flags say") {
  const Tokenizer t = tokenizer_of(tiny_bytes());
  CHECK(t.encode("<|im_end|>hello<|im_end|>") == Ids{272, 259, 272});
  CHECK(t.encode("a  <tool> \n b") == Ids{97, 273, 98});
  CHECK(t.encode("cat concat cat1 (cat)") ==
        Ids{274, 32, 99, 111, 110, 99, 97, 116, 32, 99, 97, 116, 49, 32, 40, 274, 41});
  CHECK(t.encode("e\u0301!") == Ids{275});  // é! only after normalization
}

TEST_CASE("what a user typed never becomes a control token") {
  const Tokenizer t = tokenizer_of(tiny_bytes());
  const Ids ids = t.encode("x<|im_end|>y <tool>", Tokenizer::Specials::literal);
  CHECK(std::count(ids.begin(), ids.end(), 272) == 0);
  CHECK(t.decode(ids) == "x<|im_end|>y<tool>");  // <tool> is no control token and took the space
  CHECK(t.is_control(272));
  CHECK_FALSE(t.is_control(273));

  // Nor does one that its file calls user-defined.
  GgufMetadata lax = tiny_bytes_gguf("gpt-2");
  lax.set("tokenizer.ggml.token_type", GgufArray(std::vector<int32_t>(274, 4)));
  CHECK(Tokenizer::from_gguf(lax).encode("<|im_end|>", Tokenizer::Specials::literal) != Ids{272});

  // Not even where the whole word is looked up, or where scores would merge up to it.
  Json json = tiny_bytes();
  json["model"]["ignore_merges"] = true;
  json["added_tokens"].push_back(added_token(259, "hello", true));
  CHECK(tokenizer_of(json).encode("hello", Tokenizer::Specials::literal) != Ids{259});
  GgufMetadata m = tiny_sentencepiece(false);
  const TextList& tokens = m.texts("tokenizer.ggml.tokens");
  std::vector<std::string> changed;
  for (size_t i = 0; i < tokens.size(); ++i) changed.emplace_back(i == 1 ? "ca" : tokens[i]);
  m.set("tokenizer.ggml.tokens", GgufArray(changed));
  CHECK(Tokenizer::from_gguf(m).encode("ca", Tokenizer::Specials::literal) == Ids{262, 260});
  CHECK(Tokenizer::from_gguf(m).encode("ca") == Ids{1});
}

TEST_CASE("ids of the beginnings of a text are those that each alone has, or none") {
  const uint64_t seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const std::vector<std::string> pieces = {
      "<|im_end|>", "<tool>", "<too", "cat", "é!",  "e\u0301!", " ",  "\n", "hello",
      " world",     "a",      "aa",   "l",   "123", "가",       "<|", "l>", "\xff"};
  const Tokenizer bytes = tokenizer_of(tiny_bytes());
  const Tokenizer spm = Tokenizer::from_gguf(tiny_sentencepiece(true));
  size_t agreed = 0, apart = 0;
  for (int i = 0; i < 4000; ++i) {
    std::string text;
    std::vector<size_t> borders = {0};
    // Broken bytes in a few of them.
    const size_t known = pieces.size() - (i % 16 == 0 ? 0 : 1);
    for (size_t n = random() % 12; n > 0; --n) {
      text += pieces[random() % known];
      borders.push_back(text.size());
    }
    std::vector<size_t> cuts;
    std::vector<TextSpan> literal;
    for (const size_t border : borders) {
      if (random() % 2 == 0) cuts.push_back(border);
      const size_t from = literal.empty() ? 0 : literal.back().end;
      if (random() % 4 == 0 && border > from) literal.push_back({from, border});
    }
    CAPTURE(text);
    for (const Tokenizer* t : {&bytes, &spm}) {
      const auto [ids, counts] = t->encode(text, literal, cuts);
      CHECK(ids == t->encode(text, literal));
      REQUIRE(counts.size() == cuts.size());
      for (size_t c = 0; c < cuts.size(); ++c) {
        CAPTURE(cuts[c]);
        std::vector<TextSpan> before;
        for (const TextSpan& span : literal)
          if (span.begin < cuts[c]) before.push_back({span.begin, std::min(span.end, cuts[c])});
        const Ids alone = t->encode(std::string_view(text).substr(0, cuts[c]), before);
        const bool begins =
            alone.size() <= ids.size() && std::equal(alone.begin(), alone.end(), ids.begin());
        CHECK(counts[c] == (begins ? std::optional(alone.size()) : std::nullopt));
        ++(begins ? agreed : apart);
      }
    }
  }
  CHECK(agreed > 1000);
  CHECK(apart > 100);
}

TEST_CASE("each pre-tokenizer cuts text as its pattern does") {
  // Words as Hugging Face tokenizers 0.23 cuts them, with | between.
  const std::vector<std::string> texts = {"I'll PAY'LL 1234567 won, it's 3.14!\r\n\n  x\ty   ",
                                          "가격은 1,234원 👍🏽\u00a0끝",
                                          "HelloWorld's ǅungla e\u0301té ſ'ſ",
                                          "a\n \n  b",
                                          "//==\n/*x*/",
                                          " \t\u3000"};
  const std::vector<std::pair<const char*, std::vector<std::string>>> expected = {
      {"gpt-2",
       {"I|'ll| PAY|'|LL| 1234567| won|,| it|'s| 3|.|14|!|\r\n\n | x|\t|y|   ",
        "가격은| 1|,|234|원| 👍🏽|\u00a0|끝", "HelloWorld|'s| ǅungla| e|\u0301|té| ſ|'|ſ",
        "a|\n \n | b", "//==|\n|/*|x|*/", " \t\u3000"}},
      {"llama-bpe",
       {"I|'ll| PAY|'LL| |123|456|7| won|,| it|'s| |3|.|14|!\r\n\n| | x|\ty|   ",
        "가격은| |1|,|234|원| 👍🏽|\u00a0끝", "HelloWorld|'s| ǅungla| e|\u0301té| ſ|'ſ",
        "a|\n \n| | b", "//==\n|/*|x|*/", " \t\u3000"}},
      {"qwen2",
       {"I|'ll| PAY|'LL| |1|2|3|4|5|6|7| won|,| it|'s| |3|.|1|4|!\r\n\n| | x|\ty|   ",
        "가격은| |1|,|2|3|4|원| 👍🏽|\u00a0끝", "HelloWorld|'s| ǅungla| e|\u0301té| ſ|'ſ",
        "a|\n \n| | b", "//==\n|/*|x|*/", " \t\u3000"}},
      {"qwen35",
       {"I|'ll| PAY|'LL| |1|2|3|4|5|6|7| won|,| it|'s| |3|.|1|4|!\r\n\n| | x|\ty|   ",
        "가격은| |1|,|2|3|4|원| 👍🏽|\u00a0끝", "HelloWorld|'s| ǅungla| e\u0301té| ſ|'ſ",
        "a|\n \n| | b", "//==\n|/*|x|*/", " \t\u3000"}},
      {"smollm",
       {"I|'ll| PAY|'|LL| |1|2|3|4|5|6|7| won|,| it|'s| |3|.|1|4|!|\r\n\n | x|\t|y|   ",
        "가격은| |1|,|2|3|4|원| 👍🏽|\u00a0|끝",
        "HelloWorld|'s| ǅungla| e|\u0301|té| ſ|'|ſ", "a|\n \n | b", "//==|\n|/*|x|*/",
        " \t\u3000"}},
      {"tekken",
       {"I|'ll| PAY|'LL| |1|2|3|4|5|6|7| won|,| it|'s| |3|.|1|4|!\r\n\n| | x|\ty|   ",
        "가격은| |1|,|2|3|4|원| 👍🏽|\u00a0끝", "Hello|World|'s| ǅungla| e\u0301té| ſ|'ſ",
        "a|\n \n| | b", "//==\n/|*x|*/", " \t\u3000"}},
      {"gpt-4o",
       {"I'll| PAY'LL| |123|456|7| won|,| it's| |3|.|14|!\r\n\n| | x|\ty|   ",
        "가격은| |1|,|234|원| 👍🏽|\u00a0끝", "Hello|World's| ǅungla| e\u0301té| ſ'ſ",
        "a|\n \n| | b", "//==\n/|*x|*/", " \t\u3000"}},
      {"deepseek-v3",
       {"I|'ll| PAY|'LL| |123|456|7| won|,| it|'s| |3|.|14|!\r\n\n| | x|\ty|   ",
        "가격은| |1|,|234|원| 👍🏽|\u00a0끝", "HelloWorld|'s| ǅungla| e\u0301té| ſ|'|ſ",
        "a|\n \n| | b", "//==\n|/*|x|*/", " \t\u3000"}},
  };
  for (const auto& [name, cut] : expected) {
    CAPTURE(name);
    const PreTokenizer pre = pre_tokenizer_of(known_pre(name));
    for (size_t i = 0; i < texts.size(); ++i) {
      std::string words;
      for (const std::string& word : words_of(pre, texts[i]))
        words += (words.empty() ? "" : "|") + word;
      CHECK(words == cut[i]);
    }
  }
}

TEST_CASE("the hand-written scanners cut as PCRE2 does by the same patterns") {
  const uint64_t seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  std::set<std::string_view> patterns;
  for (const KnownPre& pre : known_pres())
    patterns.insert(pre.patterns.begin(), pre.patterns.end());
  for (const std::string_view pattern : patterns) {
    CAPTURE(pattern);
    const Matcher scanner = Matcher::of_regex("test", pattern);
    const Regex regex("test", pattern);
    for (int i = 0; i < 300; ++i) {
      const std::string text = random_text(random, 1 + random() % 30);
      CAPTURE(text);
      for (size_t from = 0; from < text.size();) {
        const auto by_scanner = scanner.find(text, from);
        const auto by_regex = regex.find(text, from);
        REQUIRE(by_scanner.has_value() == by_regex.has_value());
        if (!by_scanner) break;
        REQUIRE(by_scanner->begin == by_regex->begin);
        REQUIRE(by_scanner->end == by_regex->end);
        from = by_scanner->end;
      }
    }
  }
}

TEST_CASE("characters have the classes that patterns name, also those of Unicode 16") {
  CHECK(class_of(U'가') == (kLetter | kUpperLike | kLowerLike | kWord));
  CHECK(class_of(U'\u0301') == (kMark | kUpperLike | kLowerLike | kWord));
  CHECK(class_of(U'½') == kNumber);
  CHECK(class_of(U'\u3000') == kSpace);
  CHECK(class_of(U'\u180e') == 0);  // a space once, for PCRE2 still
  CHECK(class_of(U'\n') == (kSpace | kNewline));
  CHECK(class_of(U'_') == (kPunctuation | kWord));
  CHECK(class_of(U'₩') == kSymbol);
  CHECK(class_of(0x1c89) == (kLetter | kUpperLike | kWord));  // Cyrillic Tje, 2024
  CHECK(class_of(0x2ebf0) == (kLetter | kUpperLike | kLowerLike | kWord));
  CHECK(class_of(0x0378) == 0);
  CHECK(class_of(0x110000) == 0);
  for (char32_t c = 0; c < 0x80; ++c) CHECK(class_of(c) == class_of_any(c));
}

TEST_CASE("splits keep, drop and join matches as their behaviour says") {
  const auto split = [](SplitBehavior behavior, bool invert) {
    PreTokenizer pre;
    pre.add({.matcher = Matcher::of_text("-"), .behavior = behavior, .invert = invert});
    return words_of(pre, "the-final--countdown");
  };
  using Words = std::vector<std::string>;
  // The example in the documentation of `tokenizers`.
  CHECK(split(SplitBehavior::removed, false) == Words{"the", "final", "countdown"});
  CHECK(split(SplitBehavior::isolated, false) == Words{"the", "-", "final", "-", "-", "countdown"});
  CHECK(split(SplitBehavior::merged_with_previous, false) ==
        Words{"the-", "final-", "-", "countdown"});
  CHECK(split(SplitBehavior::merged_with_next, false) == Words{"the", "-final", "-", "-countdown"});
  CHECK(split(SplitBehavior::contiguous, false) == Words{"the", "-", "final", "--", "countdown"});
  CHECK(split(SplitBehavior::removed, true) == Words{"-", "-", "-"});
}

TEST_CASE("an unknown pattern runs by PCRE2 if it means the same there, and is refused if not") {
  Json json = tiny_bytes();
  const auto with = [&](const char* regex) {
    json["pre_tokenizer"]["pretokenizers"][0] = {{"type", "Split"},
                                                 {"pattern", {{"Regex", regex}}},
                                                 {"behavior", "Isolated"},
                                                 {"invert", false}};
    return json;
  };
  CHECK(tokenizer_of(with(R"(l(?=o)|[^\s\p{L}]+)")).encode("hello") == Ids{256, 108, 108, 111});
  for (const char* regex : {R"(\h)", R"([a&&[b]])", R"((?<x>a))", R"(\p{Emoji})", R"(a(*FAIL))",
                            R"(\K)", "(", "[z-a]", R"([\S])"}) {
    CAPTURE(regex);
    const Error e = error_from([&] { tokenizer_of(with(regex)); });
    CHECK(e.kind() == ErrorKind::unsupported);
    CHECK(std::string(e.what()).find(regex) != std::string::npos);
    CHECK(e.where().find("pre_tokenizer.pretokenizers[0].pattern") != std::string::npos);
  }
  // Backtracking without end stops.
  const Error e = error_from([&] {
    tokenizer_of(with(R"((a|a|a)+$|(.|\s|.)*b(.|\s|.)*c)")).encode(std::string(200, 'x'));
  });
  CHECK(e.kind() == ErrorKind::unsupported);
}

TEST_CASE("SentencePiece pieces merge by score; unknown characters fall back to bytes") {
  const Tokenizer with = Tokenizer::from_gguf(tiny_sentencepiece(true));
  CHECK(with.encode("abc") == Ids{263, 267});
  CHECK(with.encode(" abc") == Ids{259, 263, 267});
  CHECK(with.encode("abc abc") == Ids{263, 267, 263, 267});
  CHECK(with.encode("a\n\nb") == Ids{263, 268, 259, 261});
  CHECK(with.encode("가각") == Ids{259, 269, 237, 179, 132});
  CHECK(with.encode("</s>a") == Ids{2, 263});
  CHECK(with.encode("a b  c") == Ids{263, 259, 261, 270, 262});
  const Tokenizer without = Tokenizer::from_gguf(tiny_sentencepiece(false));
  CHECK(without.encode("abc") == Ids{265});
  CHECK(without.encode("a\n\nb") == Ids{260, 268, 261});
  CHECK(without.encode("bcb") == Ids{267, 261});
  CHECK(with.adds_bos());
  CHECK(with.bos() == 1);
}

TEST_CASE("decoding drops the dummy space in front, and only that") {
  const Tokenizer with = Tokenizer::from_gguf(tiny_sentencepiece(true));
  CHECK(with.decode(Ids{263, 267}) == "abc");
  CHECK(with.decode(Ids{259, 263, 267}) == " abc");
  CHECK(with.decode(Ids{1, 263, 2}) == "a");
  CHECK(with.decode(Ids{1, 263, 2}, true) == "<s> a</s>");
  CHECK(with.decode(Ids{263, 268, 259, 261}) == "a\n\n b");
  CHECK(Tokenizer::from_gguf(tiny_sentencepiece(false)).decode(Ids{263, 267}) == " abc");
  CHECK(with.bytes_of(263) == " a");
  CHECK(with.bytes_of(2) == "");
  CHECK(with.piece(263) == "▁a");
  CHECK(with.id_of("▁a") == 263);
  CHECK_FALSE(with.id_of("▁zzz"));
  CHECK(with.decode(Ids{-1, 1 << 30, 260}) == "a");  // ids that are none are left out
}

TEST_CASE("a stream emits whole characters, also where tokens split a Hangul syllable") {
  const Tokenizer t = tokenizer_of(tiny_bytes());
  TextStream stream(t);
  CHECK(stream.push(0xea) == "");  // 가 is EA B0 80
  CHECK(stream.push(0xb0) == "");
  CHECK(stream.push(0x80) == "가");
  CHECK(stream.push(267) == "가");
  CHECK(stream.push(266) == "");        // EA B0
  CHECK(stream.push(97) == "\ufffda");  // which an a leaves unfinished
  CHECK(stream.push(0xff) == "\ufffd");
  CHECK(stream.push(0xe0) == "");
  CHECK(stream.push(0x80) == "\ufffd\ufffd");  // E0 80 begins no character
  CHECK(stream.push(272) == "");               // control
  CHECK(stream.push(0xf0) == "");
  CHECK(stream.finish() == "\ufffd");
  CHECK(stream.finish() == "");
}

TEST_CASE("pushing ids one by one gives what decoding them together gives") {
  const uint64_t seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const Tokenizer bytes = tokenizer_of(tiny_bytes());
  const Tokenizer spm = Tokenizer::from_gguf(tiny_sentencepiece(true));
  for (int i = 0; i < 300; ++i)
    for (const Tokenizer* t : {&bytes, &spm}) {
      Ids ids;
      for (size_t n = random() % 20; n > 0; --n)
        ids.push_back(static_cast<TokenId>(random() % t->vocab_size()));
      TextStream stream(*t);
      std::string text;
      for (const TokenId id : ids) text += stream.push(id);
      text += stream.finish();
      CHECK(text == repair_utf8(t->decode(ids)));
    }
}

TEST_CASE("valid text survives encoding and decoding") {
  const uint64_t seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const Tokenizer bytes = Tokenizer::from_gguf(tiny_bytes_gguf("llama-bpe"));
  const Tokenizer spm = Tokenizer::from_gguf(tiny_sentencepiece(false));
  for (int i = 0; i < 500; ++i) {
    const std::string text = random_text(random, random() % 40);
    CAPTURE(text);
    CHECK(bytes.decode(bytes.encode(text), true) == text);
    CHECK(spm.decode(spm.encode(text), true) == text);
  }
}

TEST_CASE("invalid UTF-8 is taken as U+FFFD") {
  const Tokenizer t = tokenizer_of(tiny_bytes());
  for (const auto& [broken, repaired] :
       std::vector<std::pair<std::string, std::string>>{{"a\xff", "a\ufffd"},
                                                        {"\xea\xb0 x", "\ufffd x"},
                                                        {"\xed\xa0\x80", "\ufffd\ufffd\ufffd"},
                                                        {"\xf0\x9f\x91", "\ufffd"}})
    CHECK(t.encode(broken) == t.encode(repaired));
}

TEST_CASE("long words merge by a heap as short ones do by scanning") {
  // The definition: the lowest rank, the leftmost of equals, over and over.
  const auto reference = [](const std::string& word) {
    std::vector<std::string> symbols;
    for (const char c : word) symbols.push_back(letter(static_cast<uint8_t>(c)));
    for (;;) {
      size_t best = SIZE_MAX, rank = SIZE_MAX;
      for (size_t i = 0; i + 1 < symbols.size(); ++i)
        for (size_t r = 0; r < std::min(rank, kMerges.size()); ++r)
          if (kMerges[r] == symbols[i] + " " + symbols[i + 1]) {
            best = i;
            rank = r;
          }
      if (best == SIZE_MAX) return symbols;
      symbols[best] += symbols[best + 1];
      symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(best) + 1);
    }
  };
  const Tokenizer t = tokenizer_of(tiny_bytes());
  const uint64_t seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  for (const size_t length : {1, 5, 47, 48, 49, 50, 200, 700}) {
    std::string word;
    while (word.size() < length) word += "helorwda"[random() % 8];
    CAPTURE(word);
    std::vector<std::string> pieces;
    for (const TokenId id : t.encode(word)) pieces.emplace_back(t.piece(id));
    CHECK(pieces == reference(word));
  }
}

TEST_CASE("a tokenizer encodes from many threads at once") {
  const Tokenizer t = tokenizer_of(tiny_bytes());
  std::mt19937_64 random(7);
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (int i = 0; i < 200; ++i) {
    texts.push_back(random_text(random, 30));
    expected.push_back(t.encode(texts.back()));
  }
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t n = 0; n < wrong.size(); ++n)
    threads.emplace_back([&, n] {
      for (int round = 0; round < 5; ++round)
        for (size_t i = 0; i < texts.size(); ++i)
          wrong[n] += t.encode(texts[i]) != expected[i] ? 1 : 0;
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("qwen2 composes text before it splits it, and adds no BOS unasked") {
  const Tokenizer qwen = Tokenizer::from_gguf(tiny_bytes_gguf("qwen2"));
  CHECK(qwen.encode("\u1100\u1161") == Ids{267});  // 가 from its jamo
  CHECK_FALSE(qwen.adds_bos());
  CHECK(Tokenizer::from_gguf(tiny_bytes_gguf("llama-bpe")).encode("\u1100\u1161") != Ids{267});
}

TEST_CASE("a GGUF without a pre-tokenizer's name, or with an unknown one, is refused by name") {
  const Error missing = error_from([] { Tokenizer::from_gguf(tiny_bytes_gguf(nullptr)); });
  CHECK(missing.kind() == ErrorKind::unsupported);
  CHECK(missing.where() == "t.gguf: tokenizer.ggml.pre");
  const Error unknown = error_from([] { Tokenizer::from_gguf(tiny_bytes_gguf("qwen9000")); });
  CHECK(unknown.kind() == ErrorKind::unsupported);
  CHECK(unknown.problem().find("qwen9000") != std::string::npos);
  GgufMetadata bert = tiny_bytes_gguf("gpt-2");
  bert.set("tokenizer.ggml.model", GgufScalar(std::string("bert")));
  CHECK(error_from([&] { Tokenizer::from_gguf(bert); }).kind() == ErrorKind::unsupported);
}

TEST_CASE("metadata of a GGUF comes back as it was; of a tokenizer.json it reads as the same") {
  const GgufMetadata m = tiny_bytes_gguf("smollm");
  const std::vector<GgufPair> own = Tokenizer::from_gguf(m).gguf_metadata();
  REQUIRE(own.size() == m.pairs.size());
  for (size_t i = 0; i < own.size(); ++i) CHECK(own[i].key == m.pairs[i].key);

  Json json = tiny_bytes();
  json["pre_tokenizer"]["pretokenizers"].erase(0);
  json["added_tokens"] = {added_token(272, "<|im_end|>", true), added_token(273, "<tool>", false)};
  const Tokenizer olmo = tokenizer_of(json);  // NFC, then GPT-2's pattern
  GgufMetadata made;
  made.where = "made";
  made.pairs = olmo.gguf_metadata(300);
  CHECK(made.text("tokenizer.ggml.pre") == "olmo");
  CHECK(made.texts("tokenizer.ggml.tokens").size() == 300);
  CHECK(made.integers("tokenizer.ggml.token_type")[299] == 5);
  const Tokenizer again = Tokenizer::from_gguf(made);
  for (const char* text : {"hello world", "e\u0301 1234<|im_end|>가각", "<tool> x"})
    CHECK(again.encode(text) == olmo.encode(text));

  json["normalizer"] = {{"type", "NFKC"}};
  const Error e = error_from([&] { tokenizer_of(json).gguf_metadata(); });
  CHECK(e.kind() == ErrorKind::unsupported);
}

TEST_CASE("BOS, EOS and stop tokens come from the files of a folder") {
  const TempDir folder;
  Json json = tiny_bytes();
  json["added_tokens"].push_back(added_token(276, "<s>", true));
  json["added_tokens"].push_back(added_token(277, "</s>", true));
  json["added_tokens"].push_back(added_token(278, "<|stop|>", true));
  json["added_tokens"].push_back(added_token(279, "<halt>", true));
  json["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single",
                             {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
                              {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}}};
  folder.file("tokenizer.json", json.dump());
  const Tokenizer plain = Tokenizer::from_folder(folder.path());
  CHECK(plain.bos() == 276);
  CHECK(plain.adds_bos());
  CHECK_FALSE(plain.adds_eos());
  CHECK(plain.stop_ids() == Ids{272, 277, 278});

  folder.file("tokenizer_config.json",
              R"({"add_bos_token": false, "add_eos_token": true, "eos_token": {"content": "</s>"},
                  "pad_token": "<halt>"})");
  folder.file("generation_config.json", R"({"eos_token_id": [277, 279, 99999999]})");
  const Tokenizer configured = Tokenizer::from_folder(folder.path());
  CHECK_FALSE(configured.adds_bos());
  CHECK(configured.adds_eos());
  CHECK(configured.eos() == 277);
  CHECK(configured.pad() == 279);
  CHECK(configured.stop_ids() == Ids{272, 277, 278, 279});
  CHECK(error_from([&] { Tokenizer::from_folder(folder.path() / "none"); }).kind() ==
        ErrorKind::not_found);
}

TEST_CASE("a tokenizer.json that contradicts itself is refused, naming the field") {
  struct Row {
    const char* pointer;
    Json value;
    const char* field;
  };
  const std::vector<Row> rows = {
      {"/model/vocab/a", -1, "model.vocab[\"a\"]"},
      {"/model/vocab/a", 1.5, "model.vocab[\"a\"]"},
      {"/model/vocab/a", 98, "model.vocab[\"b\"]"},
      {"/model/vocab/a", 4000000000, "model.vocab[\"a\"]"},
      {"/model/vocab/a", "97", "model.vocab[\"a\"]"},
      {"/model/vocab/a", Json::array(), "model.vocab[\"a\"]"},
      {"/model/merges/3", "zz q", "model.merges[3]"},
      {"/model/merges/3", "a q", "model.merges[3]"},
      {"/model/merges/3", "a", "model.merges[3]"},
      {"/model/merges/3", "a b c", "model.merges[3]"},
      {"/model/merges/3", 7, "model.merges[3]"},
      {"/model/merges/3", {"a"}, "model.merges[3]"},
      {"/model/merges/3", {"a", "a", "a"}, "model.merges[3]"},
      {"/model/type", "Unigram", "model.type"},
      {"/model/type", 3, "model.type"},
      {"/model/unk_token", "<nope>", "model.unk_token"},
      {"/model/end_of_word_suffix", "</w>", "model.end_of_word_suffix"},
      {"/model/dropout", 0.1, "model.dropout"},
      {"/model", nullptr, "model"},
      {"/added_tokens/0/id", 5, "added_tokens[0].id"},
      {"/added_tokens/0/id", "x", "added_tokens[0].id"},
      {"/added_tokens/0/content", "", "added_tokens[0].content"},
      {"/added_tokens/0/lstrip", 1, "added_tokens[0].lstrip"},
      {"/added_tokens", 1, "tokenizer.json.added_tokens"},
      {"/normalizer/type", "Precompiled", "normalizer.type"},
      {"/normalizer",
       {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", std::string(65, 'a')}},
       "normalizer.content"},
      {"/pre_tokenizer/pretokenizers/0/type", "Bert", "pre_tokenizer.pretokenizers[0].type"},
      {"/pre_tokenizer", {{"type", "Metaspace"}}, "decoder"},
      {"/decoder", {{"type", "CTC"}}, "decoder.type"},
      {"/decoder", nullptr, "decoder"},
      {"/post_processor", {{"type", "Other"}}, "post_processor.type"},
  };
  for (const Row& row : rows) {
    CAPTURE(row.pointer);
    CAPTURE(row.value.dump());
    Json json = tiny_bytes();
    json[Json::json_pointer(row.pointer)] = row.value;
    const Error e = error_from([&] { tokenizer_of(json); });
    CHECK(e.where() == fmt::format("t.json: {}", row.field));
  }
  const Error e = error_from([] { Tokenizer::from_json("t.json", "{\"model\": "); });
  CHECK(e.kind() == ErrorKind::bad_input);
  CHECK(e.where().starts_with("t.json"));
  // A key that stands twice, which a JSON value would have lost.
  const Error twice = error_from([] {
    Tokenizer::from_json("t.json", R"({"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}}})");
  });
  CHECK(twice.where() == "t.json: model.vocab[\"a\"]");
}

TEST_CASE("a GGUF whose vocabulary contradicts itself is refused, naming the key") {
  const auto where = [](GgufMetadata m, const char* key, GgufValue value) {
    m.set(key, std::move(value));
    return error_from([&] { Tokenizer::from_gguf(m); }).where();
  };
  const GgufMetadata bytes = tiny_bytes_gguf("gpt-2"), spm = tiny_sentencepiece(true);
  CHECK(where(bytes, "tokenizer.ggml.tokens", GgufArray(std::vector<std::string>{})) ==
        "t.gguf: tokenizer.ggml.tokens");
  CHECK(where(bytes, "tokenizer.ggml.tokens", GgufArray(std::vector<std::string>{"a", "a"})) ==
        "t.gguf: tokenizer.ggml.tokens[1]");
  CHECK(where(bytes, "tokenizer.ggml.tokens", GgufArray(std::vector<std::string>{"\xff"})) ==
        "t.gguf: tokenizer.ggml.tokens[0]");
  CHECK(where(bytes, "tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"zz q"})) ==
        "t.gguf: tokenizer.ggml.merges[0]");
  CHECK(where(bytes, "tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"a "})) ==
        "t.gguf: tokenizer.ggml.merges[0]");
  CHECK(where(bytes, "tokenizer.ggml.token_type", GgufArray(std::vector<int32_t>{1, 9})) ==
        "t.gguf: tokenizer.ggml.token_type");
  CHECK(where(bytes, "tokenizer.ggml.token_type", GgufArray(std::vector<int32_t>(274, 77))) ==
        "t.gguf: tokenizer.ggml.token_type[0]");
  CHECK(where(bytes, "tokenizer.ggml.token_type", GgufArray(std::vector<int32_t>(274, 6))) ==
        "t.gguf: tokenizer.ggml.tokens[0]");
  CHECK(where(bytes, "tokenizer.ggml.bos_token_id", GgufScalar(uint32_t{274})) ==
        "t.gguf: tokenizer.ggml.bos_token_id");
  CHECK(where(spm, "tokenizer.ggml.scores", GgufArray(std::vector<float>{1})) ==
        "s.gguf: tokenizer.ggml.scores");
  CHECK(where(spm, "tokenizer.ggml.scores", GgufArray(std::vector<float>(300, std::nanf("")))) ==
        "s.gguf: tokenizer.ggml.scores[0]");
}
