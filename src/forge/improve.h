// A model that learns from its own checked answers, with a gate between every two steps:
//
//   measure → (pairs → tune → merge → gate) × k
//
// Each iteration starts from the last model that the gate accepted; a refused one is kept in its
// folder and goes no further. The gate holds a model against the last accepted one and against the
// one that all began with. Every stage stands in the journal (forge/journal.h): killed at any
// moment and run again, the work goes on where it was.
//
//   OUT/model.gguf      the last accepted model, in the type that is served
//   OUT/improve.json    what each iteration did, gained and cost
//   OUT/iteration-1/    its pairs, its log of tuning, its models, every answer to the gate
#pragma once
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "prove/gate.h"
#include "tune/pairs_job.h"
#include "tune/trainer.h"

namespace moru {

enum class ImproveMethod {
  sft,  // learn a right answer to each prompt (pairs.right.jsonl)
  dpo,  // learn to prefer right answers to wrong ones (pairs.jsonl); the reference is the model
        // that the iteration starts from
};
const char* name_of(ImproveMethod method);
// Error usage, listing the names.
ImproveMethod improve_method_named(std::string_view name);

struct ImproveOptions {
  std::filesystem::path model, out;
  PairsJob pairs;    // its `out` is set here
  TuneOptions tune;  // its model, data, method, out and template are set here; lr is sft's
  double dpo_lr = 1e-4;
  // Of each iteration; the last one stands for all after it. Not empty.
  std::vector<ImproveMethod> methods = {ImproveMethod::sft};
  size_t iterations = 2;
  // What the gate asks: these, or else the questions that no pair was made of.
  std::vector<std::filesystem::path> gate_questions;
  GateOptions gate;
  std::string served_type =
      "Q8_0";  // a preset of lighten: each tuned model in it samples and serves
  size_t threads = 0;
};

struct Iteration {
  size_t number = 0;
  ImproveMethod method = ImproveMethod::sft;
  nlohmann::ordered_json pairs;   // tune/pairs_job.h's summary
  nlohmann::ordered_json tuning;  // steps, losses
  ChainVerdict verdict;
  double pairs_seconds = 0, tune_seconds = 0, merge_seconds = 0, gate_seconds = 0;

  double seconds() const { return pairs_seconds + tune_seconds + merge_seconds + gate_seconds; }
};

struct ImproveReport {
  std::string base_sha256;
  double measure_seconds = 0;
  std::vector<Iteration> iterations;
  size_t accepted = 0;          // iterations that the gate let through
  std::filesystem::path model;  // the last accepted; empty if there is none
};

// `note` gets a line for people at each stage. Errors: those of every stage; usage.
ImproveReport improve(const ImproveOptions& options,
                      const std::function<void(const std::string&)>& note = {});

nlohmann::ordered_json to_json(const ImproveReport& report);
// At most 80 columns: a line for each iteration, then the gate's tables of the last one.
std::string table_of(const ImproveReport& report);

}  // namespace moru
