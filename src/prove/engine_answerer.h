// The engine as prove() reaches it: questions become prompts the way that tuning and serving make
// them, answers are greedy.
#pragma once
#include <string>

#include "engine/forward.h"
#include "engine/model_files.h"
#include "engine/prompt.h"
#include "prove/prove.h"

namespace moru {

// All arguments must outlive the answerer. `model_sha256` names the weights in results.
Answerer make_answerer(std::string name, std::string model_sha256, Engine& engine,
                       const ModelFiles& files, const PromptStyle& style);

// What decides answers beside the weights: numeric profile, template, system message.
std::string describe_engine(const Engine& engine, const ModelFiles& files,
                            const PromptStyle& style);

}  // namespace moru
