#include "engine/kv_cache.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/half.h"
#include "base/random.h"
#include "support.h"

using namespace moru;

namespace {

std::vector<float> normals(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> x(count);
  for (float& v : x) v = random.normal();
  return x;
}

float key(const KvCache& cache, const KvSequence& s, size_t layer, size_t head, size_t t,
          size_t d) {
  const void* page = cache.keys(s, t / kPageTokens, layer, head);
  const size_t at = d * kPageTokens + t % kPageTokens;
  return cache.shape().type == KvType::f16 ? f32_from_f16(static_cast<const uint16_t*>(page)[at])
                                           : static_cast<const float*>(page)[at];
}
float value(const KvCache& cache, const KvSequence& s, size_t layer, size_t head, size_t t,
            size_t d) {
  const void* page = cache.values(s, t / kPageTokens, layer, head);
  const size_t at = t % kPageTokens * cache.shape().head_dim + d;
  return cache.shape().type == KvType::f16 ? f32_from_f16(static_cast<const uint16_t*>(page)[at])
                                           : static_cast<const float*>(page)[at];
}

void append(KvCache& cache, KvSequence& s, float content, size_t count = 1) {
  const KvShape& shape = cache.shape();
  const size_t ld = shape.kv_heads * shape.head_dim;
  const std::vector<float> rows(count * ld, content);
  REQUIRE(cache.reserve(s, count));
  for (size_t layer = 0; layer < shape.layers; ++layer)
    cache.write(s, layer, s.tokens(), count, rows.data(), rows.data(), ld);
  cache.advance(s, count);
}

}  // namespace

TEST_CASE("what is written can be read back, rounded to the cache's type, for any cut") {
  for (const KvType type : {KvType::f16, KvType::f32}) {
    for (const size_t cut : {1, 7, 16, 17, 64, 100, 150}) {
      CAPTURE(cut);
      KvCache cache({.layers = 2, .kv_heads = 3, .head_dim = 48, .type = type}, 4);
      KvSequence s = cache.make_sequence();
      const size_t tokens = 150, dim = 48, ld = 3 * dim + 5;
      const std::vector<float> k = normals(2 * tokens * ld, 1), v = normals(2 * tokens * ld, 2);
      REQUIRE(cache.reserve(s, tokens));
      for (size_t layer = 0; layer < 2; ++layer)
        for (size_t t = 0; t < tokens; t += cut)
          cache.write(s, layer, t, std::min(cut, tokens - t), k.data() + (layer * tokens + t) * ld,
                      v.data() + (layer * tokens + t) * ld, ld);
      cache.advance(s, tokens);
      CHECK(s.tokens() == tokens);
      bool equal = true;
      for (size_t layer = 0; layer < 2; ++layer)
        for (size_t t = 0; t < tokens; ++t)
          for (size_t head = 0; head < 3; ++head)
            for (size_t d = 0; d < dim; ++d) {
              const size_t at = (layer * tokens + t) * ld + head * dim + d;
              const auto stored = [&](float x) {
                return type == KvType::f16 ? f32_from_f16(f16_from_f32(x)) : x;
              };
              equal = equal && key(cache, s, layer, head, t, d) == stored(k[at]) &&
                      value(cache, s, layer, head, t, d) == stored(v[at]);
            }
      CHECK(equal);
    }
  }
}

TEST_CASE("bf16 and q8_0 round a token's keys and values on their own, wherever it lands") {
  for (const KvType type : {KvType::bf16, KvType::q8_0}) {
    CAPTURE(name_of(type));
    const size_t tokens = 150, dim = 48, ld = 2 * dim + 3;
    std::vector<float> k = normals(tokens * ld, 1), v = normals(tokens * ld, 2);
    for (size_t d = 0; d < dim; ++d) k[10 * ld + d] *= 1e-6f;  // each token has its own scale
    std::fill_n(v.begin() + ptrdiff_t(20 * ld), dim, 0.0f);
    const KvShape shape{.layers = 2, .kv_heads = 2, .head_dim = dim, .type = type};
    std::vector<float> keys(64 * dim), values(64 * dim);
    for (const size_t cut : {1, 7, 64, 150}) {
      CAPTURE(cut);
      KvCache cache(shape, 3);
      KvSequence s = cache.make_sequence();
      REQUIRE(cache.reserve(s, tokens));
      for (size_t t = 0; t < tokens; t += cut)
        cache.write(s, 1, t, std::min(cut, tokens - t), k.data() + t * ld, v.data() + t * ld, ld);
      cache.advance(s, tokens);
      // Half a step of the rounding: 2^-9 of the value, or 1/254 of the token's largest.
      const auto error = [&](const float* row, float stored, float x) {
        float largest = 0;
        for (size_t d = 0; d < dim; ++d) largest = std::max(largest, std::abs(row[d]));
        const float most = type == KvType::bf16 ? std::abs(x) / 256 : largest / 253;
        return std::abs(stored - x) <= most;
      };
      bool good = true;
      for (size_t head = 0; head < 2; ++head)
        for (size_t block = 0; block < 3; ++block) {
          cache.widen(s, block, 1, head, keys.data(), values.data());
          for (size_t t = block * 64; t < std::min(tokens, block * 64 + 64); ++t)
            for (size_t d = 0; d < dim; ++d) {
              const size_t row = t * ld + head * dim;
              good = good && error(&k[row], keys[d * 64 + t % 64], k[row + d]) &&
                     error(&v[row], values[t % 64 * dim + d], v[row + d]);
            }
        }
      CHECK(good);
    }
  }
  CHECK(KvCache::page_bytes({.layers = 1, .kv_heads = 1, .head_dim = 64, .type = KvType::q8_0}) ==
        2 * 64 * (64 + 4));
}

TEST_CASE("i16 keeps a token's keys and values to half a code, wherever it lands") {
  const size_t tokens = 150, dim = 48, ld = 2 * dim + 3;
  std::vector<float> k = normals(tokens * ld, 1), v = normals(tokens * ld, 2);
  for (size_t d = 0; d < dim; ++d) k[10 * ld + d] *= 1e-6f;  // each token has its own scale
  std::fill_n(v.begin() + ptrdiff_t(20 * ld), dim, 0.0f);
  for (const size_t cut : {1, 7, 64, 150}) {
    CAPTURE(cut);
    KvCache cache({.layers = 2, .kv_heads = 2, .head_dim = dim, .type = KvType::i16}, 3);
    KvSequence s = cache.make_sequence();
    REQUIRE(cache.reserve(s, tokens));
    for (size_t t = 0; t < tokens; t += cut)
      cache.write(s, 1, t, std::min(cut, tokens - t), k.data() + t * ld, v.data() + t * ld, ld);
    cache.advance(s, tokens);
    bool good = true;
    for (size_t head = 0; head < 2; ++head)
      for (size_t t = 0; t < tokens; ++t) {
        const auto* keys = static_cast<const int16_t*>(cache.keys(s, t / 64, 1, head));
        const auto* values = static_cast<const int16_t*>(cache.values(s, t / 64, 1, head));
        const size_t at = t % 64, row = t * ld + head * dim;
        const float k_scale = reinterpret_cast<const float*>(keys + 64 * dim)[at];
        const float v_scale = reinterpret_cast<const float*>(values + 64 * dim)[at];
        for (size_t d = 0; d < dim; ++d) {
          const float key = k_scale * keys[d / 2 * 128 + 2 * at + d % 2];
          const float value = v_scale * values[at / 2 * 2 * dim + 2 * d + at % 2];
          good = good && std::abs(key - k[row + d]) <= 0.501f * k_scale &&
                 std::abs(value - v[row + d]) <= 0.501f * v_scale;
        }
      }
    CHECK(good);
  }
  CHECK(KvCache::page_bytes({.layers = 1, .kv_heads = 1, .head_dim = 64, .type = KvType::i16}) ==
        2 * 64 * (2 * 64 + 4));
}

TEST_CASE("q8_0 saturates instead of becoming infinite; NaN stays, in its token alone") {
  KvCache cache({.layers = 1, .kv_heads = 1, .head_dim = 16, .type = KvType::q8_0}, 1);
  KvSequence s = cache.make_sequence();
  std::vector<float> rows(3 * 16, 1.0f);
  rows[5] = -std::numeric_limits<float>::infinity();
  rows[16 + 5] = std::numeric_limits<float>::quiet_NaN();
  REQUIRE(cache.reserve(s, 3));
  cache.write(s, 0, 0, 3, rows.data(), rows.data(), 16);
  std::vector<float> keys(64 * 16), values(64 * 16);
  cache.widen(s, 0, 0, 0, keys.data(), values.data());
  CHECK(keys[5 * 64] == doctest::Approx(-3.4e38));
  CHECK(keys[0] == 0);
  CHECK(std::isnan(values[16 + 2]));
  CHECK(values[2 * 16 + 2] == doctest::Approx(1));
}

TEST_CASE("f16 saturates instead of becoming infinite; NaN stays") {
  KvCache cache({.layers = 1, .kv_heads = 1, .head_dim = 16, .type = KvType::f16}, 1);
  KvSequence s = cache.make_sequence();
  std::vector<float> rows(16, 0.0f);
  rows[0] = 1e6f;
  rows[1] = -std::numeric_limits<float>::infinity();
  rows[2] = std::numeric_limits<float>::quiet_NaN();
  rows[3] = 65504.0f;
  rows[4] = 65519.0f;
  REQUIRE(cache.reserve(s, 1));
  cache.write(s, 0, 0, 1, rows.data(), rows.data(), 16);
  CHECK(key(cache, s, 0, 0, 0, 0) == 65504.0f);
  CHECK(value(cache, s, 0, 0, 0, 1) == -65504.0f);
  CHECK(std::isnan(value(cache, s, 0, 0, 0, 2)));
  CHECK(value(cache, s, 0, 0, 0, 3) == 65504.0f);
  CHECK(value(cache, s, 0, 0, 0, 4) == 65504.0f);
}

TEST_CASE("pages are taken when reserved and come back with the last sequence") {
  KvCache cache({.layers = 1, .kv_heads = 1, .head_dim = 16}, 4);
  CHECK(cache.total_pages() == 4);
  CHECK(KvCache::page_bytes(cache.shape()) == 2 * 64 * (16 * 2 + 4));
  {
    KvSequence a = cache.make_sequence();
    CHECK(cache.reserve(a, 0));
    CHECK(cache.free_pages() == 4);
    CHECK(cache.reserve(a, 64));
    CHECK(cache.free_pages() == 3);
    CHECK(cache.reserve(a, 64));  // already there
    CHECK(cache.free_pages() == 3);
    CHECK(cache.reserve(a, 65));
    CHECK(cache.free_pages() == 2);
    KvSequence b = cache.make_sequence();
    CHECK_FALSE(cache.reserve(b, 129));  // three pages, two are free: nothing is taken
    CHECK(cache.free_pages() == 2);
    CHECK(b.pages().empty());
    CHECK(cache.reserve(b, 128));
    CHECK(cache.free_pages() == 0);
    KvSequence moved = std::move(b);
    CHECK(cache.free_pages() == 0);
    moved = cache.make_sequence();
    CHECK(cache.free_pages() == 2);
  }
  CHECK(cache.free_pages() == 4);
}

TEST_CASE("a fork shares full pages and copies the partial one") {
  KvCache cache({.layers = 2, .kv_heads = 2, .head_dim = 16, .type = KvType::f16}, 8);
  KvSequence a = cache.make_sequence();
  append(cache, a, 1.0f, 100);
  KvSequence b = cache.make_sequence();
  REQUIRE(cache.fork(a, 100, b));
  CHECK(b.tokens() == 100);
  CHECK(cache.free_pages() == 5);
  CHECK(b.pages()[0] == a.pages()[0]);
  CHECK(b.pages()[1] != a.pages()[1]);
  append(cache, a, 2.0f);
  append(cache, b, 3.0f);
  CHECK(value(cache, a, 1, 1, 99, 3) == 1.0f);
  CHECK(value(cache, b, 1, 1, 99, 3) == 1.0f);
  CHECK(key(cache, a, 0, 1, 100, 15) == 2.0f);
  CHECK(key(cache, b, 0, 1, 100, 15) == 3.0f);
  a = KvSequence();
  CHECK(cache.free_pages() == 6);
  CHECK(key(cache, b, 0, 0, 5, 5) == 1.0f);

  KvSequence c = cache.make_sequence();
  REQUIRE(cache.fork(b, 64, c));  // exactly a page: nothing is copied
  CHECK(cache.free_pages() == 6);
  REQUIRE(cache.fork(b, 0, c));
  CHECK(c.pages().empty());
}

TEST_CASE("a fork without a free page for its copy fails and changes nothing") {
  KvCache cache({.layers = 1, .kv_heads = 1, .head_dim = 16}, 2);
  KvSequence a = cache.make_sequence();
  append(cache, a, 1.0f, 100);
  KvSequence b = cache.make_sequence();
  CHECK_FALSE(cache.fork(a, 65, b));
  CHECK(b.pages().empty());
  CHECK(b.tokens() == 0);
  CHECK(cache.fork(a, 64, b));
  CHECK(cache.free_pages() == 0);
}

TEST_CASE("a sequence cut inside a shared page writes to its own copy") {
  KvCache cache({.layers = 1, .kv_heads = 1, .head_dim = 16, .type = KvType::f16}, 3);
  KvSequence a = cache.make_sequence();
  append(cache, a, 1.0f, 128);
  KvSequence b = cache.make_sequence();
  REQUIRE(cache.fork(a, 128, b));
  CHECK(cache.free_pages() == 1);
  cache.truncate(b, 70);
  CHECK(b.tokens() == 70);
  CHECK(cache.pages_for(b, 0) == 0);
  CHECK(cache.pages_for(b, 1) == 1);
  CHECK(cache.pages_for(b, 100) == 2);
  CHECK(cache.pages_for(a, 64) == 1);
  append(cache, b, 2.0f);
  CHECK(cache.free_pages() == 0);
  CHECK(key(cache, a, 0, 0, 70, 0) == 1.0f);
  CHECK(key(cache, b, 0, 0, 70, 0) == 2.0f);
  CHECK(key(cache, b, 0, 0, 69, 0) == 1.0f);
  CHECK(b.pages()[0] == a.pages()[0]);
  // Cut inside the first page now: it needs a copy and none is free once b's second page is full.
  cache.truncate(a, 10);
  CHECK(a.pages().size() == 1);
  CHECK(cache.free_pages() == 1);
  CHECK(cache.reserve(a, 1));
  CHECK(cache.free_pages() == 0);
  cache.truncate(b, 64);
  KvSequence c = cache.make_sequence();
  REQUIRE(cache.fork(b, 64, c));
  append(cache, b, 5.0f);
  cache.truncate(c, 3);
  CHECK_FALSE(cache.reserve(c, 1));
}

TEST_CASE("a cache larger than the address space is refused with an Error") {
  const Error e = error_from(
      [] { KvCache cache({.layers = 1000, .kv_heads = 64, .head_dim = 256}, size_t{1} << 31); });
  CHECK(e.kind() == ErrorKind::no_space);
}

namespace {

// Three full layers and six windowed ones: groups of three.
KvShape windowed_shape(size_t window) {
  return {.layers = 9,
          .kv_heads = 1,
          .head_dim = 16,
          .type = KvType::f16,
          .window = window,
          .windowed = {true, true, false, true, true, false, true, true, false}};
}

// Content that tells layers and positions apart.
void append_numbered(KvCache& cache, KvSequence& s, size_t count) {
  REQUIRE(cache.reserve(s, count));
  std::vector<float> rows(count * 16);
  for (size_t layer = 0; layer < cache.shape().layers; ++layer) {
    for (size_t t = 0; t < count; ++t)
      std::fill_n(rows.begin() + ptrdiff_t(t * 16), 16,
                  float(layer * 200 + (s.tokens() + t) % 200));
    cache.write(s, layer, s.tokens(), count, rows.data(), rows.data(), 16);
  }
  cache.advance(s, count);
}

}  // namespace

TEST_CASE("layers of one kind share pages of one size, and none lies on another") {
  KvCache cache(windowed_shape(100), 30);
  CHECK(cache.groups() == 3);
  CHECK(cache.full_groups() == 1);
  CHECK(KvCache::page_bytes(cache.shape()) == 3 * 2 * 64 * 16 * 2);
  KvSequence s = cache.make_sequence();
  append_numbered(cache, s, 150);
  CHECK(cache.free_pages() == 30 - 3 * 3);
  bool equal = true;
  for (size_t layer = 0; layer < 9; ++layer)
    for (size_t t = 0; t < 150; ++t)
      equal = equal && key(cache, s, layer, 0, t, 7) == float(layer * 200 + t) &&
              value(cache, s, layer, 0, t, 15) == key(cache, s, layer, 0, t, 0);
  CHECK(equal);
}

TEST_CASE("windowed layers keep their window and what a cut back needs") {
  const size_t window = 100;
  KvCache cache(windowed_shape(window), 40);
  KvSequence s = cache.make_sequence();
  for (size_t tokens = 1; tokens <= 700; ++tokens) {
    append_numbered(cache, s, 1);
    cache.trim(s);
    CAPTURE(tokens);
    size_t full = 0, windowed = 0;
    for (size_t i = 0; i < s.pages().size(); ++i) {
      const bool held = s.pages()[i] != kNoPage;
      (i % 3 == 0 ? full : windowed) += held;
      // A token at `tokens − 64` still finds all that it sees.
      const size_t last = i / 3 * 64 + 63, back = tokens < 64 ? 0 : tokens - 64;
      if (last + window >= back + 1) REQUIRE(held);
    }
    CHECK(full == (tokens + 63) / 64);
    CHECK(windowed <= 2 * ((window + kKeptTokens) / 64 + 2));
    CHECK(cache.free_pages() == 40 - full - windowed);
  }
  for (size_t t = 600; t < 700; ++t) CHECK(key(cache, s, 4, 0, t, 3) == float(800 + t % 200));
  CHECK(cache.truncate(s, 640) == 640);
  CHECK(cache.truncate(s, 639) == 639);
  CHECK(cache.truncate(s, 100) == 0);  // its window is gone
  CHECK(cache.free_pages() == 40);
}

TEST_CASE("a windowed sequence is forked where its window is still there, and nowhere else") {
  KvCache cache(windowed_shape(100), 60);
  KvSequence a = cache.make_sequence(), b = cache.make_sequence();
  append_numbered(cache, a, 500);
  REQUIRE(cache.fork(a, 200, b));  // nothing has been trimmed yet
  CHECK(b.tokens() == 200);
  CHECK(value(cache, b, 4, 0, 199, 3) == 999);
  cache.trim(a);
  CHECK_FALSE(cache.fork(a, 300, b));
  CHECK(b.tokens() == 200);
  REQUIRE(cache.fork(a, 450, b));
  CHECK(b.tokens() == 450);
  CHECK(value(cache, b, 7, 0, 449, 3) == 1449);
  CHECK(value(cache, b, 2, 0, 0, 3) == 400);  // a full layer has everything
  append_numbered(cache, b, 30);
  a = KvSequence();
  b = KvSequence();
  CHECK(cache.free_pages() == 60);
}

TEST_CASE("the longest sequence really fits, in the largest steps") {
  for (const size_t pages : {9, 20, 27, 28, 40, 100}) {
    for (const size_t step : {1, 64, 200}) {
      CAPTURE(pages);
      CAPTURE(step);
      KvCache cache(windowed_shape(100), pages);
      const size_t longest = cache.longest_sequence(step);
      CHECK(longest >= 64);
      KvSequence s = cache.make_sequence();
      while (s.tokens() < longest) {
        cache.trim(s);
        append_numbered(cache, s, std::min(step, longest - s.tokens()));
      }
    }
  }
  // Windows make room: 100 pages hold 33 blocks of all layers.
  CHECK(KvCache(windowed_shape(100), 100).longest_sequence(64) > 2 * 33 * 64);
}
