#include "tune/preference.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "support.h"

using namespace moru;

namespace {

// Losses and gradients by torch (tests/parity/tune/expect_preference.py).
nlohmann::json expected() {
  return nlohmann::json::parse(read_file(MORU_SOURCE_DIR "/tests/golden/tune/preference.json"));
}

bool agree(double found, double wanted) {
  return std::abs(found - wanted) <= 1e-9 * std::max(1.0, std::abs(wanted));
}

}  // namespace

TEST_CASE("every preference loss and its gradient are torch's") {
  const nlohmann::json table = expected();
  CHECK(table["pairs"].size() == 165);
  for (const nlohmann::json& row : table["pairs"]) {
    CAPTURE(row.dump());
    PreferenceOptions o;
    o.loss = parse_preference_loss(row["kind"].get<std::string>());
    o.beta = row["beta"];
    o.label_smoothing = row["eps"];
    o.gamma = table["gamma"];
    o.dpop_lambda = table["dpop_lambda"];
    const nlohmann::json& l = row["logps"];
    const PairLoss found = pair_loss(o, {.chosen = l[0],
                                         .rejected = l[1],
                                         .ref_chosen = l[2],
                                         .ref_rejected = l[3],
                                         .chosen_tokens = l[4],
                                         .rejected_tokens = l[5]});
    CHECK(agree(found.loss, row["loss"]));
    CHECK(agree(found.by_chosen, row["by_chosen"]));
    CHECK(agree(found.by_rejected, row["by_rejected"]));
  }
  for (const nlohmann::json& row : table["kto"]) {
    CAPTURE(row.dump());
    PreferenceOptions o;
    o.beta = row["beta"];
    o.desirable_weight = table["desirable_weight"];
    o.undesirable_weight = table["undesirable_weight"];
    const KtoLoss found = kto_loss(o, row["desirable"], row["logp"], row["ref"], row["kl"]);
    CHECK(agree(found.loss, row["loss"]));
    CHECK(agree(found.by_logp, row["by_logp"]));
  }
}

TEST_CASE("a policy that is its reference has DPO's loss ln 2 and no rewards") {
  const PairLoss found =
      pair_loss({}, {.chosen = -20, .rejected = -7, .ref_chosen = -20, .ref_rejected = -7});
  CHECK(found.loss == doctest::Approx(std::log(2.0)).epsilon(1e-15));
  CHECK(found.chosen_reward == 0);
  CHECK(found.rejected_reward == 0);
}

TEST_CASE("losses stay finite for any log-probabilities") {
  for (size_t i = 0; i < 11; ++i) {
    PreferenceOptions o;
    o.loss = static_cast<PreferenceLoss>(i);
    CAPTURE(name_of(o.loss));
    CHECK(parse_preference_loss(name_of(o.loss)) == o.loss);
    for (const double c : {0.0, -1e-9, -1e5})
      for (const double r : {0.0, -1e-9, -1e5}) {
        const PairLoss found = pair_loss(o, {.chosen = c, .rejected = r});
        CHECK(std::isfinite(found.loss));
        CHECK(std::isfinite(found.by_chosen));
        CHECK(std::isfinite(found.by_rejected));
      }
  }
  CHECK(error_from([] { parse_preference_loss("dpo"); }).kind() == ErrorKind::usage);
}
