#include "forge/picture.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "base/text.h"

namespace moru {
namespace {

struct Point {
  double x = 0, y = 0;
};
struct Box {
  double left = 0, top = 0, right = 0, bottom = 0;
};

bool overlaps(const Box& a, const Box& b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}
bool contains(const Box& outer, const Box& inner) {
  return inner.left >= outer.left && inner.right <= outer.right && inner.top >= outer.top &&
         inner.bottom <= outer.bottom;
}
Box around(Point p, double dx, double dy) { return {p.x - dx, p.y - dy, p.x + dx, p.y + dy}; }

// Whether the straight line from a to b touches the box: it is clipped to the box's two slabs.
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

std::string num(double value) { return fmt::format("{:.1f}", value); }

// ---- drawing ----

class Svg {
 public:
  Svg(const PictureSize& size, std::string_view title, std::string_view description)
      : font_(size.font) {
    text_ = fmt::format(
        "<svg viewBox=\"0 0 {0} {1}\" role=\"img\" aria-labelledby=\"{2}-t {2}-d\" "
        "font-size=\"{3}\">\n<title id=\"{2}-t\">{4}</title>\n<desc id=\"{2}-d\">{5}</desc>\n",
        num(size.width), num(size.height), size.id, num(size.font), escape_markup(title),
        escape_markup(description));
  }

  void line(const char* style, Point a, Point b) {
    text_ += fmt::format("<line class=\"{}\" x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"/>\n", style,
                         num(a.x), num(a.y), num(b.x), num(b.y));
  }
  void circle(const char* style, Point at, double radius) {
    text_ += fmt::format("<circle class=\"{}\" cx=\"{}\" cy=\"{}\" r=\"{}\"/>\n", style, num(at.x),
                         num(at.y), num(radius));
  }
  void diamond(const char* style, Point at, double radius) {
    text_ += fmt::format("<path class=\"{0}\" d=\"M{1} {2}l{3} {3}l-{3} {3}l-{3} -{3}z\"/>\n",
                         style, num(at.x), num(at.y - radius), num(radius));
  }
  // Points down, at `at` with its tip.
  void triangle(const char* style, Point at, double radius) {
    text_ += fmt::format("<path class=\"{0}\" d=\"M{1} {2}l-{3} -{4}h{5}z\"/>\n", style, num(at.x),
                         num(at.y), num(radius), num(radius * 1.5), num(radius * 2));
  }
  void rect(const char* style, const Box& box) {
    text_ += fmt::format("<rect class=\"{}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/>\n",
                         style, num(box.left), num(box.top), num(box.right - box.left),
                         num(box.bottom - box.top));
  }
  void polyline(const char* style, const std::vector<Point>& points) {
    std::string list;
    for (const Point& p : points) list += fmt::format("{},{} ", num(p.x), num(p.y));
    text_ += fmt::format("<polyline class=\"{}\" points=\"{}\"/>\n", style, list);
  }
  // `at` is the baseline's start, middle or end, as `anchor` says.
  void text(const char* style, Point at, const char* anchor, std::string_view words) {
    text_ += fmt::format("<text class=\"{}\" x=\"{}\" y=\"{}\" text-anchor=\"{}\">{}</text>\n",
                         style, num(at.x), num(at.y), anchor, escape_markup(words));
  }
  void text_in(const char* style, const Box& box, std::string_view words) {
    text(style, {box.left, box.bottom - font_ * 0.28}, "start", words);
  }
  std::string finish() { return text_ + "</svg>\n"; }

  // A little more than any of the page's fonts needs.
  double width_of(std::string_view words) const {
    return static_cast<double>(display_width(words)) * font_ * 0.6;
  }
  double line_height() const { return font_ * 1.25; }

 private:
  double font_;
  std::string text_;
};

// ---- scales ----

// Steps of 1, 2 or 5 · 10^k that cut [low, high] into about `wanted` parts.
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

std::string tick_usd(double usd) {
  const int places = std::max(0, static_cast<int>(std::ceil(-std::log10(usd) - 1e-9)) + 1);
  std::string digits = fmt::format("{:.{}f}", usd, std::min(places, 9));
  if (digits.find('.') != std::string::npos) {
    while (digits.ends_with('0')) digits.pop_back();
    if (digits.ends_with('.')) digits.pop_back();
  }
  return fmt::format("${}", digits);
}

// A piece of the cost axis: [low, high] dollars, logarithmic, on [left, right].
struct CostSpan {
  double low = 1, high = 10, left = 0, right = 1;

  double at(double usd) const {
    const double share = std::log(usd / low) / std::log(high / low);
    return left + (right - left) * share;
  }
  // Costs to write under the axis, as many as `width_of` their labels leaves room for.
  template <typename WidthOf>
  std::vector<double> ticks(WidthOf&& width_of) const {
    const std::array<std::vector<double>, 4> choices = {
        {{1, 1.5, 2, 3, 4, 5, 6, 8}, {1, 2, 3, 5}, {1, 2, 5}, {1}}};
    std::vector<double> found;
    for (const std::vector<double>& mantissas : choices) {
      found.clear();
      for (double k = std::floor(std::log10(low)); k <= std::ceil(std::log10(high)); ++k)
        for (const double m : mantissas) {
          const double usd = m * std::pow(10, k);
          if (usd >= low * 0.999 && usd <= high * 1.001) found.push_back(usd);
        }
      bool fits = !found.empty();
      for (size_t i = 1; i < found.size(); ++i)
        fits &= at(found[i]) - at(found[i - 1]) >=
                (width_of(found[i]) + width_of(found[i - 1])) / 2 + 4;
      if (fits) return found;
    }
    return {std::sqrt(low * high)};
  }
};

CostSpan span_over(double low, double high) {
  const double middle = std::sqrt(low * high);
  // At least a factor of two is shown: less would magnify noise.
  const double reach = std::max(std::sqrt(high / low) * 1.12, std::sqrt(2.0));
  return {.low = middle / reach, .high = middle * reach};
}

bool is_vendor(const Candidate& c) { return c.kind == Candidate::Kind::vendor; }
bool has_cost(const Candidate& c) { return std::isfinite(c.usd_per_1000) && c.usd_per_1000 > 0; }

// ---- labels ----

// Finds places for labels one after the other, so that none covers a point, a bar, or a label.
class Labels {
 public:
  explicit Labels(const Box& bounds) : bounds_(bounds) {}

  // No label may cover this, and no leader may cross it.
  void block(const Box& box) { taken_.push_back(box); }
  // No label may cover this.
  void block_labels(const Box& box) { thin_.push_back(box); }

  struct Place {
    Box box;
    bool has_leader = false;
    Point leader_end;
  };
  // A place for a label of this size near `point`, or nullopt. Nearer places come first, and among
  // equally near ones right, then above and below, then left.
  std::optional<Place> find(Point point, double width, double height) {
    constexpr std::array<int, 16> kOrder = {0, 1, 15, 2, 14, 8, 7, 9, 3, 13, 6, 10, 4, 12, 5, 11};
    for (const double distance : {11.0, 17.0, 25.0, 36.0, 50.0, 68.0, 90.0, 116.0, 146.0}) {
      for (const int sixteenth : kOrder) {
        const double angle = -sixteenth * std::numbers::pi / 8;
        const double cosine = std::cos(angle), sine = std::sin(angle);
        // The label's centre stands so that its edge, not its middle, is `distance` away.
        const Point centre = {point.x + cosine * (distance + width / 2),
                              point.y + sine * (distance + height / 2)};
        const Box box = around(centre, width / 2, height / 2);
        if (!is_free(box)) continue;
        const Point end = {std::clamp(point.x, box.left, box.right),
                           std::clamp(point.y, box.top, box.bottom)};
        const bool far = distance > 20;
        if (far && !is_clear(point, end)) continue;
        block(box);
        if (far) leaders_.push_back({point, end});
        return Place{box, far, end};
      }
    }
    return std::nullopt;
  }

 private:
  bool is_free(const Box& box) const {
    const auto is_hit = [&](const Box& other) { return overlaps(box, other); };
    return contains(bounds_, box) && std::none_of(taken_.begin(), taken_.end(), is_hit) &&
           std::none_of(thin_.begin(), thin_.end(), is_hit) &&
           std::none_of(leaders_.begin(), leaders_.end(),
                        [&](const auto& l) { return crosses(l.first, l.second, box); });
  }
  // A leader starts at the edge of its own point and touches no other.
  bool is_clear(Point from, Point to) const {
    const double length = std::hypot(to.x - from.x, to.y - from.y);
    const double own = 13;  // past the corner of the point's own box
    const Point start = {from.x + (to.x - from.x) * own / length,
                         from.y + (to.y - from.y) * own / length};
    return std::none_of(taken_.begin(), taken_.end(),
                        [&](const Box& other) { return crosses(start, to, other); });
  }

  Box bounds_;
  std::vector<Box> taken_, thin_;
  std::vector<std::pair<Point, Point>> leaders_;
};

// ---- cost against quality ----

struct CostAxis {
  CostSpan measured, beyond;
  bool broken = false;  // `beyond` holds what costs far more than all that was measured

  double at(double usd) const {
    if (broken && usd > measured.high) return beyond.at(usd);
    return measured.at(usd);
  }
};

CostAxis cost_axis(const std::vector<const Candidate*>& measured,
                   const std::vector<const Candidate*>& vendors, double left, double right) {
  double low = HUGE_VAL, high = 0, vendor_low = HUGE_VAL, vendor_high = 0;
  for (const Candidate* c : measured) {
    low = std::min(low, c->usd_per_1000);
    high = std::max(high, c->usd_per_1000);
  }
  const double all_measured = high;
  for (const Candidate* c : vendors) {
    // Prices near the measured costs stand in their part of the axis.
    if (measured.empty() || c->usd_per_1000 <= all_measured * 2) {
      low = std::min(low, c->usd_per_1000);
      high = std::max(high, c->usd_per_1000);
    } else {
      vendor_low = std::min(vendor_low, c->usd_per_1000);
      vendor_high = std::max(vendor_high, c->usd_per_1000);
    }
  }
  CostAxis axis;
  if (high == 0) low = 0.001, high = 0.01;
  if (vendor_high == 0) {
    axis.measured = span_over(low, high);
  } else if (vendor_high / low < 30) {
    axis.measured = span_over(low, vendor_high);
  } else {
    axis.broken = true;
    axis.measured = span_over(low, high);
    axis.beyond = span_over(vendor_low, vendor_high);
  }
  constexpr double kGap = 22, kMeasuredShare = 0.64;
  axis.measured.left = left;
  axis.measured.right = right;
  if (axis.broken) {
    axis.measured.right = left + (right - left) * kMeasuredShare - kGap / 2;
    axis.beyond.left = axis.measured.right + kGap;
    axis.beyond.right = right;
  }
  return axis;
}

// Vendors' labels in lanes, cheapest first; each lane takes what does not overlap.
struct VendorLabel {
  const Candidate* vendor;
  std::string words;  // empty: there was no room
  size_t lane = 0;
  bool on_right = true;
  Point at;  // y is set when the strip's place is known
};

constexpr size_t kMaxLanes = 6;

size_t lay_lanes(std::vector<VendorLabel>& labels, const Svg& svg, double left, double right) {
  std::array<std::vector<Box>, kMaxLanes> lanes;
  size_t used = 0;
  for (VendorLabel& label : labels) {
    const double width = svg.width_of(label.words), x = label.at.x;
    bool placed = false;
    for (size_t lane = 0; lane < kMaxLanes && !placed; ++lane) {
      for (const bool on_right : {true, false}) {
        const double start = on_right ? x + 9 : x - 9 - width;
        // The diamond belongs to what must stay free.
        const Box box = {std::min(start, x - 7), 0, std::max(start + width, x + 7), 1};
        if (start < left || start + width > right) continue;
        if (std::any_of(lanes[lane].begin(), lanes[lane].end(),
                        [&](const Box& other) { return overlaps(box, other); }))
          continue;
        lanes[lane].push_back(box);
        label.lane = lane;
        label.on_right = on_right;
        used = std::max(used, lane + 1);
        placed = true;
        break;
      }
    }
    if (!placed) label.words.clear();
  }
  return std::max<size_t>(used, labels.empty() ? 0 : 1);
}

// The score below which a candidate is no longer drawn to scale.
double quality_floor(const ForgeReport& report, const std::vector<const Candidate*>& measured) {
  const auto best = std::max_element(
      measured.begin(), measured.end(),
      [](const Candidate* a, const Candidate* b) { return a->accuracy() < b->accuracy(); });
  if (best == measured.end()) return 0;
  const Interval interval = (*best)->interval;
  const double lowest = std::min(interval.low, report.at_least.value_or(1));
  return lowest - std::max(0.1, 2 * (interval.high - interval.low));
}

std::string describe(const ForgeReport& report) {
  std::string words = report.outcome;
  for (const Candidate& c : report.candidates) {
    if (!words.empty()) words += ' ';
    words +=
        is_vendor(c)
            ? fmt::format("{}: {} by list price, not measured.", c.name, format_usd(c.usd_per_1000))
            : fmt::format("{}: score {}, 95 % interval {}, {}.", c.name, format_score(c.accuracy()),
                          format_interval(c.interval), format_usd(c.usd_per_1000));
  }
  return words;
}

}  // namespace

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

std::string cost_quality_svg(const ForgeReport& report, const PictureSize& size) {
  Svg svg(size, "Cost against quality", describe(report));
  std::vector<const Candidate*> measured, vendors;
  for (const Candidate& c : report.candidates)
    if (has_cost(c)) (is_vendor(c) ? vendors : measured).push_back(&c);
  std::stable_sort(vendors.begin(), vendors.end(), [](const Candidate* a, const Candidate* b) {
    return a->usd_per_1000 < b->usd_per_1000;
  });

  // Space: axis labels on the left and below, the vendors' strip between plot and axis.
  const double line = svg.line_height();
  const double left = size.font * 3.4, right = size.width - 10, top = line + 10;
  const CostAxis axis = cost_axis(measured, vendors, left + 14, right - 14);
  std::vector<VendorLabel> labels;
  for (const Candidate* v : vendors)
    labels.push_back({.vendor = v,
                      .words = truncate_to_width(v->name, 20),
                      .at = {axis.at(v->usd_per_1000), 0}});
  const size_t lanes = lay_lanes(labels, svg, left, right);
  const double axis_y = size.height - 2 * line - 8;
  const double strip_top = axis_y - (lanes == 0 ? 0 : line * (static_cast<double>(lanes) + 1) + 8);
  const double bottom = strip_top - (lanes == 0 ? 0 : 6);

  // Quality. What lies far below all that matters stands at the lower edge with its score beside
  // it: an axis down to it would flatten the differences that decide.
  const double floor = quality_floor(report, measured);
  double low = report.at_least.value_or(1), high = report.at_least.value_or(0);
  for (const Candidate* c : measured) {
    if (c->interval.high >= floor) low = std::min(low, c->interval.low);
    high = std::max(high, c->interval.high);
  }
  if (low > high) low = 0, high = 1;
  const double pad = std::max(0.02, (high - low) * 0.07);
  low = std::max(0.0, low - pad);
  high = std::min(1.0, high + 2 * pad);  // room for labels
  const auto y_at = [&](double share) {
    return bottom - (bottom - top) * (share - low) / (high - low);
  };

  const std::vector<double> ticks = linear_ticks(low, high, std::max(3.0, (bottom - top) / 55));
  const bool fine = ticks.size() > 1 && ticks[1] - ticks[0] < 0.0999;
  for (const double tick : ticks) {
    svg.line("grid", {left, y_at(tick)}, {right, y_at(tick)});
    svg.text("tick", {left - 7, y_at(tick) + size.font * 0.35}, "end",
             fmt::format("{:.{}f}", tick, fine ? 2 : 1));
  }
  svg.text("tick", {4, top - line * 0.7}, "start", "score on the held-out questions");

  // The goal: what reaches above the line with its whole interval is good enough.
  Labels places({left + 2, top - 4, right, bottom - 1});
  if (report.at_least) {
    const double y = y_at(*report.at_least);
    svg.rect("good-zone", {left, top, right, y});
    svg.line("goal", {left, y}, {right, y});
    places.block_labels({left, y - 1, right, y + 1});
  }

  // Cost.
  svg.line("axis", {left, axis_y}, {axis.broken ? axis.measured.right : right, axis_y});
  const auto draw_ticks = [&](const CostSpan& span) {
    const auto width = [&](double usd) { return svg.width_of(tick_usd(usd)); };
    for (const double usd : span.ticks(width)) {
      const double x = span.at(usd);
      svg.line("grid", {x, top}, {x, axis_y});
      svg.line("axis", {x, axis_y}, {x, axis_y + 5});
      svg.text("tick", {x, axis_y + line + 3}, "middle", tick_usd(usd));
    }
  };
  draw_ticks(axis.measured);
  if (axis.broken) {
    svg.line("axis", {axis.beyond.left, axis_y}, {right, axis_y});
    draw_ticks(axis.beyond);
    const double x = (axis.measured.right + axis.beyond.left) / 2;
    svg.line("break", {x, top}, {x, axis_y});
    for (const double end : {axis.measured.right, axis.beyond.left})
      svg.line("axis", {end - 3, axis_y + 6}, {end + 3, axis_y - 6});
  }
  svg.text("tick", {(left + right) / 2, axis_y + 2 * line + 3}, "middle",
           "cost of 1,000 answers, logarithmic");

  // Points: the chosen one last, so that it lies on top.
  std::vector<const Candidate*> order = measured;
  std::stable_sort(order.begin(), order.end(),
                   [](const Candidate* a, const Candidate* b) { return a->chosen < b->chosen; });
  const auto is_below = [&](const Candidate& c) { return c.interval.high < floor; };
  const auto point_of = [&](const Candidate& c) {
    return Point{axis.at(c.usd_per_1000), is_below(c) ? bottom - 10 : y_at(c.accuracy())};
  };
  for (const Candidate* c : order) {
    const Point p = point_of(*c);
    places.block(around(p, 8, 8));
    if (is_below(*c)) continue;
    const double y_low = y_at(c->interval.low), y_high = y_at(c->interval.high);
    const char* bar = c->chosen ? "bar chosen" : c->good_enough ? "bar good" : "bar poor";
    svg.line(bar, {p.x, y_low}, {p.x, y_high});
    for (const double y : {y_low, y_high}) svg.line(bar, {p.x - 4, y}, {p.x + 4, y});
    places.block_labels({p.x - 5, y_high - 1, p.x + 5, y_low + 1});
  }
  for (const Candidate* c : order) {
    if (c->chosen) svg.circle("halo", point_of(*c), 11);
    if (is_below(*c)) {
      svg.triangle("point poor", {point_of(*c).x, point_of(*c).y + 7}, 6);
      continue;
    }
    svg.circle(c->chosen        ? "point chosen"
               : c->good_enough ? "point good"
                                : "point poor",
               point_of(*c), c->chosen ? 7 : 5);
  }

  // Labels in order of importance: the chosen one, then from the best down.
  std::stable_sort(order.begin(), order.end(), [](const Candidate* a, const Candidate* b) {
    if (a->chosen != b->chosen) return a->chosen;
    return a->accuracy() > b->accuracy();
  });
  for (const Candidate* c : order) {
    std::string words = truncate_to_width(c->name, c->chosen ? 22 : 18);
    if (c->chosen) words += fmt::format(", {}", format_usd(c->usd_per_1000));
    if (is_below(*c)) words += fmt::format(", {}", format_score(c->accuracy()));
    const Point p = point_of(*c);
    // Bold is wider.
    const double width = svg.width_of(words) * (c->chosen ? 1.08 : 1);
    const std::optional<Labels::Place> place = places.find(p, width, line);
    if (!place) continue;
    if (place->has_leader) svg.line("leader", p, place->leader_end);
    svg.text_in(c->chosen ? "label chosen" : "label", place->box, words);
  }
  if (report.at_least) {
    const std::string words = fmt::format("goal {}", format_score(*report.at_least));
    const double y = y_at(*report.at_least), width = svg.width_of(words);
    for (const double x : {right - width / 2 - 2, left + width / 2 + 4, (left + right) / 2}) {
      const std::optional<Labels::Place> place =
          places.find({x - width / 2 - 11, y + line * 0.5 + 3}, width, line);
      if (!place || place->has_leader) continue;
      svg.text_in("label goal-label", place->box, words);
      break;
    }
  }

  // Vendors.
  if (lanes > 0) {
    svg.rect("strip", {left, strip_top, right, axis_y});
    svg.text("label strip-title", {left + 6, strip_top + line - 1}, "start",
             "vendors: list price, not measured");
    size_t unnamed = 0;
    for (VendorLabel& v : labels) {
      v.at.y = strip_top + line * (static_cast<double>(v.lane) + 1.5) + 4;
      svg.diamond("vendor", v.at, 5);
      unnamed += v.words.empty();
      if (!v.words.empty())
        svg.text("label vendor-label", {v.at.x + (v.on_right ? 9 : -9), v.at.y + size.font * 0.35},
                 v.on_right ? "start" : "end", v.words);
    }
    if (unnamed > 0)
      svg.text("label strip-title", {right - 6, strip_top + line - 1}, "end",
               fmt::format("{} more in the table", unnamed));
  }
  return svg.finish();
}

std::string curve_svg(const ForgeReport& report, const PictureSize& size) {
  std::vector<CurvePoint> curve;
  for (const CurvePoint& p : report.curve)
    if (std::isfinite(p.loss)) curve.push_back(p);
  std::string description = "No training took place.";
  if (!curve.empty())
    description =
        fmt::format("Training loss falls from {:.3f} at step {} to {:.3f} at step {}.",
                    curve.front().loss, curve.front().step, curve.back().loss, curve.back().step);
  Svg svg(size, "Training loss by step", description);
  const double line = svg.line_height();
  const double left = size.font * 3.4, right = size.width - 12, top = line + 12;
  const double bottom = size.height - 2 * line - 4;
  double high = 0, steps = 1;
  for (const CurvePoint& p : curve) {
    high = std::max({high, p.loss, p.validation_loss.value_or(0)});
    steps = std::max(steps, static_cast<double>(p.step));
  }
  high = high > 0 ? high * 1.05 : 1;
  const auto at = [&](double step, double loss) {
    return Point{left + (right - left) * step / steps, bottom - (bottom - top) * loss / high};
  };
  for (const double tick : linear_ticks(0, high, std::max(3.0, (bottom - top) / 45))) {
    const double y = at(0, tick).y;
    svg.line("grid", {left, y}, {right, y});
    svg.text("tick", {left - 7, y + size.font * 0.35}, "end",
             fmt::format("{:.{}f}", tick, high < 1 ? 2 : 1));
  }
  for (const double tick : linear_ticks(0, steps, std::max(3.0, (right - left) / 110)))
    svg.text("tick", {at(tick, 0).x, bottom + line + 2}, "middle", format_count(tick));
  svg.line("axis", {left, bottom}, {right, bottom});
  svg.text("tick", {(left + right) / 2, bottom + 2 * line + 2}, "middle", "step");
  svg.text("tick", {4, top - line * 0.7}, "start", "loss");

  std::vector<Point> training, validation;
  for (const CurvePoint& p : curve) {
    training.push_back(at(static_cast<double>(p.step), p.loss));
    if (p.validation_loss && std::isfinite(*p.validation_loss))
      validation.push_back(at(static_cast<double>(p.step), *p.validation_loss));
  }
  svg.polyline("train", training);
  svg.polyline("valid", validation);
  for (const Point& p : validation) svg.circle("point valid-point", p, 3.5);
  // The legend stands top right, where a falling curve is not.
  const double x = right - svg.width_of("validation split");
  svg.line("train", {x - 30, top + line * 0.4}, {x - 8, top + line * 0.4});
  svg.text("label", {x, top + line * 0.75}, "start", "training batch");
  if (!validation.empty()) {
    svg.line("valid", {x - 30, top + line * 1.6}, {x - 8, top + line * 1.6});
    svg.circle("point valid-point", {x - 19, top + line * 1.6}, 3.5);
    svg.text("label", {x, top + line * 1.95}, "start", "validation split");
  }
  return svg.finish();
}

}  // namespace moru
