// The engine as the server sees it: one model, loaded, with its generator.
#pragma once
#include <filesystem>
#include <memory>

#include "engine/forward.h"
#include "engine/model.h"
#include "serve/backend.h"

namespace moru {

// An adapter and what clients call it.
struct NamedAdapter {
  std::string name;
  Lora lora;
};

struct EngineBackendOptions {
  std::filesystem::path model;
  size_t threads = 0;  // 0: all that this process may use
  LoadOptions load;
  EngineOptions engine;
  size_t sequences = 32;               // answers computed at once
  double step_seconds = 0.2;           // what a step should take at most; 0: as long as it likes
  bool drafts = true;                  // GenerationRequest::drafts of every request
  std::vector<NamedAdapter> adapters;  // for this model's shape
};

class EngineBackend final : public Backend {
 public:
  // Loads the model. Errors: those of open_model and load_model, no_space.
  explicit EngineBackend(EngineBackendOptions options);
  ~EngineBackend() override;

  const Model& model() const;
  const KvCache& cache() const;

  std::vector<TokenId> encode_chat(const nlohmann::ordered_json& messages) const override;
  std::vector<TokenId> encode_text(std::string_view text) const override;
  std::string decode(std::span<const TokenId> ids) const override;
  std::string bytes_of(TokenId id) const override;
  size_t vocab() const override;
  size_t longest_prompt() const override;
  std::vector<TokenId> stop_ids() const override;
  std::vector<std::string> adapters() const override;
  const Adapter* adapter(std::string_view name) const override;
  uint64_t submit(GenerationRequest request) override;
  void cancel(uint64_t request) override;
  bool busy() const override;
  GeneratorLoad load() const override;
  void step(const std::function<void(const GenerationEvent&)>& emit) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
