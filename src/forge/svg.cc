#include "forge/svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/text.h"

namespace moru {

std::string escape_markup(std::string_view text) {
  std::string escaped;
  for (const CodePoint c : CodePoints(text)) {
    switch (c.value) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default: {
        const bool is_control = (c.value < 0x20 && c.value != '\n' && c.value != '\t') ||
                                (c.value >= 0x7F && c.value < 0xA0);
        append_utf8(escaped, is_control ? kReplacement : c.value);
      }
    }
  }
  return escaped;
}

namespace svg {
namespace {

std::string num(double value) { return fmt::format("{:.1f}", value); }

}  // namespace

Box around(Point centre, double dx, double dy) {
  return {centre.x - dx, centre.y - dy, centre.x + dx, centre.y + dy};
}

bool overlaps(const Box& a, const Box& b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

bool contains(const Box& outer, const Box& inner) {
  return inner.left >= outer.left && inner.right <= outer.right && inner.top >= outer.top &&
         inner.bottom <= outer.bottom;
}

// The line is clipped to the box's two slabs; what is left of it lies inside.
bool crosses(Point a, Point b, const Box& box) {
  double enter = 0, leave = 1;
  const auto clip = [&](double from, double to, double low, double high) {
    const double step = to - from;
    if (step == 0) return from >= low && from <= high;
    const double t0 = (low - from) / step, t1 = (high - from) / step;
    enter = std::max(enter, std::min(t0, t1));
    leave = std::min(leave, std::max(t0, t1));
    return true;
  };
  return clip(a.x, b.x, box.left, box.right) && clip(a.y, b.y, box.top, box.bottom) &&
         enter <= leave;
}

Svg::Svg(const PictureSize& size, std::string_view title, std::string_view description)
    : font_(size.font) {
  text_ = fmt::format(
      "<svg viewBox=\"0 0 {0} {1}\" role=\"img\" aria-labelledby=\"{2}-t {2}-d\" "
      "font-size=\"{3}\">\n<title id=\"{2}-t\">{4}</title>\n<desc id=\"{2}-d\">{5}</desc>\n",
      num(size.width), num(size.height), size.id, num(size.font), escape_markup(title),
      escape_markup(description));
}

void Svg::line(const char* style, Point a, Point b) {
  text_ += fmt::format("<line class=\"{}\" x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"/>\n", style,
                       num(a.x), num(a.y), num(b.x), num(b.y));
}

void Svg::circle(const char* style, Point at, double radius) {
  text_ += fmt::format("<circle class=\"{}\" cx=\"{}\" cy=\"{}\" r=\"{}\"/>\n", style, num(at.x),
                       num(at.y), num(radius));
}

void Svg::diamond(const char* style, Point at, double radius) {
  text_ += fmt::format("<path class=\"{0}\" d=\"M{1} {2}l{3} {3}l-{3} {3}l-{3} -{3}z\"/>\n", style,
                       num(at.x), num(at.y - radius), num(radius));
}

void Svg::triangle(const char* style, Point at, double radius) {
  text_ += fmt::format("<path class=\"{0}\" d=\"M{1} {2}l-{3} -{4}h{5}z\"/>\n", style, num(at.x),
                       num(at.y), num(radius), num(radius * 1.5), num(radius * 2));
}

void Svg::rect(const char* style, const Box& box) {
  text_ += fmt::format("<rect class=\"{}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/>\n", style,
                       num(box.left), num(box.top), num(box.right - box.left),
                       num(box.bottom - box.top));
}

void Svg::polyline(const char* style, const std::vector<Point>& points) {
  std::string list;
  for (const Point& p : points) list += fmt::format("{},{} ", num(p.x), num(p.y));
  text_ += fmt::format("<polyline class=\"{}\" points=\"{}\"/>\n", style, list);
}

void Svg::text(const char* style, Point at, const char* anchor, std::string_view words) {
  text_ += fmt::format("<text class=\"{}\" x=\"{}\" y=\"{}\" text-anchor=\"{}\">{}</text>\n", style,
                       num(at.x), num(at.y), anchor, escape_markup(words));
}

void Svg::text_in(const char* style, const Box& box, std::string_view words) {
  text(style, {box.left, box.bottom - font_ * 0.28}, "start", words);
}

std::string Svg::finish() { return text_ + "</svg>\n"; }

double Svg::width_of(std::string_view words) const {
  return static_cast<double>(display_width(words)) * font_ * 0.6;
}

std::vector<double> linear_ticks(double low, double high, double wanted) {
  if (!(high > low)) return {low};
  const double raw = (high - low) / wanted;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  double step = power;
  for (const double factor : {2.0, 5.0, 10.0})
    if (step < raw * 0.8) step = power * factor;
  std::vector<double> ticks;
  for (double k = std::ceil(low / step - 1e-9); k * step <= high + step * 1e-9; ++k)
    ticks.push_back(k * step + 0.0);  // + 0.0: no minus before zero
  return ticks;
}

}  // namespace svg
}  // namespace moru
