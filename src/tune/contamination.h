// Whether a text to be learnt stands in what a model will be evaluated on: a run of thirteen words
// in common, as GPT-3's and later papers count it (arXiv:2005.14165, appendix C), or the whole
// text.
//
// Words are runs of letters and digits, case-folded. Korean, Chinese, Japanese and Thai do not part
// words, or part them as the writer likes, so each of their characters counts, two for a word:
// spacing hides nothing, and 26 syllables weigh as much as thirteen English words. Runs that stand
// in more than ten evaluation texts are instructions or boilerplate and show nothing.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

namespace moru {

class EvaluationTexts {
 public:
  explicit EvaluationTexts(size_t words = 13) : words_(words) {}  // ≥ 1

  void add(std::string_view text);
  // Every text of every row of JSON Lines, JSON or CSV; the lines of a .txt file. Errors:
  // not_found, io, bad_input.
  void add_file(const std::filesystem::path& path);
  size_t texts() const { return whole_.size(); }

  // The words of `text` that an evaluation text has too; nullopt if it is clean.
  std::optional<std::string> overlap(std::string_view text) const;

 private:
  size_t words_;
  std::unordered_set<uint64_t> whole_;                 // hashes of whole texts
  std::unordered_map<uint64_t, uint32_t> texts_with_;  // of runs
};

}  // namespace moru
