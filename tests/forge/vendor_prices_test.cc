#include "forge/vendor_prices.h"

#include "support.h"

using namespace moru;

namespace {

std::vector<VendorPrice> read(std::string_view name, std::string_view content) {
  const TempDir folder;
  return read_vendor_prices(folder.file(name, content));
}

const VendorPrice* find(const std::vector<VendorPrice>& prices, std::string_view name) {
  for (const VendorPrice& p : prices)
    if (p.name == name) return &p;
  return nullptr;
}

}  // namespace

TEST_CASE("prices come as CSV or JSON rows, under either name of a field") {
  const auto csv = read("p.csv",
                        "name,input,output,date,note\n"
                        "large,$3.00,15,2026-08-21,\n"
                        "\"작은 모델\", 0.15 ,0.6,,with cache\n");
  REQUIRE(csv.size() == 2);
  CHECK(csv[0].input_usd_per_mtok == 3);
  CHECK(csv[0].output_usd_per_mtok == 15);
  CHECK(csv[0].date == "2026-08-21");
  CHECK(csv[1].name == "작은 모델");
  CHECK(csv[1].note == "with cache");
  const auto json = read("p.jsonl", R"({"vendor": "v", "model": "m", "input_usd_per_mtok": 0.5,)"
                                    R"( "output_usd_per_mtok": 1.5, "as_of": "2024-05-14"})");
  CHECK(json[0].name == "v m");
  CHECK(json[0].output_usd_per_mtok == 1.5);
  CHECK(json[0].date == "2024-05-14");
}

TEST_CASE("a row whose price is not known is left out") {
  const auto prices = read("p.csv", "name,input,output\na,1,\nb,1,2\nc,,2\n");
  REQUIRE(prices.size() == 1);
  CHECK(prices[0].name == "b");
}

TEST_CASE("a price map counts models that chat and have a price") {
  const auto prices = read("p.json", R"({
    "sample_spec": {"input_cost_per_token": "in dollars", "mode": "one of chat, embedding"},
    "chatty": {"input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05, "mode": "chat",
               "deprecation_date": "2026-02-19"},
    "vectors": {"input_cost_per_token": 1e-07, "output_cost_per_token": 0, "mode": "embedding"},
    "pictures": {"input_cost_per_pixel": 1e-08, "mode": "image_generation"},
    "unknown": {"input_cost_per_token": 0, "output_cost_per_token": 0, "mode": "chat"}
  })");
  REQUIRE(prices.size() == 1);
  CHECK(prices[0].name == "chatty");
  CHECK(prices[0].input_usd_per_mtok == doctest::Approx(3));
  CHECK(prices[0].output_usd_per_mtok == doctest::Approx(15));
  CHECK(prices[0].note == "retires 2026-02-19");
}

TEST_CASE("a row without a price is refused, naming line and field") {
  const auto refusal = [](std::string_view content) {
    return error_from([&] { read("p.csv", content); });
  };
  CHECK(refusal("name,input,output\na,1,2\nb,free,2\n")
            .where()
            .ends_with("p.csv: line 3, field input"));
  CHECK(refusal("name,input,output\na,-1,2\n").problem() == "\"-1\" is not a price");
  CHECK(refusal("name,input\na,1\n").where().ends_with("line 2, field output"));
  CHECK(refusal("name,input,output\n,1,2\n").where().ends_with("line 2, field name"));
  CHECK(error_from([] { read("p.json", R"({"a": {"mode": "embedding"}})"); }).problem() ==
        "holds no token prices");
  CHECK(
      error_from([] { read("p.json", R"({"a": {"input_cost_per_token": [1], "mode": "chat"}})"); })
          .where()
          .ends_with("p.json: a, field input_cost_per_token"));
}

TEST_CASE("prices are selected by name, and a wrong name finds its neighbours") {
  const auto prices =
      read("p.csv", "name,input,output\nnova-large,1,2\nnova-small,3,4\nother,5,6\n");
  const std::vector<std::string> names = {"other", "nova-large"};
  const auto selected = select_prices(prices, names);
  REQUIRE(selected.size() == 2);
  CHECK(selected[0].name == "other");
  CHECK(select_prices(prices, {}).size() == 3);
  const std::vector<std::string> wrong = {"nova-smal"};
  const Error error = error_from([&] { select_prices(prices, wrong); });
  CHECK(error.kind() == ErrorKind::usage);
  CHECK(error.cure().starts_with("the nearest names are nova-small"));
}

TEST_CASE("a thousand answers cost their tokens at list price") {
  Tally tokens;
  tokens.total = 200;
  tokens.tokens_in = 200 * 1000;
  tokens.tokens_out = 200 * 300;
  const VendorPrice price{.name = "p", .input_usd_per_mtok = 0.5, .output_usd_per_mtok = 1.5};
  CHECK(usd_per_1000(price, tokens) == doctest::Approx(0.95));
  CHECK(usd_per_1000(price, Tally{}) == 0);
}

// Public price lists stand beside the repository where it is developed.
TEST_CASE("public price lists are read whole") {
  const std::filesystem::path lists =
      std::filesystem::path(MORU_SOURCE_DIR) / ".." / "shared" / "data" / "vendors";
  if (!std::filesystem::exists(lists)) {
    MESSAGE("skipped: no price lists at " << lists.string());
    return;
  }
  const auto old_map = read_vendor_prices(lists / "litellm_model_prices_tokencost_2024-05-14.json");
  const auto new_map = read_vendor_prices(lists / "litellm_model_prices_tokencost_2025-09-05.json");
  const auto rows = read_vendor_prices(lists / "prices_article_models.csv");
  CHECK(old_map.size() > 150);
  CHECK(new_map.size() > old_map.size());
  CHECK(rows.size() > 90);
  REQUIRE(find(old_map, "gpt-4") != nullptr);
  CHECK(find(old_map, "gpt-4")->input_usd_per_mtok == doctest::Approx(30));
  CHECK(find(rows, "openai gpt-4")->output_usd_per_mtok == doctest::Approx(60));
}
