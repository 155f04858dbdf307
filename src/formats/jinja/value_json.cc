// Values to JSON as Python's json.dumps writes it, and JSON to values.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "formats/jinja/format.h"
#include "formats/jinja/loop.h"
#include "formats/jinja/strings.h"
#include "formats/jinja/value.h"
#include "formats/jinja/value_parts.h"

namespace moru::jinja {
namespace {

void add_json_text(Builder& out, std::string_view text, bool ascii) {
  out.add("\"");
  size_t plain = 0;  // begin of the run that needs no escape
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    const bool escaped =
        c.value < 0x20 || c.value == '"' || c.value == '\\' || (ascii && c.value > 0x7E);
    if (!escaped) {
      at += c.bytes;
      continue;
    }
    out.add(text.substr(plain, at - plain));
    at += c.bytes;
    plain = at;
    static constexpr std::string_view kNamed = "\"\\\n\r\t\f\b", kLetters = "\"\\nrtfb";
    const size_t named = c.value < 0x80 ? kNamed.find(static_cast<char>(c.value)) : kNamed.npos;
    if (named != kNamed.npos) {
      out.add("\\");
      out.add(kLetters.substr(named, 1));
    } else if (c.value < 0x10000) {
      out.add(fmt::format("\\u{:04x}", static_cast<uint32_t>(c.value)));
    } else {
      const uint32_t offset = static_cast<uint32_t>(c.value) - 0x10000;
      out.add(
          fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (offset >> 10), 0xDC00 + (offset & 0x3FF)));
    }
  }
  out.add(text.substr(plain));
  out.add("\"");
}

std::string json_of(double v) {
  if (std::isnan(v)) return "NaN";
  if (std::isinf(v)) return v > 0 ? "Infinity" : "-Infinity";
  return repr_of(v);
}

// What json.dumps makes of a key.
std::string json_key(Runtime& runtime, const Value& key) {
  if (const Text* text = as_text(key)) return text->bytes;
  if (const auto* flag = std::get_if<bool>(&key)) return *flag ? "true" : "false";
  if (is_none(key)) return "null";
  if (const auto* whole = std::get_if<Int>(&key)) return fmt::format("{}", *whole);
  if (const auto* real = std::get_if<double>(&key)) return json_of(*real);
  runtime.fail(fmt::format("a key of JSON cannot be a {}", type_name(key)));
}

class JsonWriter {
 public:
  JsonWriter(Builder& out, const JsonStyle& style) : out_(out), style_(style) {
    item_separator_ = style.item_separator.value_or(style.indent ? "," : ", ");
    key_separator_ = style.key_separator.value_or(": ");
  }

  void write(const Value& v, size_t level) {
    Runtime& runtime = out_.runtime();
    runtime.step();
    if (is_none(v)) return out_.add("null");
    if (const auto* flag = std::get_if<bool>(&v)) return out_.add(*flag ? "true" : "false");
    if (const auto* whole = std::get_if<Int>(&v)) return out_.add(fmt::format("{}", *whole));
    if (const auto* real = std::get_if<double>(&v)) return out_.add(json_of(*real));
    if (const Text* text = as_text(v)) return add_json_text(out_, text->bytes, style_.ascii);
    if (const Sequence* sequence = as_sequence(v);
        sequence && (sequence->kind == Sequence::Kind::list || is_tuple(*sequence))) {
      if (sequence->items.empty()) return out_.add("[]");
      out_.add("[");
      for (size_t i = 0; i < sequence->items.size(); ++i) {
        begin_item(i, level + 1);
        write(sequence->items[i], level + 1);
      }
      end_items(level);
      return out_.add("]");
    }
    if (const Dict* dict = as_dict(v)) return write_dict(*dict, level);
    runtime.fail(fmt::format("a {} cannot be written as JSON", type_name(v)),
                 is_undefined(v) ? reason_of(std::get<Undefined>(v)) : "");
  }

 private:
  void write_dict(const Dict& dict, size_t level) {
    if (dict.items.empty()) return out_.add("{}");
    std::vector<const std::pair<Value, Value>*> items;
    for (const auto& item : dict.items) items.push_back(&item);
    if (style_.sort_keys) {
      std::stable_sort(items.begin(), items.end(), [&](const auto* a, const auto* b) {
        return compare(out_.runtime(), a->first, b->first) < 0;
      });
    }
    out_.add("{");
    for (size_t i = 0; i < items.size(); ++i) {
      begin_item(i, level + 1);
      add_json_text(out_, json_key(out_.runtime(), items[i]->first), style_.ascii);
      out_.add(key_separator_);
      write(items[i]->second, level + 1);
    }
    end_items(level);
    out_.add("}");
  }
  void begin_item(size_t i, size_t level) {
    if (i > 0) out_.add(item_separator_);
    if (style_.indent) break_line(level);
  }
  void end_items(size_t level) {
    if (style_.indent) break_line(level);
  }
  void break_line(size_t level) {
    out_.add("\n");
    out_.add(level, *style_.indent);
  }

  Builder& out_;
  const JsonStyle& style_;
  std::string item_separator_, key_separator_;
};

Value from_json_at(Runtime& runtime, const nlohmann::ordered_json& json, uint32_t depth) {
  using Type = nlohmann::ordered_json::value_t;
  if (depth > kMaxDepth) fail_on_depth(runtime);
  switch (json.type()) {
    case Type::boolean:
      return json.get<bool>();
    case Type::number_integer:
      return Int{json.get<int64_t>()};
    case Type::number_unsigned:
      return Int{json.get<uint64_t>()};
    case Type::number_float:
      return json.get<double>();
    case Type::string:
      return runtime.text(repair_utf8(json.get_ref<const std::string&>()));
    case Type::array: {
      SequencePtr list = runtime.sequence();
      list->items.reserve(json.size());
      for (const auto& item : json) runtime.push(*list, from_json_at(runtime, item, depth + 1));
      return list;
    }
    case Type::object: {
      DictPtr dict = runtime.dict();
      for (const auto& [key, item] : json.items()) {
        Value value = from_json_at(runtime, item, depth + 1);
        runtime.claim(dict->claim, 2 * sizeof(Value));
        dict->depth = std::max(dict->depth, 1 + depth_of(value));
        // Keys of JSON objects are unique already, so nothing is looked up.
        dict->items.emplace_back(runtime.text(repair_utf8(key)), std::move(value));
      }
      return dict;
    }
    default:
      return None{};
  }
}

}  // namespace

std::string to_json(Runtime& runtime, const Value& v, const JsonStyle& style) {
  Builder out(runtime);
  JsonWriter(out, style).write(v, 0);
  return out.take();
}

Value from_json(Runtime& runtime, const nlohmann::ordered_json& json) {
  return from_json_at(runtime, json, 0);
}

}  // namespace moru::jinja
