#include "prove/chrf.h"

#include <algorithm>
#include <string>
#include <vector>

#include "base/text.h"
#include "prove/checks.h"

namespace moru {
namespace {

constexpr size_t kOrders = 6;
constexpr double kRecallWeight = 4;  // β², β = 2

std::u32string letters_of(std::string_view text) {
  std::u32string letters = utf32_from_utf8(normalise_answer(text));
  std::erase(letters, U' ');
  return letters;
}

std::vector<std::u32string_view> sorted_grams(std::u32string_view letters, size_t order) {
  std::vector<std::u32string_view> grams;
  for (size_t at = 0; at + order <= letters.size(); ++at)
    grams.push_back(letters.substr(at, order));
  std::sort(grams.begin(), grams.end());
  return grams;
}

// N-grams that both have, each as often as it stands in both.
size_t common(const std::vector<std::u32string_view>& a,
              const std::vector<std::u32string_view>& b) {
  size_t shared = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (a[i] == b[j]) {
      ++shared, ++i, ++j;
    } else {
      a[i] < b[j] ? ++i : ++j;
    }
  }
  return shared;
}

}  // namespace

double chrf(std::string_view answer, std::string_view reference) {
  const std::u32string given = letters_of(answer), wanted = letters_of(reference);
  double precision = 0, recall = 0;
  size_t orders = 0;
  for (size_t order = 1; order <= kOrders; ++order) {
    const auto a = sorted_grams(given, order), b = sorted_grams(wanted, order);
    if (a.empty() || b.empty()) break;
    const auto shared = static_cast<double>(common(a, b));
    precision += shared / static_cast<double>(a.size());
    recall += shared / static_cast<double>(b.size());
    ++orders;
  }
  if (precision + recall == 0) return 0;
  precision /= static_cast<double>(orders);
  recall /= static_cast<double>(orders);
  return (1 + kRecallWeight) * precision * recall / (kRecallWeight * precision + recall);
}

}  // namespace moru
