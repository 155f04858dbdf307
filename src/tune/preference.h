// Losses that learn from preferences, as functions of log-probabilities: what TRL, and the papers
// named, compute. All in double; nothing here knows of models.
//
//   Δc = log π(chosen) − log π_ref(chosen), Δr likewise, d = Δc − Δr, σ the logistic function,
//   ε = label_smoothing; l̄ = a log-probability over its number of tokens
//
//   sigmoid       −(1 − ε) log σ(βd) − ε log σ(−βd)             DPO 2305.18290; cDPO where ε > 0
//   robust        [−(1 − ε) log σ(βd) + ε log σ(−βd)] / (1 − 2ε)               2403.00409
//   hinge         max(0, 1 − βd)                                               2305.10425
//   ipo           (Δ̄c − Δ̄r − 1/(2β))², log-ratios per token                    2310.12036
//   sigmoid_norm  sigmoid of log-ratios per token
//   dpop          −log σ(β(d − λ max(0, −Δc)))                                 2402.13228
//   sppo_hard     (Δc − 1/(2β))² + (Δr + 1/(2β))²                              2405.00675
//   apo_zero      1 − σ(βΔc) + σ(βΔr)                                          2408.06266
//   apo_down      σ(βΔc) + 1 − σ(βd)
//   simpo         sigmoid of β(l̄c − l̄r) − γ; no reference                      2405.14734
//   orpo          −β log σ(logit p̄c − logit p̄r), p̄ = exp l̄; no reference       2403.07691
//
// The anchor that RPO, SimPO's TRL form and ORPO add, the mean −log p of the chosen tokens, is a
// weight on tokens and no function of one pair: the trainer adds it (PreferenceOptions::anchor).
#pragma once
#include <cstddef>
#include <string_view>

namespace moru {

enum class PreferenceLoss {
  sigmoid,
  robust,
  hinge,
  ipo,
  sigmoid_norm,
  dpop,
  sppo_hard,
  apo_zero,
  apo_down,
  simpo,
  orpo,
};
// TRL's names, as in the table above. Error: usage.
PreferenceLoss parse_preference_loss(std::string_view name);
std::string_view name_of(PreferenceLoss loss);
bool needs_reference(PreferenceLoss loss);

struct PreferenceOptions {
  PreferenceLoss loss = PreferenceLoss::sigmoid;
  double beta = 0.1;
  double label_smoothing = 0;  // of sigmoid, sigmoid_norm, robust and simpo
  double gamma = 0.5;          // SimPO's margin
  double dpop_lambda = 50;
  double anchor = 0;  // weight of the mean −log p of the chosen tokens (RPO's α, CPO's cpo_alpha)
  // The anchor counts the tokens of prompt and answer, as TRL's ORPO does, not of the answer alone,
  // as LLaMA-Factory's.
  bool anchor_over_prompt = false;
  // KTO
  double desirable_weight = 1, undesirable_weight = 1;
};
// Errors: usage, naming the flag.
void check(const PreferenceOptions& options);

// Sums of log p over the tokens of the two answers, and the numbers of those tokens (≥ 1).
struct PairLogps {
  double chosen = 0, rejected = 0;
  double ref_chosen = 0, ref_rejected = 0;
  size_t chosen_tokens = 1, rejected_tokens = 1;
};
struct PairLoss {
  double loss = 0;
  double by_chosen = 0, by_rejected = 0;          // gradient by the two sums
  double chosen_reward = 0, rejected_reward = 0;  // β Δ, or β l̄ where there is no reference
};
PairLoss pair_loss(const PreferenceOptions& options, const PairLogps& logps);

// KTO (2402.01306): an answer that is wanted or not, and kl = max(0, mean log-ratio of answers that
// belong to other prompts), a constant.
//   wanted      w (1 − σ(β(Δ − kl)))      unwanted      w (1 − σ(β(kl − Δ)))
struct KtoLoss {
  double loss = 0, by_logp = 0, reward = 0;
};
KtoLoss kto_loss(const PreferenceOptions& options, bool desirable, double logp, double ref_logp,
                 double kl);

}  // namespace moru
