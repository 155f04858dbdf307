// Speed of attention and of the row operations, as shares of the f32 multiply-add rate and of the
// read bandwidth that the same run measures.
//
//   attention_bench [prefill] [decode] [training] [rows] [model…]      all by default
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <string_view>
#include <vector>

#include "base/cpu.h"
#include "base/random.h"
#include "engine/attention.h"
#include "engine/machine.h"
#include "engine/row_ops.h"

namespace {

using namespace moru;

struct Model {
  const char* name;
  size_t heads, kv_heads, head_dim;
};
constexpr Model kModels[] = {{"SmolLM2-135M", 9, 3, 64},
                             {"Gemma-3-270M", 4, 1, 256},
                             {"Qwen2.5-0.5B", 14, 2, 64},
                             {"Qwen3-0.6B", 16, 8, 128},
                             {"Llama-3.2-1B", 32, 8, 64}};

std::vector<Model> asked_models(int argc, char** argv) {
  std::vector<Model> asked;
  for (const Model& m : kModels)
    if (std::find(argv + 1, argv + argc, std::string_view(m.name)) != argv + argc)
      asked.push_back(m);
  if (asked.empty()) asked.assign(std::begin(kModels), std::end(kModels));
  return asked;
}

AttentionShape shape_of(const Model& m) {
  return {.heads = m.heads,
          .kv_heads = m.kv_heads,
          .head_dim = m.head_dim,
          .scale = 1 / std::sqrt(static_cast<float>(m.head_dim))};
}
std::vector<float> normals(size_t count) {
  Random random(1);
  std::vector<float> x(count);
  for (float& v : x) v = random.normal();
  return x;
}
// Of scores and of weighted values, for one query that sees `keys` keys.
double operations(const AttentionShape& s, double keys) {
  return 4 * keys * static_cast<double>(s.heads * s.head_dim);
}

void prefill(Pool& pool, const MachineRates& limits, const std::vector<Model>& models) {
  fmt::print("\nprefill, 512 tokens          context       ms  GFLOP/s  of fma\n");
  for (const Model& m : models) {
    const AttentionShape s = shape_of(m);
    const size_t tokens = 512, ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
    const std::vector<float> q = normals(tokens * ldq), kv = normals(8192 * ldkv);
    std::vector<float> out(q.size());
    KvCache cache({.layers = 1, .kv_heads = s.kv_heads, .head_dim = s.head_dim}, 128);
    KvSequence sequence = cache.make_sequence();
    cache.reserve(sequence, 8192);
    cache.write(sequence, 0, 0, 8192, kv.data(), kv.data(), ldkv);
    for (const size_t context : {size_t{512}, size_t{8192}}) {
      const AttentionSpan span{.first_row = 0,
                               .tokens = tokens,
                               .first_position = context - tokens,
                               .sequence = &sequence};
      const double seconds = best_seconds(0.3, [&] {
        attend_cached(pool, s, cache, 0, {&span, 1}, q.data(), ldq, out.data(), ldq);
      });
      const double keys = static_cast<double>(context - tokens) + (tokens + 1) / 2.0;
      const double rate = operations(s, keys * tokens) / seconds;
      fmt::print("{:28} {:>7} {:>8.2f} {:>8.1f} {:>6.0f}%\n", m.name, context, seconds * 1e3,
                 rate / 1e9, 100 * rate / limits.f32);
    }
  }
}

// As many layers as make the cache larger than the processor's own memory.
void decode(Pool& pool, const MachineRates& limits, const std::vector<Model>& models) {
  fmt::print("\ndecode              sequences  context       µs     GB/s  of bw  of fma\n");
  for (const Model& m : models) {
    const AttentionShape s = shape_of(m);
    const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
    for (const auto& [sequences, context] :
         {std::pair<size_t, size_t>{1, 512}, {1, 4096}, {1, 32768}, {8, 1024}}) {
      const size_t bytes = sequences * context * ldkv * 4;
      const size_t layers = std::max<size_t>(1, (size_t{192} << 20) / bytes);
      const size_t pages = context / kPageTokens * sequences;
      KvCache cache({.layers = layers, .kv_heads = s.kv_heads, .head_dim = s.head_dim}, pages);
      const std::vector<float> q = normals(sequences * ldq), kv = normals(context * ldkv);
      std::vector<float> out(q.size());
      std::vector<KvSequence> held;
      std::vector<AttentionSpan> spans;
      for (size_t i = 0; i < sequences; ++i) {
        held.push_back(cache.make_sequence());
        cache.reserve(held[i], context);
        for (size_t layer = 0; layer < layers; ++layer)
          cache.write(held[i], layer, 0, context, kv.data(), kv.data(), ldkv);
      }
      for (size_t i = 0; i < sequences; ++i)
        spans.push_back(
            {.first_row = i, .tokens = 1, .first_position = context - 1, .sequence = &held[i]});
      const double seconds = best_seconds(0.3, [&] {
        for (size_t layer = 0; layer < layers; ++layer)
          attend_cached(pool, s, cache, layer, spans, q.data(), ldq, out.data(), ldq);
      });
      const double rate = static_cast<double>(bytes * layers) / seconds;
      const double flops =
          operations(s, static_cast<double>(sequences * context * layers)) / seconds;
      fmt::print("{:20} {:>8} {:>8} {:>8.1f} {:>8.1f} {:>5.0f}% {:>5.0f}%\n", m.name, sequences,
                 context, seconds / static_cast<double>(layers) * 1e6, rate / 1e9,
                 100 * rate / limits.read, 100 * flops / limits.f32);
    }
  }
}

void training(Pool& pool, const MachineRates& limits, const std::vector<Model>& models) {
  fmt::print("\ntraining              documents   forward ms  of fma  backward ms  of fma\n");
  for (const Model& m : models) {
    const AttentionShape s = shape_of(m);
    const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
    for (const auto& [documents, length] :
         {std::pair<size_t, size_t>{58, 35}, {16, 128}, {4, 512}, {1, 2048}}) {
      std::vector<PackedDocument> packed;
      for (size_t i = 0; i < documents; ++i)
        packed.push_back({.first = i * length, .end = (i + 1) * length});
      const size_t tokens = documents * length;
      const std::vector<float> q = normals(tokens * ldq), kv = normals(tokens * ldkv);
      std::vector<float> out(q.size()), lse(tokens * s.heads), dq(q.size()), dk(kv.size()),
          dv(kv.size());
      const double forward = best_seconds(0.2, [&] {
        attend_packed(pool, s, packed, q.data(), ldq, kv.data(), kv.data(), ldkv, out.data(), ldq,
                      lse.data());
      });
      const double backward = best_seconds(0.2, [&] {
        attend_packed_backward(pool, s, packed, q.data(), ldq, kv.data(), kv.data(), ldkv,
                               out.data(), q.data(), ldq, lse.data(), dq.data(), dk.data(),
                               dv.data());
      });
      const double work = operations(s, static_cast<double>(documents * length * (length + 1)) / 2);
      fmt::print("{:20} {:>5} x {:<4} {:>10.2f} {:>6.0f}% {:>12.2f} {:>6.0f}%\n", m.name, documents,
                 length, forward * 1e3, 100 * work / forward / limits.f32, backward * 1e3,
                 250 * work / backward / limits.f32);
    }
  }
}

void rows(Pool& pool, const MachineRates& limits) {
  fmt::print("\nrows                                  µs     GB/s  of read bw\n");
  const auto print = [&](const char* name, double seconds, size_t bytes) {
    const double rate = static_cast<double>(bytes) / seconds;
    fmt::print("{:30} {:>9.1f} {:>8.1f} {:>6.0f}%\n", name, seconds * 1e6, rate / 1e9,
               100 * rate / limits.read);
  };
  const size_t m = 2048, n = 1536, all = m * n;
  const std::vector<float> x = normals(all), w = normals(n);
  std::vector<float> y(all), inverse(m), dx(all), dw(n);
  std::vector<uint16_t> a(all), b(all), c(all), d(all);
  print("rms_norm 1 x 576",
        best_seconds(
            0.05,
            [&] { rms_norm_rows(pool, x.data(), 576, 1, 576, w.data(), 1e-5f, y.data(), 576); }),
        576 * 8);
  print("rms_norm 2048 x 1536",
        best_seconds(0.2,
                     [&] {
                       rms_norm_rows(pool, x.data(), n, m, n, w.data(), 1e-5f, y.data(), n,
                                     inverse.data());
                     }),
        all * 8);
  print("rms_norm_backward",
        best_seconds(0.2,
                     [&] {
                       rms_norm_backward(pool, x.data(), n, inverse.data(), y.data(), n, m, n,
                                         w.data(), dx.data(), n, dw.data());
                     }),
        all * 16);
  round_to_bf16(pool, x.data(), all, a.data());
  round_to_bf16(pool, x.data(), all, b.data());
  print("round_to_bf16", best_seconds(0.2, [&] { round_to_bf16(pool, x.data(), all, c.data()); }),
        all * 6);
  print(
      "gate_rows silu",
      best_seconds(
          0.2,
          [&] { gate_rows(pool, Activation::silu, x.data(), n, y.data(), n, m, n, dx.data(), n); }),
      all * 12);
  print(
      "gate_rows_bf16 gelu",
      best_seconds(
          0.2,
          [&] { gate_rows_bf16(pool, Activation::gelu_tanh, a.data(), b.data(), m, n, c.data()); }),
      all * 6);
  print("gate_backward_bf16 silu",
        best_seconds(0.2,
                     [&] {
                       gate_backward_bf16(pool, Activation::silu, a.data(), b.data(), x.data(), m,
                                          n, c.data(), d.data());
                     }),
        all * 12);
  for (const size_t count : {size_t{1}, size_t{64}}) {
    const size_t vocabulary = 151'936;
    std::vector<float> logits = normals(count * vocabulary);
    const std::vector<int32_t> targets(count, 7);
    std::vector<float> nll(count);
    print(count == 1 ? "cross_entropy 1 x 151936" : "cross_entropy 64 x 151936",
          best_seconds(0.3,
                       [&] {
                         cross_entropy_rows(pool, logits.data(), vocabulary, count, vocabulary,
                                            targets.data(), nll.data(), 1e-3f);
                       }),
          count * vocabulary * 8);
    print("  without gradient",
          best_seconds(0.2,
                       [&] {
                         cross_entropy_rows(pool, logits.data(), vocabulary, count, vocabulary,
                                            targets.data(), nll.data(), 0);
                       }),
          count * vocabulary * 4);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Pool pool(usable_threads());
  const std::vector<Model> models = asked_models(argc, argv);
  const MachineRates limits = measure_machine(pool);
  fmt::print("{}\nread bandwidth {:.1f} GB/s, f32 multiply-adds {:.0f} GFLOP/s\n", machine_name(),
             limits.read / 1e9, limits.f32 / 1e9);
  bool all = true;
  const auto asked = [&](std::string_view name) {
    const bool named = std::find(argv + 1, argv + argc, name) != argv + argc;
    all = all && !named;
    return named;
  };
  const bool prefills = asked("prefill"), decodes = asked("decode");
  const bool trains = asked("training"), rowwise = asked("rows");
  if (all || prefills) prefill(pool, limits, models);
  if (all || decodes) decode(pool, limits, models);
  if (all || trains) training(pool, limits, models);
  if (all || rowwise) rows(pool, limits);
  return 0;
}
