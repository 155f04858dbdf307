#include "tune/near_duplicates.h"

#include <fmt/format.h>

#include <set>

#include "base/random.h"
#include "support.h"

using namespace moru;

namespace {

std::string random_text(Random& random, size_t length) {
  std::string text;
  for (size_t i = 0; i < length; ++i) text += static_cast<char>('a' + random.below(20));
  return text;
}

// Jaccard's measure of five-letter shingles, as its definition says.
double plain_similarity(const std::string& a, const std::string& b) {
  std::set<std::string> in_a, in_b, both;
  for (size_t i = 0; i + 5 <= a.size(); ++i) in_a.insert(a.substr(i, 5));
  for (size_t i = 0; i + 5 <= b.size(); ++i) in_b.insert(b.substr(i, 5));
  for (const std::string& s : in_a)
    if (in_b.contains(s)) both.insert(s);
  return static_cast<double>(both.size()) /
         static_cast<double>(in_a.size() + in_b.size() - both.size());
}

}  // namespace

TEST_CASE("equal texts repeat the first, whatever their case, spaces and Unicode form") {
  const std::vector<std::string> texts = {"Café au lait", "tea", "CAFE\u0301  au lait\n", "Tea",
                                          ""};
  CHECK(near_duplicates(texts) ==
        std::vector<size_t>{kNoDuplicate, kNoDuplicate, 0, 1, kNoDuplicate});
}

TEST_CASE("short answers that differ are not alike") {
  const std::vector<std::string> texts = {"41", "42", "card_lost", "card_last", "네", "예"};
  for (const size_t repeats : near_duplicates(texts)) CHECK(repeats == kNoDuplicate);
}

TEST_CASE("what a tenth of many texts share does not make them alike") {
  Random random(3);
  std::vector<std::string> texts;
  for (int i = 0; i < 40; ++i)
    texts.push_back("Read the message of our customer and name its intent in one word: " +
                    random_text(random, 6));
  for (const size_t repeats : near_duplicates(texts)) CHECK(repeats == kNoDuplicate);
  texts.push_back(texts[7]);
  CHECK(near_duplicates(texts).back() == 7);
}

TEST_CASE("texts are alike exactly from the threshold on") {
  const uint64_t seed = 7;
  CAPTURE(seed);
  Random random(seed);
  size_t alike = 0, unlike = 0;
  for (int round = 0; round < 300; ++round) {
    std::string a = random_text(random, 120), b = a;
    for (size_t edits = random.below(6); edits > 0; --edits)
      b[random.below(b.size())] = static_cast<char>('A' + random.below(20));
    for (char& c : b) c = static_cast<char>(c | 0x20);
    if (a == b) continue;
    const double similarity = plain_similarity(a, b);
    if (similarity > 0.75 && similarity < 0.85) continue;  // MinHash may miss a few near it
    const std::vector<std::string> texts = {random_text(random, 120), a, random_text(random, 90),
                                            b};
    CAPTURE(similarity);
    CHECK(near_duplicates(texts, 0.8)[3] == (similarity >= 0.8 ? 1 : kNoDuplicate));
    (similarity >= 0.8 ? alike : unlike) += 1;
  }
  CHECK(alike > 50);
  CHECK(unlike > 50);
}

TEST_CASE("an instruction that all prompts share does not make them alike") {
  const std::string instruction =
      "Name the kind of the customer's message, one of the kinds that our handbook lists: ";
  Random random(3);
  std::vector<std::string> texts;
  for (int i = 0; i < 40; ++i) texts.push_back(instruction + random_text(random, 20));
  texts.push_back(texts[5] + "!");
  const std::vector<size_t> repeats = near_duplicates(texts);
  for (size_t i = 0; i < 40; ++i) CHECK(repeats[i] == kNoDuplicate);
  CHECK(repeats[40] == 5);
}

TEST_CASE("what a text repeats is itself no repetition") {
  Random random(5);
  const std::string base = random_text(random, 200);
  const std::vector<std::string> texts = {base, base + "xy", base + "xyz", base + "xy"};
  CHECK(near_duplicates(texts, 0.9) == std::vector<size_t>{kNoDuplicate, 0, 0, 0});
}
