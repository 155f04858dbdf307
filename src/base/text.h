// UTF-8 text: checking and repairing it, walking its code points, normalising it, and how wide it
// stands on a terminal. Spec: The Unicode Standard, chapter 3 (D92) and annexes 11, 15, 29.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace moru {

inline constexpr char32_t kReplacement = 0xFFFD;

// What stands at one place of a text. An ill-formed place is U+FFFD and as many bytes as one
// replacement stands for: the longest start of a well-formed sequence, as Python, browsers and
// `tokenizers` count it.
struct CodePoint {
  char32_t value;
  size_t bytes;  // 1 to 4
  bool well_formed;
};
// at < text.size().
CodePoint code_point_at(std::string_view text, size_t at) noexcept;

// Walks a text: for (const CodePoint c : CodePoints(text)) …
class CodePoints {
 public:
  explicit CodePoints(std::string_view text) : text_(text) {}

  class Iterator {
   public:
    CodePoint operator*() const { return code_point_at(text_, at_); }
    Iterator& operator++() {
      at_ += code_point_at(text_, at_).bytes;
      return *this;
    }
    bool operator==(const Iterator& other) const { return at_ == other.at_; }

   private:
    friend CodePoints;
    Iterator(std::string_view text, size_t at) : text_(text), at_(at) {}
    std::string_view text_;
    size_t at_;
  };
  Iterator begin() const { return {text_, 0}; }
  Iterator end() const { return {text_, text_.size()}; }

 private:
  std::string_view text_;
};

size_t count_code_points(std::string_view text) noexcept;
std::u32string utf32_from_utf8(std::string_view text);
// Surrogates and numbers past U+10FFFF become U+FFFD.
void append_utf8(std::string& text, char32_t value);
std::string utf8_from_utf32(std::u32string_view text);

// Offset of the first byte that is not well-formed UTF-8; nullopt if there is none.
std::optional<size_t> find_invalid_utf8(std::string_view text) noexcept;
// `text` with U+FFFD in each ill-formed place.
std::string repair_utf8(std::string_view text);

// Normalisation form C; ill-formed places become U+FFFD.
std::string nfc(std::string_view text);

// Columns on a terminal: 2 for East Asian wide and emoji, also where a character is written as
// several code points (Hangul as jamo, flags, families joined by ZWJ), 0 for combining marks and
// control characters, 1 otherwise (also for widths that the standard calls ambiguous).
size_t display_width(std::string_view text);
// `text` up to `width` columns, never cutting through a character; where something is left out,
// it ends in "…". Ill-formed places come out as U+FFFD.
std::string truncate_to_width(std::string_view text, size_t width);
// The words of `text` in lines of at most `width` columns, each ending in a newline; lines after a
// paragraph's first are indented by `indent` < width. A longer word is truncated.
std::string wrap_to_width(std::string_view text, size_t width, size_t indent);
// `text` and as many spaces as fill `width` columns; longer text stays as it is.
std::string pad_right(std::string_view text, size_t width);
std::string pad_left(std::string_view text, size_t width);

}  // namespace moru
