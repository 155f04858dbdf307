#include "engine/attention.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/half.h"
#include "base/random.h"
#include "engine/float_kernels.h"

using namespace moru;

namespace {

constexpr double kUlp = 0x1p-24;

std::vector<float> normals(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> x(count);
  for (float& v : x) v = random.normal();
  return x;
}
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

AttentionShape shape_of(size_t heads, size_t kv_heads, size_t head_dim) {
  return {.heads = heads,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

std::vector<PackedDocument> documents_of(const std::vector<size_t>& starts) {
  std::vector<PackedDocument> documents;
  for (size_t d = 0; d + 1 < starts.size(); ++d)
    documents.push_back({.first = starts[d], .end = starts[d + 1]});
  return documents;
}

// The definition, in double: row r of q is position r; o [T, heads · head_dim], lse [T, heads].
template <typename T>
std::pair<std::vector<double>, std::vector<double>> defined(const AttentionShape& s, size_t tokens,
                                                            const std::vector<T>& q,
                                                            const std::vector<T>& k,
                                                            const std::vector<T>& v) {
  const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
  std::vector<double> o(tokens * ldq, 0.0), lse(tokens * s.heads), p(tokens);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t h = 0; h < s.heads; ++h) {
      const size_t kv = h / (s.heads / s.kv_heads) * s.head_dim;
      const size_t first = s.window == 0 || t + 1 < s.window ? 0 : t + 1 - s.window;
      double sum = s.sinks == nullptr ? 0 : std::exp(double{s.sinks[h]});
      for (size_t j = first; j <= t; ++j) {
        double score = 0;
        for (size_t d = 0; d < s.head_dim; ++d)
          score += double(q[t * ldq + h * s.head_dim + d]) * double(k[j * ldkv + kv + d]);
        score *= double{s.scale};
        if (s.softcap > 0) score = double{s.softcap} * std::tanh(score / double{s.softcap});
        p[j] = std::exp(score);
        sum += p[j];
      }
      lse[t * s.heads + h] = std::log(sum);
      for (size_t j = first; j <= t; ++j)
        for (size_t d = 0; d < s.head_dim; ++d)
          o[t * ldq + h * s.head_dim + d] += p[j] / sum * double(v[j * ldkv + kv + d]);
    }
  return {o, lse};
}

// A score is a chain of head_dim roundings of terms whose sizes sum to about |q||k| scale ~ √dim;
// it enters exp as it is. Then the weighted mean of normal values: p has the score's error and 4
// ulp of exp, the sums a chain of up to 512, relative to Σ p|v| < 4.
double tolerance(const AttentionShape& s) {
  return (double(s.head_dim) * std::sqrt(double(s.head_dim)) + 4 + 64) * kUlp * 4;
}

double furthest(const std::vector<float>& got, const std::vector<double>& want) {
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double off = std::abs(double{got[i]} - want[i]);
    worst = off <= worst ? worst : off;  // NaN gets through
  }
  return worst;
}

struct Tokens {
  std::vector<float> q, k, v;
};
Tokens tokens_for(const AttentionShape& s, size_t tokens, uint64_t seed) {
  return {normals(tokens * s.heads * s.head_dim, seed),
          normals(tokens * s.kv_heads * s.head_dim, seed + 1),
          normals(tokens * s.kv_heads * s.head_dim, seed + 2)};
}

// A prompt given in chunks to layer 1 of a cache of two layers; the result of every token.
std::vector<float> run_cached(Pool& pool, const AttentionShape& s, KvType type, const Tokens& x,
                              size_t tokens, const std::vector<size_t>& chunks) {
  KvCache cache({.layers = 2, .kv_heads = s.kv_heads, .head_dim = s.head_dim, .type = type},
                tokens / kPageTokens + 1);
  KvSequence sequence = cache.make_sequence();
  const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
  std::vector<float> out(tokens * ldq, NAN);
  size_t at = 0;
  for (size_t i = 0; at < tokens; ++i) {
    const size_t count = std::min(chunks[i % chunks.size()], tokens - at);
    REQUIRE(cache.reserve(sequence, count));
    cache.write(sequence, 1, at, count, x.k.data() + at * ldkv, x.v.data() + at * ldkv, ldkv);
    const AttentionSpan span{
        .first_row = 0, .tokens = count, .first_position = at, .sequence = &sequence};
    attend_cached(pool, s, cache, 1, {&span, 1}, x.q.data() + at * ldq, ldq, out.data() + at * ldq,
                  ldq);
    cache.advance(sequence, count);
    at += count;
  }
  return out;
}

std::vector<AttentionShape> shapes() {
  std::vector<AttentionShape> all;
  for (const size_t dim : {16, 32, 64, 80, 96, 128, 256}) all.push_back(shape_of(3, 3, dim));
  all.push_back(shape_of(9, 3, 64));
  all.push_back(shape_of(14, 2, 64));
  all.push_back(shape_of(8, 1, 32));
  all.push_back(shape_of(60, 1, 16));  // more heads in a group than rows in an item
  AttentionShape window = shape_of(4, 2, 64);
  window.window = 33;
  all.push_back(window);
  window.window = 1;
  all.push_back(window);
  AttentionShape capped = shape_of(4, 2, 32);
  capped.softcap = 2;
  all.push_back(capped);
  capped.window = 100;
  all.push_back(capped);
  return all;
}

}  // namespace

TEST_CASE("attend_cached over f32 agrees with the definition in double") {
  Pool pool(2);
  for (const AttentionShape& s : shapes()) {
    CAPTURE(s.heads);
    CAPTURE(s.head_dim);
    CAPTURE(s.window);
    for (const size_t tokens : {1, 15, 16, 17, 64, 65, 200}) {
      CAPTURE(tokens);
      const Tokens x = tokens_for(s, tokens, tokens);
      const std::vector<float> out = run_cached(pool, s, KvType::f32, x, tokens, {tokens});
      CHECK(furthest(out, defined(s, tokens, x.q, x.k, x.v).first) <= tolerance(s));
    }
  }
}

TEST_CASE("a head's sink takes its share of the softmax and gives nothing") {
  Pool pool(2);
  const std::vector<float> sinks = {-3, 0.5f, 2, 9};
  AttentionShape s = shape_of(4, 2, 64);
  s.sinks = sinks.data();
  for (const size_t window : {0, 40}) {
    s.window = window;
    for (const size_t tokens : {1, 65, 600}) {
      CAPTURE(tokens);
      const Tokens x = tokens_for(s, tokens, tokens);
      const std::vector<float> out = run_cached(pool, s, KvType::f32, x, tokens, {tokens});
      CHECK(furthest(out, defined(s, tokens, x.q, x.k, x.v).first) <= tolerance(s));
      CHECK(same_bits(out, run_cached(pool, s, KvType::f32, x, tokens, {1, 7})));
    }
  }
}

TEST_CASE("attend_cached over f16 is the same arithmetic on rounded keys and values") {
  Pool pool(2);
  for (const AttentionShape& s : shapes()) {
    const size_t tokens = 150;
    Tokens x = tokens_for(s, tokens, 7);
    const std::vector<float> out = run_cached(pool, s, KvType::f16, x, tokens, {tokens});
    const std::vector<float> one = run_cached(pool, s, KvType::f16, x, tokens, {1});
    for (float& value : x.k) value = f32_from_f16(f16_from_f32(value));
    for (float& value : x.v) value = f32_from_f16(f16_from_f32(value));
    CHECK(same_bits(out, run_cached(pool, s, KvType::f32, x, tokens, {tokens})));
    CHECK(same_bits(one, out));
  }
}

// i16: a score's error is half a code of q times the size of k and the other way round: two sums of
// √dim terms of up to |q||k| / 46,000 each, with |q||k| scale ~ √dim. Probabilities are cut into
// 32,767 parts of their page's sum.
TEST_CASE("attend_cached over i16 agrees with the definition better than over f16") {
  Pool pool(2);
  for (const AttentionShape& s : shapes()) {
    CAPTURE(s.heads);
    CAPTURE(s.head_dim);
    CAPTURE(s.window);
    for (const size_t tokens : {1, 2, 15, 16, 17, 63, 64, 65, 200, 600}) {
      CAPTURE(tokens);
      const Tokens x = tokens_for(s, tokens, tokens);
      const std::vector<double> want = defined(s, tokens, x.q, x.k, x.v).first;
      const std::vector<float> out = run_cached(pool, s, KvType::i16, x, tokens, {tokens});
      const double off = furthest(out, want);
      CHECK(off <= 6e-4);
      if (tokens >= 64)
        CHECK(off <= furthest(run_cached(pool, s, KvType::f16, x, tokens, {tokens}), want));
      CHECK(same_bits(out, run_cached(pool, s, KvType::i16, x, tokens, {1, 3, 40})));
    }
  }
}

TEST_CASE("codes of i16 neither overflow nor vanish, whatever the sizes") {
  Pool pool(1);
  AttentionShape s = shape_of(1, 1, 64);
  const size_t tokens = 130, dim = 64;
  const auto off = [&](const Tokens& x) {
    const std::vector<double> want = defined(s, tokens, x.q, x.k, x.v).first;
    double largest = 0;
    for (const float v : x.v) largest = std::max(largest, double{std::abs(v)});
    return furthest(run_cached(pool, s, KvType::i16, x, tokens, {tokens}), want) / largest;
  };
  // q and k parallel, so that a score is as large as it can be; one element has it all, or all
  // have.
  for (const bool one : {false, true}) {
    CAPTURE(one);
    Tokens x = tokens_for(s, tokens, 1);
    for (size_t i = 0; i < tokens * dim; ++i)
      x.q[i] = x.k[i] = one ? (i % dim == 3 ? 5.0f : 0.0f) : i % 2 == 0 ? 0.7f : -0.7f;
    for (float& v : x.v) v = v < 0 ? -2.0f : 2.0f;
    CHECK(off(x) <= 1e-4);
  }
  // An outlier in each key and query, as Qwen's biases make them.
  Tokens x = tokens_for(s, tokens, 2);
  for (size_t t = 0; t < tokens; ++t) {
    x.q[t * dim + 9] = 12;
    x.k[t * dim + 9] = 60;
  }
  CHECK(off(x) <= 2e-3);
  // Values of tokens of very different sizes; keys and queries of nothing.
  x = tokens_for(s, tokens, 3);
  for (size_t i = 0; i < tokens * dim; ++i) x.v[i] *= i / dim % 3 == 0 ? 1e-3f : 1e4f;
  CHECK(off(x) <= 4e-4);
  std::fill(x.q.begin(), x.q.end(), 0.0f);
  CHECK(off(x) <= 4e-4);
  x = tokens_for(s, tokens, 4);
  std::fill(x.k.begin(), x.k.end(), 1e-33f);
  CHECK(off(x) <= 4e-4);
  for (float& v : x.v) v = 0;
  for (const float y : run_cached(pool, s, KvType::i16, x, tokens, {tokens})) CHECK(y == 0.0f);
}

TEST_CASE("a NaN or an infinity over i16 reaches the tokens that see it, and no other") {
  Pool pool(1);
  const AttentionShape s = shape_of(2, 1, 32);
  const size_t tokens = 100, ldq = 64, at = 70;
  for (const float bad : {NAN, INFINITY, -INFINITY, 3e38f}) {
    CAPTURE(bad);
    for (const bool key : {false, true}) {
      Tokens x = tokens_for(s, tokens, 5);
      const std::vector<float> good = run_cached(pool, s, KvType::i16, x, tokens, {tokens});
      (key ? x.k : x.v)[at * 32 + 7] = bad;
      const std::vector<float> out = run_cached(pool, s, KvType::i16, x, tokens, {tokens});
      CHECK(std::memcmp(out.data(), good.data(), at * ldq * sizeof(float)) == 0);
      for (size_t t = at; t < tokens; ++t) CHECK(!std::isfinite(out[t * ldq]));
    }
  }
}

TEST_CASE("a token has the same bits by decode, in any chunk, with any number of threads") {
  const size_t tokens = 1200;  // three blocks of keys
  std::vector<AttentionShape> some = {shape_of(6, 2, 64), shape_of(2, 2, 16)};
  some.push_back(some[0]);
  some.back().window = 300;
  some.push_back(some[0]);
  some.back().window = 700;
  some.back().softcap = 5;
  for (const AttentionShape& s : some) {
    const Tokens x = tokens_for(s, tokens, 11);
    const auto want = defined(s, tokens, x.q, x.k, x.v).first;
    for (const KvType type : {KvType::i16, KvType::f16}) {
      CAPTURE(name_of(type));
      Pool one(1);
      const std::vector<float> whole = run_cached(one, s, type, x, tokens, {tokens});
      CHECK(furthest(whole, want) <= 2e-3);  // f16: half an ulp of 11 bits on keys of size 4
      for (const size_t threads : {1, 2, 4}) {
        Pool pool(threads);
        for (const std::vector<size_t>& chunks :
             {std::vector<size_t>{1}, {7}, {64}, {333}, {511, 2, 100}, {tokens}}) {
          CAPTURE(threads);
          CAPTURE(chunks[0]);
          if (chunks[0] == 1 && threads == 4) continue;
          CHECK(same_bits(run_cached(pool, s, type, x, tokens, chunks), whole));
        }
      }
    }
  }
}

TEST_CASE("sequences in one batch do not touch each other's bits") {
  const AttentionShape s = shape_of(6, 2, 32);
  const size_t ldq = 6 * 32, ldkv = 2 * 32;
  const std::vector<size_t> lengths = {1, 5, 64, 700, 130, 1030};
  KvCache cache({.layers = 1, .kv_heads = 2, .head_dim = 32}, 64);
  std::vector<KvSequence> sequences;
  std::vector<AttentionSpan> spans;
  std::vector<float> q, alone;
  Pool pool(2);
  size_t row = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const size_t tokens = lengths[i], asked = std::min<size_t>(tokens, i + 1);
    const Tokens x = tokens_for(s, tokens, 100 + i);
    sequences.push_back(cache.make_sequence());
    REQUIRE(cache.reserve(sequences[i], tokens));
    cache.write(sequences[i], 0, 0, tokens, x.k.data(), x.v.data(), ldkv);
    spans.push_back(
        {.first_row = row, .tokens = asked, .first_position = tokens - asked, .sequence = nullptr});
    q.insert(q.end(), x.q.end() - ptrdiff_t(asked * ldq), x.q.end());
    const std::vector<float> all = run_cached(pool, s, KvType::i16, x, tokens, {tokens});
    alone.insert(alone.end(), all.end() - ptrdiff_t(asked * ldq), all.end());
    row += asked;
  }
  for (size_t i = 0; i < spans.size(); ++i) spans[i].sequence = &sequences[i];
  std::vector<float> out(q.size());
  attend_cached(pool, s, cache, 0, spans, q.data(), ldq, out.data(), ldq);
  CHECK(same_bits(out, alone));
  // In the queries' place, by few items that are split and by many that are not.
  for (const size_t threads : {2, 12}) {
    Pool several(threads);
    std::vector<float> place = q;
    attend_cached(several, s, cache, 0, spans, place.data(), ldq, place.data(), ldq);
    CHECK(same_bits(place, alone));
  }
}

TEST_CASE("what lies in a page beyond the sequence's tokens is never read into a result") {
  const AttentionShape s = shape_of(2, 1, 16);
  KvCache cache({.layers = 1, .kv_heads = 1, .head_dim = 16, .type = KvType::f32}, 1);
  Pool pool(1);
  {
    KvSequence poisoned = cache.make_sequence();
    REQUIRE(cache.reserve(poisoned, 64));
    const std::vector<float> nan(64 * 16, NAN);
    cache.write(poisoned, 0, 0, 64, nan.data(), nan.data(), 16);
  }
  const Tokens x = tokens_for(s, 20, 3);
  KvSequence sequence = cache.make_sequence();
  REQUIRE(cache.reserve(sequence, 20));
  cache.write(sequence, 0, 0, 20, x.k.data(), x.v.data(), 16);
  std::vector<float> out(20 * 32);
  const AttentionSpan span{
      .first_row = 0, .tokens = 20, .first_position = 0, .sequence = &sequence};
  attend_cached(pool, s, cache, 0, {&span, 1}, x.q.data(), 32, out.data(), 32);
  CHECK(furthest(out, defined(s, 20, x.q, x.k, x.v).first) <= tolerance(s));
}

TEST_CASE("attend_packed agrees with the definition, document by document") {
  for (const AttentionShape& s : shapes()) {
    CAPTURE(s.heads);
    CAPTURE(s.head_dim);
    CAPTURE(s.window);
    const std::vector<size_t> lengths = {1, 0, 17, 35, 64, 65, 200, 96, 97};
    const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
    std::vector<size_t> starts = {0};
    for (const size_t length : lengths) starts.push_back(starts.back() + length);
    const Tokens x = tokens_for(s, starts.back(), 5);
    std::vector<float> out(starts.back() * ldq), lse(starts.back() * s.heads);
    Pool pool(2);
    attend_packed(pool, s, documents_of(starts), x.q.data(), ldq, x.k.data(), x.v.data(), ldkv,
                  out.data(), ldq, lse.data());
    for (size_t d = 0; d < lengths.size(); ++d) {
      const auto part = [&](const std::vector<float>& from, size_t ld) {
        return std::vector<float>(from.begin() + ptrdiff_t(starts[d] * ld),
                                  from.begin() + ptrdiff_t(starts[d + 1] * ld));
      };
      const auto [o, l] = defined(s, lengths[d], part(x.q, ldq), part(x.k, ldkv), part(x.v, ldkv));
      CHECK(furthest(part(out, ldq), o) <= tolerance(s));
      CHECK(furthest(part(lse, s.heads), l) <= tolerance(s));
    }
  }
}

namespace {

struct Gradients {
  std::vector<float> out, lse, dq, dk, dv;
};
Gradients run_packed(Pool& pool, const AttentionShape& s,
                     const std::vector<PackedDocument>& documents, const Tokens& x,
                     const std::vector<float>& d_out) {
  const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
  const size_t tokens = documents.back().end;
  Gradients g{std::vector<float>(tokens * ldq), std::vector<float>(tokens * s.heads),
              std::vector<float>(tokens * ldq, NAN), std::vector<float>(tokens * ldkv, NAN),
              std::vector<float>(tokens * ldkv, NAN)};
  attend_packed(pool, s, documents, x.q.data(), ldq, x.k.data(), x.v.data(), ldkv, g.out.data(),
                ldq, g.lse.data());
  attend_packed_backward(pool, s, documents, x.q.data(), ldq, x.k.data(), x.v.data(), ldkv,
                         g.out.data(), d_out.data(), ldq, g.lse.data(), g.dq.data(), g.dk.data(),
                         g.dv.data());
  return g;
}

Gradients run_packed(Pool& pool, const AttentionShape& s, const std::vector<size_t>& starts,
                     const Tokens& x, const std::vector<float>& d_out) {
  return run_packed(pool, s, documents_of(starts), x, d_out);
}

// The gradients in double, by the chain rule over the definition's probabilities.
struct Exact {
  std::vector<double> dq, dk, dv;
};
Exact gradients_of(const AttentionShape& s, size_t tokens, const Tokens& x,
                   const std::vector<float>& d_out) {
  const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim, dim = s.head_dim;
  const auto [o, lse] = defined(s, tokens, x.q, x.k, x.v);
  Exact g{std::vector<double>(tokens * ldq), std::vector<double>(tokens * ldkv),
          std::vector<double>(tokens * ldkv)};
  for (size_t t = 0; t < tokens; ++t)
    for (size_t h = 0; h < s.heads; ++h) {
      const size_t at = t * ldq + h * dim, kv = h / (s.heads / s.kv_heads) * dim;
      const size_t first = s.window == 0 || t + 1 < s.window ? 0 : t + 1 - s.window;
      double delta = 0;
      for (size_t d = 0; d < dim; ++d) delta += double{d_out[at + d]} * o[at + d];
      for (size_t j = first; j <= t; ++j) {
        double score = 0, dp = 0, slope = double{s.scale};
        for (size_t d = 0; d < dim; ++d) {
          score += double{x.q[at + d]} * double{x.k[j * ldkv + kv + d]};
          dp += double{d_out[at + d]} * double{x.v[j * ldkv + kv + d]};
        }
        score *= double{s.scale};
        if (s.softcap > 0) {
          const double bent = std::tanh(score / double{s.softcap});
          score = double{s.softcap} * bent;
          slope *= 1 - bent * bent;
        }
        const double p = std::exp(score - lse[t * s.heads + h]), ds = p * (dp - delta) * slope;
        for (size_t d = 0; d < dim; ++d) {
          g.dv[j * ldkv + kv + d] += p * double{d_out[at + d]};
          g.dq[at + d] += ds * double{x.k[j * ldkv + kv + d]};
          g.dk[j * ldkv + kv + d] += ds * double{x.q[at + d]};
        }
      }
    }
  return g;
}

}  // namespace

TEST_CASE("the gradients of attend_packed agree with central differences in double") {
  for (const bool bent : {false, true}) {
    AttentionShape s = shape_of(4, 2, 16);
    if (bent) {
      s.softcap = 1.5f;
      s.window = 9;
    }
    const size_t tokens = 23, ldq = 64, ldkv = 32;
    const Tokens x = tokens_for(s, tokens, 21);
    const std::vector<float> d_out = normals(tokens * ldq, 22);
    Pool pool(2);
    const Gradients g = run_packed(pool, s, {0, tokens}, x, d_out);
    std::vector<double> q(x.q.begin(), x.q.end()), k(x.k.begin(), x.k.end()),
        v(x.v.begin(), x.v.end());
    const auto loss = [&] {
      const std::vector<double> o = defined(s, tokens, q, k, v).first;
      double sum = 0;
      for (size_t i = 0; i < o.size(); ++i) sum += o[i] * double{d_out[i]};
      return sum;
    };
    const auto difference = [&](double& at) {
      const double old = at, h = 1e-5;
      at = old + h;
      const double up = loss();
      at = old - h;
      const double down = loss();
      at = old;
      return (up - down) / (2 * h);
    };
    // f32: chains of up to 23 terms of size about 10; the difference: h² and rounding / h.
    const double allowed = 23 * 10 * 4 * kUlp + 1e-6;
    for (size_t i = 0; i < tokens * ldq; i += 5)
      CHECK(std::abs(g.dq[i] - difference(q[i])) <= allowed);
    for (size_t i = 0; i < tokens * ldkv; i += 3) {
      CHECK(std::abs(g.dk[i] - difference(k[i])) <= allowed);
      CHECK(std::abs(g.dv[i] - difference(v[i])) <= allowed);
    }
  }
}

TEST_CASE("the gradients agree with the chain rule in double for every shape") {
  Pool pool(2);
  for (const AttentionShape& s : shapes()) {
    CAPTURE(s.heads);
    CAPTURE(s.head_dim);
    CAPTURE(s.window);
    for (const size_t tokens : {1, 16, 35, 64, 97, 193}) {
      CAPTURE(tokens);
      const Tokens x = tokens_for(s, tokens, 31);
      const std::vector<float> d_out = normals(x.q.size(), 32);
      const Gradients g = run_packed(pool, s, {0, tokens}, x, d_out);
      const Exact want = gradients_of(s, tokens, x, d_out);
      // p is off by the score's error (tolerance), ds by that times |dp − delta| < 4 √dim; a key
      // sums them over the heads of its group and the queries that weigh it, about 2 in all.
      const double allowed = tolerance(s) * 8 * double(s.heads / s.kv_heads);
      CHECK(furthest(g.dq, want.dq) <= allowed);
      CHECK(furthest(g.dk, want.dk) <= allowed);
      CHECK(furthest(g.dv, want.dv) <= allowed);
    }
  }
}

TEST_CASE("long documents are split in the backward pass without changing the result") {
  AttentionShape s = shape_of(2, 1, 16);
  for (const size_t window : {0, 600}) {
    s.window = window;
    const size_t tokens = 1100;
    const Tokens x = tokens_for(s, tokens, 41);
    const std::vector<float> d_out = normals(x.q.size(), 42);
    Pool pool(2);
    const Gradients g = run_packed(pool, s, {0, tokens}, x, d_out);
    const Exact want = gradients_of(s, tokens, x, d_out);
    CHECK(furthest(g.dq, want.dq) <= tolerance(s) * 8);
    CHECK(furthest(g.dk, want.dk) <= tolerance(s) * 16);
    CHECK(furthest(g.dv, want.dv) <= tolerance(s) * 16);
  }
}

TEST_CASE("neither threads nor neighbours in the row change a bit of training's attention") {
  const AttentionShape s = shape_of(6, 2, 32);
  const std::vector<size_t> starts = {0, 35, 36, 640, 1800, 1820};
  const Tokens x = tokens_for(s, starts.back(), 51);
  const std::vector<float> d_out = normals(x.q.size(), 52);
  Pool one(1), two(2), four(4);
  const Gradients a = run_packed(one, s, starts, x, d_out);
  for (Pool* pool : {&two, &four}) {
    const Gradients b = run_packed(*pool, s, starts, x, d_out);
    CHECK(same_bits(a.out, b.out));
    CHECK(same_bits(a.lse, b.lse));
    CHECK(same_bits(a.dq, b.dq));
    CHECK(same_bits(a.dk, b.dk));
    CHECK(same_bits(a.dv, b.dv));
  }
  for (size_t d = 0; d + 1 < starts.size(); ++d) {
    const auto part = [&](const std::vector<float>& from) {
      const size_t ld = from.size() / starts.back();
      return std::vector<float>(from.begin() + ptrdiff_t(starts[d] * ld),
                                from.begin() + ptrdiff_t(starts[d + 1] * ld));
    };
    const Gradients b = run_packed(two, s, {0, starts[d + 1] - starts[d]},
                                   {part(x.q), part(x.k), part(x.v)}, part(d_out));
    CHECK(same_bits(part(a.out), b.out));
    CHECK(same_bits(part(a.dq), b.dq));
    CHECK(same_bits(part(a.dk), b.dk));
    CHECK(same_bits(part(a.dv), b.dv));
  }
}

TEST_CASE("documents that share their start's rows attend as if each had its own") {
  for (AttentionShape s : {shape_of(4, 2, 16), shape_of(3, 3, 64)}) {
    for (const size_t window : {size_t{0}, size_t{50}}) {
      s.window = window;
      const size_t ldq = s.heads * s.head_dim, ldkv = s.kv_heads * s.head_dim;
      for (const auto& [prompt, chosen, rejected] :
           {std::array<size_t, 3>{5, 3, 4}, {64, 10, 130}, {500, 90, 700}, {1, 1, 1}}) {
        CAPTURE(prompt);
        CAPTURE(window);
        // Rows: another document, prompt and chosen, rejected.
        const size_t before = 7, base = before + prompt + chosen, tokens = base + rejected;
        const std::vector<PackedDocument> shared = {
            {0, before}, {before, base}, {base, tokens, before, prompt}};
        const Tokens x = tokens_for(s, tokens, 91);
        const std::vector<float> d_out = normals(tokens * ldq, 92);
        Pool pool(2), one(1);
        const Gradients found = run_packed(pool, s, shared, x, d_out);
        CHECK(same_bits(found.dk, run_packed(one, s, shared, x, d_out).dk));

        // The same with the prompt's rows twice.
        const std::vector<size_t> starts = {0, before, base, tokens + prompt};
        const auto twice = [&](const std::vector<float>& from, size_t ld, bool clear) {
          std::vector<float> to(from.begin(), from.begin() + ptrdiff_t(base * ld));
          to.insert(to.end(), from.begin() + ptrdiff_t(before * ld),
                    from.begin() + ptrdiff_t((before + prompt) * ld));
          if (clear) std::fill(to.end() - ptrdiff_t(prompt * ld), to.end(), 0.0f);
          to.insert(to.end(), from.begin() + ptrdiff_t(base * ld), from.end());
          return to;
        };
        Tokens y;
        y.q = twice(x.q, ldq, false);
        y.k = twice(x.k, ldkv, false);
        y.v = twice(x.v, ldkv, false);
        const Gradients wanted = run_packed(pool, s, starts, y, twice(d_out, ldq, true));
        const auto folded = [&](const std::vector<float>& from, size_t ld, bool add) {
          std::vector<double> to(from.begin(), from.begin() + ptrdiff_t(base * ld));
          for (size_t i = 0; add && i < prompt * ld; ++i)
            to[before * ld + i] += double{from[base * ld + i]};
          to.insert(to.end(), from.begin() + ptrdiff_t((base + prompt) * ld), from.end());
          return to;
        };
        CHECK(furthest(found.out, folded(wanted.out, ldq, false)) == 0);
        CHECK(furthest(found.lse, folded(wanted.lse, s.heads, false)) == 0);
        // Sums of up to a thousand terms of size 1, in another order.
        CHECK(furthest(found.dq, folded(wanted.dq, ldq, true)) <= 1e-4);
        CHECK(furthest(found.dk, folded(wanted.dk, ldkv, true)) <= 1e-4);
        CHECK(furthest(found.dv, folded(wanted.dv, ldkv, true)) <= 1e-4);
      }
    }
  }
}

TEST_CASE("training's attention in bf16 is that in f32 but for the rounding of operands") {
  // Where the processor does not multiply bf16 the two are the same.
  const auto distance = [](const std::vector<float>& found, const std::vector<float>& wanted) {
    // Sizes of 0.1 at least: where a query sees one key dq and dk are 0.
    double difference = 0, size = 1e-2 * static_cast<double>(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
      difference += std::pow(double{found[i]} - double{wanted[i]}, 2);
      size += std::pow(double{wanted[i]}, 2);
    }
    return std::sqrt(difference / size);
  };
  std::vector<AttentionShape> all = shapes();
  all.push_back(shape_of(3, 1, 80));
  for (AttentionShape s : all) {
    CAPTURE(s.heads);
    CAPTURE(s.head_dim);
    CAPTURE(s.window);
    for (const size_t tokens : {2, 12, 13, 33, 64, 97, 193, 700}) {
      CAPTURE(tokens);
      // Rows: a prompt with one answer, another document, another answer to the prompt.
      const std::vector<PackedDocument> documents = {
          {0, tokens}, {tokens, tokens + 11}, {tokens + 11, tokens + 40, 0, tokens / 2}};
      const Tokens x = tokens_for(s, tokens + 40, 71);
      const std::vector<float> d_out = normals(x.q.size(), 72);
      Pool pool(2), one(1);
      s.bf16 = false;
      const Gradients wanted = run_packed(pool, s, documents, x, d_out);
      s.bf16 = true;
      const Gradients found = run_packed(pool, s, documents, x, d_out);
      // Each operand is off by 2^-9 of itself at most, about 1e-3 in the mean. Scores of size 1 add
      // that to p, and ds is a difference: a few roundings in all.
      CHECK(distance(found.out, wanted.out) < 4e-3);
      CHECK(distance(found.lse, wanted.lse) < 4e-3);
      CHECK(distance(found.dv, wanted.dv) < 6e-3);
      const double allowed = s.window == 1 ? 3e-2 : 1e-2;
      CHECK(distance(found.dq, wanted.dq) < allowed);
      CHECK(distance(found.dk, wanted.dk) < allowed);
      const Gradients alone = run_packed(one, s, documents, x, d_out);
      CHECK(same_bits(found.out, alone.out));
      CHECK(same_bits(found.dq, alone.dq));
      CHECK(same_bits(found.dk, alone.dk));
      CHECK(same_bits(found.dv, alone.dv));
    }
  }
}

TEST_CASE("training's forward pass and inference over an f32 cache give the same bits") {
  const AttentionShape s = shape_of(6, 2, 64);
  const size_t tokens = 700, ldq = 6 * 64, ldkv = 2 * 64;
  const Tokens x = tokens_for(s, tokens, 61);
  Pool pool(2);
  std::vector<float> out(tokens * ldq), lse(tokens * s.heads);
  attend_packed(pool, s, documents_of({0, tokens}), x.q.data(), ldq, x.k.data(), x.v.data(), ldkv,
                out.data(), ldq, lse.data());
  CHECK(same_bits(out, run_cached(pool, s, KvType::f32, x, tokens, {tokens})));
}

TEST_CASE("every level of the instruction set gives the bits of the scalar definition") {
  for (const size_t dim : {16, 64, 80, 96, 256}) {
    for (const size_t rows : {1, 3, 7, 13}) {
      for (const PageType type : {PageType::f32, PageType::f16, PageType::i16}) {
        CAPTURE(dim);
        CAPTURE(rows);
        CAPTURE(int(type));
        const size_t tokens = 150;
        const std::vector<float> q = normals(rows * dim, 1), k = normals(tokens * dim, 2),
                                 v = normals(tokens * dim, 3), d_out = normals(rows * dim, 4);
        std::vector<uint32_t> first(rows), end(rows);
        for (size_t r = 0; r < rows; ++r) {
          first[r] = static_cast<uint32_t>(3 * r);
          end[r] = static_cast<uint32_t>(tokens - rows + r + 1);
        }
        const auto result = [&](Isa level) {
          const FloatKernels& kernels = float_kernels(level);
          std::vector<float> pages(2 * 3 * kKeyPage * dim), scores(rows * kKeyBlock),
              page(attend_scratch(rows, dim));
          const void *keys[3], *values[3];
          for (size_t p = 0; p < 3; ++p) {
            float *to_k = pages.data() + 2 * p * kKeyPage * dim, *to_v = to_k + kKeyPage * dim;
            const size_t at = p * kKeyPage, count = std::min(kKeyPage, tokens - at);
            kernels.put_keys(k.data() + at * dim, dim, 0, count, dim, type, to_k);
            kernels.put_values(v.data() + at * dim, dim, 0, count, dim, type, to_v);
            keys[p] = to_k;
            values[p] = to_v;
          }
          std::vector<float> all(rows * (dim + 2) + rows * (dim + 2));
          AttendBlock block{};
          block.q = q.data();
          block.ldq = block.head_dim = block.ldv = dim;
          block.rows = rows;
          block.scale = 0.3f;
          block.softcap = rows == 7 ? 3.0f : 0.0f;
          block.type = type;
          block.pages = 3;
          block.keys = keys;
          block.values = values;
          block.next = keys[0];
          block.first = first.data();
          block.end = end.data();
          block.scores = scores.data();
          block.page = page.data();
          block.max = all.data();
          block.sum = all.data() + rows;
          block.out = all.data() + 2 * rows;
          kernels.attend_block(block);
          float* merged = all.data() + rows * (dim + 2);
          std::fill_n(merged, rows, 1.5f);
          std::fill_n(merged + rows, rows, 0.5f);
          std::fill_n(merged + 2 * rows, rows * dim, 0.25f);
          kernels.merge_block(block, merged, merged + rows, merged + 2 * rows);

          std::vector<float> k_page(kKeyPage * dim), v_page(kKeyPage * dim), p(rows * kKeyPage),
              ds(rows * kKeyPage), lse(rows, 9.0f), delta(rows, 0.1f),
              gradients((rows + 2 * kKeyPage) * dim, 1.0f);
          kernels.put_keys(k.data(), dim, 0, 37, dim, PageType::f32, k_page.data());
          kernels.put_keys(v.data(), dim, 0, 37, dim, PageType::f32, v_page.data());
          std::vector<uint32_t> page_end(rows);
          for (size_t r = 0; r < rows; ++r) page_end[r] = static_cast<uint32_t>(37 - rows + r + 1);
          kernels.attend_backward_tile({.rows = rows,
                                        .keys = 37,
                                        .head_dim = dim,
                                        .scale = 0.3f,
                                        .softcap = block.softcap,
                                        .q = q.data(),
                                        .ldq = dim,
                                        .d_out = d_out.data(),
                                        .ldo = dim,
                                        .lse = lse.data(),
                                        .delta = delta.data(),
                                        .k = k.data(),
                                        .ldkv = dim,
                                        .k_page = k_page.data(),
                                        .v_page = v_page.data(),
                                        .first = first.data(),
                                        .end = page_end.data(),
                                        .p = p.data(),
                                        .ds = ds.data(),
                                        .dq = gradients.data(),
                                        .lddq = dim,
                                        .dk = gradients.data() + rows * dim,
                                        .dv = gradients.data() + (rows + kKeyPage) * dim,
                                        .lddkv = dim});
          all.insert(all.end(), gradients.begin(), gradients.end());
          return all;
        };
        const std::vector<float> scalar = result(Isa::scalar);
        for (const Isa level : {Isa::avx2, Isa::avx512})
          if (level <= isa()) CHECK(same_bits(result(level), scalar));
      }
    }
  }
}
