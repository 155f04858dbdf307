// chrF: how much of one text's character n-grams another has. Popović 2015 (WMT15, W15-3049), with
// the choices of sacreBLEU's default: n from 1 to 6, recall weighted twice, spaces left out, orders
// that one of the texts is too short for left out of the mean.
#pragma once
#include <string_view>

namespace moru {

// 0 (nothing in common) to 1 (equal but for spaces), of texts in NFC. Symmetric only at its ends.
double chrf(std::string_view answer, std::string_view reference);

}  // namespace moru
