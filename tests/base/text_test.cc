#include "base/text.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "base/random.h"

using namespace moru;

TEST_CASE("every code point survives UTF-8 and back") {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string bytes;
    append_utf8(bytes, c);
    const CodePoint read = code_point_at(bytes, 0);
    if (read.value != c || read.bytes != bytes.size() || !read.well_formed) FAIL(uint32_t{c});
  }
}

TEST_CASE("surrogates and numbers past the last code point become U+FFFD") {
  for (const char32_t c : {char32_t{0xD800}, char32_t{0xDFFF}, char32_t{0x110000}}) {
    std::string bytes;
    append_utf8(bytes, c);
    CHECK(bytes == "\uFFFD");
  }
}

TEST_CASE("ill-formed UTF-8 is found and each maximal part becomes one U+FFFD") {
  struct Case {
    std::string bytes;
    size_t first_bad;
    std::string repaired;
  };
  const std::vector<Case> cases = {
      {"a\xFFz", 1, "a\uFFFDz"},
      {"\xC0\xAF", 0, "\uFFFD\uFFFD"},                      // overlong
      {"\xE0\x80\x80", 0, "\uFFFD\uFFFD\uFFFD"},            // overlong
      {"\xED\xA0\x80", 0, "\uFFFD\uFFFD\uFFFD"},            // a surrogate
      {"\xF4\x90\x80\x80", 0, "\uFFFD\uFFFD\uFFFD\uFFFD"},  // past U+10FFFF
      {"\xF0\x9F\x98", 0, "\uFFFD"},                        // cut short at the end
      {"\xF0\x9F\x98z", 0, "\uFFFDz"},
      {"abcdefgh\xEA\xB0", 8, "abcdefgh\uFFFD"},
      {"가\x80나", 3, "가\uFFFD나"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.repaired);
    CHECK(find_invalid_utf8(c.bytes) == c.first_bad);
    CHECK(repair_utf8(c.bytes) == c.repaired);
  }
  CHECK(!find_invalid_utf8("plain and 한글 and 😀"));
  CHECK(repair_utf8("plain and 한글") == "plain and 한글");
}

TEST_CASE("repairing random bytes gives well-formed text, and repairing that changes nothing") {
  Random random(7);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (size_t n = random.below(24); n > 0; --n) bytes += static_cast<char>(random.u32());
    const std::string repaired = repair_utf8(bytes);
    CAPTURE(round);
    CHECK(!find_invalid_utf8(repaired));
    CHECK(repair_utf8(repaired) == repaired);
    CHECK(count_code_points(bytes) == count_code_points(repaired));
    CHECK(utf8_from_utf32(utf32_from_utf8(bytes)) == repaired);
  }
}

TEST_CASE("code points are counted and walked") {
  CHECK(count_code_points("") == 0);
  CHECK(count_code_points("abcdefghij한글😀") == 13);
  std::u32string walked;
  for (const CodePoint c : CodePoints("a한😀")) walked += c.value;
  CHECK(walked == U"a한😀");
}

TEST_CASE("jamo and combining accents compose under NFC") {
  CHECK(nfc("\u1112\u1161\u11AB\u1100\u1173\u11AF") == "한글");
  CHECK(nfc("e\u0301") == "é");
  CHECK(nfc("한글 text") == "한글 text");
  CHECK(nfc("") == "");
  CHECK(nfc("a\xFF\u1112\u1161") == "a\uFFFD하");
}

TEST_CASE("display width counts columns, not bytes or code points") {
  CHECK(display_width("") == 0);
  CHECK(display_width("moru") == 4);
  CHECK(display_width("모루") == 4);
  CHECK(display_width("\u1106\u1169\u1105\u116E") == 4);  // the same, as jamo
  CHECK(display_width("\u1112\u1161\u11AB") == 2);
  CHECK(display_width("e\u0301") == 1);
  CHECK(display_width("漢字かな") == 8);
  CHECK(display_width("ｆｕｌｌ") == 8);
  CHECK(display_width("😀") == 2);
  CHECK(display_width("👨\u200D👩\u200D👧") == 2);  // one family
  CHECK(display_width("👍🏽") == 2);         // with a skin tone
  CHECK(display_width("🇰🇷") == 2);
  CHECK(display_width("🇰🇷🇯🇵") == 4);
  CHECK(display_width("❤\uFE0F") == 2);
  CHECK(display_width("a\x01\nb") == 2);
  CHECK(display_width("·…") == 2);
}

TEST_CASE("truncating stops at whole characters and marks what is left out") {
  CHECK(truncate_to_width("moru", 4) == "moru");
  CHECK(truncate_to_width("anvil", 4) == "anv…");
  CHECK(truncate_to_width("모루모루", 8) == "모루모루");
  CHECK(truncate_to_width("모루모루", 7) == "모루모…");
  CHECK(truncate_to_width("모루모루", 6) == "모루…");  // a half character would not fit
  CHECK(truncate_to_width("모루", 1) == "…");
  CHECK(truncate_to_width("모루", 0) == "");
  CHECK(truncate_to_width("", 0) == "");
  CHECK(truncate_to_width("👨\u200D👩\u200D👧👨\u200D👩\u200D👧!", 4) == "👨\u200D👩\u200D👧…");
  CHECK(truncate_to_width("e\u0301e\u0301e\u0301", 2) == "e\u0301…");
}

TEST_CASE("truncated text never passes its width") {
  const std::string text = "a모e\u0301\u1112\u1161\u11AB👍🏽🇰🇷漢·z";
  for (size_t width = 0; width < 20; ++width)
    CHECK(display_width(truncate_to_width(text, width)) <= width);
}

TEST_CASE("padding fills columns") {
  CHECK(pad_right("모루", 6) == "모루  ");
  CHECK(pad_left("모루", 6) == "  모루");
  CHECK(pad_right("모루", 3) == "모루");
  CHECK(pad_left("모루", 4) == "모루");
}

TEST_CASE("words are wrapped by the columns they take, paragraph by paragraph") {
  CHECK(wrap_to_width("one two three", 8, 2) == "one two\n  three\n");
  CHECK(wrap_to_width("one two\nthree", 80, 2) == "one two\nthree\n");
  CHECK(wrap_to_width("오늘 날씨 좋네요", 10, 2) == "오늘 날씨\n  좋네요\n");
  CHECK(wrap_to_width("  a b", 4, 0) == "  a\nb\n");
  CHECK(wrap_to_width("unbreakable", 6, 2) == "unb…\n");
  CHECK(wrap_to_width("", 10, 0) == "\n");
}
