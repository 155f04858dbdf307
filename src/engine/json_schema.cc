#include "engine/json_schema.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "engine/decimal_grammar.h"
#include "engine/regex_grammar.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;
using Node = Grammar::Node;
constexpr size_t kNoLimit = Grammar::kNoLimit;

constexpr size_t kMaxSchemaBytes = 256 << 10;
constexpr int kMaxDepth = 100;
constexpr size_t kMaxMerges = 10'000;  // of allOf and what stands beside a $ref or an anyOf
constexpr size_t kMaxIndent = 40;

// Say something about a value but do not change which are valid.
constexpr std::array<std::string_view, 19> kAnnotations = {
    "title",    "description", "default",       "examples",        "example",
    "$schema",  "$id",         "$comment",      "$defs",           "definitions",
    "readOnly", "writeOnly",   "deprecated",    "contentEncoding", "contentMediaType",
    "id",       "$vocabulary", "discriminator", "externalDocs"};

constexpr std::array<std::string_view, 7> kTypes = {"object",  "array",   "string", "number",
                                                    "integer", "boolean", "null"};
// The keywords of each type.
struct TypedKeyword {
  std::string_view name, type;
};
constexpr std::array<TypedKeyword, 20> kTypedKeywords = {{{"properties", "object"},
                                                          {"required", "object"},
                                                          {"additionalProperties", "object"},
                                                          {"minProperties", "object"},
                                                          {"maxProperties", "object"},
                                                          {"items", "array"},
                                                          {"prefixItems", "array"},
                                                          {"additionalItems", "array"},
                                                          {"minItems", "array"},
                                                          {"maxItems", "array"},
                                                          {"uniqueItems", "array"},
                                                          {"pattern", "string"},
                                                          {"minLength", "string"},
                                                          {"maxLength", "string"},
                                                          {"format", "string"},
                                                          {"minimum", "number"},
                                                          {"maximum", "number"},
                                                          {"exclusiveMinimum", "number"},
                                                          {"exclusiveMaximum", "number"},
                                                          {"multipleOf", "number"}}};
// Those that combine schemas.
constexpr std::array<std::string_view, 7> kCombining = {"type",  "enum",  "const", "$ref",
                                                        "anyOf", "oneOf", "allOf"};

// Formats as expressions; each is a part of what the format allows.
struct Format {
  std::string_view name, pattern;
};
#define MORU_DATE                                    \
  "\\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|" \
  "(0[469]|11)-(0[1-9]|[12]\\d|30)|02-(0[1-9]|1\\d|2[0-8]))"
#define MORU_TIME \
  "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d{1,9})?(Z|[+-]([01]\\d|2[0-3]):[0-5]\\d)"
#define MORU_LABEL "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
constexpr std::array<Format, 9> kFormats = {
    {{"date", "^" MORU_DATE "$"},
     {"time", "^" MORU_TIME "$"},
     {"date-time", "^" MORU_DATE "T" MORU_TIME "$"},
     {"duration",
      "^P(\\d{1,9}W|\\d{1,9}D|T\\d{1,9}[HMS]|\\d{1,9}DT\\d{1,9}[HMS]|"
      "\\d{1,9}[YM]|\\d{1,9}Y\\d{1,9}M)$"},
     {"uuid", "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"},
     {"email", "^[A-Za-z0-9_+-]{1,32}(\\.[A-Za-z0-9_+-]{1,15}){0,2}@" MORU_LABEL "(\\." MORU_LABEL
               "){0,2}\\.[A-Za-z]{2,24}$"},
     {"hostname", "^" MORU_LABEL "(\\." MORU_LABEL "){0,3}$"},
     {"ipv4",
      "^((25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)\\.){3}(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)$"},
     {"uri",
      "^[a-z][a-z0-9+.-]{1,15}://[A-Za-z0-9.-]{1,253}(:\\d{1,5})?"
      "(/([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2}){0,500}){0,20}"
      "(\\?([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-F]{2}){0,500})?"
      "(#([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-F]{2}){0,500})?$"}}};
#undef MORU_DATE
#undef MORU_TIME
#undef MORU_LABEL
constexpr std::string_view kIpv6 =
    "^(([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,5}(:[0-9a-f]{1,4}){1,2}|::1?)$";

template <typename List>
bool is_one_of(std::string_view name, const List& list) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string_view type_of(const Json& value) {
  if (value.is_object()) return "object";
  if (value.is_array()) return "array";
  if (value.is_string()) return "string";
  if (value.is_boolean()) return "boolean";
  if (value.is_null()) return "null";
  const bool whole =
      value.is_number_integer() || std::floor(value.get<double>()) == value.get<double>();
  return whole ? "integer" : "number";
}

// One schema and where it stands.
struct Place {
  const Json* schema;
  std::string path;  // a JSON pointer

  Place at(std::string_view name) const {
    std::string step;
    for (const char c : name) {
      if (c == '~') {
        step += "~0";
      } else if (c == '/') {
        step += "~1";
      } else {
        step += c;
      }
    }
    return {&(*schema)[std::string(name)], path + "/" + step};
  }
  Place at(std::string_view list, size_t index) const {
    return {&(*schema)[std::string(list)][index], fmt::format("{}/{}/{}", path, list, index)};
  }
  bool has(std::string_view name) const { return schema->contains(name); }
};

class Builder {
 public:
  explicit Builder(const Json& root) : root_(root) {
    const CodeSet& plain = plain_characters();
    short_escape_ = g_.sequence({g_.text("\\"), g_.one_of({{'"', '"'},
                                                           {'\\', '\\'},
                                                           {'b', 'b'},
                                                           {'f', 'f'},
                                                           {'n', 'n'},
                                                           {'r', 'r'},
                                                           {'t', 't'}})});
    const Node hex = g_.one_of({{'0', '9'}, {'A', 'F'}, {'a', 'f'}});
    const Node to_7 = g_.one_of({{'0', '7'}});
    const CodeSet d = {{'D', 'D'}, {'d', 'd'}};
    const CodeSet not_d = CodeSet{{'0', '9'}, {'A', 'F'}, {'a', 'f'}}.without(d);
    // Half of a pair of surrogates alone is no character.
    const Node one = g_.choice({g_.sequence({g_.one_of(not_d), hex, hex, hex}),
                                g_.sequence({g_.one_of(d), to_7, hex, hex})});
    const Node pair =
        g_.sequence({g_.one_of(d), g_.one_of({{'8', '9'}, {'A', 'B'}, {'a', 'b'}}), hex, hex,
                     g_.text("\\u"), g_.one_of(d), g_.one_of({{'C', 'F'}, {'c', 'f'}}), hex, hex});
    character_ = g_.choice({g_.one_of(plain), short_escape_, g_.text("\\/"),
                            g_.sequence({g_.text("\\u"), g_.choice({one, pair})})});
    const Node indent = g_.repeat(g_.one_of({{' ', ' '}, {'\t', '\t'}}), 0, kMaxIndent);
    gap_ = g_.choice({g_.empty(), g_.text(" "), g_.sequence({g_.text("\n"), indent})});
    space_ = g_.choice({g_.empty(), g_.text(" ")});
  }

  Program any_object_program() { return compile(g_, any_object(), kName); }
  Program run() { return compile(g_, value({&root_, ""}), kName); }

 private:
  static constexpr std::string_view kName = "json_schema";

  [[noreturn]] static void refuse(ErrorKind kind, const Place& place, std::string_view keyword,
                                  std::string what, std::string cure = "") {
    throw Error(kind, {.where = fmt::format("{}: {}{}{}", kName, place.path,
                                            keyword.empty() ? "" : "/", keyword),
                       .what = std::move(what),
                       .cure = std::move(cure)});
  }
  [[noreturn]] static void malformed(const Place& place, std::string_view keyword,
                                     std::string what) {
    refuse(ErrorKind::bad_input, place, keyword, std::move(what));
  }
  [[noreturn]] static void unsupported(const Place& place, std::string_view keyword,
                                       std::string what, std::string cure = "") {
    refuse(ErrorKind::unsupported, place, keyword, std::move(what), std::move(cure));
  }

  // The values of one schema. Each is one rule, so that they may refer to each other; schemas that
  // read alike share one, also those that merging makes again and again.
  Node value(const Place& place) {
    if (place.schema->is_boolean()) return place.schema->get<bool>() ? any_value() : g_.nothing();
    if (!place.schema->is_object()) malformed(place, "", "is neither an object nor a boolean");
    const auto [found, is_new] = rules_.try_emplace(dump(*place.schema), 0);
    if (is_new) {
      const size_t rule = g_.add_rule();
      found->second = rule;
      if (++depth_ > 4 * kMaxDepth) unsupported(place, "", "is nested too deeply");
      const Node made = new_value(place);
      --depth_;
      g_.set_rule(rule, made);
      return g_.reference(rule);
    }
    return g_.reference(found->second);
  }

  Node new_value(const Place& place) {
    check_keywords(place);
    for (const std::string_view keyword : {"$ref", "allOf", "anyOf", "oneOf"})
      if (place.has(keyword)) return combined(place, keyword);
    if (place.has("const") || place.has("enum")) return listed(place);
    const std::set<std::string_view> types = types_of(place);
    std::vector<Node> ways;
    for (const std::string_view type : types) {
      if (type == "integer" && types.contains("number")) continue;
      ways.push_back(typed(place, type));
    }
    if (place.has("nullable") && (*place.schema)["nullable"] == true && !types.contains("null"))
      ways.push_back(g_.text("null"));
    return g_.choice(std::move(ways));
  }

  void check_keywords(const Place& place) {
    for (const auto& [name, ignored] : place.schema->items()) {
      if (is_one_of(name, kAnnotations) || is_one_of(name, kCombining) || name == "nullable" ||
          name.starts_with("x-"))
        continue;
      if (std::any_of(kTypedKeywords.begin(), kTypedKeywords.end(),
                      [&word = name](const TypedKeyword& k) { return k.name == word; }))
        continue;
      unsupported(place, name, "is a keyword that is not supported", "leave it out");
    }
  }

  // Those that "type" names; without it, those that the other keywords speak of, or all.
  std::set<std::string_view> types_of(const Place& place) {
    std::set<std::string_view> types;
    const auto add = [&](const Json& name) {
      if (!name.is_string()) malformed(place, "type", "is not the name of a type");
      const auto found =
          std::find(kTypes.begin(), kTypes.end(), name.get_ref<const std::string&>());
      if (found == kTypes.end())
        malformed(place, "type", fmt::format("{} is no type", truncate_to_width(dump(name), 40)));
      types.insert(*found);
    };
    if (place.has("type")) {
      const Json& type = (*place.schema)["type"];
      if (type.is_array()) {
        for (const Json& one : type) add(one);
        if (types.empty()) malformed(place, "type", "has no types");
      } else {
        add(type);
      }
      return types;
    }
    for (const TypedKeyword& k : kTypedKeywords)
      if (place.has(k.name)) types.insert(k.type);
    if (types.empty()) types.insert(kTypes.begin(), kTypes.end());
    return types;
  }

  Node typed(const Place& place, std::string_view type) {
    if (type == "object") return object(place);
    if (type == "array") return array(place);
    if (type == "string") return string(place);
    if (type == "null") return g_.text("null");
    if (type == "boolean") return g_.choice({g_.text("true"), g_.text("false")});
    return number(place, type == "integer");
  }

  // --- const and enum

  Node listed(const Place& place) {
    for (const TypedKeyword& k : kTypedKeywords)
      if (place.has(k.name)) unsupported(place, k.name, "stands beside const or enum");
    std::vector<Json> values;
    if (place.has("enum")) {
      const Json& list = (*place.schema)["enum"];
      if (!list.is_array() || list.empty()) malformed(place, "enum", "is not a list of values");
      values.assign(list.begin(), list.end());
    }
    if (place.has("const")) {
      const Json& only = (*place.schema)["const"];
      if (!values.empty() && std::find(values.begin(), values.end(), only) == values.end())
        unsupported(place, "const", "is not in the enum: no value is valid");
      values = {only};
    }
    const std::set<std::string_view> types = types_of(place);
    std::vector<Node> ways;
    for (const Json& v : values) {
      const std::string_view type = type_of(v);
      if (types.contains(type) || (type == "integer" && types.contains("number")))
        ways.push_back(g_.text(dump(v)));
    }
    return g_.choice(std::move(ways));
  }

  // --- $ref, allOf, anyOf, oneOf

  Node combined(const Place& place, std::string_view keyword) {
    Json rest = *place.schema;
    rest.erase(std::string(keyword));
    for (const std::string_view name : kAnnotations) rest.erase(std::string(name));
    if (keyword == "$ref") {
      const Place target = referred(place);
      if (rest.empty()) return value(target);
      return merged(place, {target.schema, &rest});
    }
    const Json& list = (*place.schema)[std::string(keyword)];
    if (!list.is_array() || list.empty()) malformed(place, keyword, "is not a list of schemas");
    if (keyword == "allOf") {
      std::vector<const Json*> all;
      for (const Json& one : list) all.push_back(&one);
      if (!rest.empty()) all.push_back(&rest);
      return merged(place, all);
    }
    if (keyword == "oneOf") check_disjoint(place);
    std::vector<Node> ways;
    for (size_t i = 0; i < list.size(); ++i) {
      const Place way = place.at(keyword, i);
      ways.push_back(rest.empty() ? value(way) : merged(way, {way.schema, &rest}));
    }
    return g_.choice(std::move(ways));
  }

  Place referred(const Place& place) {
    const Json& ref = (*place.schema)["$ref"];
    if (!ref.is_string()) malformed(place, "$ref", "is not a text");
    const std::string& text = ref.get_ref<const std::string&>();
    if (!text.starts_with('#') || (text.size() > 1 && text[1] != '/'))
      unsupported(place, "$ref",
                  fmt::format("\"{}\" leads out of this schema or to an anchor",
                              truncate_to_width(text, 80)),
                  "use \"#/$defs/…\"");
    try {
      const Json::json_pointer pointer(text.substr(1));
      if (root_.contains(pointer)) return {&root_.at(pointer), text.substr(1)};
    } catch (const Json::exception&) {
    }
    malformed(place, "$ref", fmt::format("\"{}\" is not there", truncate_to_width(text, 80)));
  }

  // The values that all of `schemas` allow, as one schema where that can be said.
  Node merged(const Place& place, const std::vector<const Json*>& schemas) {
    Json all = Json::object();
    std::vector<const Json*> open;
    for (const Json* schema : schemas) merge_into(all, *schema, place, open);
    made_.push_back(std::move(all));
    return value({&made_.back(), place.path});
  }

  void merge_into(Json& all, const Json& schema, const Place& place,
                  std::vector<const Json*>& open) {
    if (++merges_ > kMaxMerges) unsupported(place, "", "combines too many schemas");
    if (schema.is_boolean() && schema.get<bool>()) return;
    if (!schema.is_object()) unsupported(place, "allOf", "has a part that allows nothing");
    const Place here{&schema, place.path};
    check_keywords(here);
    if (schema.contains("$ref")) {
      if (std::find(open.begin(), open.end(), &schema) != open.end())
        unsupported(place, "allOf", "refers to itself");
      open.push_back(&schema);
      merge_into(all, *referred(here).schema, place, open);
      open.pop_back();
    }
    if (const auto list = schema.find("allOf"); list != schema.end()) {
      if (!list->is_array()) malformed(here, "allOf", "is not a list of schemas");
      for (const Json& one : *list) merge_into(all, one, place, open);
    }
    // Properties that only one of two closed objects has are in neither.
    const auto closed = [](const Json& s) {
      return s.contains("additionalProperties") && s["additionalProperties"] != true;
    };
    if ((closed(all) || closed(schema)) && names_of(all) != names_of(schema) &&
        (all.contains("properties") || closed(all)) &&
        (schema.contains("properties") || closed(schema)))
      unsupported(place, "additionalProperties",
                  "is combined with a schema that has other properties",
                  "put all properties into one schema");
    for (const auto& [name, theirs] : schema.items()) {
      if (name == "$ref" || name == "allOf" || is_one_of(name, kAnnotations)) continue;
      if (!all.contains(name)) {
        all[name] = theirs;
        continue;
      }
      Json& ours = all[name];
      if (ours == theirs) continue;
      if (name == "properties" && ours.is_object() && theirs.is_object()) {
        for (const auto& [property, its] : theirs.items()) {
          if (!ours.contains(property)) {
            ours[property] = its;
          } else if (ours[property] != its) {
            ours[property] = Json{{"allOf", Json::array({ours[property], its})}};
          }
        }
      } else if (name == "required" && ours.is_array() && theirs.is_array()) {
        for (const Json& one : theirs)
          if (std::find(ours.begin(), ours.end(), one) == ours.end()) ours.push_back(one);
      } else if (name.starts_with("min") || name == "exclusiveMinimum") {
        if (theirs.is_number() && ours.is_number() && theirs > ours) ours = theirs;
      } else if (name.starts_with("max") || name == "exclusiveMaximum") {
        if (theirs.is_number() && ours.is_number() && theirs < ours) ours = theirs;
      } else if (name == "type" || name == "enum") {
        intersect(ours, theirs, place, name);
      } else if (name == "items") {
        ours = Json{{"allOf", Json::array({ours, theirs})}};
      } else {
        unsupported(place, name, "is said twice by schemas that must both hold");
      }
    }
  }

  static std::set<std::string> names_of(const Json& schema) {
    std::set<std::string> names;
    if (const auto list = schema.find("properties"); list != schema.end() && list->is_object())
      for (const auto& [name, ignored] : list->items()) names.insert(name);
    return names;
  }

  static void intersect(Json& ours, const Json& theirs, const Place& place,
                        const std::string& name) {
    const auto listed_of = [](const Json& v) { return v.is_array() ? v : Json::array({v}); };
    const Json a = listed_of(ours), b = listed_of(theirs);
    Json both = Json::array();
    for (const Json& x : a) {
      for (const Json& y : b) {
        const bool narrower = name == "type" && ((x == "integer" && y == "number") ||
                                                 (x == "number" && y == "integer"));
        const Json& kept = narrower ? (x == "integer" ? x : y) : x;
        if ((x == y || narrower) && std::find(both.begin(), both.end(), kept) == both.end())
          both.push_back(kept);
      }
    }
    if (both.empty()) unsupported(place, name, "has no value that all schemas here allow");
    ours = std::move(both);
  }

  // oneOf promises that one branch alone holds; that must be plain to see.
  void check_disjoint(const Place& place) {
    const Json& list = (*place.schema)["oneOf"];
    for (size_t a = 0; a < list.size(); ++a)
      for (size_t b = a + 1; b < list.size(); ++b)
        if (!are_disjoint(place.at("oneOf", a), place.at("oneOf", b), 0))
          unsupported(place, "oneOf",
                      fmt::format("has branches {} and {} that may hold both", a, b),
                      "use anyOf, or give each a property with a const of its own");
  }

  Place resolved(Place place) {
    for (int i = 0; i < kMaxDepth && place.schema->is_object() && place.has("$ref"); ++i)
      place = referred(place);
    return place;
  }

  bool are_disjoint(Place a, Place b, int depth) {
    if (depth > 8) return false;
    a = resolved(a);
    b = resolved(b);
    if (!a.schema->is_object() || !b.schema->is_object()) return false;
    const auto values_of = [](const Place& p) {
      std::vector<Json> values;
      if (p.has("const")) return std::vector<Json>{(*p.schema)["const"]};
      if (p.has("enum") && (*p.schema)["enum"].is_array())
        values.assign((*p.schema)["enum"].begin(), (*p.schema)["enum"].end());
      return values;
    };
    const std::vector<Json> va = values_of(a), vb = values_of(b);
    if (!va.empty() && !vb.empty())
      return std::none_of(va.begin(), va.end(), [&](const Json& v) {
        return std::find(vb.begin(), vb.end(), v) != vb.end();
      });
    const auto types = [&](const Place& p, const std::vector<Json>& values) {
      std::set<std::string_view> out;
      if (values.empty()) {
        // Without "type" every type is valid, whatever the other keywords speak of.
        out =
            p.has("type") ? types_of(p) : std::set<std::string_view>(kTypes.begin(), kTypes.end());
      }
      for (const Json& v : values) out.insert(type_of(v));
      if (out.contains("number")) out.insert("integer");
      return out;
    };
    const auto ta = types(a, va), tb = types(b, vb);
    std::vector<std::string_view> both;
    std::set_intersection(ta.begin(), ta.end(), tb.begin(), tb.end(), std::back_inserter(both));
    if (both.empty()) return true;
    if (both != std::vector<std::string_view>{"object"}) return false;
    const auto requires_name = [](const Place& p, const std::string& name) {
      if (!p.has("required")) return false;
      const Json& list = (*p.schema)["required"];
      return list.is_array() && std::find(list.begin(), list.end(), name) != list.end();
    };
    for (const std::string& name : names_of(*a.schema)) {
      if (!names_of(*b.schema).contains(name)) continue;
      if (requires_name(a, name) && requires_name(b, name) &&
          are_disjoint(a.at("properties").at(name), b.at("properties").at(name), depth + 1))
        return true;
    }
    return false;
  }

  // --- strings

  Node quoted(Node inside) { return g_.sequence({g_.text("\""), inside, g_.text("\"")}); }

  // One character of a set, as JSON strings spell it.
  static Node spelled(Grammar& g, const CodeSet& set) {
    std::vector<Node> ways;
    CodeSet raw;
    for (const auto& [first, last] : set.ranges()) raw.add(first, last);
    raw = raw.without(plain_characters().inverted());
    if (!raw.empty()) ways.push_back(g.one_of(raw));
    for (char32_t c = 0; c < 0x60; ++c) {
      if (plain_characters().contains(c) || !set.contains(c)) continue;
      const std::string whole = dump(std::string(1, static_cast<char>(c)));
      ways.push_back(g.text(std::string_view(whole).substr(1, whole.size() - 2)));
    }
    return ways.empty() ? g.nothing() : g.choice(std::move(ways));
  }

  Node string(const Place& place) {
    const size_t min = count(place, "minLength").value_or(0);
    const size_t max = count(place, "maxLength").value_or(kNoLimit);
    if (min > max) unsupported(place, "minLength", "is more than maxLength: no value is valid");
    const bool pattern = place.has("pattern"), format = place.has("format");
    if (!pattern && !format) return quoted(g_.repeat(character_, min, max));
    const char* keyword = pattern ? "pattern" : "format";
    if (pattern && format) unsupported(place, "format", "stands beside a pattern");
    const Json& text = (*place.schema)[keyword];
    if (!text.is_string()) malformed(place, keyword, "is not a text");
    std::string expression = text.get<std::string>();
    if (format) {
      const auto found = std::find_if(kFormats.begin(), kFormats.end(),
                                      [&](const Format& f) { return f.name == expression; });
      if (found != kFormats.end()) {
        expression = found->pattern;
      } else if (expression == "ipv6") {
        expression = kIpv6;
      } else {
        unsupported(place, "format",
                    fmt::format("\"{}\" is not supported", truncate_to_width(expression, 40)),
                    "leave it out, or use a pattern");
      }
    }
    return quoted(add_regex(g_, expression,
                            {.where = fmt::format("{}: {}/{}", kName, place.path, keyword),
                             .anywhere = true,
                             .write = spelled,
                             .min_length = min,
                             .max_length = max}));
  }

  // --- numbers

  Node number(const Place& place, bool integer) {
    DecimalBounds bounds{.integer = integer};
    const auto limit = [&](const char* keyword) -> std::optional<Decimal> {
      if (!place.has(keyword)) return std::nullopt;
      const Json& v = (*place.schema)[keyword];
      // Draft 4 had exclusiveMinimum as a flag.
      if (!v.is_number()) malformed(place, keyword, "is not a number");
      const std::optional<Decimal> decimal = Decimal::parse(dump(v));
      if (!decimal) unsupported(place, keyword, "is too large or too fine");
      return decimal;
    };
    bounds.low = limit("minimum");
    bounds.high = limit("maximum");
    if (const auto low = limit("exclusiveMinimum"); low && (!bounds.low || !(*low < *bounds.low))) {
      bounds.low = low;
      bounds.low_excluded = true;
    }
    if (const auto high = limit("exclusiveMaximum");
        high && (!bounds.high || !(*bounds.high < *high))) {
      bounds.high = high;
      bounds.high_excluded = true;
    }
    if (place.has("multipleOf")) {
      const Json& step = (*place.schema)["multipleOf"];
      const std::optional<Decimal> decimal =
          step.is_number() ? Decimal::parse(dump(step)) : std::nullopt;
      // 1, 0.1, 0.01 …: so many digits after the point.
      if (!decimal || decimal->negative ||
          decimal->whole + decimal->fraction !=
              (decimal->fraction.empty()
                   ? "1"
                   : "0" + std::string(decimal->fraction.size() - 1, '0') + "1"))
        unsupported(place, "multipleOf", "is none of 1, 0.1, 0.01 …");
      bounds.fraction_digits = std::min(bounds.fraction_digits, decimal->fraction.size());
      if (decimal->fraction.empty()) bounds.integer = true;
    }
    return add_decimals(g_, bounds);
  }

  std::optional<size_t> count(const Place& place, const char* keyword) {
    if (!place.has(keyword)) return std::nullopt;
    const Json& v = (*place.schema)[keyword];
    const bool whole = v.is_number_unsigned() ||
                       (v.is_number_float() && v.get<double>() >= 0 &&
                        std::floor(v.get<double>()) == v.get<double>() && v.get<double>() < 1e9);
    if (!whole) malformed(place, keyword, "is not a count");
    const auto n = v.get<size_t>();
    if (n > 1'000'000'000) unsupported(place, keyword, "is beyond 1,000,000,000");
    return n;
  }

  // --- arrays

  Node array(const Place& place) {
    const size_t min = count(place, "minItems").value_or(0);
    size_t max = count(place, "maxItems").value_or(kNoLimit);
    if (min > max) unsupported(place, "minItems", "is more than maxItems: no value is valid");
    if (place.has("uniqueItems") && (*place.schema)["uniqueItems"] != false && max > 1)
      unsupported(place, "uniqueItems", "cannot be promised");
    std::vector<Node> first;  // by position
    std::optional<Node> item;
    const auto add_first = [&](const char* keyword) {
      const Json& list = (*place.schema)[keyword];
      if (!list.is_array()) malformed(place, keyword, "is not a list of schemas");
      for (size_t i = 0; i < list.size(); ++i) first.push_back(value(place.at(keyword, i)));
    };
    const char* rest = "items";
    if (place.has("prefixItems")) add_first("prefixItems");
    if (place.has("items") && (*place.schema)["items"].is_array()) {
      add_first("items");
      rest = "additionalItems";
    }
    if (place.has(rest)) {
      if ((*place.schema)[rest] == false) {
        max = std::min(max, first.size());
        if (min > max) unsupported(place, rest, "leaves fewer items than minItems asks for");
      } else {
        item = value(place.at(rest));
      }
    } else if (first.empty() || min > first.size()) {
      item = any_value();
    }
    const Node comma = g_.sequence({g_.text(","), gap_});
    if (first.size() > max) first.resize(max);
    // After the positions: as many more as the counts allow.
    const size_t fixed = first.size();
    const auto less = [&](size_t n) { return n == kNoLimit ? n : n - std::min(n, fixed); };
    Node tail = g_.empty();
    if (item && less(max) > 0) {
      if (fixed > 0) {
        tail = g_.repeat(g_.sequence({comma, *item}), less(min), less(max));
      } else {
        const Node more = g_.repeat(g_.sequence({comma, *item}), min > 0 ? min - 1 : 0,
                                    max == kNoLimit ? max : max - 1);
        tail = g_.sequence({*item, more});
        if (min == 0) tail = g_.optional(tail);
      }
    }
    for (size_t i = fixed; i-- > 0;) {
      tail = g_.sequence({i > 0 ? comma : g_.empty(), first[i], tail});
      if (i >= min) tail = g_.optional(tail);
    }
    return g_.sequence({g_.text("["), gap_, tail, gap_, g_.text("]")});
  }

  // --- objects

  struct Property {
    std::string key;  // as JSON
    Node value;
    bool required;
  };

  Node object(const Place& place) {
    std::vector<Property> properties;
    std::set<std::string> required, known;
    if (place.has("required")) {
      const Json& list = (*place.schema)["required"];
      if (!list.is_array()) malformed(place, "required", "is not a list of names");
      for (const Json& name : list) {
        if (!name.is_string()) malformed(place, "required", "is not a list of names");
        required.insert(name.get<std::string>());
      }
    }
    if (place.has("properties")) {
      const Place list = place.at("properties");
      if (!list.schema->is_object()) malformed(place, "properties", "is not an object");
      for (const auto& [name, schema] : list.schema->items()) {
        // A property that no value can have is not there.
        if (schema == false && !required.contains(name)) {
          known.insert(name);
          continue;
        }
        properties.push_back({dump(name), value(list.at(name)), required.contains(name)});
        known.insert(name);
      }
    }
    std::optional<Node> additional;
    if (place.has("additionalProperties")) {
      if ((*place.schema)["additionalProperties"] != false)
        additional = value(place.at("additionalProperties"));
    } else if (known.empty()) {
      additional = any_value();
    }
    const bool closed = place.has("additionalProperties") && !additional;
    for (const std::string& name : required) {
      if (!known.insert(name).second) continue;
      if (closed)
        unsupported(place, "required",
                    fmt::format("names \"{}\", which additionalProperties forbids",
                                truncate_to_width(name, 40)));
      properties.push_back({dump(name), additional.value_or(any_value()), true});
    }

    const size_t min = count(place, "minProperties").value_or(0);
    const size_t max = count(place, "maxProperties").value_or(kNoLimit);
    const auto sure = static_cast<size_t>(std::count_if(
        properties.begin(), properties.end(), [](const Property& p) { return p.required; }));
    size_t more_min = 0, more_max = kNoLimit;
    if (properties.empty()) {
      more_min = min;
      more_max = max;
      if (!additional && min > 0) unsupported(place, "minProperties", "no property is allowed");
    } else {
      if (min > sure) unsupported(place, "minProperties", "stands beside optional properties");
      if (max < properties.size() || (max != kNoLimit && additional))
        unsupported(place, "maxProperties", "stands beside optional properties");
    }

    const Node comma = g_.sequence({g_.text(","), gap_});
    const Node close = g_.sequence({gap_, g_.text("}")});
    // What follows when a property has been written, and when none has been yet.
    Node after_some = close, after_none = close;
    if (additional && more_max > 0) {
      const Node entry = g_.sequence({key_but(known), g_.text(":"), space_, *additional});
      const Node next = g_.sequence({comma, entry});
      after_some = g_.sequence({g_.repeat(next, 0), close});
      Node all = g_.sequence({gap_, entry,
                              g_.repeat(next, more_min > 0 ? more_min - 1 : 0,
                                        more_max == kNoLimit ? more_max : more_max - 1)});
      if (more_min == 0) all = g_.optional(all);
      after_none = g_.sequence({all, close});
    }
    // Rules from the last property to the first; each is said once, however many ways lead to it.
    const auto rule_of = [&](Node node) {
      const size_t rule = g_.add_rule();
      g_.set_rule(rule, node);
      return g_.reference(rule);
    };
    for (size_t i = properties.size(); i-- > 0;) {
      const Property& p = properties[i];
      const Node entry = rule_of(g_.sequence({g_.text(p.key + ":"), space_, p.value, after_some}));
      const Node some = g_.sequence({comma, entry}), none = g_.sequence({gap_, entry});
      after_none = p.required ? none : rule_of(g_.choice({none, after_none}));
      after_some = p.required ? some : rule_of(g_.choice({some, after_some}));
    }
    return g_.sequence({g_.text("{"), after_none});
  }

  // A key that is none of `names`, with its quotes. Keys here have one spelling each, so that none
  // of the names comes back as an escape.
  Node key_but(const std::set<std::string>& names) {
    const Node rest = g_.sequence(
        {g_.repeat(g_.choice({g_.one_of(plain_characters()), short_escape_}), 0), g_.text("\"")});
    std::vector<std::vector<std::string>> spelled_names;
    for (const std::string& name : names) {
      const std::string whole = dump(name);
      const std::string_view inside = std::string_view(whole).substr(1, whole.size() - 2);
      std::vector<std::string> units;
      for (size_t at = 0; at < inside.size();) {
        size_t length = code_point_at(inside, at).bytes;
        if (inside[at] == '\\') length = inside[at + 1] == 'u' ? 6 : 2;
        units.emplace_back(inside.substr(at, length));
        at += length;
      }
      spelled_names.push_back(std::move(units));
    }
    std::sort(spelled_names.begin(), spelled_names.end());
    return g_.sequence({g_.text("\""), key_after(spelled_names, 0, rest)});
  }

  // The rest of a key that begins as all of `names` do, for `depth` characters.
  Node key_after(std::span<const std::vector<std::string>> names, size_t depth, Node rest) {
    if (names.empty()) return rest;
    std::vector<Node> ways;
    if (names[0].size() == depth) {
      names = names.subspan(1);  // this is a name: it must go on
    } else {
      ways.push_back(g_.text("\""));
    }
    CodeSet others = plain_characters();
    std::set<std::string> escapes = {"\\\"", "\\\\", "\\b", "\\f", "\\n", "\\r", "\\t"};
    while (!names.empty()) {
      const std::string& unit = names[0][depth];
      size_t same = 1;
      while (same < names.size() && names[same][depth] == unit) ++same;
      ways.push_back(g_.sequence({g_.text(unit), key_after(names.first(same), depth + 1, rest)}));
      if (unit[0] == '\\') {
        escapes.erase(unit);
      } else {
        const char32_t code = code_point_at(unit, 0).value;
        others = others.without({{code, code}});
      }
      names = names.subspan(same);
    }
    ways.push_back(g_.sequence({g_.one_of(others), rest}));
    for (const std::string& escape : escapes) ways.push_back(g_.sequence({g_.text(escape), rest}));
    return g_.choice(std::move(ways));
  }

  // --- anything

  Node any_value() {
    if (!any_rule_) {
      any_rule_ = g_.add_rule();
      const Node item = g_.reference(*any_rule_);
      const Node comma = g_.sequence({g_.text(","), gap_});
      const Node items = g_.sequence({item, g_.repeat(g_.sequence({comma, item}), 0)});
      const Node array = g_.sequence({g_.text("["), gap_, g_.optional(items), gap_, g_.text("]")});
      g_.set_rule(*any_rule_, g_.choice({quoted(g_.repeat(character_, 0)), add_decimals(g_, {}),
                                         g_.text("true"), g_.text("false"), g_.text("null"),
                                         any_object(), array}));
    }
    return g_.reference(*any_rule_);
  }

  Node any_object() {
    const Node item = any_value();
    if (!any_object_) {
      const Node comma = g_.sequence({g_.text(","), gap_});
      const Node entry =
          g_.sequence({quoted(g_.repeat(character_, 0)), g_.text(":"), space_, item});
      const Node entries = g_.sequence({entry, g_.repeat(g_.sequence({comma, entry}), 0)});
      any_object_ = g_.sequence({g_.text("{"), gap_, g_.optional(entries), gap_, g_.text("}")});
    }
    return *any_object_;
  }

  const Json& root_;
  Grammar g_;
  Node character_, short_escape_, gap_, space_;
  std::map<std::string, size_t> rules_;  // by the schema's text
  std::deque<Json> made_;                // schemas that merging made
  size_t merges_ = 0;
  int depth_ = 0;
  std::optional<size_t> any_rule_;
  std::optional<Node> any_object_;
};

Json parse(std::string_view text) {
  const auto refuse = [](std::string what) {
    throw Error(ErrorKind::bad_input,
                {.where = "json_schema", .what = std::move(what), .cure = ""});
  };
  if (text.size() > kMaxSchemaBytes)
    refuse(fmt::format("is longer than {} bytes", kMaxSchemaBytes));
  bool too_deep = false;
  const auto watch = [&](int depth, Json::parse_event_t, Json&) {
    too_deep = too_deep || depth > kMaxDepth;
    return !too_deep;
  };
  try {
    Json json = Json::parse(text.begin(), text.end(), watch);
    if (too_deep) refuse(fmt::format("is nested deeper than {}", kMaxDepth));
    return json;
  } catch (const Json::exception& error) {
    const std::string_view what = error.what();
    const size_t at = what.find("] ");
    refuse(fmt::format("is not JSON: {}", what.substr(at == std::string_view::npos ? 0 : at + 2)));
  }
  return {};
}

}  // namespace

Program json_schema_program(std::string_view schema) {
  const Json root = parse(schema);
  return Builder(root).run();
}

Program json_object_program() {
  const Json root = true;
  return Builder(root).any_object_program();
}

}  // namespace moru
