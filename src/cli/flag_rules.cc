#include "cli/flag_rules.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/text.h"

namespace moru {
namespace {

constexpr size_t kWidth = 80, kColumn = 30;  // of a line; where descriptions begin
constexpr std::string_view kSize = "SIZE";   // the name of memory_size()

// CLI11 names a value "UINT:INT in [0 - 1024]": its kind, then what its checks are called.
struct Value {
  std::string kind, check;
};
Value value_of(const CLI::Option& option) {
  const std::string name = option.get_type_name();
  const size_t colon = name.find(':');
  return {name.substr(0, colon), colon == std::string::npos ? "" : name.substr(colon + 1)};
}
bool counts(const Value& value) { return value.kind == "UINT" && value.check != kSize; }
bool measures(const Value& value) { return value.kind == "FLOAT"; }

// "N", "X", "SIZE", "TEXT" or "{bf16,f32}".
std::string shown_kind(const Value& value) {
  if (value.check.starts_with("{")) return value.check;
  if (value.check == kSize) return value.check;
  return counts(value) ? "N" : measures(value) ? "X" : "TEXT";
}

// "0 to 1024"; empty where there is none that anybody would meet.
std::string shown_range(const Value& value) {
  constexpr size_t kFarDigits = 7;
  if (value.check == "POSITIVE") return "above 0";
  if (value.check == "NONNEGATIVE") return "0 or more";
  const size_t open = value.check.find(" in ["), dash = value.check.find(" - ");
  if (open == std::string::npos || dash == std::string::npos) return "";
  const std::string low = value.check.substr(open + 5, dash - open - 5);
  const std::string high = value.check.substr(dash + 3, value.check.size() - dash - 4);
  if (high.size() < kFarDigits && high.find('e') == std::string::npos) return low + " to " + high;
  return low == "0" ? "" : low + " or more";
}

// `head` and, from kColumn on, `text` in as many lines as it takes.
std::string entry(const std::string& head, const std::string& text) {
  std::string lines = "  " + head;
  if (text.empty()) return lines + "\n";
  const std::string wrapped = wrap_to_width(text, kWidth - kColumn, 0);
  bool fresh = lines.size() >= kColumn;
  if (fresh) lines += "\n";
  for (size_t at = 0; at < wrapped.size();) {
    const size_t end = wrapped.find('\n', at) + 1;
    lines += (fresh ? std::string(kColumn, ' ') : std::string(kColumn - lines.size(), ' ')) +
             wrapped.substr(at, end - at);
    fresh = true;
    at = end;
  }
  return lines;
}

class HelpFormat : public CLI::Formatter {
 public:
  std::string make_option(const CLI::Option* option, bool positional) const override {
    const Value value = value_of(*option);
    const bool takes_value = option->get_items_expected_max() != 0;
    const bool many = option->get_expected_max() == CLI::detail::expected_max_vector_size;
    std::string head = make_option_name(option, positional);
    if (takes_value && !positional) head += " " + shown_kind(value);
    if (many) head += " ...";

    std::vector<std::string> notes;
    if (option->get_required()) notes.emplace_back("required");
    std::string otherwise = option->get_default_str();
    if (otherwise.starts_with('[')) otherwise = otherwise.substr(1, otherwise.size() - 2);
    if (!otherwise.empty()) notes.push_back("default " + otherwise);
    if (takes_value)
      if (std::string range = shown_range(value); !range.empty()) notes.push_back(std::move(range));
    if (!option->get_envname().empty()) notes.push_back("or " + option->get_envname());
    for (const CLI::Option* other : option->get_excludes())
      notes.push_back("not with " + other->get_name());
    std::string text = option->get_description();
    if (!notes.empty())
      text += fmt::format("{}({})", text.empty() ? "" : " ", fmt::join(notes, "; "));
    return entry(head, text);
  }
  std::string make_subcommand(const CLI::App* command) const override {
    return entry(command->get_name(), command->get_description());
  }
  std::string make_description(const CLI::App* app) const override {
    return wrap_to_width(app->get_description(), kWidth, 0);
  }
  std::string make_footer(const CLI::App* app) const override {
    const std::string footer = app->get_footer();
    return footer.empty() ? "" : wrap_to_width(footer, kWidth, 0);
  }
};

std::string whole_number_problem(const std::string& text) {
  uint64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, failed] = std::from_chars(text.data(), end, number);
  if (failed == std::errc{} && stop == end) return "";
  return fmt::format("\"{}\" is no whole number of 0 or more", text);
}

std::string number_problem(const std::string& text) {
  double number = 0;
  const char* first = text.data() + (text.starts_with('+') ? 1 : 0);
  const char* end = text.data() + text.size();
  const auto [stop, failed] = std::from_chars(first, end, number);
  // Some of them end as a float.
  if (failed == std::errc{} && stop == end && std::isfinite(number) &&
      std::abs(number) <= double{std::numeric_limits<float>::max()})
    return "";
  return fmt::format("\"{}\" is no number{}", text, stop == end ? " that can be meant" : "");
}

}  // namespace

std::shared_ptr<CLI::Formatter> help_format() { return std::make_shared<HelpFormat>(); }

void refuse_odd_values(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    if (option->get_items_expected_max() == 0) continue;  // takes no value
    const Value value = value_of(*option);
    // transform() puts it before the other checks; it changes nothing.
    option->transform(CLI::Validator(
        [whole = counts(value), real = measures(value)](std::string& text) {
          if (text.empty()) return std::string("its value is empty");
          return whole ? whole_number_problem(text) : real ? number_problem(text) : std::string();
        },
        ""));
  }
  for (CLI::App* command : app.get_subcommands({})) refuse_odd_values(*command);
}

void refuse_given(const CLI::App& command, const std::vector<const char*>& flags,
                  const std::string& why) {
  for (const char* flag : flags)
    if (command.get_option(flag)->count() != 0)
      throw Error(ErrorKind::usage, {.where = flag, .what = why, .cure = "leave it out"});
}

std::string problem_of(const CLI::ParseError& error) {
  constexpr std::string_view kTwice = ": At Most 1 required but received ";
  std::string text = error.what();
  if (const size_t at = text.find(kTwice); at != std::string::npos)
    return fmt::format("{}: is given {} times", text.substr(0, at),
                       text.substr(at + kTwice.size()));
  return text.starts_with("A subcommand") ? "a command is required" : text;
}

CLI::Validator memory_size() {
  return {[](std::string& text) {
            constexpr std::string_view kUnits = "kmgt";
            double number = 0;
            const char* end = text.data() + text.size();
            const auto [stop, failed] = std::from_chars(text.data(), end, number);
            std::string unit = CLI::detail::to_lower(std::string(stop, end));
            std::erase(unit, ' ');
            if (unit.ends_with('b')) unit.pop_back();
            const bool binary = unit.size() > 1 && unit.ends_with('i');
            if (binary) unit.pop_back();
            const size_t power = unit.empty() ? 0 : kUnits.find(unit) + 1;
            const double bytes = number * std::pow(binary ? 1024.0 : 1000.0, power);
            if (failed != std::errc{} || unit.size() > 1 || (!unit.empty() && power == 0) ||
                !(bytes >= 0 && bytes < 0x1p60))
              return fmt::format("\"{}\" is no size of memory: write it as 512MiB or 4GB", text);
            text = fmt::format("{}", static_cast<uint64_t>(bytes));
            return std::string();
          },
          std::string(kSize)};
}

}  // namespace moru
