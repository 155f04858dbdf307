// Python's functions on str, over well-formed UTF-8. Positions and lengths count code points where
// Python's do; characters are classed by the Unicode tables of utf8proc.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moru::jinja {

bool is_ascii(std::string_view text);
bool is_space(char32_t c);
bool is_alpha(char32_t c);
bool is_decimal(char32_t c);
bool is_digit(char32_t c);
bool is_numeric(char32_t c);
bool is_upper(char32_t c);
bool is_lower(char32_t c);
bool is_title(char32_t c);
bool is_printable(char32_t c);  // whether repr() shows it as it is

// Byte offset of code point `index`; text.size() past the end.
size_t offset_of(std::string_view text, size_t index);

// Offset of the first `part` at or after `from`, or of the last one; npos if there is none. In time
// linear in the text, unlike std::string's, whatever is looked for.
size_t find_part(std::string_view text, std::string_view part, size_t from = 0);
size_t find_last_part(std::string_view text, std::string_view part);

enum class Side { left, right, both };
// Without the white space, or the code points of `chars`, at its ends.
std::string_view strip(std::string_view text, Side side,
                       std::optional<std::string_view> chars = std::nullopt);

// At most `limit` splits (no limit where negative), from the left or the right. Splitting at white
// space drops empty pieces.
std::vector<std::string_view> split(std::string_view text, std::string_view separator,
                                    long long limit, Side from = Side::left);
std::vector<std::string_view> split_at_space(std::string_view text, long long limit,
                                             Side from = Side::left);
std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends);

std::string upper(std::string_view text);
std::string lower(std::string_view text);
std::string title(std::string_view text);  // str.title: every word, where a word is letters
std::string capitalize(std::string_view text);
std::string swap_case(std::string_view text);
bool is_upper_text(std::string_view text);
bool is_lower_text(std::string_view text);
bool is_title_text(std::string_view text);
std::string reverse(std::string_view text);
std::string escape_html(std::string_view text);
size_t count_words(std::string_view text);  // runs of letters, digits and _

}  // namespace moru::jinja
