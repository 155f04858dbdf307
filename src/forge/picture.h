// The report's pictures as inline SVG. They carry no colours of their own: the page's style sheet
// gives them theirs, light or dark, by class.
#pragma once
#include <string>
#include <string_view>

#include "forge/report.h"

namespace moru {

// User units are the page's pixels at full size.
struct PictureSize {
  double width = 860, height = 460;
  double font = 13;
  std::string id = "wide";  // keeps apart the ids of several drawings on one page
};

// Cost (x, logarithmic) against quality (y) of every measured candidate with its interval, the
// chosen one highlighted, the goal as a line; vendors' prices, which have no quality, on a strip of
// their own under the same axis. Where prices lie far above all measured costs the axis is broken.
std::string cost_quality_svg(const ForgeReport& report, const PictureSize& size);

// Loss against step: the training batches and the validation split.
std::string curve_svg(const ForgeReport& report, const PictureSize& size);

// A page on its own in the reports' style: no file or address beside it. `body` is markup.
std::string page_html(std::string_view title, std::string_view body);

// Text for HTML and SVG: markup is escaped, what is no character becomes U+FFFD.
std::string escape_markup(std::string_view text);

}  // namespace moru
