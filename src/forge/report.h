// What a forge run found, and the three forms in which it is told: a table in the terminal,
// report.json for programs (docs/report.md has its fields), report.html for people.
//
// The report is plain data. Whoever fills it says where each number comes from; nothing here
// measures or computes a result.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "prove/statistics.h"

namespace moru {

// A model that stands in the table.
struct Candidate {
  enum class Kind {
    measured,  // it answered the questions on this machine
    vendor,    // a vendor's list price; it has no score
  };

  std::string name;  // "base", "tuned", "tuned Q4_K"
  Kind kind = Kind::measured;
  std::string file = {};  // where it lies, relative to the output folder; empty: not kept
  std::string sha256 = {};
  uint64_t file_bytes = 0;
  double bits_per_weight = 0;

  size_t correct = 0, total = 0;
  Interval interval = {};
  double tokens_per_second = 0;  // in and out
  double seconds = 0;            // the machine's time of all its answers
  double usd_per_1000 = 0;       // answers

  // Against the best candidate on the same questions; absent for the best one and for vendors.
  struct AgainstBest {
    size_t newly_wrong = 0, newly_right = 0;
    double p = 1;                                                   // McNemar, exact
    Interval ratio = {0, std::numeric_limits<double>::infinity()};  // of accuracies
  };
  std::optional<AgainstBest> against_best = {};

  bool good_enough = false, chosen = false;
  std::string verdict = {};  // "not good enough: lower end 0.810 < 0.850"
  std::string note = {};     // for vendors: the price's date and source

  double accuracy() const {
    return total == 0 ? 0 : static_cast<double>(correct) / static_cast<double>(total);
  }
};

// A file that went in.
struct InputFile {
  std::string path, sha256;
  size_t rows = 0;  // pairs or questions; 0 for a model
};

struct CurvePoint {
  size_t step = 0;
  double loss = 0;  // on the training batch
  std::optional<double> validation_loss = {};
};

// One question that two models answered differently.
struct ChangedAnswer {
  std::string id, prompt, expected, before, after;
};
struct ChangeSet {
  std::string title;  // "tuned Q4_K against tuned"
  size_t newly_wrong_total = 0, newly_right_total = 0;
  double p = 1;
  std::vector<ChangedAnswer> newly_wrong = {}, newly_right = {};  // examples, perhaps not all
};

struct StageTime {
  std::string name;
  double seconds = 0;
  bool reused = false;  // taken from an earlier run of the same work
};

struct Setting {
  std::string name, value;
};

struct ForgeReport {
  std::string title;    // what the models were forged for; the output folder's name
  std::string outcome;  // one sentence: what was chosen and why, or that nothing was
  std::string goal;     // "lower end of the 95 % interval ≥ 0.850"
  std::optional<double> at_least = {};  // drawn as a line
  double machine_usd_per_hour = 0;

  std::vector<Candidate> candidates = {};  // in the order in which they are told

  std::string moru_version = {}, command = {}, machine = {};
  std::string started = {}, finished = {};  // UTC, as utc_now() writes it
  uint64_t seed = 0;
  InputFile model = {}, pairs = {}, questions = {};
  std::vector<Setting> settings = {};  // everything else that decides the result
  std::vector<StageTime> stages = {};
  std::vector<CurvePoint> curve = {};      // of the tuning that was kept
  std::vector<std::string> tried = {};     // what was tried, one line each
  std::vector<std::string> plan_log = {};  // fall-backs of quantization types and the like
  std::vector<ChangeSet> changes = {};

  const Candidate* chosen() const;  // nullptr if nothing was
};

std::string report_json(const ForgeReport& report);
// Error bad_input naming `where` and field. Fields of later versions are left out.
ForgeReport report_from_json(const std::string& where, std::string_view json);

// One page without scripts or anything from outside: pictures are inline SVG, in a wide and a
// narrow drawing, of which the page shows the one that fits. Whatever the report holds appears as
// text.
std::string report_html(const ForgeReport& report);

struct TerminalStyle {
  bool colour = false;
  size_t width = 80;  // ≥ 60
};
// Lines of at most `width` columns, each ended by a line break.
std::string report_table(const ForgeReport& report, const TerminalStyle& style);

// Writes report.json and report.html into `folder`, each whole or not at all.
void write_report(const ForgeReport& report, const std::filesystem::path& folder);

// ---- how numbers read ----

std::string format_usd(double usd);                     // "$0.00113", "$12.3"
std::string format_bytes(uint64_t bytes);               // "93.8 MiB"
std::string format_count(double count);                 // "12,345"
std::string format_score(double share);                 // "0.871"
std::string format_interval(const Interval& interval);  // "0.848–0.891"

}  // namespace moru
