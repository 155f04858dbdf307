// From a model, pairs and held-out questions to the cheapest model that is good enough, with proof.
//
//   measure → tune → merge → lighten → prove → choose
//
// Each stage stands in the journal (forge/journal.h): killed at any moment and run again, the work
// goes on where it was.
//
//   OUT/model.gguf         the chosen model
//   OUT/report.html, .json what was found (forge/report.h)
//   OUT/adapter/           the LoRA adapter, a PEFT folder
//   OUT/candidates/        every model that was tried
//   OUT/results/           every answer of every candidate
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/prompt.h"
#include "forge/choose.h"
#include "forge/report.h"
#include "prove/prove.h"
#include "prove/questions.h"
#include "tune/trainer.h"

namespace moru {

struct ForgeOptions {
  std::filesystem::path model, pairs, questions, out;
  Goal goal;
  std::vector<std::string> ladder = {"Q8_0", "Q6_K", "Q5_0", "Q4_K_M", "IQ4_NL"};
  std::filesystem::path vendor_prices;  // empty: none
  std::vector<std::string> vendors;     // names in that file; empty: all
  double machine_usd_per_hour = 0.1;

  TuneOptions tune;  // its model, data and out are set by forge
  PromptStyle style;
  QuestionOptions rows;
  AnswerLimits limits;
  size_t calibration_tokens = 32768;
  size_t threads = 0;
  std::string command;  // as typed, for the report
};

// Runs to the end and returns what report.json holds. Errors: those of every stage; usage for
// options that cannot be meant, before any work.
ForgeReport forge(const ForgeOptions& options);

}  // namespace moru
