// Recipes by name: what --preset sets before the other flags.
//
//   lora, qlora, full   moru's defaults for each way to learn
//   rhea-sft, rhea-dpo  the recipe that nox intended for Rhea-72b, as its code has it: r 8, alpha
//   16,
//                       cosine without warm-up, plain prompts; lr 1e-7 over 3 epochs, then DPO with
//                       beta 0.1 and lr 1e-5 over one epoch, a pair a step
#pragma once
#include <string_view>

#include "tune/trainer.h"

namespace moru {

// Error: usage.
void apply_preset(std::string_view name, TuneOptions& options);
// "sft", "text", "dpo", "simpo", "orpo" or "kto": the method, its loss and the learning rate and
// epochs that suit it. Error: usage.
void apply_method(std::string_view name, TuneOptions& options);

}  // namespace moru
