#include "tune/presets.h"

#include <fmt/format.h>

#include "base/error.h"

namespace moru {
namespace {

void apply_rhea(TuneOptions& o) {
  o.lora.rank = 8;
  o.lora.alpha = 16;
  o.schedule.kind = Schedule::cosine;
  o.warmup_ratio = 0;
  o.rows.plain_template = "### User:\n{prompt}\n### Assistant:\n{completion}";
  o.rows.max_length = 1024;
}

}  // namespace

void apply_preset(std::string_view name, TuneOptions& o) {
  if (name == "lora") return;
  if (name == "qlora") {
    o.keep_quantized = true;
    return;
  }
  if (name == "full") {
    o.learnt.full = true;
    o.lr = 2e-5;
    return;
  }
  if (name == "rhea-sft") {
    apply_rhea(o);
    o.lr = 1e-7;
    o.epochs = 3;
    o.batch_size = 16;
    return;
  }
  if (name == "rhea-dpo") {
    apply_rhea(o);
    apply_method("dpo", o);
    o.lr = 1e-5;
    o.batch_size = 1;
    return;
  }
  throw Error(ErrorKind::usage, {.where = "--preset",
                                 .what = fmt::format("\"{}\" is no preset", name),
                                 .cure = "one of lora, qlora, full, rhea-sft, rhea-dpo"});
}

void apply_method(std::string_view name, TuneOptions& o) {
  const auto preferences = [&](PreferenceLoss loss, double beta, double anchor, double lr) {
    o.method = Method::dpo;
    o.preference.loss = loss;
    o.preference.beta = beta;
    o.preference.anchor = anchor;
    o.lr = lr;
    o.epochs = 1;
  };
  if (name == "simpo") {
    preferences(PreferenceLoss::simpo, 2, 0, 5e-6);
    o.preference.gamma = 1;
    return;
  }
  if (name == "orpo") return preferences(PreferenceLoss::orpo, 0.1, 1, 8e-6);
  o.method = parse_method(name);
  if (o.method == Method::dpo) preferences(PreferenceLoss::sigmoid, 0.1, 0, 5e-6);
  if (o.method == Method::kto) {
    o.lr = 5e-6;
    o.epochs = 1;
  }
}

}  // namespace moru
