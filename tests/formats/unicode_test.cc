#include "formats/unicode.h"

#include <doctest/doctest.h>

using namespace moru;

TEST_CASE("the classes of ASCII are those that the Unicode data gives it") {
  for (char32_t code = 0; code < 0x80; ++code) {
    CAPTURE(static_cast<uint32_t>(code));
    CHECK(class_of(code) == class_of_any(code));
  }
  CHECK(class_of(0xac00) == (kLetter | kUpperLike | kLowerLike | kWord));
}
