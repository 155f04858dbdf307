// The picture of a training run.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "forge/picture.h"
#include "forge/svg.h"

namespace moru {

using svg::Point;
using svg::Svg;

std::string curve_svg(const ForgeReport& report, const PictureSize& size) {
  std::vector<CurvePoint> curve;
  for (const CurvePoint& p : report.curve)
    if (std::isfinite(p.loss)) curve.push_back(p);
  std::string description = "No training took place.";
  if (!curve.empty())
    description =
        fmt::format("Training loss falls from {:.3f} at step {} to {:.3f} at step {}.",
                    curve.front().loss, curve.front().step, curve.back().loss, curve.back().step);
  Svg out(size, "Training loss by step", description);
  const double line = out.line_height();
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
  for (const double tick : svg::linear_ticks(0, high, std::max(3.0, (bottom - top) / 45))) {
    const double y = at(0, tick).y;
    out.line("grid", {left, y}, {right, y});
    out.text("tick", {left - 7, y + size.font * 0.35}, "end",
             fmt::format("{:.{}f}", tick, high < 1 ? 2 : 1));
  }
  for (const double tick : svg::linear_ticks(0, steps, std::max(3.0, (right - left) / 110)))
    out.text("tick", {at(tick, 0).x, bottom + line + 2}, "middle", format_count(tick));
  out.line("axis", {left, bottom}, {right, bottom});
  out.text("tick", {(left + right) / 2, bottom + 2 * line + 2}, "middle", "step");
  out.text("tick", {4, top - line * 0.7}, "start", "loss");

  std::vector<Point> training, validation;
  for (const CurvePoint& p : curve) {
    training.push_back(at(static_cast<double>(p.step), p.loss));
    if (p.validation_loss && std::isfinite(*p.validation_loss))
      validation.push_back(at(static_cast<double>(p.step), *p.validation_loss));
  }
  out.polyline("train", training);
  out.polyline("valid", validation);
  for (const Point& p : validation) out.circle("point valid-point", p, 3.5);
  // The legend stands top right, where a falling curve is not.
  const double x = right - out.width_of("validation split");
  out.line("train", {x - 30, top + line * 0.4}, {x - 8, top + line * 0.4});
  out.text("label", {x, top + line * 0.75}, "start", "training batch");
  if (!validation.empty()) {
    out.line("valid", {x - 30, top + line * 1.6}, {x - 8, top + line * 1.6});
    out.circle("point valid-point", {x - 19, top + line * 1.6}, 3.5);
    out.text("label", {x, top + line * 1.95}, "start", "validation split");
  }
  return out.finish();
}

}  // namespace moru
