#include "engine/constraint.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/random.h"
#include "base/text.h"
#include "engine/generate.h"
#include "peers.h"
#include "support.h"
#include "tiny_model.h"

using namespace moru;

namespace {

using Json = nlohmann::ordered_json;
using Kind = ConstraintSource::Kind;

uint64_t fresh_seed() {
  return static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
}

Language regex(std::string pattern) { return Language({Kind::regex, std::move(pattern)}); }
Language schema(std::string text) { return Language({Kind::json_schema, std::move(text)}); }

void check(const Language& language, const std::vector<std::string>& in,
           const std::vector<std::string>& out) {
  for (const std::string& text : in) {
    CAPTURE(text);
    CHECK(language.accepts(text));
  }
  for (const std::string& text : out) {
    CAPTURE(text);
    CHECK(!language.accepts(text));
  }
}

// GPT-2's letters for the bytes.
std::string letters(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) {
    const auto b = static_cast<uint8_t>(c);
    char32_t code = b;
    if (b < 33) code = 256u + b;
    if (b >= 127 && b < 161) code = 256u + 33 + (b - 127u);
    if (b == 173) code = 256u + 67;
    append_utf8(out, code);
  }
  return out;
}

// All bytes, and random texts of what is often in the way: quotes with their neighbours, halves of
// characters, digits, long words.
Tokenizer awkward_tokenizer(size_t count, Random& random) {
  const std::vector<std::string> parts = {
      "\"",   "\\",       "\\n",      "\\u00",       ",",     ":", "{",  "}",    "[",
      "]",    " ",        "\n",       "-",           "0",     "1", "7",  ".",    "e",
      "a",    "b",        "name",     "true",        "null",  "é", "한", "\xED", "\x95",
      "\x9C", "\xF0\x9F", "\x98\x80", "abcdefghijk", "2024-", "\t"};
  std::vector<std::string> tokens;
  for (unsigned b = 0; b < 256; ++b)
    tokens.push_back(letters(std::string(1, static_cast<char>(b))));
  tokens.push_back("th");  // the one merge
  while (tokens.size() < count) {
    std::string text;
    for (size_t n = 1 + random.below(4); n > 0; --n) text += parts[random.below(parts.size())];
    if (std::find(tokens.begin(), tokens.end(), letters(text)) == tokens.end())
      tokens.push_back(letters(text));
  }
  std::vector<int32_t> types(tokens.size(), 1);
  tokens.push_back("<|im_end|>");
  types.push_back(3);
  GgufMetadata m;
  m.set("tokenizer.ggml.model", GgufScalar{std::string("gpt2")});
  m.set("tokenizer.ggml.pre", GgufScalar{std::string("gpt-2")});
  m.set("tokenizer.ggml.eos_token_id", GgufScalar{static_cast<uint32_t>(tokens.size() - 1)});
  m.set("tokenizer.ggml.tokens", GgufArray(std::move(tokens)));
  m.set("tokenizer.ggml.token_type", GgufArray(std::move(types)));
  m.set("tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"t h"}));
  return Tokenizer::from_gguf(m);
}

// The mask by its definition: each token is tried.
std::vector<uint64_t> tried_mask(const Language& language, const Vocabulary& vocabulary,
                                 const Tokenizer& tokenizer, std::string_view before) {
  std::vector<uint64_t> bits((vocabulary.vocab() + 63) / 64);
  Automaton automaton(language.program());
  Automaton::State state = automaton.start();
  for (const char c : before) state = automaton.next(state, static_cast<uint8_t>(c));
  for (size_t i = 0; i < tokenizer.vocab_size(); ++i) {
    const std::string bytes = tokenizer.bytes_of(static_cast<TokenId>(i));
    Automaton::State s = state;
    for (const char c : bytes) s = automaton.next(s, static_cast<uint8_t>(c));
    if (!bytes.empty() && s != Automaton::kDead) bits[i / 64] |= uint64_t{1} << (i % 64);
  }
  return bits;
}

std::vector<TokenId> tokens_in(std::span<const uint64_t> mask) {
  std::vector<TokenId> ids;
  for (size_t i = 0; i < mask.size() * 64; ++i)
    if ((mask[i / 64] >> (i % 64) & 1) != 0) ids.push_back(static_cast<TokenId>(i));
  return ids;
}

// Whether a value is valid: the keywords that the walks below use.
bool is_valid(const Json& s, const Json& v, const Json& root) {
  if (s.is_boolean()) return s.get<bool>();
  if (s.contains("$ref"))
    return is_valid(root.at(Json::json_pointer(s["$ref"].get<std::string>().substr(1))), v, root);
  if (s.contains("const") && s["const"] != v) return false;
  if (s.contains("enum") && std::find(s["enum"].begin(), s["enum"].end(), v) == s["enum"].end())
    return false;
  for (const char* word : {"anyOf", "oneOf", "allOf"}) {
    if (!s.contains(word)) continue;
    const auto holds = std::count_if(s[word].begin(), s[word].end(),
                                     [&](const Json& one) { return is_valid(one, v, root); });
    const std::string_view w = word;
    if (w == "allOf" ? holds != std::ssize(s[word]) : w == "oneOf" ? holds != 1 : holds == 0)
      return false;
  }
  if (s.contains("type")) {
    const Json types = s["type"].is_array() ? s["type"] : Json::array({s["type"]});
    const bool fits = std::any_of(types.begin(), types.end(), [&](const Json& t) {
      return t == v.type_name() || (t == "integer" && v.is_number_integer());
    });
    if (!fits) return false;
  }
  const auto within = [&](const char* low, const char* high, size_t n) {
    return s.value(low, size_t{0}) <= n && n <= s.value(high, SIZE_MAX);
  };
  if (v.is_string())
    return within("minLength", "maxLength", count_code_points(v.get_ref<const std::string&>()));
  if (v.is_number()) {
    const double x = v.get<double>();
    return !(s.contains("minimum") && x < s["minimum"]) &&
           !(s.contains("maximum") && x > s["maximum"]) &&
           !(s.contains("exclusiveMinimum") && x <= s["exclusiveMinimum"]) &&
           !(s.contains("exclusiveMaximum") && x >= s["exclusiveMaximum"]);
  }
  if (v.is_array()) {
    if (!within("minItems", "maxItems", v.size())) return false;
    const size_t fixed = s.contains("prefixItems") ? s["prefixItems"].size() : 0;
    for (size_t i = 0; i < v.size(); ++i) {
      if (i < fixed && !is_valid(s["prefixItems"][i], v[i], root)) return false;
      if (i >= fixed && s.contains("items") && !is_valid(s["items"], v[i], root)) return false;
    }
  }
  if (v.is_object()) {
    if (!within("minProperties", "maxProperties", v.size())) return false;
    const Json none = Json::object();
    const Json& properties = s.contains("properties") ? s["properties"] : none;
    for (const Json& name : s.contains("required") ? s["required"] : none)
      if (!v.contains(name.get_ref<const std::string&>())) return false;
    for (const auto& [name, its] : v.items()) {
      if (properties.contains(name)) {
        if (!is_valid(properties[name], its, root)) return false;
      } else if (s.contains("additionalProperties") &&
                 !is_valid(s["additionalProperties"], its, root)) {
        return false;
      }
    }
  }
  return true;
}

const std::vector<std::string> kSchemas = {
    R"({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 40},
                 "maxItems": 3}}, "required": ["name", "age"], "additionalProperties": false})",
    R"({"type": "array", "items": {"enum": ["red", "blau", "초록", 5, null, {"a": [1]}]},
        "minItems": 2, "maxItems": 4})",
    R"({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "value": {"type": ["number", "null"]}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
        {"type": "null"}]}}, "required": ["value", "next"]}}})",
    R"({"type": "object", "properties": {"a": {"type": "boolean"}, "a\"b": {"const": "x"}},
        "additionalProperties": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 20.25}})",
    R"({"type": "object", "additionalProperties": {"type": "string", "minLength": 1},
        "minProperties": 1, "maxProperties": 3})",
    R"({"oneOf": [{"type": "object", "properties": {"kind": {"const": "circle"},
        "r": {"type": "number", "minimum": 0.5, "maximum": 3}}, "required": ["kind", "r"]},
        {"type": "object", "properties": {"kind": {"const": "square"}, "side":
        {"type": "integer", "exclusiveMaximum": 0}}, "required": ["kind"]}]})",
    R"({"allOf": [{"type": "object", "properties": {"x": {"type": "integer", "minimum": 3}},
        "required": ["x"]}, {"properties": {"x": {"type": "number", "maximum": 5},
        "y": {"type": "boolean"}}, "required": ["y"]}]})",
    R"({"type": "array", "prefixItems": [{"type": "string", "maxLength": 3},
        {"type": "boolean"}], "items": {"type": "integer"}, "minItems": 1, "maxItems": 5})",
    R"({"type": "string", "minLength": 30, "maxLength": 1000})",
    R"(true)"};

// Walks at random through a language's masks until the text may end; "" if it does not in time.
std::string random_walk(Constraint& constraint, const Tokenizer& tokenizer, Random& random,
                        size_t most_tokens) {
  std::string text;
  for (size_t n = 0; n < most_tokens; ++n) {
    const std::vector<TokenId> allowed = tokens_in(constraint.mask());
    if (constraint.accepts() && (allowed.empty() || random.below(4) == 0)) return text;
    REQUIRE(!allowed.empty());
    // Short tokens close what is open: half of the steps take the shortest of a few.
    TokenId id = allowed[random.below(allowed.size())];
    for (int i = 0; i < 12 && n > most_tokens / 4; ++i) {
      const TokenId other = allowed[random.below(allowed.size())];
      if (tokenizer.bytes_of(other).find_first_of("\"}]") < 2) id = other;
    }
    REQUIRE(constraint.take(tokenizer.bytes_of(id)));
    text += tokenizer.bytes_of(id);
  }
  return "";
}

}  // namespace

TEST_CASE("a regular expression accepts what it matches as a whole") {
  check(regex("abc"), {"abc"}, {"", "ab", "abcd"});
  check(regex("a*"), {"", "a", "aaaa"}, {"b", "ab"});
  check(regex("(ab|a)+c?"), {"ab", "aab", "abac", "a"}, {"", "b", "ca", "abb"});
  check(regex("[^a-c]{2}"), {"de", "한글", "\n!"}, {"ad", "d", "def"});
  check(regex("a{2,3}b{0}c{1,}"), {"aac", "aaacc"}, {"ac", "aabc", "aaaac", "aa"});
  check(regex("(a?b?){3}"), {"", "ab", "aaa", "babab", "ababab"}, {"aaaa", "c"});
  check(regex("((a{2,3}){2}|x){2}"), {"aaaaaaaa", "xx", "aaaaax", "xaaaa"}, {"aaaa", "x", "aaax"});
  check(regex("^\\d{4}-[01]\\d$"), {"2024-12"}, {"2024-22", "x2024-12"});
  check(regex("\\w+@\\w+\\.(com|kr)"), {"a_1@b.kr"}, {"a@b", "é@b.kr"});
  check(regex("."), {"x", "é", "한", "😀"}, {"", "\n", "xy", "\xED", "\xED\xA0\x80", "\x80"});
  check(regex("[가-힣]+"), {"모루", "가", "힣"}, {"", "a", "ㄱ", "\xEA\xB0"});
  check(regex("[\\]\\-x]|[]a]|[a-]"), {"]", "-", "x", "a"}, {"b", "\\"});
  check(regex("a{,2}"), {"a{,2}"}, {"a", "aa"});
  check(regex("\\x41\\u0042\\u{43}\\t\\."), {"ABC\t."}, {"ABC\tx"});
  check(regex("\\p{L}\\P{L}"), {"é1", "한!"}, {"11", "éé"});
  check(regex("(?:a|(?<n>b)|(?P<m>c))+?"), {"a", "abc"}, {""});
  check(regex("|a"), {"", "a"}, {"b"});
}

TEST_CASE("an expression that no mask can keep, or no engine reads, is refused with its reason") {
  struct Refusal {
    std::string pattern;
    ErrorKind kind;
    std::string says;
  };
  for (const Refusal& r : std::vector<Refusal>{
           {"(", ErrorKind::bad_input, "( without )"},
           {")", ErrorKind::bad_input, ") without ("},
           {"[a", ErrorKind::bad_input, "[ without ]"},
           {"*a", ErrorKind::bad_input, "repeats nothing"},
           {"a**", ErrorKind::bad_input, "repeats a repeat"},
           {"a{3,2}", ErrorKind::bad_input, "{3,2}"},
           {"[z-a]", ErrorKind::bad_input, "order"},
           {"\\", ErrorKind::bad_input, "ends in"},
           {"\\x4", ErrorKind::bad_input, "digits"},
           {"\xFF", ErrorKind::bad_input, "UTF-8"},
           {"(?=a)", ErrorKind::unsupported, "lookaround"},
           {"(?<!a)b", ErrorKind::unsupported, "lookaround"},
           {"(a)\\1", ErrorKind::unsupported, "back-reference"},
           {"\\bword", ErrorKind::unsupported, "word border"},
           {"(?i)a", ErrorKind::unsupported, "flag"},
           {"(?>a)", ErrorKind::unsupported, "atomic"},
           {"a++", ErrorKind::unsupported, "possessive"},
           {"(^a)", ErrorKind::unsupported, "anchor"},
           {"[[:alpha:]]", ErrorKind::unsupported, "POSIX"},
           {"\\p{Greek}", ErrorKind::unsupported, "property"},
           {"\\ud800", ErrorKind::unsupported, "half a character"},
           {std::string(200, '(') + std::string(200, ')'), ErrorKind::unsupported, "nested"},
           {std::string(20'000, 'a'), ErrorKind::unsupported, "longer"},
           {"a{2000000}", ErrorKind::unsupported, "count"},
           {"[]", ErrorKind::bad_input, "[ without ]"},
           {".*x.{50}", ErrorKind::unsupported, "too many states"},
           {"(a|b)*a(a|b){30}", ErrorKind::unsupported, "too many states"},
           {"a*a{0,500}", ErrorKind::unsupported, "too many states"}}) {
    CAPTURE(r.pattern.substr(0, 40));
    const Error error = error_from([&] { regex(r.pattern); });
    CHECK(error.kind() == r.kind);
    CHECK(error.where() == "regex");
    CHECK(error.problem().find(r.says) != std::string::npos);
  }
}

TEST_CASE("counts cost nothing: large, nested and together") {
  const Language far = regex("([a-z]{1,1000} ){0,1000}([0-9]{1000}){1000}");
  CHECK(far.program().code.size() < 200);
  check(regex("a{1000}"), {std::string(1000, 'a')},
        {std::string(999, 'a'), std::string(1001, 'a')});
  check(regex("(a{2}){500}"), {std::string(1000, 'a')}, {std::string(999, 'a')});
}

TEST_CASE("values of a schema's types") {
  check(schema(R"({"type": "string"})"), {R"("")", R"("é\n\u00e9\ud83d\ude00\/")"},
        {R"(")", "\"\n\"", R"("\ud83d")", R"("\x")", "1", ""});
  check(schema(R"({"type": "integer"})"), {"0", "-7", "123456"}, {"01", "1.0", "+1", "-", "1e3"});
  check(schema(R"({"type": "number"})"), {"0", "-0.5", "1e3", "2.50E-07"}, {"01", ".5", "1.", "e"});
  check(schema(R"({"type": ["boolean", "null"]})"), {"true", "false", "null"}, {"0", "True"});
  check(schema("true"), {"{}", "[1, {\"a\": [[]]}]", "\"x\"", "-1"}, {"", "[1,]", "{a:1}"});
  check(schema(R"({"enum": [1, "a", [1, 2]]})"), {"1", "\"a\"", "[1,2]"}, {"2", "[1, 2]"});
  check(schema(R"({"type": "string", "enum": [1, "a"]})"), {"\"a\""}, {"1"});
  check(schema(R"({"nullable": true, "type": "boolean"})"), {"null", "true"}, {"0"});
  check(Language({Kind::json_object, ""}), {"{}", R"({"a": {"b":[1,2]}})"}, {"[]", "1", "{"});
}

TEST_CASE("numbers between bounds: each is accepted if and only if it is within") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  Random random(seed);
  const auto random_number = [&](int digits) {
    const auto n = static_cast<int64_t>(random.below(2001)) - 1000;
    return static_cast<double>(n) / std::pow(10, digits);
  };
  for (int round = 0; round < 60; ++round) {
    const bool integer = round % 3 == 0;
    Json s = {{"type", integer ? "integer" : "number"}};
    const int digits = integer && round % 2 == 0 ? 0 : static_cast<int>(random.below(4));
    double low = random_number(digits), high = random_number(digits);
    if (low > high) std::swap(low, high);
    if (round % 5 != 1) s[random.below(2) != 0 ? "minimum" : "exclusiveMinimum"] = low;
    if (round % 5 != 2) s[random.below(2) != 0 ? "maximum" : "exclusiveMaximum"] = high;
    CAPTURE(s.dump());
    std::optional<Language> language;
    try {
      language.emplace(schema(s.dump()));
    } catch (const Error& error) {
      CHECK(error.problem().find("no text") != std::string::npos);  // an empty range
    }
    for (int i = 0; i < 300; ++i) {
      double v = random_number(static_cast<int>(random.below(4)));
      if (random.below(4) == 0) v = random.below(2) != 0 ? low : high;
      if (integer) v = std::round(v);
      const Json number = v == std::floor(v) ? Json(static_cast<int64_t>(v)) : Json(v);
      const std::string text = number.dump();
      if (text.find('e') != std::string::npos) continue;
      CAPTURE(text);
      CHECK((language && language->accepts(text)) == is_valid(s, number, s));
    }
  }
  check(schema(R"({"type": "number", "multipleOf": 0.01, "minimum": 0})"), {"1", "1.5", "1.25"},
        {"1.255", "-1"});
  check(schema(R"({"type": "integer", "minimum": 1e3})"), {"1000", "54321"}, {"999", "-5"});
}

TEST_CASE("objects: order, optional properties, and what is additional") {
  const Language a = schema(R"({"type": "object", "properties": {"a": {"const": 1},
      "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]})");
  check(a, {R"({"b":2})", R"({"a": 1, "b": 2})", "{\n  \"b\": 2,\n  \"c\": 3\n}"},
        {"{}", R"({"a":1})", R"({"b":2,"a":1})", R"({"b":2,"d":1})", R"({"b":2,})", R"({,"b":2})"});
  const Language b = schema(R"({"properties": {"ab": {"const": 1}, "ac": {"const": 2}},
      "additionalProperties": {"type": "boolean"}})");
  check(b, {"{}", R"({"ab":1,"x":true})", R"({"a":true,"abc":false,"":true})"},
        {R"({"ab":true})", R"({"x":1})", R"({"ac":true})", R"({"\u0061b":true})"});
  check(schema(R"({"type": "object", "properties": {}, "additionalProperties": false})"),
        {"{}", "{ }"}, {R"({"a":1})"});
  check(schema(R"({"type": "object", "required": ["z"]})"), {R"({"z": [1]})"}, {"{}"});
}

TEST_CASE("strings: lengths count characters, patterns meet escapes, formats") {
  const Language one = schema(R"({"type": "string", "minLength": 2, "maxLength": 3})");
  check(one, {R"("ab")", R"("\n\u00e9é")", R"("😀\ud83d\ude00")"}, {R"("a")", R"("abcd")"});
  check(schema(R"({"pattern": "^\"\\\\.\n$"})"), {R"("\"\\x\n")"}, {R"("\"\\xn")"});
  check(schema(R"({"pattern": "b"})"), {R"("b")", R"("abc\n")"}, {R"("ac")"});
  check(schema(R"({"pattern": "^[a-z]*$", "minLength": 2, "maxLength": 4})"), {R"("ab")"},
        {R"("a")", R"("abcde")", R"("AB")"});
  const auto format = [](const std::string& name) {
    return schema(R"({"type": "string", "format": ")" + name + "\"}");
  };
  check(format("date"), {R"("2024-02-28")"}, {R"("2024-02-30")", R"("2024-13-01")"});
  check(format("date-time"), {R"("2024-12-31T23:59:59.5+09:00")"}, {R"("2024-12-31 23:59:59Z")"});
  check(format("uuid"), {R"("123e4567-e89b-12d3-a456-426614174000")"}, {R"("123e4567")"});
  check(format("email"), {R"("a.b@example.co.kr")"}, {R"("a@b")", R"("@x.kr")"});
  check(format("ipv4"), {R"("192.168.0.1")"}, {R"("256.1.1.1")", R"("1.2.3")"});
  check(format("ipv6"), {R"("1:2:3:4:5:6:7:8")", R"("1::8")", R"("::1")"}, {R"("1:2")"});
  check(format("uri"), {R"("https://a.kr/b%20c?d=1#e")"}, {R"("a b")", R"("https://a/%zz")"});
}

TEST_CASE("a schema that cannot be held to is refused by keyword and path") {
  struct Refusal {
    std::string schema, where, says;
  };
  for (const Refusal& r : std::vector<Refusal>{
           {"{", "json_schema", "not JSON"},
           {"[]", "json_schema: ", "neither an object"},
           {R"({"not": {}})", "json_schema: /not", "not supported"},
           {R"({"properties": {"a/b": {"if": {}}}})", "json_schema: /properties/a~1b/if", ""},
           {R"({"type": "object", "patternProperties": {}})", "json_schema: /patternProperties",
            ""},
           {R"({"type": "float"})", "json_schema: /type", "no type"},
           {R"({"type": "array", "uniqueItems": true})", "json_schema: /uniqueItems", "promised"},
           {R"x({"items": {"pattern": "(?=a)"}})x", "json_schema: /items/pattern", "lookaround"},
           {R"({"items": {"pattern": ".*x.{60}"}})", "json_schema: /items/pattern", "too many"},
           {R"({"pattern": "(ab)+", "maxLength": 3})", "json_schema: /pattern", "maxLength"},
           {R"({"type": "string", "format": "binary"})", "json_schema: /format", "binary"},
           {R"({"type": "string", "minLength": -1})", "json_schema: /minLength", "count"},
           {R"({"type": "number", "multipleOf": 3})", "json_schema: /multipleOf", ""},
           {R"({"enum": []})", "json_schema: /enum", "list"},
           {R"({"$ref": "#"})", "json_schema", "itself"},
           {R"({"anyOf": [{"$ref": "#"}, {"type": "null"}]})", "json_schema", "itself"},
           {R"({"$ref": "other.json"})", "json_schema: /$ref", "leads out"},
           {R"({"$ref": "#/$defs/x"})", "json_schema: /$ref", "not there"},
           {R"({"properties": {"a": {"$ref": "#"}}, "required": ["a"]})", "json_schema", "no text"},
           {R"({"oneOf": [{"type": "string"}, {"maxLength": 3}]})", "json_schema: /oneOf", "both"},
           {R"({"allOf": [{"type": "string"}, {"type": "null"}]})", "json_schema: /type",
            "no value"},
           {R"({"required": ["a"], "additionalProperties": false})", "json_schema: /required", "a"},
           {R"({"minItems": 3, "maxItems": 2})", "json_schema: /minItems", "no value"},
           {std::string(200, '[') + std::string(200, ']'), "json_schema", "nested"}}) {
    CAPTURE(r.schema.substr(0, 80));
    const Error error = error_from([&] { schema(r.schema); });
    CHECK(error.where() == r.where);
    CHECK(error.problem().find(r.says) != std::string::npos);
  }
}

TEST_CASE("a mask is exactly the tokens that may follow, at every step of random walks") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  Random random(seed);
  const Tokenizer tokenizer = awkward_tokenizer(1500, random);
  const auto vocabulary = std::make_shared<const Vocabulary>(tokenizer, tokenizer.vocab_size() + 3);
  std::vector<std::shared_ptr<const Language>> languages;
  for (const std::string& text : kSchemas)
    languages.push_back(std::make_shared<Language>(ConstraintSource{Kind::json_schema, text}));
  for (const char* pattern :
       {"[a-z]{20,40}", "(.{3}\\n){0,30}", "[^\"]*\"[^\"]{5,18}\"", "(a|ab|é){0,12}(b|x.*)?"})
    languages.push_back(std::make_shared<Language>(ConstraintSource{Kind::regex, pattern}));
  for (const auto& language : languages) {
    const auto masks = std::make_shared<TokenMasks>(language, vocabulary);
    for (int round = 0; round < 3; ++round) {
      Constraint constraint(masks);
      std::string text;
      for (int n = 0; n < 40; ++n) {
        CAPTURE(text);
        const std::span<const uint64_t> mask = constraint.mask();
        const std::vector<uint64_t> tried = tried_mask(*language, *vocabulary, tokenizer, text);
        REQUIRE(std::vector<uint64_t>(mask.begin(), mask.end()) == tried);
        const std::vector<TokenId> allowed = tokens_in(tried);
        if (allowed.empty()) {
          REQUIRE(constraint.complete());
          break;
        }
        const std::string bytes = tokenizer.bytes_of(allowed[random.below(allowed.size())]);
        REQUIRE(constraint.take(bytes));
        REQUIRE(!constraint.take("\xFF\xFF"));
        text += bytes;
      }
    }
  }
}

TEST_CASE("a mask takes away what it does not have and nothing else") {
  Random random(1);
  for (const size_t vocab : {1, 63, 64, 65, 200, 1000}) {
    for (const uint64_t share : {0, 1, 8, 15, 16}) {
      std::vector<uint64_t> mask((vocab + 63) / 64);
      std::vector<float> logits(vocab), expected(vocab);
      for (size_t i = 0; i < vocab; ++i) {
        logits[i] = expected[i] = random.normal();
        if (random.below(16) < share) {
          mask[i / 64] |= uint64_t{1} << (i % 64);
        } else {
          expected[i] = -INFINITY;
        }
      }
      apply_mask(mask, logits);
      CHECK(logits == expected);
    }
  }
}

TEST_CASE("what random walks through a schema's masks spell is valid by the schema") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  Random random(seed);
  std::vector<std::pair<std::string, Tokenizer>> tokenizers;
  tokenizers.emplace_back("awkward", awkward_tokenizer(1500, random));
  if (const auto model = peer_model("SmolLM2-135M-Q4_K_M.gguf"))
    tokenizers.emplace_back("SmolLM2", Tokenizer::from_gguf(GgufFile(*model).metadata()));
  // For a look by another validator: MORU_WALKS names a file of {"schema", "value"} rows.
  std::ofstream walks;
  if (const char* path = std::getenv("MORU_WALKS")) walks.open(path);
  for (const auto& [name, tokenizer] : tokenizers) {
    const auto vocabulary = std::make_shared<const Vocabulary>(tokenizer, tokenizer.vocab_size());
    for (const std::string& text : kSchemas) {
      CAPTURE(name);
      CAPTURE(text);
      const Json root = Json::parse(text);
      const auto language =
          std::make_shared<const Language>(ConstraintSource{Kind::json_schema, text});
      const auto masks = std::make_shared<TokenMasks>(language, vocabulary);
      size_t finished = 0;
      for (int round = 0; round < 20; ++round) {
        Constraint constraint(masks);
        const std::string spelled = random_walk(constraint, tokenizer, random, 400);
        if (spelled.empty()) continue;
        ++finished;
        CAPTURE(spelled);
        CHECK(language->accepts(spelled));
        REQUIRE(Json::accept(spelled));
        CHECK(is_valid(root, Json::parse(spelled), root));
        if (walks.is_open()) walks << Json{{"schema", root}, {"value", spelled}}.dump() << "\n";
      }
      CHECK(finished > 0);
    }
  }
}

TEST_CASE("a model's answers are held to their language, alone and together") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf");
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(2);
  const Model model = load_model(pool, files, {.context = 512});
  Engine engine(pool, model, {.step_tokens = 64, .cache_tokens = 4096});
  std::vector<GenerationRequest> requests;
  for (size_t i = 0; i < 2 * kSchemas.size(); ++i) {
    GenerationRequest request;
    request.prompt = {1, 2, static_cast<TokenId>(i)};
    request.max_tokens = 300;
    request.sampling.temperature = i % 3 == 0 ? 0.0f : 1.0f;
    request.sampling.seed = i;
    request.stop_ids = files.stop_ids;
    request.language = std::make_shared<const Language>(
        ConstraintSource{Kind::json_schema, kSchemas[i % kSchemas.size()]});
    if (i % 4 == 1) request.top_logprobs = 1;
    requests.push_back(request);
  }
  Generator generator(engine, files.tokenizer);
  const std::vector<GenerationResult> together = generate_all(generator, requests);
  size_t ended = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    CAPTURE(together[i].text);
    const Json root = Json::parse(kSchemas[i % kSchemas.size()]);
    if (together[i].finish == Finish::stop) {
      ++ended;
      REQUIRE(Json::accept(together[i].text));
      CHECK(is_valid(root, Json::parse(together[i].text), root));
    }
    CHECK(generate_all(generator, {requests[i]}).front().text == together[i].text);
  }
  CHECK(ended > 5);
}

TEST_CASE("what must come next is added without asking the model") {
  const TempDir folder;
  write_tiny_model(folder.path() / "tiny.gguf");
  const ModelFiles files = open_model(folder.path() / "tiny.gguf");
  Pool pool(1);
  const Model model = load_model(pool, files, {.context = 256});
  Engine engine(pool, model, {.step_tokens = 64, .cache_tokens = 512});
  Generator generator(engine, files.tokenizer);
  GenerationRequest request;
  request.prompt = {1, 2, 3};
  request.stop_ids = files.stop_ids;
  request.language =
      std::make_shared<const Language>(ConstraintSource{Kind::regex, "the answer is (yes|no)!"});
  const uint64_t number = generator.submit(request);
  size_t steps = 0;
  std::string text;
  std::optional<Finish> finish;
  while (generator.busy()) {
    ++steps;
    generator.step([&](const GenerationEvent& event) {
      CHECK(event.request == number);
      text += event.text;
      finish = event.finish;
    });
  }
  CHECK((text == "the answer is yes!" || text == "the answer is no!"));
  CHECK(finish == Finish::stop);
  CHECK(steps < 8);

  // The same tokens one by one, where each one's log-probability is asked for.
  request.top_logprobs = 0;
  const GenerationResult slow = generate_all(generator, {request}).front();
  CHECK(slow.text == text);
  CHECK(slow.logprobs.size() == slow.completion_tokens);

  // An end where none is allowed is never chosen, however likely.
  request.sampling.logit_bias = {{files.stop_ids.front(), 100.0f}};
  CHECK(generate_all(generator, {request}).front().text.starts_with("the answer is "));
  // A limit cuts the answer short, and says so.
  request.max_tokens = 5;
  const GenerationResult cut = generate_all(generator, {request}).front();
  CHECK(cut.finish == Finish::length);
  CHECK(cut.completion_tokens == 5);
}
