#include "tune/preference.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"

namespace moru {
namespace {

struct LossRow {
  std::string_view name;
  PreferenceLoss loss;
  bool reference;
};
constexpr std::array<LossRow, 11> kLosses = {{
    {"sigmoid", PreferenceLoss::sigmoid, true},
    {"robust", PreferenceLoss::robust, true},
    {"hinge", PreferenceLoss::hinge, true},
    {"ipo", PreferenceLoss::ipo, true},
    {"sigmoid_norm", PreferenceLoss::sigmoid_norm, true},
    {"dpop", PreferenceLoss::dpop, true},
    {"sppo_hard", PreferenceLoss::sppo_hard, true},
    {"apo_zero", PreferenceLoss::apo_zero, true},
    {"apo_down", PreferenceLoss::apo_down, true},
    {"simpo", PreferenceLoss::simpo, false},
    {"orpo", PreferenceLoss::orpo, false},
}};

double sigmoid(double x) {
  return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
}
double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }
// log(1 − eˣ), x < 0, where neither form loses digits.
double log_1m_exp(double x) {
  return x > -0.6931471805599453 ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x));
}

// A loss of one number, and its derivative.
struct Curve {
  double loss, slope;
};
// −(1 − ε) log σ(x) − ε log σ(−x)
Curve smoothed(double x, double eps) {
  return {-(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x), sigmoid(x) - (1 - eps)};
}

}  // namespace

PreferenceLoss parse_preference_loss(std::string_view name) {
  for (const LossRow& row : kLosses)
    if (row.name == name) return row.loss;
  std::string names;
  for (const LossRow& row : kLosses) names += (names.empty() ? "" : ", ") + std::string(row.name);
  throw Error(ErrorKind::usage, {.where = "--loss-type",
                                 .what = fmt::format("\"{}\" is no preference loss", name),
                                 .cure = "one of " + names});
}

std::string_view name_of(PreferenceLoss loss) { return kLosses[static_cast<size_t>(loss)].name; }
bool needs_reference(PreferenceLoss loss) { return kLosses[static_cast<size_t>(loss)].reference; }

void check(const PreferenceOptions& o) {
  const auto refuse = [](const char* where, const char* what) {
    throw Error(ErrorKind::usage, {.where = where, .what = what, .cure = "see moru tune --help"});
  };
  if (!(o.beta > 0)) refuse("--beta", "must be above 0");
  if (!(o.label_smoothing >= 0 && o.label_smoothing < 0.5))
    refuse("--label-smoothing", "must be in [0, 0.5)");
  if (!(o.anchor >= 0)) refuse("--rpo-alpha", "must be at least 0");
  if (!(o.dpop_lambda >= 0)) refuse("--dpop-lambda", "must be at least 0");
  if (!(o.desirable_weight >= 0 && o.undesirable_weight >= 0))
    refuse("--desirable-weight, --undesirable-weight", "must be at least 0");
}

PairLoss pair_loss(const PreferenceOptions& o, const PairLogps& p) {
  const double beta = o.beta, eps = o.label_smoothing;
  const double nc = static_cast<double>(std::max<size_t>(1, p.chosen_tokens));
  const double nr = static_cast<double>(std::max<size_t>(1, p.rejected_tokens));
  const double c = p.chosen - p.ref_chosen, r = p.rejected - p.ref_rejected, d = c - r;
  PairLoss out;
  out.chosen_reward = beta * c;
  out.rejected_reward = beta * r;
  // The loss of one argument x that rises with Δc and falls with Δr, each by its own share.
  const auto of = [&](const Curve& curve, double by_c, double by_r) {
    out.loss = curve.loss;
    out.by_chosen = curve.slope * by_c;
    out.by_rejected = curve.slope * by_r;
  };
  switch (o.loss) {
    case PreferenceLoss::sigmoid:
      of(smoothed(beta * d, eps), beta, -beta);
      break;
    case PreferenceLoss::robust: {
      const double x = beta * d;
      const double norm = 1 - 2 * eps;
      // d/dx: −(1 − ε) σ(−x) − ε σ(x)
      of({(-(1 - eps) * log_sigmoid(x) + eps * log_sigmoid(-x)) / norm,
          (-(1 - eps) * sigmoid(-x) - eps * sigmoid(x)) / norm},
         beta, -beta);
      break;
    }
    case PreferenceLoss::hinge: {
      const double left = 1 - beta * d;
      of({std::max(0.0, left), left > 0 ? -1.0 : 0.0}, beta, -beta);
      break;
    }
    case PreferenceLoss::ipo: {
      const double off = c / nc - r / nr - 1 / (2 * beta);
      of({off * off, 2 * off}, 1 / nc, -1 / nr);
      break;
    }
    case PreferenceLoss::sigmoid_norm:
      of(smoothed(beta * (c / nc - r / nr), eps), beta / nc, -beta / nr);
      break;
    case PreferenceLoss::dpop: {
      const double fall = std::max(0.0, -c);
      of(smoothed(beta * (d - o.dpop_lambda * fall), eps),
         beta * (1 + (fall > 0 ? o.dpop_lambda : 0.0)), -beta);
      break;
    }
    case PreferenceLoss::sppo_hard: {
      const double up = c - 0.5 / beta, down = r + 0.5 / beta;
      out.loss = up * up + down * down;
      out.by_chosen = 2 * up;
      out.by_rejected = 2 * down;
      break;
    }
    case PreferenceLoss::apo_zero: {
      const double sc = sigmoid(beta * c), sr = sigmoid(beta * r);
      out.loss = 1 - sc + sr;
      out.by_chosen = -beta * sc * (1 - sc);
      out.by_rejected = beta * sr * (1 - sr);
      break;
    }
    case PreferenceLoss::apo_down: {
      const double sc = sigmoid(beta * c), sd = sigmoid(beta * d);
      out.loss = sc + 1 - sd;
      out.by_chosen = beta * (sc * (1 - sc) - sd * (1 - sd));
      out.by_rejected = beta * sd * (1 - sd);
      break;
    }
    case PreferenceLoss::simpo: {
      const double mean_c = p.chosen / nc, mean_r = p.rejected / nr;
      of(smoothed(beta * (mean_c - mean_r) - o.gamma, eps), beta / nc, -beta / nr);
      out.chosen_reward = beta * mean_c;
      out.rejected_reward = beta * mean_r;
      break;
    }
    case PreferenceLoss::orpo: {
      // A certain answer has infinite odds: the mean stays a little below 0.
      constexpr double kCertain = -1e-12;
      const double mean_c = std::min(p.chosen / nc, kCertain);
      const double mean_r = std::min(p.rejected / nr, kCertain);
      const double odds = (mean_c - mean_r) - (log_1m_exp(mean_c) - log_1m_exp(mean_r));
      // d logit(p)/d log p = 1 / (1 − p)
      of({-beta * log_sigmoid(odds), -beta * sigmoid(-odds)}, -1 / (std::expm1(mean_c) * nc),
         1 / (std::expm1(mean_r) * nr));
      out.chosen_reward = beta * mean_c;
      out.rejected_reward = beta * mean_r;
      break;
    }
  }
  return out;
}

KtoLoss kto_loss(const PreferenceOptions& o, bool desirable, double logp, double ref_logp,
                 double kl) {
  const double ratio = logp - ref_logp, sign = desirable ? 1 : -1;
  const double weight = desirable ? o.desirable_weight : o.undesirable_weight;
  const double s = sigmoid(sign * o.beta * (ratio - kl));
  return {.loss = weight * (1 - s),
          .by_logp = -weight * sign * o.beta * s * (1 - s),
          .reward = o.beta * ratio};
}

}  // namespace moru
