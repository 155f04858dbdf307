// What the server needs of a model. The engine is behind it in engine_backend.h; tests put models
// of their own there.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "engine/generate.h"

namespace moru {

class Backend {
 public:
  virtual ~Backend() = default;

  // Any thread, at any time. Errors: unsupported (no chat template), bad_input (the template
  // refuses the messages).
  virtual std::vector<TokenId> encode_chat(const nlohmann::ordered_json& messages) const = 0;
  virtual std::vector<TokenId> encode_text(std::string_view text) const = 0;
  virtual std::string decode(std::span<const TokenId> ids) const = 0;
  // Bytes of one token as text; control tokens as the vocabulary spells them.
  virtual std::string bytes_of(TokenId id) const = 0;
  virtual size_t vocab() const = 0;
  virtual size_t longest_prompt() const = 0;  // in tokens
  virtual std::vector<TokenId> stop_ids() const = 0;
  // Adapters that requests may name as their model, in order; and one of them, nullptr if unknown.
  virtual std::vector<std::string> adapters() const { return {}; }
  virtual const Adapter* adapter(std::string_view name) const {
    static_cast<void>(name);
    return nullptr;
  }

  // As Generator's; one thread alone.
  virtual uint64_t submit(GenerationRequest request) = 0;
  virtual void cancel(uint64_t request) = 0;
  virtual bool busy() const = 0;
  virtual GeneratorLoad load() const { return {}; }
  virtual void step(const std::function<void(const GenerationEvent&)>& emit) = 0;
};

}  // namespace moru
