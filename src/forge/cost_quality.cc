// The picture of cost against quality.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <optional>

#include "base/text.h"
#include "forge/picture.h"
#include "forge/svg.h"

namespace moru {
namespace {

using namespace svg;

using CandidateList = std::vector<const Candidate*>;

bool has_cost(const Candidate& c) { return std::isfinite(c.usd_per_1000) && c.usd_per_1000 > 0; }

// ---- the cost axis ----

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

struct CostAxis {
  CostSpan measured, beyond;
  bool broken = false;  // `beyond` holds what costs far more than all that was measured

  double at(double usd) const {
    if (broken && usd > measured.high) return beyond.at(usd);
    return measured.at(usd);
  }
};

CostAxis cost_axis(const CandidateList& measured, const CandidateList& vendors, double left,
                   double right) {
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
    Box box = {};
    bool has_leader = false;
    Point leader_end = {};
  };
  // Takes this very place, if it is free.
  bool take(const Box& box) {
    if (!is_free(box)) return false;
    block(box);
    return true;
  }
  enum class Leader { clear, over_points };
  // A place for a label of this size near `point`, or nullopt. Nearer places come first, and among
  // equally near ones right, then above and below, then left. The line that leads to a far label
  // may pass over other points only where that is asked for.
  std::optional<Place> find(Point point, double width, double height, Leader leader) {
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
        if (far && leader == Leader::clear && !is_clear(point, end)) continue;
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

// Vendors' labels in lanes, cheapest first; each lane takes what does not overlap.
struct VendorLabel {
  std::string words;
  double x = 0;
  size_t lane = 0;
  bool on_right = true, has_room = false;
};

struct Lanes {
  std::vector<VendorLabel> labels;
  size_t count = 0;    // of all lanes
  size_t unnamed = 0;  // vendors without room for a name: they share the last lane
};

Lanes lay_lanes(const CandidateList& vendors, const CostAxis& axis, const Svg& picture, double left,
                double right) {
  constexpr size_t kMaxNamed = 6;
  std::array<std::vector<Box>, kMaxNamed> taken;
  Lanes lanes;
  const auto place = [&](VendorLabel& label) {
    const double width = picture.width_of(label.words);
    for (size_t lane = 0; lane < kMaxNamed; ++lane) {
      for (const bool on_right : {true, false}) {
        const double start = on_right ? label.x + 9 : label.x - 9 - width;
        // The diamond belongs to what must stay free.
        const Box box = {std::min(start, label.x - 7), 0, std::max(start + width, label.x + 7), 1};
        if (start < left || start + width > right) continue;
        if (std::any_of(taken[lane].begin(), taken[lane].end(),
                        [&](const Box& other) { return overlaps(box, other); }))
          continue;
        taken[lane].push_back(box);
        label.lane = lane;
        label.on_right = on_right;
        label.has_room = true;
        lanes.count = std::max(lanes.count, lane + 1);
        return;
      }
    }
  };
  for (const Candidate* v : vendors) {
    VendorLabel& label = lanes.labels.emplace_back();
    label.words = truncate_to_width(v->name, 20);
    label.x = axis.at(v->usd_per_1000);
    place(label);
    lanes.unnamed += !label.has_room;
  }
  if (lanes.unnamed > 0) {
    for (VendorLabel& label : lanes.labels)
      if (!label.has_room) label.lane = lanes.count;
    ++lanes.count;
  }
  return lanes;
}

// ---- the picture ----

// The score below which a candidate is no longer drawn to scale.
double quality_floor(const ForgeReport& report, const CandidateList& measured) {
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
        c.kind == Candidate::Kind::vendor
            ? fmt::format("{}: {} by list price, not measured.", c.name, format_usd(c.usd_per_1000))
            : fmt::format("{}: score {}, 95 % interval {}, {}.", c.name, format_score(c.accuracy()),
                          format_interval(c.interval), format_usd(c.usd_per_1000));
  }
  return words;
}

// Where things stand: axis labels on the left and below, the vendors' strip between plot and axis.
struct Plot {
  CostAxis cost;
  double left = 0, right = 0, top = 0, bottom = 0;  // of the measured part
  double strip_top = 0, axis_y = 0;
  double low = 0, high = 1;  // scores at bottom and top
  double floor = 0;          // candidates below it stand at the lower edge

  double x(double usd) const { return cost.at(usd); }
  double y(double share) const { return bottom - (bottom - top) * (share - low) / (high - low); }
  bool is_below(const Candidate& c) const { return c.interval.high < floor; }
  Point at(const Candidate& c) const {
    return {x(c.usd_per_1000), is_below(c) ? bottom - 10 : y(c.accuracy())};
  }
};

// What lies far below all that matters stands at the lower edge with its score beside it: an axis
// down to it would flatten the differences that decide.
void fit_scores(Plot& plot, const ForgeReport& report, const CandidateList& measured) {
  plot.floor = quality_floor(report, measured);
  double low = report.at_least.value_or(1), high = report.at_least.value_or(0);
  for (const Candidate* c : measured) {
    if (!plot.is_below(*c)) low = std::min(low, c->interval.low);
    high = std::max(high, c->interval.high);
  }
  if (low > high) low = 0, high = 1;
  const double pad = std::max(0.02, (high - low) * 0.07);
  plot.low = std::max(0.0, low - pad);
  plot.high = std::min(1.0, high + 2 * pad);  // room for labels
}

void draw_score_axis(Svg& out, const Plot& plot) {
  const std::vector<double> ticks =
      linear_ticks(plot.low, plot.high, std::max(3.0, (plot.bottom - plot.top) / 55));
  const bool fine = ticks.size() > 1 && ticks[1] - ticks[0] < 0.0999;
  for (const double tick : ticks) {
    const double y = plot.y(tick);
    out.line("grid", {plot.left, y}, {plot.right, y});
    out.text("tick", {plot.left - 7, y + out.line_height() * 0.28}, "end",
             fmt::format("{:.{}f}", tick, fine ? 2 : 1));
  }
  out.text("tick", {4, plot.top - out.line_height() * 0.7}, "start",
           "score on the held-out questions");
}

void draw_cost_axis(Svg& out, const Plot& plot) {
  const double y = plot.axis_y, line = out.line_height();
  const auto draw_span = [&](const CostSpan& span, double left, double right) {
    out.line("axis", {left, y}, {right, y});
    const auto width = [&](double usd) { return out.width_of(tick_usd(usd)); };
    for (const double usd : span.ticks(width)) {
      const double x = span.at(usd);
      out.line("grid", {x, plot.top}, {x, y});
      out.line("axis", {x, y}, {x, y + 5});
      out.text("tick", {x, y + line + 3}, "middle", tick_usd(usd));
    }
  };
  const CostAxis& cost = plot.cost;
  draw_span(cost.measured, plot.left, cost.broken ? cost.measured.right : plot.right);
  if (cost.broken) {
    draw_span(cost.beyond, cost.beyond.left, plot.right);
    const double x = (cost.measured.right + cost.beyond.left) / 2;
    out.line("break", {x, plot.top}, {x, y});
    for (const double end : {cost.measured.right, cost.beyond.left})
      out.line("axis", {end - 3, y + 6}, {end + 3, y - 6});
  }
  out.text("tick", {(plot.left + plot.right) / 2, y + 2 * line + 3}, "middle",
           "cost of 1,000 answers, logarithmic");
}

// What reaches above the line with its whole interval is good enough.
void draw_goal(Svg& out, const Plot& plot, double at_least, Labels& places) {
  const double y = plot.y(at_least);
  out.rect("good-zone", {plot.left, plot.top, plot.right, y});
  out.line("goal", {plot.left, y}, {plot.right, y});
  places.block_labels({plot.left, y - 1, plot.right, y + 1});
}

void label_goal(Svg& out, const Plot& plot, double at_least, Labels& places) {
  const std::string words = fmt::format("goal {}", format_score(at_least));
  const double width = out.width_of(words), line = out.line_height();
  for (const double centre :
       {plot.right - width / 2 - 2, plot.left + width / 2 + 4, (plot.left + plot.right) / 2})
    for (const double y : {plot.y(at_least) + line * 0.5 + 3, plot.y(at_least) - line * 0.5 - 3}) {
      const Box box = around({centre, y}, width / 2, line / 2);
      if (!places.take(box)) continue;
      out.text_in("label goal-label", box, words);
      return;
    }
}

// Intervals first, then points, the chosen one last, so that it lies on top.
void draw_candidates(Svg& out, const Plot& plot, CandidateList measured, Labels& places) {
  std::stable_sort(measured.begin(), measured.end(),
                   [](const Candidate* a, const Candidate* b) { return a->chosen < b->chosen; });
  const auto style = [](const Candidate& c, const char* chosen, const char* good,
                        const char* poor) {
    return c.chosen ? chosen : c.good_enough ? good : poor;
  };
  for (const Candidate* c : measured) {
    const Point p = plot.at(*c);
    places.block(around(p, 8, 8));
    if (plot.is_below(*c)) continue;
    const double y_low = plot.y(c->interval.low), y_high = plot.y(c->interval.high);
    const char* bar = style(*c, "bar chosen", "bar good", "bar poor");
    out.line(bar, {p.x, y_low}, {p.x, y_high});
    for (const double y : {y_low, y_high}) out.line(bar, {p.x - 4, y}, {p.x + 4, y});
    places.block_labels({p.x - 5, y_high - 1, p.x + 5, y_low + 1});
  }
  for (const Candidate* c : measured) {
    const Point p = plot.at(*c);
    if (c->chosen) out.circle("halo", p, 11);
    if (plot.is_below(*c))
      out.triangle("point poor", {p.x, p.y + 7}, 6);
    else
      out.circle(style(*c, "point chosen", "point good", "point poor"), p, c->chosen ? 7 : 5);
  }
}

struct LabelStyle {
  const char* name = "label";
  double stretch = 1;  // how much wider its words are
  Labels::Leader leader = Labels::Leader::clear;
};
constexpr LabelStyle kPlain, kChosen{"label chosen", 1.08},
    kChosenInCrowd{"label chosen", 1.08, Labels::Leader::over_points};

// Whether there was room.
bool label(Svg& out, const LabelStyle& style, Point at, const std::string& words, Labels& places) {
  const std::optional<Labels::Place> place =
      places.find(at, out.width_of(words) * style.stretch, out.line_height(), style.leader);
  if (!place) return false;
  if (place->has_leader) out.line("leader", at, place->leader_end);
  out.text_in(style.name, place->box, words);
  return true;
}

// In order of importance: the chosen one, then from the best down. A crowd leaves some unlabelled;
// the table has them all.
void label_candidates(Svg& out, const Plot& plot, CandidateList measured, Labels& places) {
  std::stable_sort(measured.begin(), measured.end(), [](const Candidate* a, const Candidate* b) {
    if (a->chosen != b->chosen) return a->chosen;
    return a->accuracy() > b->accuracy();
  });
  for (const Candidate* c : measured) {
    const std::string name = truncate_to_width(c->name, c->chosen ? 22 : 18);
    const Point p = plot.at(*c);
    if (c->chosen) {
      // It must have one: rather across other points, rather a shorter one, than none.
      const std::string words = fmt::format("{}, {}", name, format_usd(c->usd_per_1000));
      if (!label(out, kChosen, p, words, places) && !label(out, kChosenInCrowd, p, words, places))
        label(out, kChosenInCrowd, p, name, places);
    } else if (plot.is_below(*c)) {
      label(out, kPlain, p, fmt::format("{}, {}", name, format_score(c->accuracy())), places);
    } else {
      label(out, kPlain, p, name, places);
    }
  }
}

void draw_vendors(Svg& out, const Plot& plot, const Lanes& lanes) {
  if (lanes.count == 0) return;
  const double line = out.line_height(), middle = line * 0.28;
  const auto lane_y = [&](size_t lane) {
    return plot.strip_top + line * (static_cast<double>(lane) + 1.5) + 4;
  };
  out.rect("strip", {plot.left, plot.strip_top, plot.right, plot.axis_y});
  out.text("label strip-title", {plot.left + 6, plot.strip_top + line - 1}, "start",
           "vendors: list price, not measured");
  double first_unnamed = plot.right;
  for (const VendorLabel& v : lanes.labels) {
    out.diamond("vendor", {v.x, lane_y(v.lane)}, 5);
    if (v.has_room)
      out.text("label vendor-label", {v.x + (v.on_right ? 9 : -9), lane_y(v.lane) + middle},
               v.on_right ? "start" : "end", v.words);
    else
      first_unnamed = std::min(first_unnamed, v.x);
  }
  const std::string more = fmt::format("{} more in the table", lanes.unnamed);
  if (lanes.unnamed > 0 && first_unnamed - 12 - out.width_of(more) > plot.left)
    out.text("label strip-title", {first_unnamed - 12, lane_y(lanes.count - 1) + middle}, "end",
             more);
}

}  // namespace

std::string cost_quality_svg(const ForgeReport& report, const PictureSize& size) {
  Svg out(size, "Cost against quality", describe(report));
  CandidateList measured, vendors;
  for (const Candidate& c : report.candidates)
    if (has_cost(c)) (c.kind == Candidate::Kind::vendor ? vendors : measured).push_back(&c);
  std::stable_sort(vendors.begin(), vendors.end(), [](const Candidate* a, const Candidate* b) {
    return a->usd_per_1000 < b->usd_per_1000;
  });

  const double line = out.line_height();
  Plot plot;
  plot.left = size.font * 3.4;
  plot.right = size.width - 10;
  plot.top = line + 10;
  plot.axis_y = size.height - 2 * line - 8;
  plot.cost = cost_axis(measured, vendors, plot.left + 14, plot.right - 14);
  const Lanes lanes = lay_lanes(vendors, plot.cost, out, plot.left, plot.right);
  plot.strip_top = plot.axis_y;
  if (lanes.count > 0) plot.strip_top -= line * (static_cast<double>(lanes.count) + 1) + 8;
  plot.bottom = plot.strip_top - (lanes.count > 0 ? 6 : 0);
  fit_scores(plot, report, measured);

  Labels places({plot.left + 2, plot.top - 4, plot.right, plot.bottom - 1});
  draw_score_axis(out, plot);
  draw_cost_axis(out, plot);
  if (report.at_least) draw_goal(out, plot, *report.at_least, places);
  draw_candidates(out, plot, measured, places);
  label_candidates(out, plot, measured, places);
  if (report.at_least) label_goal(out, plot, *report.at_least, places);
  draw_vendors(out, plot, lanes);
  return out.finish();
}

}  // namespace moru
