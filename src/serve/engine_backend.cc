#include "serve/engine_backend.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/cpu.h"
#include "engine/prompt.h"

namespace moru {

struct EngineBackend::State {
  explicit State(EngineBackendOptions o)
      : files(open_model(o.model)),
        pool(o.threads != 0 ? o.threads : usable_threads()),
        model(load_model(pool, files, o.load)),
        engine(pool, model, o.engine),
        generator(engine, files.tokenizer,
                  {.sequences = o.sequences, .step_seconds = o.step_seconds}),
        drafts(o.drafts) {
    for (NamedAdapter& named : o.adapters)
      adapters.push_back({std::move(named.name), make_adapter(std::move(named.lora))});
  }

  ModelFiles files;
  Pool pool;
  Model model;
  Engine engine;
  Generator generator;
  bool drafts;
  std::vector<std::pair<std::string, Adapter>> adapters;
};

EngineBackend::EngineBackend(EngineBackendOptions options)
    : state_(new State(std::move(options))) {}
EngineBackend::~EngineBackend() = default;

const Model& EngineBackend::model() const { return state_->model; }
const KvCache& EngineBackend::cache() const { return state_->engine.cache(); }

std::vector<TokenId> EngineBackend::encode_chat(const nlohmann::ordered_json& messages) const {
  return moru::encode_chat(state_->files, {.messages = messages, .add_generation_prompt = true});
}
std::vector<TokenId> EngineBackend::encode_text(std::string_view text) const {
  return moru::encode_text(state_->files, text);
}
std::string EngineBackend::decode(std::span<const TokenId> ids) const {
  return state_->files.tokenizer.decode(ids);
}
std::string EngineBackend::bytes_of(TokenId id) const {
  const Tokenizer& tokenizer = state_->files.tokenizer;
  return tokenizer.is_control(id) ? std::string(tokenizer.piece(id)) : tokenizer.bytes_of(id);
}
size_t EngineBackend::vocab() const { return state_->model.config.vocab; }
size_t EngineBackend::longest_prompt() const {
  Engine& engine = state_->engine;
  const size_t cache = engine.cache().longest_sequence(engine.step_tokens());
  return std::min(state_->model.config.context, cache) - 1;
}
std::vector<TokenId> EngineBackend::stop_ids() const { return state_->files.stop_ids; }

std::vector<std::string> EngineBackend::adapters() const {
  std::vector<std::string> names;
  for (const auto& [name, adapter] : state_->adapters) names.push_back(name);
  return names;
}
const Adapter* EngineBackend::adapter(std::string_view name) const {
  for (const auto& [known, adapter] : state_->adapters)
    if (known == name) return &adapter;
  return nullptr;
}

uint64_t EngineBackend::submit(GenerationRequest request) {
  request.drafts = state_->drafts;
  return state_->generator.submit(std::move(request));
}
void EngineBackend::cancel(uint64_t request) { state_->generator.cancel(request); }
bool EngineBackend::busy() const { return state_->generator.busy(); }
GeneratorLoad EngineBackend::load() const { return state_->generator.load(); }
void EngineBackend::step(const std::function<void(const GenerationEvent&)>& emit) {
  state_->generator.step(emit);
}

}  // namespace moru
