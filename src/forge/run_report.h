// A tuning run as one self-contained page: what its log and tune.json hold, as curves.
#pragma once
#include <filesystem>
#include <string>

namespace moru {

// `folder`: of `moru tune`. Every column of log.jsonl becomes a chart; lines with "sample" (an
// object with "prompt" and "answer") a table. Errors: not_found (no log yet), io.
std::string run_report_html(const std::filesystem::path& folder);

}  // namespace moru
