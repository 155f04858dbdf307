#include "forge/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/files.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kVersion = 1;

// JSON has no infinity: an open end is null.
Json end_of(double value) { return std::isfinite(value) ? Json(value) : Json(); }

Json to_json(const Interval& interval) { return {end_of(interval.low), end_of(interval.high)}; }

Json to_json(const Candidate& c) {
  Json json = {{"name", c.name},
               {"kind", c.kind == Candidate::Kind::vendor ? "vendor" : "measured"},
               {"usd_per_1000", c.usd_per_1000}};
  if (c.kind == Candidate::Kind::measured) {
    json["file"] = c.file;
    json["sha256"] = c.sha256;
    json["file_bytes"] = c.file_bytes;
    json["bits_per_weight"] = c.bits_per_weight;
    json["correct"] = c.correct;
    json["total"] = c.total;
    json["accuracy"] = c.accuracy();
    json["interval"] = to_json(c.interval);
    json["tokens_per_second"] = c.tokens_per_second;
    json["seconds"] = c.seconds;
    json["good_enough"] = c.good_enough;
    json["chosen"] = c.chosen;
  }
  if (c.against_best)
    json["against_best"] = {{"newly_wrong", c.against_best->newly_wrong},
                            {"newly_right", c.against_best->newly_right},
                            {"p", c.against_best->p},
                            {"ratio", to_json(c.against_best->ratio)}};
  json["verdict"] = c.verdict;
  json["note"] = c.note;
  return json;
}

Json to_json(const InputFile& file) {
  return {{"path", file.path}, {"sha256", file.sha256}, {"rows", file.rows}};
}

Json to_json(const std::vector<ChangedAnswer>& answers) {
  Json list = Json::array();
  for (const ChangedAnswer& a : answers)
    list.push_back({{"id", a.id},
                    {"prompt", a.prompt},
                    {"expected", a.expected},
                    {"before", a.before},
                    {"after", a.after}});
  return list;
}

// ---- reading ----

// Reads members of an object and knows their names for the error.
class Reader {
 public:
  Reader(const std::string& where, std::string path, const Json& json)
      : where_(where), path_(std::move(path)), json_(json) {
    if (!json.is_object()) refuse(path_, "is not an object");
  }

  template <typename T>
  void read(const char* name, T& value) const {
    const auto field = json_.find(name);
    if (field == json_.end() || field->is_null()) return;
    try {
      field->get_to(value);
    } catch (const nlohmann::json::exception&) {
      refuse(name_of(name), fmt::format("has the wrong type ({})", field->type_name()));
    }
  }

  void read(const char* name, Interval& interval) const {
    const auto field = json_.find(name);
    if (field == json_.end()) return;
    if (!field->is_array() || field->size() != 2) refuse(name_of(name), "is not a pair of numbers");
    const auto end = [&](size_t i, double open) {
      const Json& value = (*field)[i];
      if (value.is_null()) return open;
      if (!value.is_number()) refuse(name_of(name), "is not a pair of numbers");
      return value.get<double>();
    };
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    interval = {end(0, -kInfinity), end(1, kInfinity)};
  }

  // Calls item(reader) for each object of an array.
  template <typename Item>
  void each(const char* name, Item&& item) const {
    const auto field = json_.find(name);
    if (field == json_.end()) return;
    if (!field->is_array()) refuse(name_of(name), "is not a list");
    for (size_t i = 0; i < field->size(); ++i)
      item(Reader(where_, fmt::format("{}[{}]", name_of(name), i), (*field)[i]));
  }

  std::optional<Reader> object(const char* name) const {
    const auto field = json_.find(name);
    if (field == json_.end() || field->is_null()) return std::nullopt;
    return Reader(where_, name_of(name), *field);
  }

  [[noreturn]] void refuse(const std::string& field, std::string what) const {
    throw Error(ErrorKind::bad_input,
                {.where = field.empty() ? where_ : fmt::format("{}: field {}", where_, field),
                 .what = std::move(what),
                 .cure = "take a report.json that moru forge wrote"});
  }

 private:
  std::string name_of(const char* name) const {
    return path_.empty() ? name : fmt::format("{}.{}", path_, name);
  }

  const std::string& where_;
  std::string path_;
  const Json& json_;
};

Candidate candidate_from(const Reader& in) {
  Candidate c;
  std::string kind = "measured";
  in.read("name", c.name);
  in.read("kind", kind);
  if (kind != "measured" && kind != "vendor")
    in.refuse("kind", fmt::format("\"{}\" is neither measured nor vendor", kind));
  c.kind = kind == "vendor" ? Candidate::Kind::vendor : Candidate::Kind::measured;
  in.read("usd_per_1000", c.usd_per_1000);
  in.read("file", c.file);
  in.read("sha256", c.sha256);
  in.read("file_bytes", c.file_bytes);
  in.read("bits_per_weight", c.bits_per_weight);
  in.read("correct", c.correct);
  in.read("total", c.total);
  in.read("interval", c.interval);
  in.read("tokens_per_second", c.tokens_per_second);
  in.read("seconds", c.seconds);
  in.read("good_enough", c.good_enough);
  in.read("chosen", c.chosen);
  in.read("verdict", c.verdict);
  in.read("note", c.note);
  if (const std::optional<Reader> best = in.object("against_best")) {
    c.against_best = Candidate::AgainstBest{};
    best->read("newly_wrong", c.against_best->newly_wrong);
    best->read("newly_right", c.against_best->newly_right);
    best->read("p", c.against_best->p);
    best->read("ratio", c.against_best->ratio);
  }
  return c;
}

InputFile input_from(const std::optional<Reader>& in) {
  InputFile file;
  if (!in) return file;
  in->read("path", file.path);
  in->read("sha256", file.sha256);
  in->read("rows", file.rows);
  return file;
}

std::vector<ChangedAnswer> answers_from(const Reader& in, const char* name) {
  std::vector<ChangedAnswer> answers;
  in.each(name, [&](const Reader& item) {
    ChangedAnswer& a = answers.emplace_back();
    item.read("id", a.id);
    item.read("prompt", a.prompt);
    item.read("expected", a.expected);
    item.read("before", a.before);
    item.read("after", a.after);
  });
  return answers;
}

}  // namespace

const Candidate* ForgeReport::chosen() const {
  const auto found = std::find_if(candidates.begin(), candidates.end(),
                                  [](const Candidate& c) { return c.chosen; });
  return found == candidates.end() ? nullptr : &*found;
}

std::string report_json(const ForgeReport& report) {
  Json json = {{"moru", "forge report"},
               {"version", kVersion},
               {"title", report.title},
               {"outcome", report.outcome},
               {"goal", report.goal},
               {"at_least", report.at_least ? Json(*report.at_least) : Json()},
               {"chosen", report.chosen() ? Json(report.chosen()->name) : Json()},
               {"machine_usd_per_hour", report.machine_usd_per_hour},
               {"candidates", Json::array()}};
  for (const Candidate& c : report.candidates) json["candidates"].push_back(to_json(c));
  json["provenance"] = {{"moru_version", report.moru_version},
                        {"command", report.command},
                        {"machine", report.machine},
                        {"started", report.started},
                        {"finished", report.finished},
                        {"seed", report.seed},
                        {"model", to_json(report.model)},
                        {"pairs", to_json(report.pairs)},
                        {"questions", to_json(report.questions)}};
  json["settings"] = Json::array();
  for (const Setting& s : report.settings)
    json["settings"].push_back({{"name", s.name}, {"value", s.value}});
  json["stages"] = Json::array();
  for (const StageTime& s : report.stages)
    json["stages"].push_back({{"name", s.name}, {"seconds", s.seconds}, {"reused", s.reused}});
  json["curve"] = Json::array();
  for (const CurvePoint& p : report.curve) {
    Json point = {{"step", p.step}, {"loss", end_of(p.loss)}};
    if (p.validation_loss) point["validation_loss"] = end_of(*p.validation_loss);
    json["curve"].push_back(point);
  }
  json["tried"] = report.tried;
  json["plan_log"] = report.plan_log;
  json["changes"] = Json::array();
  for (const ChangeSet& c : report.changes)
    json["changes"].push_back({{"title", c.title},
                               {"newly_wrong_total", c.newly_wrong_total},
                               {"newly_right_total", c.newly_right_total},
                               {"p", c.p},
                               {"newly_wrong", to_json(c.newly_wrong)},
                               {"newly_right", to_json(c.newly_right)}});
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

ForgeReport report_from_json(const std::string& where, std::string_view text) {
  const Json json = Json::parse(text, nullptr, false);
  const Reader in(where, "", json);
  std::string kind;
  int version = 0;
  in.read("moru", kind);
  in.read("version", version);
  if (kind != "forge report" || version != kVersion)
    in.refuse("version", fmt::format("is not a forge report of version {}", kVersion));

  ForgeReport report;
  in.read("title", report.title);
  in.read("outcome", report.outcome);
  in.read("goal", report.goal);
  if (json.contains("at_least") && !json["at_least"].is_null())
    in.read("at_least", report.at_least.emplace());
  in.read("machine_usd_per_hour", report.machine_usd_per_hour);
  in.each("candidates",
          [&](const Reader& item) { report.candidates.push_back(candidate_from(item)); });
  if (const std::optional<Reader> from = in.object("provenance")) {
    from->read("moru_version", report.moru_version);
    from->read("command", report.command);
    from->read("machine", report.machine);
    from->read("started", report.started);
    from->read("finished", report.finished);
    from->read("seed", report.seed);
    report.model = input_from(from->object("model"));
    report.pairs = input_from(from->object("pairs"));
    report.questions = input_from(from->object("questions"));
  }
  in.each("settings", [&](const Reader& item) {
    Setting& s = report.settings.emplace_back();
    item.read("name", s.name);
    item.read("value", s.value);
  });
  in.each("stages", [&](const Reader& item) {
    StageTime& s = report.stages.emplace_back();
    item.read("name", s.name);
    item.read("seconds", s.seconds);
    item.read("reused", s.reused);
  });
  in.each("curve", [&](const Reader& item) {
    CurvePoint& p = report.curve.emplace_back();
    p.loss = std::numeric_limits<double>::infinity();
    item.read("step", p.step);
    item.read("loss", p.loss);
    double validation = std::nan("");
    item.read("validation_loss", validation);
    if (!std::isnan(validation)) p.validation_loss = validation;
  });
  in.read("tried", report.tried);
  in.read("plan_log", report.plan_log);
  in.each("changes", [&](const Reader& item) {
    ChangeSet& c = report.changes.emplace_back();
    item.read("title", c.title);
    item.read("newly_wrong_total", c.newly_wrong_total);
    item.read("newly_right_total", c.newly_right_total);
    item.read("p", c.p);
    c.newly_wrong = answers_from(item, "newly_wrong");
    c.newly_right = answers_from(item, "newly_right");
  });
  return report;
}

void write_report(const ForgeReport& report, const std::filesystem::path& folder) {
  write_file(folder / "report.json", report_json(report));
  write_file(folder / "report.html", report_html(report));
}

std::string format_usd(double usd) {
  if (!std::isfinite(usd) || usd < 0) return "–";
  if (usd == 0) return "$0";
  // Three significant digits without an exponent, and cents from one dollar on.
  const int magnitude = static_cast<int>(std::floor(std::log10(usd)));
  if (magnitude >= 2) return fmt::format("${}", format_count(usd));
  int places = std::clamp(2 - magnitude, 2, 9);
  std::string digits = fmt::format("{:.{}f}", usd, places);
  for (; places > 2 && digits.ends_with('0'); --places) digits.pop_back();
  return fmt::format("${}", digits);
}

std::string format_bytes(uint64_t bytes) {
  if (bytes == 0) return "–";
  const double mebibytes = static_cast<double>(bytes) / (1 << 20);
  if (mebibytes < 1) return fmt::format("{:.1f} KiB", mebibytes * 1024);
  if (mebibytes < 1000) return fmt::format("{:.1f} MiB", mebibytes);
  return fmt::format("{:.2f} GiB", mebibytes / 1024);
}

std::string format_count(double count) {
  const std::string digits = fmt::format("{:.0f}", count);
  std::string grouped;
  for (size_t i = 0; i < digits.size(); ++i) {
    const size_t left = digits.size() - i;
    if (i > 0 && left % 3 == 0 && digits[i - 1] != '-') grouped += ',';
    grouped += digits[i];
  }
  return grouped;
}

std::string format_score(double share) { return fmt::format("{:.3f}", share); }

std::string format_interval(const Interval& interval) {
  return fmt::format("{:.3f}–{:.3f}", interval.low, interval.high);
}

}  // namespace moru
