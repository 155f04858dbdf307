// Draws SVG: lines, points and words in user units, and whether boxes of them touch.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "forge/picture.h"

namespace moru::svg {

struct Point {
  double x = 0, y = 0;
};
struct Box {
  double left = 0, top = 0, right = 0, bottom = 0;
};
Box around(Point centre, double dx, double dy);
bool overlaps(const Box& a, const Box& b);
bool contains(const Box& outer, const Box& inner);
// Whether the straight line from a to b touches the box.
bool crosses(Point a, Point b, const Box& box);

// One picture. `style` is the class by which the style sheet colours a shape.
class Svg {
 public:
  // Title and description are what a screen reader says.
  Svg(const PictureSize& size, std::string_view title, std::string_view description);

  void line(const char* style, Point a, Point b);
  void circle(const char* style, Point at, double radius);
  void diamond(const char* style, Point at, double radius);
  // Points down, at `at` with its tip.
  void triangle(const char* style, Point at, double radius);
  void rect(const char* style, const Box& box);
  void polyline(const char* style, const std::vector<Point>& points);
  // `at` is the baseline's start, middle or end, as `anchor` says.
  void text(const char* style, Point at, const char* anchor, std::string_view words);
  // Within a box of line_height().
  void text_in(const char* style, const Box& box, std::string_view words);
  std::string finish();

  // A little more than any of the page's fonts needs.
  double width_of(std::string_view words) const;
  double line_height() const { return font_ * 1.25; }

 private:
  double font_;
  std::string text_;
};

// Steps of 1, 2 or 5 · 10^k that cut [low, high] into about `wanted` parts.
std::vector<double> linear_ticks(double low, double high, double wanted);

}  // namespace moru::svg
