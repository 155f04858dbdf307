// Vendors' list prices, so that they can stand in the table beside what was measured here. moru
// carries no prices: they are read from a file that the user vouches for.
//
// Two shapes are read. Rows (CSV, JSON Lines or a JSON array):
//
//   field                                   meaning
//   name, or vendor and model               what the row is called
//   input, or input_usd_per_mtok            dollars for a million tokens in
//   output, or output_usd_per_mtok          dollars for a million tokens out
//   date, or as_of                          when the price was read (optional)
//   note                                    (optional)
//
// where a row whose price is null or an empty cell is left out,
//
// and the JSON map that LiteLLM keeps: {"name": {"input_cost_per_token": …,
// "output_cost_per_token": …, "mode": "chat", …}, …}. Of a map only models that chat or complete
// count; entries without token prices are left out, and so are zero prices there, which in such
// lists mean "unknown".
#pragma once
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "prove/prove.h"

namespace moru {

struct VendorPrice {
  std::string name;
  double input_usd_per_mtok = 0, output_usd_per_mtok = 0;
  std::string date = {}, note = {};
};

// Errors: not_found, io; bad_input naming file, line and field.
std::vector<VendorPrice> read_vendor_prices(const std::filesystem::path& path);

// Those named, in the order of `names`; all for no names. Error usage for a name that is not there,
// with the nearest ones that are.
std::vector<VendorPrice> select_prices(std::span<const VendorPrice> prices,
                                       std::span<const std::string> names);

// What 1,000 answers cost at list price, for as many tokens as these had on average. Vendors count
// tokens by their own tokenizers, so this is right to some tens of per cent.
double usd_per_1000(const VendorPrice& price, const Tally& tokens);

}  // namespace moru
