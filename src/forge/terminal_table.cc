// The forge report as lines of a terminal.
#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/text.h"
#include "forge/report.h"

namespace moru {
namespace {

constexpr const char* kBold = "\x1b[1m";
constexpr const char* kChosen = "\x1b[1;32m";
constexpr const char* kDim = "\x1b[2m";
constexpr const char* kReset = "\x1b[0m";

std::string painted(const std::string& text, const char* colour, const TerminalStyle& style) {
  return style.colour ? fmt::format("{}{}{}", colour, text, kReset) : text;
}

// Control characters of a name or a path would move the cursor.
std::string one_line(std::string_view text) {
  std::string line;
  for (const CodePoint c : CodePoints(text)) {
    const bool is_control = c.value < 0x20 || (c.value >= 0x7F && c.value < 0xA0);
    append_utf8(line, is_control ? U' ' : c.value);
  }
  return line;
}

// `text` in lines of at most `width` columns, broken at spaces, and within words that are longer
// than a line; lines after the first are indented.
std::string wrapped(std::string_view text, size_t width, size_t indent) {
  const std::string clean = one_line(text);
  std::string lines, line;
  const auto flush = [&] {
    lines += line + "\n";
    line.assign(indent, ' ');
  };
  const auto is_fresh = [&] { return line.find_first_not_of(' ') == std::string::npos; };
  for (size_t at = 0; at < clean.size();) {
    const size_t space = std::min(clean.find(' ', at), clean.size());
    std::string word = clean.substr(at, space - at);
    at = space + 1;
    if (word.empty()) continue;
    if (!is_fresh() && display_width(line) + 1 + display_width(word) > width) flush();
    if (!is_fresh()) line += ' ';
    while (display_width(line) + display_width(word) > width) {
      // truncate_to_width marks its cut with "…", three bytes in one column.
      std::string head = truncate_to_width(word, width - display_width(line) + 1);
      head.resize(head.size() - std::string_view("…").size());
      if (head.empty()) break;
      line += head;
      word.erase(0, head.size());
      flush();
    }
    line += word;
  }
  if (!is_fresh()) flush();
  return lines;
}

struct Column {
  const char* head;
  size_t width;
  bool right;
  std::string (*cell)(const Candidate&);
  size_t from_width;  // left out of narrower terminals
};

bool is_vendor(const Candidate& c) { return c.kind == Candidate::Kind::vendor; }

const std::array<Column, 5> kColumns = {{
    {"size", 9, true,
     [](const Candidate& c) {
       return is_vendor(c) ? std::string("–") : format_bytes(c.file_bytes);
     },
     66},
    {"score", 5, true,
     [](const Candidate& c) {
       return is_vendor(c) ? std::string("–") : format_score(c.accuracy());
     },
     0},
    {"95 % range", 11, false,
     [](const Candidate& c) {
       return is_vendor(c) ? std::string("list price") : format_interval(c.interval);
     },
     0},
    {"tokens/s", 8, true,
     [](const Candidate& c) {
       return is_vendor(c) ? std::string("–") : format_count(c.tokens_per_second);
     },
     74},
    {"$/1,000", 9, true, [](const Candidate& c) { return format_usd(c.usd_per_1000); }, 0},
}};

constexpr size_t kGap = 2, kMark = 2;

const char* mark_of(const Candidate& c) {
  if (c.chosen) return "→ ";
  if (is_vendor(c)) return "$ ";
  return c.good_enough ? "✓ " : "✗ ";
}

size_t name_width(const TerminalStyle& style) {
  size_t taken = kMark;
  for (const Column& column : kColumns)
    if (style.width >= column.from_width) taken += kGap + column.width;
  return style.width - taken;
}

template <typename CellOf>
std::string row(std::string_view mark, std::string_view name, CellOf&& cell_of,
                const TerminalStyle& style) {
  const size_t width = name_width(style);
  std::string line = fmt::format("{}{}", mark, pad_right(truncate_to_width(name, width), width));
  for (const Column& column : kColumns) {
    if (style.width < column.from_width) continue;
    const std::string cell = truncate_to_width(cell_of(column), column.width);
    line.append(kGap, ' ');
    line += column.right ? pad_left(cell, column.width) : pad_right(cell, column.width);
  }
  return line;
}

}  // namespace

std::string report_table(const ForgeReport& report, const TerminalStyle& style) {
  MORU_CHECK(style.width >= 60);
  std::string out = painted(row(
                                "  ", "model", [](const Column& c) { return c.head; }, style),
                            kBold, style);
  out += '\n';
  std::string rule;
  for (size_t i = 0; i < style.width; ++i) rule += "─";
  out += painted(rule, kDim, style) + "\n";
  bool any_vendor = false;
  for (const Candidate& c : report.candidates) {
    any_vendor |= is_vendor(c);
    const std::string line = row(
        mark_of(c), one_line(c.name), [&](const Column& column) { return column.cell(c); }, style);
    const bool is_poor = !c.good_enough && !is_vendor(c);
    out += c.chosen ? painted(line, kChosen, style) : is_poor ? painted(line, kDim, style) : line;
    out += '\n';
  }
  out += '\n';
  for (const Candidate& c : report.candidates)
    if (!c.verdict.empty() && !c.good_enough && !is_vendor(c))
      out += wrapped(fmt::format("{}{}: {}", mark_of(c), c.name, c.verdict), style.width, 4);
  if (any_vendor)
    out +=
        wrapped("$ list price for as many tokens; its answers were not measured", style.width, 4);
  if (report.machine_usd_per_hour > 0)
    out += wrapped(fmt::format("$/1,000 is the price of 1,000 answers on a machine of {} per hour",
                               format_usd(report.machine_usd_per_hour)),
                   style.width, 4);
  if (!report.outcome.empty()) {
    out += '\n';
    std::string outcome = wrapped(report.outcome, style.width, 0);
    outcome.pop_back();
    out += painted(outcome, kBold, style) + "\n";
  }
  return out;
}

}  // namespace moru
