#include "forge/report.h"

#include <fmt/format.h>

#include <cmath>

#include "base/files.h"
#include "base/random.h"
#include "base/text.h"
#include "forge/picture.h"
#include "forge/svg.h"
#include "forge_example.h"
#include "support.h"

using namespace moru;

namespace {

size_t count(std::string_view text, std::string_view part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + 1))
    ++found;
  return found;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0, end; (end = text.find('\n', at)) != std::string::npos; at = end + 1)
    lines.push_back(text.substr(at, end - at));
  return lines;
}

}  // namespace

TEST_CASE("a report survives JSON and back") {
  const ForgeReport report = example_report();
  const std::string json = report_json(report);
  const ForgeReport back = report_from_json("report.json", json);
  CHECK(report_json(back) == json);
  CHECK(report_html(back) == report_html(report));
  CHECK(back.chosen()->name == report.chosen()->name);
  CHECK(std::isinf(back.candidates[0].against_best->ratio.high) ==
        std::isinf(report.candidates[0].against_best->ratio.high));
  CHECK(report_json(report_from_json("r", report_json(ForgeReport{}))) ==
        report_json(ForgeReport{}));
}

TEST_CASE("JSON that is no report is refused, naming the field") {
  const auto refusal = [](std::string_view json) {
    return error_from([&] { report_from_json("report.json", json); });
  };
  CHECK(refusal("").problem() == "is not an object");
  CHECK(refusal("{}").where() == "report.json: field version");
  const std::string head = R"({"moru": "forge report", "version": 1, )";
  CHECK(refusal(head + R"("title": 3})").where() == "report.json: field title");
  CHECK(refusal(head + R"("candidates": [{"kind": "best"}]})").problem().find("best") !=
        std::string::npos);
  CHECK(refusal(head + R"("candidates": [{"interval": [1]}]})").where() ==
        "report.json: field candidates[0].interval");
  CHECK(refusal(head + R"("curve": 1})").problem() == "is not a list");
  CHECK(refusal(head + R"("curve": [[]]})").where() == "report.json: field curve[0]");
}

TEST_CASE("the table fits its width in columns, also with Korean names") {
  ForgeReport report = example_report();
  report.candidates[0].name = "아주 긴 이름을 가진 고객 상담 분류 모델 (조정 전)";
  report.candidates[1].verdict = std::string(200, 'x');
  for (const size_t width : {60u, 70u, 80u}) {
    CAPTURE(width);
    const std::string table = report_table(report, {.width = width});
    CHECK(table.find('\x1b') == std::string::npos);
    for (const std::string& line : lines_of(table)) {
      CAPTURE(line);
      CHECK(display_width(line) <= width);
    }
    CHECK(lines_of(table).size() > report.candidates.size() + 3);
  }
}

TEST_CASE("colour changes nothing but the colour") {
  const ForgeReport report = example_report();
  std::string coloured = report_table(report, {.colour = true});
  CHECK(coloured.find("\x1b[1;32m→ ") != std::string::npos);
  for (size_t at; (at = coloured.find('\x1b')) != std::string::npos;)
    coloured.erase(at, coloured.find('m', at) - at + 1);
  CHECK(coloured == report_table(report, {}));
}

TEST_CASE("a name cannot move the terminal's cursor") {
  ForgeReport report = example_report();
  report.candidates[0].name = "bad\x1b[2Jname\n";
  report.candidates[0].verdict = "over\rwritten";
  const std::string table = report_table(report, {});
  CHECK(table.find('\x1b') == std::string::npos);
  CHECK(table.find('\r') == std::string::npos);
}

TEST_CASE("the page asks nothing of the outside and runs nothing") {
  const std::string html = report_html(example_report());
  CHECK(html.starts_with("<!doctype html>"));
  for (const char* outside :
       {"http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link"})
    CHECK_MESSAGE(html.find(outside) == std::string::npos, outside);
  CHECK(html.find("default-src 'none'") != std::string::npos);
}

TEST_CASE("everything the report holds appears as text, never as markup") {
  const std::string evil = "<script>alert('x')</script>\"&<b>\x01\xFF";
  ForgeReport report = example_report();
  report.title = report.outcome = report.goal = report.command = report.machine = evil;
  report.model.path = report.pairs.path = report.questions.path = evil;
  for (Candidate& c : report.candidates) c.name = c.verdict = c.note = c.file = c.sha256 = evil;
  for (ChangeSet& c : report.changes) {
    c.title = evil;
    for (ChangedAnswer& a : c.newly_wrong) a.id = a.prompt = a.expected = a.before = a.after = evil;
  }
  for (Setting& s : report.settings) s.name = s.value = evil;
  report.stages[0].name = report.tried[0] = report.plan_log[0] = evil;
  const std::string html = report_html(report);
  CHECK(html.find("<script") == std::string::npos);
  CHECK(html.find("<b>") == std::string::npos);
  CHECK(html.find("alert('x')") == std::string::npos);
  CHECK(html.find("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&quot;&amp;&lt;b&gt;") !=
        std::string::npos);
  CHECK(!find_invalid_utf8(html));
  CHECK(html.find('\x01') == std::string::npos);
}

TEST_CASE("the pictures say in words what they show, and the tables have heads") {
  const std::string html = report_html(example_report());
  CHECK(count(html, "<svg") == 4);  // two pictures, each wide and narrow
  CHECK(count(html, "<title") == 4 + 1);
  CHECK(count(html, "<desc") == 4);
  CHECK(count(html, "role=\"img\"") == 4);
  CHECK(html.find("scope=\"col\"") != std::string::npos);
  CHECK(html.find("scope=\"row\"") != std::string::npos);
  CHECK(html.find("list price, not measured") != std::string::npos);
}

TEST_CASE("every element that opens closes") {
  const std::string html = report_html(example_report());
  std::vector<std::string> open;
  for (size_t at = html.find('<'); at != std::string::npos; at = html.find('<', at + 1)) {
    const size_t end = html.find('>', at);
    REQUIRE(end != std::string::npos);
    const bool closing = html[at + 1] == '/';
    const size_t begin = at + (closing ? 2 : 1);
    const std::string name = html.substr(begin, html.find_first_of(" >/\n", begin) - begin);
    if (name == "!doctype" || name == "meta" || name == "br" || html[end - 1] == '/') continue;
    if (!closing) {
      open.push_back(name);
    } else {
      REQUIRE(!open.empty());
      CHECK(open.back() == name);
      open.pop_back();
    }
  }
  CHECK(open.empty());
}

TEST_CASE("an empty report, one without a choice and one of a single model make pages too") {
  CHECK(report_html(ForgeReport{}).find("</html>") != std::string::npos);
  CHECK(report_table(ForgeReport{}, {}).find("model") != std::string::npos);
  ForgeReport report = example_report();
  for (Candidate& c : report.candidates) c.chosen = c.good_enough = false;
  CHECK(report_html(report).find("</html>") != std::string::npos);
  report.candidates.resize(1);
  report.candidates[0].usd_per_1000 = 0;
  report.curve.resize(1);
  const std::string html = report_html(report);
  for (const char* no_number : {"\"nan", "\"-nan", "\"inf", "\"-inf", ">nan", ">inf", "$nan"})
    CHECK_MESSAGE(html.find(no_number) == std::string::npos, no_number);
}

TEST_CASE("numbers read well at any size") {
  CHECK(format_usd(0) == "$0");
  CHECK(format_usd(0.001134) == "$0.00113");
  CHECK(format_usd(0.0999) == "$0.0999");
  CHECK(format_usd(1.5) == "$1.50");
  CHECK(format_usd(12.345) == "$12.35");
  CHECK(format_usd(1234.5) == "$1,234");
  CHECK(format_usd(1e-12) == "$0.00");
  CHECK(format_usd(std::nan("")) == "–");
  CHECK(format_bytes(98'362'432) == "93.8 MiB");
  CHECK(format_bytes(5'000'000'000) == "4.66 GiB");
  CHECK(format_bytes(500) == "0.5 KiB");
  CHECK(format_bytes(0) == "–");
  CHECK(format_count(1234567) == "1,234,567");
  CHECK(format_count(999) == "999");
  CHECK(format_score(1) == "1.000");
  CHECK(format_interval({0.8477, 0.8894}) == "0.848–0.889");
}

// MORU_KEEP_REPORT=folder keeps the example's page there, to be looked at in a browser.
TEST_CASE("a report is written whole into its folder") {
  const TempDir folder;
  write_report(example_report(), folder.path());
  CHECK(report_from_json("r", read_file(folder.path() / "report.json")).title == "support");
  CHECK(read_file(folder.path() / "report.html") == report_html(example_report()));
  if (const char* keep = std::getenv("MORU_KEEP_REPORT")) write_report(example_report(), keep);
}

namespace {

struct Drawn {
  svg::Box box;
  std::string words;
};

double attribute(std::string_view tag, std::string_view name) {
  const size_t at = tag.find(fmt::format(" {}=\"", name));
  REQUIRE(at != std::string_view::npos);
  return std::stod(std::string(tag.substr(at + name.size() + 3)));
}

// Labels of a picture with the room they take, and its points.
void read_picture(const std::string& picture, double font, std::vector<Drawn>& labels,
                  std::vector<svg::Point>& points) {
  for (const std::string& line : lines_of(picture)) {
    if (line.starts_with("<circle class=\"point")) {
      points.push_back({attribute(line, "cx"), attribute(line, "cy")});
    } else if (line.starts_with("<text class=\"label")) {
      const size_t begin = line.find('>') + 1;
      const std::string words = line.substr(begin, line.find('<', begin) - begin);
      const double x = attribute(line, "x"), y = attribute(line, "y");
      const double width = static_cast<double>(display_width(words)) * font * 0.6;
      const double left = line.find("\"end\"") != std::string::npos ? x - width : x;
      labels.push_back({{left, y - font * 0.8, left + width, y + font * 0.2}, words});
    }
  }
}

}  // namespace

TEST_CASE("labels of the picture never cover each other or a point, however crowded it is") {
  Random random(11);
  size_t chosen_labels = 0;
  constexpr int kRounds = 150;
  for (int round = 0; round < kRounds; ++round) {
    CAPTURE(round);
    ForgeReport report = example_report();
    const Candidate measured = report.candidates[1], vendor = report.candidates[8];
    report.candidates.clear();
    const double spread = round % 3 == 0 ? 0.1 : random.uniform() * 4;
    for (size_t n = 1 + random.below(20); n > 0; --n) {
      Candidate& c = report.candidates.emplace_back(measured);
      c.name = n % 3 == 0 ? "한국어 상담 모델 " + std::to_string(n) : "tuned Q" + std::to_string(n);
      c.correct = 312 - random.below(round % 2 == 0 ? 60 : 312);
      c.interval = wilson(c.correct, 312);
      c.usd_per_1000 = 0.001 * std::pow(10, spread * double{random.uniform()});
      c.chosen = n == 1;
    }
    for (size_t n = random.below(20); n > 0; --n) {
      Candidate& c = report.candidates.emplace_back(vendor);
      c.name = fmt::format("vendor {}", n);
      c.usd_per_1000 = 0.001 * std::pow(10, 4 * double{random.uniform()});
    }
    for (const PictureSize& size :
         {PictureSize{}, PictureSize{.width = 340, .height = 430, .font = 11.5}}) {
      const std::string picture = cost_quality_svg(report, size);
      std::vector<Drawn> labels;
      std::vector<svg::Point> points;
      read_picture(picture, size.font, labels, points);
      for (size_t i = 0; i < labels.size(); ++i) {
        CAPTURE(labels[i].words);
        CHECK(svg::contains({0, 0, size.width, size.height}, labels[i].box));
        for (size_t j = 0; j < i; ++j) {
          CAPTURE(labels[j].words);
          CHECK(!svg::overlaps(labels[i].box, labels[j].box));
        }
        for (const svg::Point& p : points)
          CHECK(!svg::overlaps(labels[i].box, svg::around(p, 4, 4)));
      }
      chosen_labels += picture.find("\"label chosen\"") != std::string::npos;
    }
  }
  CHECK(chosen_labels == 2 * kRounds);
}
