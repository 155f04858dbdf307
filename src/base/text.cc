#include "base/text.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace moru {
namespace {

// What may follow a lead byte (Unicode table 3-7): the range of the second byte shuts out overlong
// forms, surrogates and numbers past U+10FFFF; later bytes are 80..BF.
struct Lead {
  size_t bytes;  // 0: not a lead byte
  unsigned char second_min, second_max;
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// Length of the run of ASCII at `at`, eight bytes at a time: most text is mostly ASCII.
size_t ascii_run(std::string_view text, size_t at) {
  const size_t begin = at;
  while (text.size() - at >= 8) {
    uint64_t word;
    std::memcpy(&word, text.data() + at, 8);
    if ((word & 0x8080808080808080u) != 0) break;
    at += 8;
  }
  while (at < text.size() && static_cast<unsigned char>(text[at]) < 0x80) ++at;
  return at - begin;
}

// Whether NFC leaves `text` alone, by ranges that hold no decomposable, composing or combining
// character: most text passes and is spared the slow way.
bool is_surely_nfc(std::string_view text) {
  for (size_t at = ascii_run(text, 0); at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    const char32_t v = c.value;
    const bool safe = v < 0x300 || (v >= 0xac00 && v <= 0xd7a3) || (v >= 0x4e00 && v <= 0x9fff) ||
                      (v >= 0x3041 && v <= 0x3096) || (v >= 0x309b && v <= 0x30ff) ||
                      (v >= 0x3001 && v <= 0x3029) || (v >= 0x2010 && v <= 0x2027) ||
                      (v >= 0x1f300 && v <= 0x1faff) || (v >= 0xff01 && v <= 0xffee) ||
                      (v >= 0x400 && v <= 0x482);
    if (!safe || !c.well_formed) return false;
    at += c.bytes;
  }
  return true;
}

constexpr char32_t kEmojiVariation = 0xFE0F;

bool is_regional_indicator(char32_t c) { return c >= 0x1F1E6 && c <= 0x1F1FF; }

size_t width_of(char32_t c) {
  return static_cast<size_t>(std::max(0, utf8proc_charwidth(static_cast<utf8proc_int32_t>(c))));
}

struct Cluster {
  size_t bytes;
  size_t width;
};

// The user-perceived character at `at`: an extended grapheme cluster, as wide as its widest part.
Cluster cluster_at(std::string_view text, size_t at) {
  const CodePoint first = code_point_at(text, at);
  Cluster cluster{first.bytes, width_of(first.value)};
  utf8proc_int32_t state = 0;
  char32_t before = first.value;
  size_t indicators = is_regional_indicator(before) ? 1 : 0;
  while (at + cluster.bytes < text.size()) {
    const CodePoint next = code_point_at(text, at + cluster.bytes);
    if (utf8proc_grapheme_break_stateful(static_cast<utf8proc_int32_t>(before),
                                         static_cast<utf8proc_int32_t>(next.value), &state))
      break;
    cluster.bytes += next.bytes;
    cluster.width = std::max(cluster.width, width_of(next.value));
    if (is_regional_indicator(next.value)) ++indicators;
    if (indicators == 2 || (next.value == kEmojiVariation && cluster.width > 0)) cluster.width = 2;
    before = next.value;
  }
  return cluster;
}

}  // namespace

CodePoint code_point_at(std::string_view text, size_t at) noexcept {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const Lead lead = lead_of(byte(0));
  if (lead.bytes == 1) return {byte(0), 1, true};
  if (lead.bytes == 0) return {kReplacement, 1, false};
  char32_t value = byte(0) & (0x7Fu >> lead.bytes);
  for (size_t i = 1; i < lead.bytes; ++i) {
    const unsigned char low = i == 1 ? lead.second_min : 0x80;
    const unsigned char high = i == 1 ? lead.second_max : 0xBF;
    if (at + i >= text.size() || byte(i) < low || byte(i) > high) return {kReplacement, i, false};
    value = value << 6 | (byte(i) & 0x3Fu);
  }
  return {value, lead.bytes, true};
}

size_t count_code_points(std::string_view text) noexcept {
  size_t count = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t ascii = ascii_run(text, at);
    at += ascii;
    count += ascii;
    if (at == text.size()) break;
    at += code_point_at(text, at).bytes;
    ++count;
  }
  return count;
}

std::u32string utf32_from_utf8(std::string_view text) {
  std::u32string points;
  points.reserve(text.size());
  for (const CodePoint c : CodePoints(text)) points += c.value;
  return points;
}

void append_utf8(std::string& text, char32_t value) {
  if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) value = kReplacement;
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  if (value < 0x80) {
    put(value);
  } else if (value < 0x800) {
    put(0xC0 | value >> 6);
    put(0x80 | (value & 0x3F));
  } else if (value < 0x10000) {
    put(0xE0 | value >> 12);
    put(0x80 | (value >> 6 & 0x3F));
    put(0x80 | (value & 0x3F));
  } else {
    put(0xF0 | value >> 18);
    put(0x80 | (value >> 12 & 0x3F));
    put(0x80 | (value >> 6 & 0x3F));
    put(0x80 | (value & 0x3F));
  }
}

std::string utf8_from_utf32(std::u32string_view text) {
  std::string bytes;
  bytes.reserve(text.size());
  for (const char32_t c : text) append_utf8(bytes, c);
  return bytes;
}

std::optional<size_t> find_invalid_utf8(std::string_view text) noexcept {
  for (size_t at = 0; at < text.size();) {
    at += ascii_run(text, at);
    if (at == text.size()) break;
    const CodePoint c = code_point_at(text, at);
    if (!c.well_formed) return at;
    at += c.bytes;
  }
  return std::nullopt;
}

std::string repair_utf8(std::string_view text) {
  const std::optional<size_t> bad = find_invalid_utf8(text);
  if (!bad) return std::string(text);
  std::string repaired(text.substr(0, *bad));
  for (const CodePoint c : CodePoints(text.substr(*bad))) append_utf8(repaired, c.value);
  return repaired;
}

std::string nfc(std::string_view text) {
  if (is_surely_nfc(text)) return std::string(text);
  const std::string well_formed = repair_utf8(text);
  utf8proc_uint8_t* composed = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(well_formed.data()),
                   static_cast<utf8proc_ssize_t>(well_formed.size()), &composed,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(composed, &std::free);
  if (size < 0) throw std::bad_alloc();  // the one way left to fail: the text is well formed
  return std::string(reinterpret_cast<const char*>(composed), static_cast<size_t>(size));
}

size_t display_width(std::string_view text) {
  size_t width = 0;
  for (size_t at = 0; at < text.size();) {
    const Cluster cluster = cluster_at(text, at);
    at += cluster.bytes;
    width += cluster.width;
  }
  return width;
}

std::string truncate_to_width(std::string_view text, size_t width) {
  // `fits` is the longest start that leaves a column for the ellipsis.
  size_t used = 0, fits = 0;
  for (size_t at = 0; at < text.size();) {
    const Cluster cluster = cluster_at(text, at);
    used += cluster.width;
    if (used > width) return width == 0 ? std::string() : repair_utf8(text.substr(0, fits)) + "…";
    at += cluster.bytes;
    if (used < width) fits = at;
  }
  return repair_utf8(text);
}

namespace {

std::string wrap_paragraph(std::string_view text, size_t width, size_t indent) {
  size_t used = std::min(text.find_first_not_of(' '), text.size());
  std::string out(used, ' ');
  text.remove_prefix(used);
  bool first = true;
  while (!text.empty()) {
    const size_t space = std::min(text.find(' '), text.size());
    const std::string word = truncate_to_width(text.substr(0, space), width - indent);
    text.remove_prefix(std::min(space + 1, text.size()));
    const size_t columns = display_width(word);
    if (!first && used + 1 + columns > width) {
      out += "\n" + std::string(indent, ' ');
      used = indent;
    } else if (!first) {
      out += ' ';
      ++used;
    }
    first = false;
    out += word;
    used += columns;
  }
  return out + "\n";
}

}  // namespace

std::string wrap_to_width(std::string_view text, size_t width, size_t indent) {
  std::string out;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    out += wrap_paragraph(text.substr(at, end - at), width, indent);
    at = end + 1;
  }
  return out;
}

std::string pad_right(std::string_view text, size_t width) {
  std::string padded(text);
  padded.append(width - std::min(width, display_width(text)), ' ');
  return padded;
}

std::string pad_left(std::string_view text, size_t width) {
  return std::string(width - std::min(width, display_width(text)), ' ') + std::string(text);
}

}  // namespace moru
