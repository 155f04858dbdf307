// Unicode as tokenizers need it: the classes that their patterns name, and the normalization forms.
// Data: utf8proc.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace moru {

// What a pattern may ask of a code point, as bits: a class in a pattern is a mask over them.
enum CharClass : uint16_t {
  kLetter = 1 << 0,       // \p{L}
  kUpperLike = 1 << 1,    // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
  kLowerLike = 1 << 2,    // [\p{Ll}\p{Lm}\p{Lo}\p{M}]
  kMark = 1 << 3,         // \p{M}
  kNumber = 1 << 4,       // \p{N}
  kSpace = 1 << 5,        // \s, the property White_Space
  kPunctuation = 1 << 6,  // \p{P}
  kSymbol = 1 << 7,       // \p{S}
  kNewline = 1 << 8,      // \r and \n
  kWord = 1 << 9,         // \w: letters, marks, decimal and letter numbers, connectors, joiners
};

// A character of text known to be valid UTF-8, where base/text.h's code_point_at need not look
// for faults.
struct Character {
  char32_t code;
  uint32_t bytes;
};

// The character at the start of `text`, which is valid UTF-8 and not empty.
inline Character first_character(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<char32_t>(static_cast<uint8_t>(text[i])); };
  const char32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xe0) return {(lead & 0x1f) << 6 | (byte(1) & 0x3f), 2};
  if (lead < 0xf0) return {(lead & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f), 3};
  return {(lead & 0x07) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f),
          4};
}

// The character at the end of `text`, which is valid UTF-8 and not empty.
inline Character last_character(std::string_view text) {
  size_t start = text.size() - 1;
  while (start > 0 && (static_cast<uint8_t>(text[start]) & 0xc0) == 0x80) --start;
  return first_character(text.substr(start));
}

// Bits of CharClass; 0 for what has none of them (control, format, unassigned).
uint16_t class_of_any(char32_t code);
// The same; most text is ASCII.
inline uint16_t class_of(char32_t code) {
  static constexpr std::array<uint16_t, 128> kAscii = [] {
    std::array<uint16_t, 128> bits{};
    const auto set = [&](char first, char last, unsigned classes) {
      for (char c = first; c <= last; ++c)
        bits[static_cast<size_t>(c)] = static_cast<uint16_t>(classes);
    };
    for (const char c : std::string_view("!\"#%&'()*,-./:;?@[\\]{}")) set(c, c, kPunctuation);
    for (const char c : std::string_view("$+<=>^`|~")) set(c, c, kSymbol);
    set('A', 'Z', kLetter | kUpperLike | kWord);
    set('a', 'z', kLetter | kLowerLike | kWord);
    set('0', '9', kNumber | kWord);
    set('_', '_', kPunctuation | kWord);
    set('\t', '\r', kSpace);
    for (const char c : std::string_view("\n\r")) set(c, c, kSpace | kNewline);
    set(' ', ' ', kSpace);
    return bits;
  }();
  return code < kAscii.size() ? kAscii[code] : class_of_any(code);
}

enum class NormalForm { nfc, nfd, nfkc, nfkd };
// `text` is valid UTF-8.
std::string normalize(std::string_view text, NormalForm form);

}  // namespace moru
