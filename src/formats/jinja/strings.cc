#include "formats/jinja/strings.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstring>

#include "base/text.h"

namespace moru::jinja {
namespace {

utf8proc_category_t category_of(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

char32_t simple_upper(char32_t c) {
  return static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c)));
}
char32_t simple_lower(char32_t c) {
  return static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
}
char32_t simple_title(char32_t c) {
  return static_cast<char32_t>(utf8proc_totitle(static_cast<utf8proc_int32_t>(c)));
}

bool is_cased(char32_t c) { return is_upper(c) || is_lower(c) || is_title(c); }

// ß and the Latin ligatures are the letters in living use whose capitals are several letters.
struct Expansion {
  char32_t letter;
  std::string_view upper, title;
};
constexpr Expansion kExpansions[] = {
    {0x00DF, "SS", "Ss"},   {0xFB00, "FF", "Ff"},   {0xFB01, "FI", "Fi"}, {0xFB02, "FL", "Fl"},
    {0xFB03, "FFI", "Ffi"}, {0xFB04, "FFL", "Ffl"}, {0xFB05, "ST", "St"}, {0xFB06, "ST", "St"},
};

const Expansion* expansion_of(char32_t c) {
  for (const Expansion& expansion : kExpansions)
    if (expansion.letter == c) return &expansion;
  return nullptr;
}

void add_upper(std::string& out, char32_t c) {
  const Expansion* expansion = c < 0x80 ? nullptr : expansion_of(c);
  if (expansion != nullptr) {
    out += expansion->upper;
  } else {
    append_utf8(out, simple_upper(c));
  }
}

void add_title(std::string& out, char32_t c) {
  const Expansion* expansion = c < 0x80 ? nullptr : expansion_of(c);
  if (expansion != nullptr) {
    out += expansion->title;
  } else {
    append_utf8(out, simple_title(c));
  }
}

// A sigma that ends a word has a lower case of its own.
constexpr char32_t kSigma = 0x03A3, kFinalSigma = 0x03C2;
// İ is the one letter whose lower case is two code points.
constexpr char32_t kDottedI = 0x0130;

bool is_case_ignorable(char32_t c) {
  const utf8proc_category_t category = category_of(c);
  return category == UTF8PROC_CATEGORY_MN || category == UTF8PROC_CATEGORY_ME ||
         category == UTF8PROC_CATEGORY_CF || category == UTF8PROC_CATEGORY_LM ||
         category == UTF8PROC_CATEGORY_SK || c == '\'' || c == '.' || c == ':' || c == 0xB7 ||
         c == 0x2019;
}

bool ends_word(std::u32string_view text, size_t at) {
  size_t before = at, after = at + 1;
  while (before > 0 && is_case_ignorable(text[before - 1])) --before;
  while (after < text.size() && is_case_ignorable(text[after])) ++after;
  return before > 0 && is_cased(text[before - 1]) &&
         (after == text.size() || !is_cased(text[after]));
}

void add_lower(std::string& out, std::u32string_view text, size_t at) {
  const char32_t c = text[at];
  if (c == kSigma && ends_word(text, at)) {
    append_utf8(out, kFinalSigma);
  } else if (c == kDottedI) {
    out += "i\u0307";
  } else {
    append_utf8(out, simple_lower(c));
  }
}

bool contains_code_point(std::string_view chars, std::string_view c) {
  return chars.find(c) != chars.npos;  // UTF-8 synchronises itself: no false match is possible
}

// The last code point of text[0, end), end > 0.
std::string_view last_code_point(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
  return text.substr(begin, end - begin);
}

bool is_line_end(char32_t c) {
  return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
         c == 0x2029;
}

}  // namespace

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

bool is_alpha(char32_t c) {
  if (c < 0x80) return (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
  const utf8proc_category_t category = category_of(c);
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

bool is_decimal(char32_t c) {
  return c < 0x80 ? c >= '0' && c <= '9' : category_of(c) == UTF8PROC_CATEGORY_ND;
}

bool is_digit(char32_t c) {
  return is_decimal(c) || c == 0xB2 || c == 0xB3 || c == 0xB9 || c == 0x2070 ||
         (c >= 0x2074 && c <= 0x2079) || (c >= 0x2080 && c <= 0x2089) ||
         (c >= 0x2460 && c <= 0x2468);
}

bool is_numeric(char32_t c) {
  if (is_digit(c)) return true;
  const utf8proc_category_t category = category_of(c);
  if (category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO) return true;
  static constexpr char32_t kHan[] =
      U"一二三四五六七八九十百千万亿億兆零〇两兩壹贰叁肆伍陆柒捌玖拾";
  return std::u32string_view(kHan).find(c) != std::u32string_view::npos;
}

bool is_upper(char32_t c) {
  if (c < 0x80) return c >= 'A' && c <= 'Z';
  return category_of(c) == UTF8PROC_CATEGORY_LU || (c >= 0x2160 && c <= 0x216F) ||
         (c >= 0x24B6 && c <= 0x24CF);
}

bool is_lower(char32_t c) {
  if (c < 0x80) return c >= 'a' && c <= 'z';
  return category_of(c) == UTF8PROC_CATEGORY_LL || c == 0xAA || c == 0xBA ||
         (c >= 0x2170 && c <= 0x217F) || (c >= 0x24D0 && c <= 0x24E9) ||
         (c >= 0x02B0 && c <= 0x02B8);
}

bool is_title(char32_t c) { return c >= 0x80 && category_of(c) == UTF8PROC_CATEGORY_LT; }

bool is_printable(char32_t c) {
  if (c < 0x80) return c >= 0x20 && c < 0x7F;
  switch (category_of(c)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
      return false;
    default:
      return true;
  }
}

size_t offset_of(std::string_view text, size_t index) {
  size_t at = 0;
  for (; index > 0 && at < text.size(); --index) at += code_point_at(text, at).bytes;
  return at;
}

size_t find_part(std::string_view text, std::string_view part, size_t from) {
  if (from > text.size()) return text.npos;
  const void* at = ::memmem(text.data() + from, text.size() - from, part.data(), part.size());
  return at == nullptr ? text.npos
                       : static_cast<size_t>(static_cast<const char*>(at) - text.data());
}

size_t find_last_part(std::string_view text, std::string_view part) {
  constexpr size_t kShort = 64;  // beyond, comparing at every place would take too long
  if (part.size() <= kShort) return text.rfind(part);
  const std::string backward(text.rbegin(), text.rend()), wanted(part.rbegin(), part.rend());
  const size_t at = find_part(backward, wanted);
  return at == text.npos ? at : text.size() - at - part.size();
}

std::string_view strip(std::string_view text, Side side, std::optional<std::string_view> chars) {
  const auto drops = [&](std::string_view c) {
    return chars ? contains_code_point(*chars, c) : is_space(code_point_at(c, 0).value);
  };
  size_t begin = 0, end = text.size();
  if (side != Side::right) {
    while (begin < end) {
      const size_t bytes = code_point_at(text, begin).bytes;
      if (!drops(text.substr(begin, bytes))) break;
      begin += bytes;
    }
  }
  if (side != Side::left) {
    while (end > begin) {
      const std::string_view last = last_code_point(text, end);
      if (!drops(last)) break;
      end -= last.size();
    }
  }
  return text.substr(begin, end - begin);
}

std::vector<std::string_view> split(std::string_view text, std::string_view separator,
                                    long long limit, Side from) {
  std::vector<std::string_view> pieces;
  const auto more = [&] { return limit < 0 || pieces.size() < static_cast<size_t>(limit); };
  if (from == Side::left) {
    size_t begin = 0;
    while (more()) {
      const size_t end = find_part(text, separator, begin);
      if (end == text.npos) break;
      pieces.push_back(text.substr(begin, end - begin));
      begin = end + separator.size();
    }
    pieces.push_back(text.substr(begin));
    return pieces;
  }
  size_t end = text.size();
  while (more() && end >= separator.size()) {
    const size_t begin = find_last_part(text.substr(0, end), separator);
    if (begin == text.npos) break;
    pieces.push_back(text.substr(begin + separator.size(), end - begin - separator.size()));
    end = begin;
  }
  pieces.push_back(text.substr(0, end));
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

std::vector<std::string_view> split_at_space(std::string_view text, long long limit, Side from) {
  std::vector<std::string_view> pieces;
  const auto more = [&] { return limit < 0 || pieces.size() < static_cast<size_t>(limit); };
  if (from == Side::left) {
    text = strip(text, Side::left);
    while (!text.empty()) {
      size_t end = text.size();
      if (more()) {
        end = 0;
        while (end < text.size() && !is_space(code_point_at(text, end).value))
          end += code_point_at(text, end).bytes;
      }
      pieces.push_back(text.substr(0, end));
      text = strip(text.substr(end), Side::left);
    }
    return pieces;
  }
  text = strip(text, Side::right);
  while (!text.empty()) {
    size_t begin = 0;
    if (more()) {
      begin = text.size();
      while (begin > 0) {
        const std::string_view last = last_code_point(text, begin);
        if (is_space(code_point_at(last, 0).value)) break;
        begin -= last.size();
      }
    }
    pieces.push_back(text.substr(begin));
    text = strip(text.substr(0, begin), Side::right);
  }
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    if (!is_line_end(c.value)) {
      at += c.bytes;
      continue;
    }
    size_t next = at + c.bytes;
    if (c.value == '\r' && next < text.size() && text[next] == '\n') ++next;
    lines.push_back(text.substr(begin, (keep_ends ? next : at) - begin));
    begin = at = next;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

std::string upper(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const CodePoint c : CodePoints(text)) add_upper(out, c.value);
  return out;
}

std::string lower(std::string_view text) {
  const std::u32string points = utf32_from_utf8(text);
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < points.size(); ++i) add_lower(out, points, i);
  return out;
}

std::string title(std::string_view text) {
  const std::u32string points = utf32_from_utf8(text);
  std::string out;
  bool in_word = false;
  for (size_t i = 0; i < points.size(); ++i) {
    if (in_word) {
      add_lower(out, points, i);
    } else {
      add_title(out, points[i]);
    }
    in_word = is_cased(points[i]);
  }
  return out;
}

std::string capitalize(std::string_view text) {
  const std::u32string points = utf32_from_utf8(text);
  std::string out;
  for (size_t i = 0; i < points.size(); ++i) {
    if (i == 0) {
      add_title(out, points[i]);
    } else {
      add_lower(out, points, i);
    }
  }
  return out;
}

std::string swap_case(std::string_view text) {
  const std::u32string points = utf32_from_utf8(text);
  std::string out;
  for (size_t i = 0; i < points.size(); ++i) {
    if (is_upper(points[i])) {
      add_lower(out, points, i);
    } else {
      add_upper(out, points[i]);
    }
  }
  return out;
}

bool is_upper_text(std::string_view text) {
  bool any = false;
  for (const CodePoint c : CodePoints(text)) {
    if (is_lower(c.value) || is_title(c.value)) return false;
    any = any || is_upper(c.value);
  }
  return any;
}

bool is_lower_text(std::string_view text) {
  bool any = false;
  for (const CodePoint c : CodePoints(text)) {
    if (is_upper(c.value) || is_title(c.value)) return false;
    any = any || is_lower(c.value);
  }
  return any;
}

bool is_title_text(std::string_view text) {
  bool any = false, in_word = false;
  for (const CodePoint c : CodePoints(text)) {
    if (is_upper(c.value) || is_title(c.value)) {
      if (in_word) return false;
      in_word = any = true;
    } else if (is_lower(c.value)) {
      if (!in_word) return false;
      any = true;
    } else {
      in_word = false;
    }
  }
  return any;
}

std::string reverse(std::string_view text) {
  std::u32string points = utf32_from_utf8(text);
  std::reverse(points.begin(), points.end());
  return utf8_from_utf32(points);
}

std::string escape_html(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

size_t count_words(std::string_view text) {
  size_t words = 0;
  bool in_word = false;
  for (const CodePoint c : CodePoints(text)) {
    const bool is_word = is_alpha(c.value) || is_numeric(c.value) || c.value == '_';
    if (is_word && !in_word) ++words;
    in_word = is_word;
  }
  return words;
}

}  // namespace moru::jinja
