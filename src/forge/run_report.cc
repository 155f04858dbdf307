#include "forge/run_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <vector>

#include "base/clock.h"
#include "base/files.h"
#include "forge/picture.h"
#include "forge/svg.h"

namespace moru {
namespace {

using nlohmann::ordered_json;
using svg::Point;
using svg::Svg;

// More points than a page has pixels are averaged.
constexpr size_t kMaxPoints = 600;
constexpr size_t kMaxSamples = 40;
// Columns of validation, drawn beside the training's of the same name.
constexpr std::string_view kValidation = "val_";

struct Series {
  const char* style;  // "train" or "valid"
  std::string name;
  std::vector<Point> points;  // (step, value)
};

struct Chart {
  std::string title;
  std::vector<Series> series;
};

struct Sample {
  uint64_t step = 0;
  std::string prompt, answer, reference;
};

struct Run {
  std::vector<Chart> charts;
  std::vector<Sample> samples;
  ordered_json result;  // tune.json; null while the run is not finished
  uint64_t steps = 0;
  std::vector<uint64_t> skipped;  // steps that were outliers
  std::optional<double> first_validation, last_loss, rate;
  std::optional<Point> best_validation;  // (step, loss): what the run keeps
};

std::vector<Point> thinned(const std::vector<Point>& points) {
  if (points.size() <= kMaxPoints) return points;
  std::vector<Point> out;
  for (size_t i = 0; i < kMaxPoints; ++i) {
    const size_t first = i * points.size() / kMaxPoints, end = (i + 1) * points.size() / kMaxPoints;
    Point sum;
    for (size_t k = first; k < end; ++k) {
      sum.x += points[k].x;
      sum.y += points[k].y;
    }
    const auto n = static_cast<double>(end - first);
    out.push_back({sum.x / n, sum.y / n});
  }
  return out;
}

// Columns that are no curves.
bool is_count(std::string_view column) {
  return column == "step" || column == "epoch" || column == "tokens" || column == "num_tokens";
}

// What people call a column.
std::string title_of(const std::string& column) {
  static const std::map<std::string, std::string, std::less<>> kTitles = {
      {"loss", "Loss"},
      {"lr", "Learning rate"},
      {"grad_norm", "Gradient norm"},
      {"tokens_per_second", "Tokens per second"}};
  const auto found = kTitles.find(column);
  return found == kTitles.end() ? column : found->second;
}

Run read_run(const std::filesystem::path& folder) {
  Run run;
  std::istringstream log(read_file(folder / "log.jsonl"));
  std::vector<std::string> order = {"loss", "lr", "grad_norm"};
  std::map<std::string, std::vector<Point>, std::less<>> columns;
  for (std::string line; std::getline(log, line);) {
    const ordered_json j = ordered_json::parse(line, nullptr, false);  // the last may be half
    if (!j.is_object() || !j.contains("step") || !j["step"].is_number()) continue;
    const auto step = j["step"].get<double>();
    run.steps = std::max(run.steps, static_cast<uint64_t>(step));
    for (const auto& [name, value] : j.items()) {
      if (is_count(name) || !value.is_number()) continue;
      const std::string chart =
          name.starts_with(kValidation) ? name.substr(kValidation.size()) : name;
      if (std::find(order.begin(), order.end(), chart) == order.end()) order.push_back(chart);
      if (std::isfinite(value.get<double>())) columns[name].push_back({step, value.get<double>()});
    }
    if (const auto skipped = j.find("skipped"); skipped != j.end() && *skipped == true)
      run.skipped.push_back(static_cast<uint64_t>(step));
    if (const auto sample = j.find("sample"); sample != j.end() && sample->is_object())
      run.samples.push_back({static_cast<uint64_t>(step), sample->value("prompt", ""),
                             sample->value("answer", ""), sample->value("reference", "")});
  }
  const auto last = [&](const char* name) -> std::optional<double> {
    return columns[name].empty() ? std::nullopt : std::optional(columns[name].back().y);
  };
  run.last_loss = last("loss");
  run.rate = last("tokens_per_second");
  if (const std::vector<Point>& losses = columns["val_loss"]; !losses.empty()) {
    run.first_validation = losses.front().y;
    run.best_validation = *std::min_element(
        losses.begin(), losses.end(), [](const Point& a, const Point& b) { return a.y < b.y; });
  }
  for (const std::string& name : order) {
    Chart chart{.title = title_of(name)};
    if (!columns[name].empty()) chart.series.push_back({"train", "training batch", columns[name]});
    const std::vector<Point>& validation = columns[std::string(kValidation) + name];
    if (!validation.empty()) chart.series.push_back({"valid", "validation", validation});
    if (!chart.series.empty()) run.charts.push_back(std::move(chart));
  }
  if (run.samples.size() > kMaxSamples)
    run.samples.erase(run.samples.begin(),
                      run.samples.end() - static_cast<std::ptrdiff_t>(kMaxSamples));
  if (std::filesystem::exists(folder / "tune.json"))
    run.result = ordered_json::parse(read_file(folder / "tune.json"), nullptr, false);
  return run;
}

// Few digits, at any magnitude.
std::string tick_text(double value) {
  const double size = std::abs(value);
  if (size >= 1000 && size < 1e9) return fmt::format("{:.0f}", value);
  if (size == 0 || size >= 1e-3) return fmt::format("{:.4g}", value);
  const int exponent = static_cast<int>(std::floor(std::log10(size) + 1e-9));
  return fmt::format("{:.2g}e{}", value / std::pow(10, exponent), exponent);
}

std::string chart_svg(const Chart& chart, const PictureSize& size) {
  double low = std::numeric_limits<double>::infinity(), high = -low, steps = 1;
  for (const Series& s : chart.series) {
    for (const Point& p : s.points) {
      low = std::min(low, p.y);
      high = std::max(high, p.y);
      steps = std::max(steps, p.x);
    }
  }
  const Series& first = chart.series.front();
  Svg out(size, chart.title + " by step",
          fmt::format("{} goes from {} at step {:.0f} to {} at step {:.0f}.", chart.title,
                      tick_text(first.points.front().y), first.points.front().x,
                      tick_text(first.points.back().y), first.points.back().x));
  // What is never negative stands on zero; what never changes has room around it.
  if (low >= 0) low = 0;
  const double spread = high - low > 0 ? high - low : std::max(1e-12, std::abs(high));
  high += spread * 0.05;
  if (low < 0) low -= spread * 0.05;
  const double line = out.line_height();
  const bool legend = chart.series.size() > 1;
  const double left = size.font * 4.2, right = size.width - 14;
  const double top = legend ? 1.8 * line : 12, bottom = size.height - 2 * line - 4;
  const auto at = [&](double step, double value) {
    return Point{left + (right - left) * step / steps,
                 bottom - (bottom - top) * (value - low) / (high - low)};
  };
  for (const double tick : svg::linear_ticks(low, high, std::max(3.0, (bottom - top) / 45))) {
    const double y = at(0, tick).y;
    out.line("grid", {left, y}, {right, y});
    out.text("tick", {left - 7, y + size.font * 0.35}, "end", tick_text(tick));
  }
  for (const double tick : svg::linear_ticks(0, steps, std::max(3.0, (right - left) / 110)))
    out.text("tick", {at(tick, low).x, bottom + line + 2}, "middle", fmt::format("{:.6g}", tick));
  out.line("axis", {left, bottom}, {right, bottom});
  out.text("tick", {(left + right) / 2, bottom + 2 * line + 2}, "middle", "step");
  double x = left;
  for (const Series& s : chart.series) {
    std::vector<Point> points;
    for (const Point& p : thinned(s.points)) points.push_back(at(p.x, p.y));
    out.polyline(s.style, points);
    const bool marked = std::string_view(s.style) == "valid" || points.size() == 1;
    if (marked && points.size() <= 60)
      for (const Point& p : points) out.circle("point valid-point", p, 3.5);
    if (!legend) continue;
    out.line(s.style, {x, line * 0.7}, {x + 22, line * 0.7});
    out.text("label", {x + 30, line}, "start", s.name);
    x += 30 + out.width_of(s.name) + 24;
  }
  return out.finish();
}

std::string chart_section(const Chart& chart, size_t index) {
  return fmt::format(
      "<section>\n<h2>{}</h2>\n<figure>\n<div class=\"wide\">\n{}</div>\n"
      "<div class=\"narrow\">\n{}</div>\n</figure>\n</section>\n",
      escape_markup(chart.title),
      chart_svg(chart, {.height = 260, .id = fmt::format("chart{}-wide", index)}),
      chart_svg(
          chart,
          {.width = 340, .height = 220, .font = 11.5, .id = fmt::format("chart{}-narrow", index)}));
}

std::string samples_section(const std::vector<Sample>& samples) {
  if (samples.empty()) return "";
  std::string out =
      "<section>\n<h2>Samples</h2>\n<table class=\"cards\" role=\"table\">\n<thead "
      "role=\"rowgroup\"><tr role=\"row\"><th role=\"columnheader\">step</th><th "
      "role=\"columnheader\">prompt</th><th role=\"columnheader\">answer</th><th "
      "role=\"columnheader\">reference</th></tr></thead>\n<tbody role=\"rowgroup\">\n";
  for (const Sample& s : samples) {
    out +=
        fmt::format("<tr role=\"row\"><th role=\"rowheader\" scope=\"row\">step {}</th>", s.step);
    for (const auto& [label, words] :
         {std::pair{"prompt", &s.prompt}, {"answer", &s.answer}, {"reference", &s.reference}})
      out += fmt::format(
          "<td role=\"cell\" class=\"wordy\" data-label=\"{}\"><span><bdi>{}</bdi></span></td>",
          label, escape_markup(*words));
    out += "</tr>\n";
  }
  return out + "</tbody>\n</table>\n</section>\n";
}

// tune.json, one line a value that there is.
std::string facts_section(const ordered_json& result) {
  if (!result.is_object()) return "";
  std::string out = "<section>\n<h2>Result</h2>\n<table class=\"facts\">\n<tbody>\n";
  const std::function<void(const std::string&, const ordered_json&)> add =
      [&](const std::string& name, const ordered_json& value) {
        if (value.is_object()) {
          for (const auto& [key, part] : value.items())
            add(name.empty() ? key : name + " " + key, part);
          return;
        }
        if (value == "") return;
        std::string label = name;
        std::replace(label.begin(), label.end(), '_', ' ');
        const std::string words = value.is_string() ? value.get<std::string>()
                                  : value.is_number_float()
                                      ? fmt::format("{:.6g}", value.get<double>())
                                      : value.dump();
        out += fmt::format("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", escape_markup(label),
                           escape_markup(words));
      };
  add("", result);
  return out + "</tbody>\n</table>\n</section>\n";
}

std::string tile(std::string_view name, std::string_view value, std::string_view small) {
  return fmt::format("<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>\n", escape_markup(name),
                     escape_markup(value), escape_markup(small));
}

}  // namespace

std::string run_report_html(const std::filesystem::path& folder) {
  const Run run = read_run(folder);
  const std::string name =
      std::filesystem::absolute(folder / ".").lexically_normal().parent_path().filename().string();
  const bool finished = run.result.is_object();
  std::string body = fmt::format(
      "<header>\n<p class=\"kind\">moru tune report</p>\n<h1>{}</h1>\n<p class=\"outcome\">{}</p>\n"
      "<dl class=\"tiles\">\n",
      escape_markup(name),
      finished ? fmt::format("Finished after {} steps.", run.steps)
               : fmt::format("Under way: {} steps so far.", run.steps));
  if (run.best_validation)
    body += tile("validation loss", fmt::format("{:.4f}", run.best_validation->y),
                 fmt::format("best, at step {:.0f}; {:.4f} before", run.best_validation->x,
                             *run.first_validation));
  if (run.last_loss)
    body += tile("training loss", fmt::format("{:.4f}", *run.last_loss), "last step");
  if (!run.skipped.empty()) {
    constexpr size_t kNamed = 4;
    const size_t named = std::min(kNamed, run.skipped.size());
    body +=
        tile("steps skipped", fmt::format("{}", run.skipped.size()),
             fmt::format("outliers: step {}{}",
                         fmt::join(run.skipped.begin(),
                                   run.skipped.begin() + static_cast<std::ptrdiff_t>(named), ", "),
                         named < run.skipped.size() ? " …" : ""));
  }
  if (run.rate) body += tile("tokens per second", fmt::format("{:.0f}", *run.rate), "in training");
  if (finished)
    body += tile(
        "time", format_duration(run.result.value("seconds", 0.0)),
        fmt::format("peak memory {} MB", run.result.value("peak_bytes", uint64_t{0}) / 1'000'000));
  body += "</dl>\n</header>\n<main>\n";
  for (size_t i = 0; i < run.charts.size(); ++i) body += chart_section(run.charts[i], i);
  body += samples_section(run.samples) + facts_section(run.result) + "</main>\n";
  return page_html(name + " · moru tune report", body);
}

}  // namespace moru
