#include "tune/contamination.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "base/files.h"
#include "base/text.h"
#include "formats/records.h"
#include "prove/checks.h"

namespace moru {
namespace {

constexpr uint32_t kBoilerplateTexts = 10;

struct Unit {
  std::string text;
  size_t weight;  // in halves of a word
};

// Scripts whose words no space sets apart for certain.
bool is_word_by_itself(char32_t c) {
  return (c >= 0x0E00 && c <= 0x0E7F) || (c >= 0x1100 && c <= 0x11FF) ||  // Thai, Hangul jamo
         (c >= 0x3040 && c <= 0x30FF) || (c >= 0x3130 && c <= 0x318F) ||  // kana, jamo
         (c >= 0x3400 && c <= 0x9FFF) || (c >= 0xAC00 && c <= 0xD7AF) ||  // Han, Hangul
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x20000 && c <= 0x3FFFF);  // Han
}

bool is_letter(char32_t c) {
  if (c < 0x80) return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return true;
    default:
      return false;
  }
}

std::vector<Unit> units_of(std::string_view text) {
  std::vector<Unit> units;
  bool in_word = false;
  const std::string folded = normalise_answer(text, true);
  for (const CodePoint c : CodePoints(folded)) {
    if (!is_letter(c.value)) {
      in_word = false;
      continue;
    }
    const bool alone = is_word_by_itself(c.value);
    if (alone || !in_word) units.push_back({"", alone ? size_t{1} : size_t{2}});
    append_utf8(units.back().text, c.value);
    in_word = !alone;
  }
  return units;
}

// FNV-1a over the units, a byte that no UTF-8 has between them.
uint64_t hash_of(std::span<const Unit> units) {
  uint64_t hash = 0xCBF29CE484222325;
  const auto take = [&](unsigned char byte) { hash = (hash ^ byte) * 0x100000001B3; };
  for (const Unit& unit : units) {
    for (const char c : unit.text) take(static_cast<unsigned char>(c));
    take(0xFF);
  }
  return hash;
}

// Calls see(run) for each shortest run that weighs `words` words; ends when it returns true.
template <typename See>
void each_run(std::span<const Unit> units, size_t words, See&& see) {
  size_t end = 0, weight = 0;
  for (size_t start = 0; start < units.size(); weight -= units[start++].weight) {
    while (end < units.size() && weight < 2 * words) weight += units[end++].weight;
    if (weight < 2 * words || see(units.subspan(start, end - start))) return;
  }
}

void add_texts(const nlohmann::ordered_json& value, EvaluationTexts& into) {
  if (value.is_string()) into.add(value.get_ref<const std::string&>());
  if (value.is_structured())
    for (const auto& item : value) add_texts(item, into);
}

}  // namespace

void EvaluationTexts::add(std::string_view text) {
  const std::vector<Unit> units = units_of(text);
  if (units.empty() || !whole_.insert(hash_of(units)).second) return;
  std::unordered_set<uint64_t> runs;
  each_run(units, words_, [&](std::span<const Unit> run) {
    runs.insert(hash_of(run));
    return false;
  });
  for (const uint64_t run : runs) ++texts_with_[run];
}

void EvaluationTexts::add_file(const std::filesystem::path& path) {
  if (path.extension() == ".txt") {
    const std::string content = read_file(path);
    for (size_t at = 0; at < content.size();) {
      const size_t end = std::min(content.find('\n', at), content.size());
      add(std::string_view(content).substr(at, end - at));
      at = end + 1;
    }
    return;
  }
  RecordReader reader(path);
  while (const std::optional<Row> row = reader.next()) add_texts(row->value, *this);
  if (texts() == 0)
    throw Error(ErrorKind::bad_input, {.where = path.string(),
                                       .what = "holds no text to keep apart from",
                                       .cure = "give rows with texts, or a .txt file"});
}

std::optional<std::string> EvaluationTexts::overlap(std::string_view text) const {
  const std::vector<Unit> units = units_of(text);
  if (units.empty()) return std::nullopt;
  std::span<const Unit> found;
  if (whole_.contains(hash_of(units))) found = units;
  each_run(units, words_, [&](std::span<const Unit> run) {
    const auto seen = texts_with_.find(hash_of(run));
    if (found.empty() && seen != texts_with_.end() && seen->second <= kBoilerplateTexts)
      found = run;
    return !found.empty();
  });
  if (found.empty()) return std::nullopt;
  std::string words;
  for (const Unit& unit : found) words += (words.empty() ? "" : " ") + unit.text;
  return words;
}

}  // namespace moru
