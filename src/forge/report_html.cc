// The forge report as one page for people.
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "base/clock.h"
#include "forge/picture.h"
#include "forge/report.h"

namespace moru {
namespace {

constexpr std::string_view kStyle = R"css(
:root { color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --ink: #1d2126; --soft: #5c6670; --line: #dedbd4; --grid: #ebe9e4;
  --accent: #0b6b57; --accent-soft: #e3f1ec; --good: #3f7fb5; --poor: #8b929a; --goal: #b4561f;
  --vendor: #8a5aa8; --wrong: #b3382c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --card: #1c2024; --ink: #e7e6e2; --soft: #a0a8b0; --line: #363c42; --grid: #2a2f34;
  --accent: #58cfae; --accent-soft: #19332c; --good: #6fb1e8; --poor: #858d95; --goal: #e59a66;
  --vendor: #c49be0; --wrong: #f08a7d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Apple SD Gothic Neo", "Malgun Gothic",
  "Noto Sans CJK KR", "Noto Sans KR", sans-serif; overflow-wrap: anywhere; }
main, header, footer { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.25rem; }
.kind { color: var(--soft); margin: 0; font-size: .9rem; letter-spacing: .02em; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .1rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
.outcome { font-size: 1.15rem; margin: 0 0 .4rem; max-width: 46rem; }
.goal { color: var(--soft); margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.25rem; margin: 1.25rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; }
.tiles div:first-child { background: var(--accent-soft); border-color: var(--accent); }
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: .82rem; font-weight: 400; color: var(--soft); }
figure { margin: 0; }
figcaption, .note { color: var(--soft); font-size: .88rem; margin: .6rem 0 0; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.narrow { display: none; }
table { border-collapse: collapse; width: 100%; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .5rem .7rem .5rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: .84rem; vertical-align: bottom;
  overflow-wrap: normal; }
tbody tr:last-child > * { border-bottom: 0; }
td small, th small { display: block; color: var(--soft); font-weight: 400; }
th[scope=row] { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
tr.chosen > * { background: var(--accent-soft); }
tr.chosen > :first-child { box-shadow: inset 3px 0 var(--accent); padding-left: .7rem; }
tr.vendor th { color: var(--vendor); } td.unmeasured { text-align: center; color: var(--soft); }
.measures th[scope=row] { min-width: 7.5rem; } .measures td.wordy { min-width: 9rem; }
.badge { display: inline-block; border: 1px solid; border-radius: 99px; padding: 0 .55em;
  font-size: .78rem; font-weight: 600; white-space: nowrap; }
.badge.chosen { color: var(--accent); } .badge.good { color: var(--good); }
.badge.poor { color: var(--soft); } .badge.vendor { color: var(--vendor); }
.facts th { color: var(--soft); font-weight: 500; width: 11rem; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .84rem; word-break: break-all; }
pre { margin: 0; padding: .8rem 1rem; border-radius: 8px; background: var(--page);
  border: 1px solid var(--line); white-space: pre-wrap; }
ul { margin: 0; padding-left: 1.2rem; }
.before { color: var(--soft); } .wrong { color: var(--wrong); } .right { color: var(--accent); }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 2.5rem; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.break { stroke: var(--line); stroke-dasharray: 3 3; }
.tick { fill: var(--soft); font-size: .92em; }
.label { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3px;
  stroke-linejoin: round; }
.label.chosen { fill: var(--accent); font-weight: 700; }
.goal { stroke: none; } line.goal { stroke: var(--goal); stroke-width: 1.5; stroke-dasharray: 6 4; }
.goal-label { fill: var(--goal); } .good-zone { fill: var(--accent); opacity: .055; }
.leader { stroke: var(--soft); stroke-width: .8; }
.bar { stroke-width: 1.6; opacity: .75; } .bar.chosen { stroke: var(--accent); stroke-width: 2.4; opacity: 1; }
.bar.good { stroke: var(--good); } .bar.poor { stroke: var(--poor); }
.point { stroke: var(--card); stroke-width: 1.5; } .point.chosen { fill: var(--accent); }
.point.good { fill: var(--good); } .point.poor { fill: var(--card); stroke: var(--poor); stroke-width: 2; }
.halo { fill: none; stroke: var(--accent); stroke-width: 1.5; opacity: .6; }
.strip { fill: var(--vendor); opacity: .07; } .strip-title { fill: var(--vendor); font-size: .9em; }
.vendor-label { fill: var(--vendor); } svg .vendor { fill: var(--card); stroke: var(--vendor); stroke-width: 1.8; }
.train { fill: none; stroke: var(--poor); stroke-width: 1.5; }
.valid { fill: none; stroke: var(--accent); stroke-width: 2; } .valid-point { fill: var(--accent); }
@media (max-width: 44rem) {
  body { font-size: 15px; } main, header, footer { padding: 0 .8rem; } header { padding-top: 1.4rem; }
  h1 { font-size: 1.5rem; } section { padding: .9rem; }
  .wide { display: none; } .narrow { display: block; }
  .cards thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  .cards, .cards tbody, .cards tr, .cards th, .cards td { display: block; width: 100%; }
  .cards tr { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .75rem; margin-bottom: .7rem; }
  .cards tr.chosen { border-color: var(--accent); background: var(--accent-soft); }
  .cards tr.chosen > :first-child { box-shadow: none; padding-left: 0; }
  .cards th, .cards td { border: 0; padding: .12rem 0; }
  .cards td { text-align: left; white-space: normal; }
  .cards td::before { content: attr(data-label); display: block; color: var(--soft); font-size: .82rem; }
  .cards td.unmeasured::before { display: none; }
  .measures tr { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .15rem .6rem; }
  .measures tr > th, .measures td.wordy, .measures td.unmeasured { grid-column: 1 / -1; }
  .measures td.wordy::before { display: none; }
  .facts th { width: auto; } .facts, .facts tbody, .facts tr, .facts th, .facts td { display: block; }
  .facts th { border: 0; padding-bottom: 0; } .facts td { padding-top: 0; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444;
    --line: #bbb; --grid: #e5e5e5; --accent: #0b6b57; --accent-soft: #fff; --good: #2f6da1;
    --poor: #777; --goal: #b4561f; --vendor: #75489a; --wrong: #a02c20; }
  section, tr, .tiles div, figure { break-inside: avoid; } body { font-size: 11pt; }
  section { border: 0; padding: 0; } main, header, footer { max-width: none; padding: 0; } }
)css";

std::string text(std::string_view words) { return escape_markup(words); }

bool is_vendor(const Candidate& c) { return c.kind == Candidate::Kind::vendor; }

// A share of time that took no time is not worth a word.
std::string duration(double seconds) {
  return seconds < 1 ? fmt::format("{:.1f} s", std::max(0.0, seconds)) : format_duration(seconds);
}

std::string p_value(double p) { return p < 0.001 ? "p < 0.001" : fmt::format("p = {:.3f}", p); }

std::string tile(std::string_view name, std::string_view value, std::string_view small) {
  return fmt::format("<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>\n", text(name),
                     text(value), text(small));
}

std::string head(const ForgeReport& r) {
  std::string out = fmt::format(
      "<header>\n<p class=\"kind\">moru forge report</p>\n<h1>{}</h1>\n<p "
      "class=\"outcome\">{}</p>\n",
      text(r.title), text(r.outcome));
  if (!r.goal.empty()) out += fmt::format("<p class=\"goal\">Goal: {}</p>\n", text(r.goal));
  if (const Candidate* c = r.chosen()) {
    out += "<dl class=\"tiles\">\n";
    out += tile("chosen", c->name, c->file);
    out += tile(
        "score", format_score(c->accuracy()),
        fmt::format("{} (95 %), {} of {}", format_interval(c->interval), c->correct, c->total));
    out += tile("1,000 answers", format_usd(c->usd_per_1000),
                fmt::format("on a machine of {} per hour", format_usd(r.machine_usd_per_hour)));
    out += tile("tokens per second", format_count(c->tokens_per_second), "in and out");
    out += tile("size", format_bytes(c->file_bytes),
                fmt::format("{:.2f} bits per weight", c->bits_per_weight));
    out += "</dl>\n";
  }
  return out + "</header>\n";
}

// The same picture for wide and for narrow pages; the style sheet shows one.
template <typename Draw>
std::string drawings(Draw&& draw, const PictureSize& wide, const PictureSize& narrow) {
  return fmt::format("<div class=\"wide\">\n{}</div>\n<div class=\"narrow\">\n{}</div>\n",
                     draw(wide), draw(narrow));
}

std::string picture(const ForgeReport& r) {
  const auto draw = [&](const PictureSize& size) { return cost_quality_svg(r, size); };
  return "<section>\n<h2>Cost against quality</h2>\n<figure>\n" +
         drawings(draw, {.id = "cost-wide"},
                  {.width = 340, .height = 430, .font = 11.5, .id = "cost-narrow"}) +
         "<figcaption>Bars are 95 % intervals. Filled points are good enough, hollow ones are not; "
         "the ringed one is chosen. Diamonds are vendors’ list prices, not measured: they have a "
         "cost "
         "but no score here.</figcaption>\n</figure>\n</section>\n";
}

std::string cell(const char* label, const std::string& value, const char* style = "number") {
  return fmt::format("<td role=\"cell\" class=\"{}\" data-label=\"{}\"><span>{}</span></td>", style,
                     label, value);
}

std::string badge_of(const Candidate& c) {
  if (c.chosen) return "<span class=\"badge chosen\">chosen</span>";
  if (is_vendor(c)) return "<span class=\"badge vendor\">vendor</span>";
  if (c.good_enough) return "<span class=\"badge good\">good enough</span>";
  return "<span class=\"badge poor\">not good enough</span>";
}

std::string candidate_row(const Candidate& c) {
  std::string out = fmt::format(
      "<tr role=\"row\" class=\"{}\"><th role=\"rowheader\" scope=\"row\">{}{}</th>",
      c.chosen       ? "chosen"
      : is_vendor(c) ? "vendor"
                     : "measured",
      text(c.name), c.note.empty() ? "" : fmt::format("<small>{}</small>", text(c.note)));
  if (is_vendor(c)) {
    out += "<td role=\"cell\" class=\"unmeasured\" colspan=\"3\">list price, not measured</td>";
    out += cell("cost of 1,000", text(format_usd(c.usd_per_1000)));
    out += cell("size", "–");
  } else {
    out += cell("score", fmt::format("{}<small>{}</small>", format_score(c.accuracy()),
                                     format_interval(c.interval)));
    out += cell("against the best",
                c.against_best
                    ? fmt::format("−{} +{}<small>{}</small>", c.against_best->newly_wrong,
                                  c.against_best->newly_right, text(p_value(c.against_best->p)))
                    : "the best");
    out += cell("tokens/s", format_count(c.tokens_per_second));
    out +=
        cell("cost of 1,000", fmt::format("{}<small>{} in all</small>",
                                          text(format_usd(c.usd_per_1000)), duration(c.seconds)));
    out += cell("size", fmt::format("{}<small>{:.2f} bits</small>", format_bytes(c.file_bytes),
                                    c.bits_per_weight));
  }
  // The badge says the first words of the verdict already.
  std::string_view verdict = c.verdict;
  for (const std::string_view said : {"not good enough", "good enough", "chosen"})
    if (verdict.starts_with(said)) {
      verdict.remove_prefix(said.size());
      break;
    }
  while (verdict.starts_with(':') || verdict.starts_with(' ')) verdict.remove_prefix(1);
  if (is_vendor(c)) verdict = {};
  out +=
      cell("verdict",
           badge_of(c) + (verdict.empty() ? "" : fmt::format("<small>{}</small>", text(verdict))),
           "wordy");
  return out + "</tr>\n";
}

std::string table_head(std::initializer_list<std::pair<const char*, bool>> columns) {
  std::string out = "<thead role=\"rowgroup\"><tr role=\"row\">";
  for (const auto& [name, is_number] : columns)
    out += fmt::format("<th role=\"columnheader\" scope=\"col\"{}>{}</th>",
                       is_number ? " class=\"number\"" : "", name);
  return out + "</tr></thead>\n";
}

std::string candidates(const ForgeReport& r) {
  std::string out =
      "<section>\n<h2>Candidates</h2>\n<table class=\"cards measures\" role=\"table\">\n" +
      table_head({{"model", false},
                  {"score, 95 % interval", true},
                  {"against the best", true},
                  {"tokens/s", true},
                  {"cost of 1,000", true},
                  {"size", true},
                  {"verdict", false}}) +
      "<tbody role=\"rowgroup\">\n";
  for (const Candidate& c : r.candidates) out += candidate_row(c);
  out += "</tbody>\n</table>\n";
  out += fmt::format(
      "<p class=\"note\">All measured candidates answered the same {} questions on this machine. "
      "Intervals are Wilson’s. “Against the best” counts questions answered wrong (−) and right "
      "(+) "
      "that the best candidate answered otherwise, with McNemar’s exact test. Cost is the "
      "machine’s time, processor time over threads, at {} per machine hour. Vendors’ prices are "
      "for as many tokens as this data has on "
      "average, by the measured model’s count.</p>\n</section>\n",
      r.questions.rows, text(format_usd(r.machine_usd_per_hour)));
  return out;
}

std::string list_section(const char* title, const std::vector<std::string>& lines) {
  if (lines.empty()) return "";
  std::string out = fmt::format("<section>\n<h2>{}</h2>\n<ul>\n", title);
  for (const std::string& line : lines) out += fmt::format("<li>{}</li>\n", text(line));
  return out + "</ul>\n</section>\n";
}

std::string training(const ForgeReport& r) {
  if (r.curve.empty()) return "";
  const auto draw = [&](const PictureSize& size) { return curve_svg(r, size); };
  return "<section>\n<h2>Training</h2>\n<figure>\n" +
         drawings(draw, {.height = 260, .id = "curve-wide"},
                  {.width = 340, .height = 230, .font = 11.5, .id = "curve-narrow"}) +
         "</figure>\n</section>\n";
}

std::string answers_table(const char* title, size_t total,
                          const std::vector<ChangedAnswer>& answers, bool is_wrong) {
  if (total == 0) return "";
  std::string out = fmt::format("<h3>{}: {}", title, total);
  if (answers.size() < total) out += fmt::format(", of which {} are shown", answers.size());
  out += "</h3>\n";
  if (answers.empty()) return out;
  out += "<table class=\"cards\" role=\"table\">\n" +
         table_head({{"question", false},
                     {"prompt", false},
                     {"expected", false},
                     {"before", false},
                     {"after", false}}) +
         "<tbody role=\"rowgroup\">\n";
  for (const ChangedAnswer& a : answers) {
    const auto wordy = [&](const char* label, const std::string& words, const char* style) {
      return cell(label, fmt::format("<bdi class=\"{}\">{}</bdi>", style, text(words)), "wordy");
    };
    out += fmt::format("<tr role=\"row\"><th role=\"rowheader\" scope=\"row\">{}</th>", text(a.id));
    out += wordy("prompt", a.prompt, "prompt");
    out += wordy("expected", a.expected, "expected");
    out += wordy("before", a.before, is_wrong ? "right" : "wrong");
    out += wordy("after", a.after, is_wrong ? "wrong" : "right");
    out += "</tr>\n";
  }
  return out + "</tbody>\n</table>\n";
}

std::string changes(const ForgeReport& r) {
  std::string out;
  for (const ChangeSet& c : r.changes) {
    out += fmt::format(
        "<section>\n<h2>Changed answers: {}</h2>\n<p class=\"note\">{} newly wrong, {} "
        "newly right, {} (McNemar, exact).</p>\n",
        text(c.title), c.newly_wrong_total, c.newly_right_total, text(p_value(c.p)));
    out += answers_table("Newly wrong", c.newly_wrong_total, c.newly_wrong, true);
    out += answers_table("Newly right", c.newly_right_total, c.newly_right, false);
    out += "</section>\n";
  }
  return out;
}

std::string fact(std::string_view name, const std::string& value) {
  return fmt::format("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", text(name), value);
}

std::string file_fact(const InputFile& file, const char* what) {
  std::string out = text(file.path);
  if (file.rows > 0)
    out += fmt::format(" · {} {}", format_count(static_cast<double>(file.rows)), what);
  if (!file.sha256.empty()) out += fmt::format("<br><code>sha256 {}</code>", text(file.sha256));
  return out;
}

std::string provenance(const ForgeReport& r) {
  std::string out = "<section>\n<h2>Provenance</h2>\n<table class=\"facts\">\n<tbody>\n";
  out += fact("model", file_fact(r.model, ""));
  out += fact("pairs", file_fact(r.pairs, "pairs"));
  out += fact("questions", file_fact(r.questions, "questions"));
  if (const Candidate* c = r.chosen(); c != nullptr && !c->sha256.empty())
    out += fact("chosen model",
                fmt::format("{}<br><code>sha256 {}</code>", text(c->file), text(c->sha256)));
  for (const Setting& s : r.settings) out += fact(s.name, text(s.value));
  out += fact("seed", std::to_string(r.seed));
  out += fact("machine", fmt::format("{} · {} per hour", text(r.machine),
                                     text(format_usd(r.machine_usd_per_hour))));
  out += fact("moru", text(r.moru_version));
  out += fact("time", fmt::format("{} to {} (UTC)", text(r.started), text(r.finished)));
  out += "</tbody>\n</table>\n";
  if (!r.stages.empty()) {
    out += "<h3>Stages</h3>\n<table class=\"facts\">\n<tbody>\n";
    for (const StageTime& s : r.stages)
      out += fact(s.name, duration(s.seconds) + (s.reused ? ", taken from an earlier run" : ""));
    out += "</tbody>\n</table>\n";
  }
  if (!r.command.empty())
    out += fmt::format("<h3>Command</h3>\n<pre><code>{}</code></pre>\n", text(r.command));
  return out + "</section>\n";
}

}  // namespace

std::string page_html(std::string_view title, std::string_view body) {
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta http-equiv=\"Content-Security-Policy\" "
      "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
      "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n{}</body>\n</html>\n",
      text(title), kStyle, body);
}

std::string report_html(const ForgeReport& r) {
  std::string out = head(r);
  out += "<main>\n";
  if (!r.candidates.empty()) out += picture(r) + candidates(r);
  out += list_section("What was tried", r.tried);
  out += training(r);
  out += changes(r);
  out += provenance(r);
  out += list_section("Plan: fall-backs", r.plan_log);
  out += "</main>\n";
  out += fmt::format("<footer>Written by moru {}.</footer>\n", text(r.moru_version));
  return page_html(r.title + " · moru forge report", out);
}

}  // namespace moru
