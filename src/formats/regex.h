// Regular expressions that a tokenizer.json brings along, run by PCRE2.
//
// `tokenizers` runs them with Oniguruma. A pattern is rewritten so that PCRE2 means the same by it
// (\s, \w, \d, ^ and $ differ); what the two engines read differently and cannot be rewritten
// (class intersections, \h, named groups, \K …) is refused, never guessed.
#pragma once
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace moru {

class Regex {
 public:
  // Errors: unsupported, naming `where` and the pattern.
  Regex(std::string where, std::string_view pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  struct Match {
    size_t begin, end;  // bytes; begin == end for an empty match
  };
  // The leftmost match in `text` (valid UTF-8) that begins at `from` or later. Thread-safe.
  // Error: unsupported, where the pattern backtracks beyond a fixed limit.
  std::optional<Match> find(std::string_view text, size_t from) const;

 private:
  struct Program;
  std::unique_ptr<Program> program_;
};

}  // namespace moru
