// The f32 profile against transformers' f32 logits on real models (tests/parity/expect_logits.py).
#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "engine/forward.h"
#include "peers.h"

using namespace moru;

namespace {

// What every position's logits are, [ids, vocab], fed in chunks of `chunk` tokens.
template <typename Visit>
void each_position(Engine& engine, std::span<const TokenId> ids, size_t chunk, Visit&& visit) {
  KvSequence sequence = engine.cache().make_sequence();
  for (size_t at = 0; at < ids.size(); at += chunk) {
    const StepSpan span{&sequence, ids.subspan(at, std::min(chunk, ids.size() - at)), 0};
    engine.step({&span, 1}, [&](size_t first, size_t count, float* logits) {
      for (size_t i = 0; i < count; ++i)
        visit(at + first + i, logits + i * engine.model().config.vocab);
    });
  }
}

}  // namespace

TEST_CASE("f32 logits of real models are those of transformers within 1e-3") {
  const auto expected =
      nlohmann::json::parse(read_file(MORU_SOURCE_DIR "/tests/golden/logits.json"));
  Pool pool(2);
  for (const auto& [name, cases] : expected.items()) {
    for (const std::string& file : {name + ".gguf", name + "-hf"}) {
      const auto path = peer_model(file);
      if (!path) continue;
      CAPTURE(file);
      const ModelFiles files = open_model(*path);
      const Model model = load_model(pool, files, {.profile = Profile::f32, .context = 512});
      Engine engine(pool, model, {.cache_tokens = 512, .kv_type = KvType::f32});
      double worst = 0;
      for (const auto& item : cases) {
        const auto ids = item["ids"].get<std::vector<TokenId>>();
        const auto columns = item["columns"].get<std::vector<size_t>>();
        each_position(engine, ids, 7, [&](size_t at, const float* logits) {
          for (size_t c = 0; c < columns.size(); ++c)
            worst = std::max(
                worst, std::abs(double{logits[columns[c]]} - item["logits"][at][c].get<double>()));
        });
      }
      MESSAGE(file << ": max abs difference " << worst);
      CHECK(worst <= 1e-3);
    }
  }
}
