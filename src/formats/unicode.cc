#include "formats/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "base/error.h"
#include "base/text.h"

namespace moru {
namespace {

constexpr char32_t kLastCode = 0x10ffff;

bool is_white_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

// Alphabetic without being a letter, mark or letter number: the circled and squared letters.
bool is_letter_like_symbol(char32_t c) {
  return (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
         (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
}

// Characters of Unicode 15.1 and 16, which the tables of utf8proc 2.8 lack and those of
// `tokenizers` have. With them the classes agree for every code point.
constexpr uint16_t kLu = kLetter | kUpperLike | kWord, kLl = kLetter | kLowerLike | kWord,
                   kLo = kLetter | kUpperLike | kLowerLike | kWord,
                   kM = kMark | kUpperLike | kLowerLike | kWord, kNd = kNumber | kWord,
                   kP = kPunctuation, kS = kSymbol;
struct ClassRange {
  char32_t first, last;
  uint16_t bits;
};
// clang-format off
constexpr ClassRange kNewCharacters[] = {
    {0x897, 0x897, kM}, {0x1b4e, 0x1b4f, kP}, {0x1b7f, 0x1b7f, kP}, {0x1c89, 0x1c89, kLu},
    {0x1c8a, 0x1c8a, kLl}, {0x2427, 0x2429, kS}, {0x2ffc, 0x2fff, kS}, {0x31e4, 0x31e5, kS},
    {0x31ef, 0x31ef, kS}, {0xa7cb, 0xa7cc, kLu}, {0xa7cd, 0xa7cd, kLl}, {0xa7da, 0xa7da, kLu},
    {0xa7db, 0xa7db, kLl}, {0xa7dc, 0xa7dc, kLu}, {0x105c0, 0x105f3, kLo},
    {0x10d40, 0x10d49, kNd}, {0x10d4a, 0x10d4f, kLo}, {0x10d50, 0x10d65, kLu},
    {0x10d69, 0x10d6d, kM}, {0x10d6e, 0x10d6e, kP}, {0x10d6f, 0x10d6f, kLo},
    {0x10d70, 0x10d85, kLl}, {0x10d8e, 0x10d8f, kS}, {0x10ec2, 0x10ec4, kLo},
    {0x10efc, 0x10efc, kM}, {0x11380, 0x11389, kLo}, {0x1138b, 0x1138b, kLo},
    {0x1138e, 0x1138e, kLo}, {0x11390, 0x113b5, kLo}, {0x113b7, 0x113b7, kLo},
    {0x113b8, 0x113c0, kM}, {0x113c2, 0x113c2, kM}, {0x113c5, 0x113c5, kM},
    {0x113c7, 0x113ca, kM}, {0x113cc, 0x113d0, kM}, {0x113d1, 0x113d1, kLo},
    {0x113d2, 0x113d2, kM}, {0x113d3, 0x113d3, kLo}, {0x113d4, 0x113d5, kP},
    {0x113d7, 0x113d8, kP}, {0x113e1, 0x113e2, kM}, {0x116d0, 0x116e3, kNd},
    {0x11bc0, 0x11be0, kLo}, {0x11be1, 0x11be1, kP}, {0x11bf0, 0x11bf9, kNd},
    {0x11f5a, 0x11f5a, kM}, {0x13460, 0x143fa, kLo}, {0x16100, 0x1611d, kLo},
    {0x1611e, 0x1612f, kM}, {0x16130, 0x16139, kNd}, {0x16d40, 0x16d6c, kLo},
    {0x16d6d, 0x16d6f, kP}, {0x16d70, 0x16d79, kNd}, {0x18cff, 0x18cff, kLo},
    {0x1cc00, 0x1ccef, kS}, {0x1ccf0, 0x1ccf9, kNd}, {0x1cd00, 0x1ceb3, kS},
    {0x1e5d0, 0x1e5ed, kLo}, {0x1e5ee, 0x1e5ef, kM}, {0x1e5f0, 0x1e5f0, kLo},
    {0x1e5f1, 0x1e5fa, kNd}, {0x1e5ff, 0x1e5ff, kP}, {0x1f8b2, 0x1f8bb, kS},
    {0x1f8c0, 0x1f8c1, kS}, {0x1fa89, 0x1fa89, kS}, {0x1fa8f, 0x1fa8f, kS},
    {0x1fabe, 0x1fabe, kS}, {0x1fac6, 0x1fac6, kS}, {0x1fadc, 0x1fadc, kS},
    {0x1fadf, 0x1fadf, kS}, {0x1fae9, 0x1fae9, kS}, {0x1fbcb, 0x1fbef, kS},
    {0x2ebf0, 0x2ee5d, kLo},
};
// clang-format on

uint16_t compute_class(char32_t code) {
  unsigned bits = 0;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LT:
      bits = kLetter | kUpperLike | kWord;
      break;
    case UTF8PROC_CATEGORY_LL:
      bits = kLetter | kLowerLike | kWord;
      break;
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      bits = kLetter | kUpperLike | kLowerLike | kWord;
      break;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
      bits = kMark | kUpperLike | kLowerLike | kWord;
      break;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
      bits = kNumber | kWord;
      break;
    case UTF8PROC_CATEGORY_NO:
      bits = kNumber;
      break;
    case UTF8PROC_CATEGORY_PC:
      bits = kPunctuation | kWord;
      break;
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO:
      bits = kPunctuation;
      break;
    case UTF8PROC_CATEGORY_SM:
    case UTF8PROC_CATEGORY_SC:
    case UTF8PROC_CATEGORY_SK:
    case UTF8PROC_CATEGORY_SO:
      bits = kSymbol;
      break;
    default:
      break;
  }
  if (is_letter_like_symbol(code) || code == 0x200c || code == 0x200d) bits |= kWord;
  if (is_white_space(code)) bits |= kSpace;
  if (code == '\r' || code == '\n') bits |= kNewline;
  return static_cast<uint16_t>(bits);
}

// Two-stage table: equal pages of 256 code points are stored once, about 60 KB in all.
class ClassTable {
 public:
  ClassTable() {
    std::array<uint16_t, 256> page;
    for (char32_t number = 0; number <= kLastCode >> 8; ++number) {
      const char32_t first = number << 8, last = first | 255;
      // Planes 4 to 13, 15 and 16 are unassigned or for private use.
      const bool bare = (first >= 0x40000 && first < 0xe0000) || first >= 0xf0000;
      for (char32_t i = 0; i < 256; ++i) page[i] = bare ? uint16_t{0} : compute_class(first | i);
      for (const ClassRange& range : kNewCharacters)
        for (char32_t c = std::max(first, range.first); c <= std::min(last, range.last); ++c)
          if (page[c & 255] == 0) page[c & 255] = range.bits;
      size_t same = 0;
      // Only the newest pages are compared: equal ones stand together (CJK, Hangul, unassigned).
      const size_t oldest = pages_.size() > 4 ? pages_.size() - 4 : 0;
      for (same = oldest; same < pages_.size() && pages_[same] != page; ++same) {
      }
      if (same == pages_.size()) pages_.push_back(page);
      index_[number] = static_cast<uint16_t>(same);
    }
  }
  uint16_t operator[](char32_t code) const {
    return code > kLastCode ? uint16_t{0} : pages_[index_[code >> 8]][code & 255];
  }

 private:
  std::array<uint16_t, (kLastCode >> 8) + 1> index_;
  std::vector<std::array<uint16_t, 256>> pages_;
};

// Characters with a compatibility decomposition that Unicode gained after the tables that
// `tokenizers` normalizes by (Unicode 9 to 11): it leaves them alone, and so must we.
bool is_newer_than_tokenizers(char32_t c) {
  return c == 0x32ff || (c >= 0xa7f2 && c <= 0xa7f4) || c == 0xab69 ||
         (c >= 0x10781 && c <= 0x107ba) || c == 0x1f16c || (c >= 0x1fbf0 && c <= 0x1fbf9);
}

std::string by_utf8proc(std::string_view text, int options) {
  utf8proc_uint8_t* result = nullptr;
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &result,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | options));
  if (length == UTF8PROC_ERROR_NOMEM) throw std::bad_alloc();
  MORU_CHECK(length >= 0);  // the text is valid UTF-8
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  return {reinterpret_cast<const char*>(result), static_cast<size_t>(length)};
}

}  // namespace

uint16_t class_of_any(char32_t code) {
  static const ClassTable table;
  return table[code];
}

std::string normalize(std::string_view text, NormalForm form) {
  if (form == NormalForm::nfc) return nfc(text);
  if (form == NormalForm::nfd) return by_utf8proc(text, UTF8PROC_DECOMPOSE);
  const int options =
      UTF8PROC_COMPAT | (form == NormalForm::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE);
  std::string out;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const Character c = first_character(text.substr(at));
    if (is_newer_than_tokenizers(c.code)) {
      out += by_utf8proc(text.substr(done, at - done), options);
      out += text.substr(at, c.bytes);
      done = at + c.bytes;
    }
    at += c.bytes;
  }
  return out + by_utf8proc(text.substr(done), options);
}

}  // namespace moru
