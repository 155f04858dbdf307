#include "forge/vendor_prices.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/files.h"
#include "formats/records.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kTokensPerPrice = 1e6;
// The whole public lists have one to two megabytes.
constexpr size_t kMaxMapBytes = size_t{64} << 20;

[[noreturn]] void refuse(std::string where, std::string what, std::string cure) {
  throw Error(ErrorKind::bad_input,
              {.where = std::move(where), .what = std::move(what), .cure = std::move(cure)});
}

// A price as a number, or as text with or without a dollar sign.
std::optional<double> price_of(const Json& value) {
  double price = 0;
  if (value.is_number()) {
    price = value.get<double>();
  } else if (value.is_string()) {
    std::string_view text = value.get_ref<const std::string&>();
    while (text.starts_with(' ') || text.starts_with('$')) text.remove_prefix(1);
    while (text.ends_with(' ')) text.remove_suffix(1);
    const auto result = std::from_chars(text.data(), text.data() + text.size(), price);
    if (result.ec != std::errc() || result.ptr != text.data() + text.size()) return std::nullopt;
  } else {
    return std::nullopt;
  }
  if (!std::isfinite(price) || price < 0) return std::nullopt;
  return price;
}

// ---- rows ----

std::string text_of(const Json& row, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const auto field = row.find(name);
    if (field == row.end() || field->is_null() || field->is_structured()) continue;
    std::string text = field->is_string() ? field->get<std::string>() : field->dump();
    if (!text.empty()) return text;
  }
  return "";
}

// nullopt where a price is null or an empty cell: it is not known, so the row cannot be compared.
std::optional<VendorPrice> price_from_row(const std::string& where, const Row& row) {
  const std::string line = fmt::format("{}: line {}", where, row.line);
  bool is_known = true;
  const auto price = [&](std::initializer_list<const char*> names) -> double {
    for (const char* name : names) {
      const auto field = row.value.find(name);
      if (field == row.value.end()) continue;
      if (field->is_null() || *field == "") {
        is_known = false;
        return 0;
      }
      if (const std::optional<double> value = price_of(*field)) return *value;
      refuse(fmt::format("{}, field {}", line, name),
             fmt::format("{} is not a price",
                         field->dump(-1, ' ', false, Json::error_handler_t::replace)),
             "write dollars for a million tokens, such as 0.15");
    }
    refuse(fmt::format("{}, field {}", line, *names.begin()), "is missing",
           "give each row name, input and output (dollars for a million tokens)");
  };
  VendorPrice p;
  p.name = text_of(row.value, {"name", "model"});
  if (p.name.empty()) refuse(fmt::format("{}, field name", line), "is missing", "name the model");
  const std::string vendor = text_of(row.value, {"vendor"});
  if (!vendor.empty() && text_of(row.value, {"name"}).empty())
    p.name = fmt::format("{} {}", vendor, p.name);
  p.input_usd_per_mtok = price({"input", "input_usd_per_mtok"});
  p.output_usd_per_mtok = price({"output", "output_usd_per_mtok"});
  p.date = text_of(row.value, {"date", "as_of"});
  p.note = text_of(row.value, {"note"});
  if (!is_known) return std::nullopt;
  return p;
}

// ---- the map ----

// The whole file as one object whose members are objects; nullopt for anything else.
std::optional<Json> read_map(const std::filesystem::path& path) {
  std::error_code ignored;
  if (std::filesystem::file_size(path, ignored) > kMaxMapBytes) return std::nullopt;
  const std::string content = read_file(path);
  const size_t first = content.find_first_not_of(" \t\r\n\xEF\xBB\xBF");
  if (first == std::string::npos || content[first] != '{') return std::nullopt;
  Json map = Json::parse(content, nullptr, false);
  if (!map.is_object() || map.empty()) return std::nullopt;
  const bool all_objects =
      std::all_of(map.begin(), map.end(), [](const Json& entry) { return entry.is_object(); });
  if (!all_objects) return std::nullopt;
  return map;
}

std::vector<VendorPrice> prices_from_map(const std::string& where, const Json& map) {
  std::vector<VendorPrice> prices;
  for (const auto& item : map.items()) {
    const std::string& name = item.key();
    const Json& entry = item.value();
    const auto cost = [&](const char* field) -> double {
      const auto value = entry.find(field);
      if (value == entry.end() || value->is_null()) return 0;
      if (const std::optional<double> price = price_of(*value)) return *price;
      // The list's own sample entry explains its fields in words.
      if (value->is_string()) return 0;
      refuse(fmt::format("{}: {}, field {}", where, name, field), "is not a price",
             "write dollars for one token");
    };
    const std::string mode = text_of(entry, {"mode"});
    if (!mode.empty() && mode != "chat" && mode != "completion" && mode != "responses") continue;
    VendorPrice p{.name = name,
                  .input_usd_per_mtok = cost("input_cost_per_token") * kTokensPerPrice,
                  .output_usd_per_mtok = cost("output_cost_per_token") * kTokensPerPrice};
    if (p.input_usd_per_mtok == 0 && p.output_usd_per_mtok == 0) continue;
    const std::string retires = text_of(entry, {"deprecation_date"});
    if (!retires.empty()) p.note = fmt::format("retires {}", retires);
    prices.push_back(std::move(p));
  }
  return prices;
}

// Edits between two names, for suggestions.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t change = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::vector<VendorPrice> read_vendor_prices(const std::filesystem::path& path) {
  std::vector<VendorPrice> prices;
  if (const std::optional<Json> map = read_map(path)) {
    prices = prices_from_map(path.string(), *map);
  } else {
    for (const Row& row : read_records(path))
      if (std::optional<VendorPrice> price = price_from_row(path.string(), row))
        prices.push_back(*std::move(price));
  }
  if (prices.empty())
    refuse(path.string(), "holds no token prices",
           "give rows with name, input and output (dollars for a million tokens)");
  return prices;
}

std::vector<VendorPrice> select_prices(std::span<const VendorPrice> prices,
                                       std::span<const std::string> names) {
  if (names.empty()) return {prices.begin(), prices.end()};
  std::vector<VendorPrice> selected;
  for (const std::string& name : names) {
    const size_t before = selected.size();
    std::copy_if(prices.begin(), prices.end(), std::back_inserter(selected),
                 [&](const VendorPrice& p) { return p.name == name; });
    if (selected.size() > before) continue;
    std::vector<std::string> known;
    for (const VendorPrice& p : prices) known.push_back(p.name);
    const size_t shown = std::min<size_t>(3, known.size());
    std::partial_sort(known.begin(), known.begin() + static_cast<ptrdiff_t>(shown), known.end(),
                      [&](const std::string& a, const std::string& b) {
                        return std::pair(edit_distance(a, name), a) <
                               std::pair(edit_distance(b, name), b);
                      });
    known.resize(shown);
    throw Error(ErrorKind::usage,
                {.where = "--vendors",
                 .what = fmt::format("the price file has no \"{}\"", name),
                 .cure = fmt::format("the nearest names are {}", fmt::join(known, ", "))});
  }
  return selected;
}

double usd_per_1000(const VendorPrice& price, const Tally& tokens) {
  if (tokens.total == 0) return 0;
  const double answers = static_cast<double>(tokens.total);
  const double dollars = static_cast<double>(tokens.tokens_in) * price.input_usd_per_mtok +
                         static_cast<double>(tokens.tokens_out) * price.output_usd_per_mtok;
  return dollars / kTokensPerPrice / answers * 1000;
}

}  // namespace moru
