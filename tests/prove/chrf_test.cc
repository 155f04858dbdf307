#include "prove/chrf.h"

#include <nlohmann/json.hpp>

#include "base/files.h"
#include "support.h"

using namespace moru;

TEST_CASE("chrF is sacreBLEU's, in any script") {
  const auto golden = nlohmann::json::parse(read_file("tests/golden/prove/chrf.json"));
  for (const auto& row : golden["rows"]) {
    const std::string answer = row["answer"], reference = row["reference"];
    CAPTURE(answer);
    CAPTURE(reference);
    CHECK(chrf(answer, reference) == doctest::Approx(row["chrf"].get<double>()).epsilon(1e-12));
  }
}

TEST_CASE("chrF takes ill-formed and decomposed text") {
  CHECK(chrf("\xFF\xFE", "abc") == 0);
  CHECK(chrf("e\u0301te\u0301", "été") == doctest::Approx(1));
}
