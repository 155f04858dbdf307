#include "engine/prefix_tree.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <vector>

#include "base/half.h"
#include "base/random.h"

using namespace moru;

namespace {

constexpr size_t kDim = 16;

KvShape shape(size_t window = 0) {
  KvShape s{.layers = 3, .kv_heads = 1, .head_dim = kDim, .type = KvType::f16};
  if (window > 0) {
    s.window = window;
    s.windowed = {true, false, true};
  }
  return s;
}

// What a layer keeps of a position tells the whole beginning up to there.
float content(std::span<const TokenId> tokens, size_t position, size_t layer) {
  uint32_t hash = static_cast<uint32_t>(layer);
  for (size_t t = 0; t <= position; ++t)
    hash = hash * 2654435761u + static_cast<uint32_t>(tokens[t]) + 1;
  return static_cast<float>(hash >> 22);  // 10 bits: exact in f16
}

void compute(KvCache& cache, std::span<const TokenId> tokens, KvSequence& s, size_t until) {
  cache.trim(s);
  const size_t first = s.tokens(), count = until - first;
  REQUIRE(cache.reserve(s, count));
  for (size_t layer = 0; layer < cache.shape().layers; ++layer) {
    std::vector<float> rows(count * kDim);
    for (size_t t = 0; t < count; ++t)
      std::fill_n(rows.begin() + static_cast<ptrdiff_t>(t * kDim), kDim,
                  content(tokens, first + t, layer));
    cache.write(s, layer, first, count, rows.data(), rows.data(), kDim);
  }
  cache.advance(s, count);
}

// Whether the next token finds what it sees.
bool holds(const KvCache& cache, std::span<const TokenId> tokens, const KvSequence& s) {
  for (size_t layer = 0; layer < cache.shape().layers; ++layer) {
    const bool windowed = cache.shape().window > 0 && cache.shape().windowed[layer];
    const size_t next = s.tokens() + 1, window = cache.shape().window;
    for (size_t t = windowed && next > window ? next - window : 0; t < s.tokens(); ++t) {
      const auto* keys = static_cast<const uint16_t*>(cache.keys(s, t / 64, layer, 0));
      if (f32_from_f16(keys[3 * 64 + t % 64]) != content(tokens, t, layer)) return false;
    }
  }
  return true;
}

std::vector<TokenId> numbers(size_t count, TokenId from = 0) {
  std::vector<TokenId> ids(count);
  for (size_t i = 0; i < count; ++i) ids[i] = from + static_cast<TokenId>(i);
  return ids;
}

void keep_new(KvCache& cache, PrefixTree& tree, const std::vector<TokenId>& tokens) {
  KvSequence s = cache.make_sequence();
  compute(cache, tokens, s, tokens.size());
  tree.keep(tokens, s, PrefixTree::At::end);
}

}  // namespace

TEST_CASE("what was kept is resumed as far as two prompts agree, whole blocks by reference") {
  KvCache cache(shape(), 20);
  PrefixTree tree(cache);
  const std::vector<TokenId> first = numbers(220);
  keep_new(cache, tree, first);
  CHECK(cache.free_pages() == 16);
  KvSequence s;
  CHECK(tree.resume(first, s) == 220);
  CHECK(holds(cache, first, s));
  CHECK(cache.free_pages() == 15);  // the copy of the last, partial block

  std::vector<TokenId> other = first;
  other[150] = -1;
  CHECK(tree.known(other) == 150);
  CHECK(tree.resume(other, s) == 150);
  CHECK(holds(cache, other, s));
  other[140] = -1;  // 12 tokens into a block: not worth a copy
  CHECK(tree.resume(other, s) == 128);
  CHECK(cache.free_pages() == 16);
  other[0] = -1;
  CHECK(tree.resume(other, s) == 0);
  CHECK(tree.resume({}, s) == 0);
}

TEST_CASE("a sequence that goes on takes the place of its kept end; one known is not kept twice") {
  KvCache cache(shape(), 20);
  PrefixTree tree(cache);
  const std::vector<TokenId> all = numbers(300);
  {
    KvSequence s = cache.make_sequence();
    compute(cache, all, s, 100);
    tree.keep(all, s, PrefixTree::At::end);
    CHECK(cache.free_pages() == 18);
  }
  KvSequence s;
  REQUIRE(tree.resume(all, s) == 100);
  compute(cache, all, s, 210);
  tree.keep(all, s, PrefixTree::At::end);
  s = {};
  CHECK(cache.free_pages() == 16);
  keep_new(cache, tree, all);
  CHECK(cache.free_pages() == 15);
  keep_new(cache, tree, all);
  keep_new(cache, tree, numbers(250));
  CHECK(cache.free_pages() == 15);
  CHECK(tree.known(all) == 300);
  tree.clear();
  CHECK(tree.empty());
  CHECK(cache.free_pages() == 20);
}

TEST_CASE("the least recently used go first, from their ends") {
  KvCache cache(shape(), 12);
  PrefixTree tree(cache);
  const std::vector<TokenId> a = numbers(256, 1000), b = numbers(256, 2000), c = numbers(256, 3000);
  for (const auto* ids : {&a, &b, &c}) keep_new(cache, tree, *ids);
  CHECK(cache.free_pages() == 0);
  KvSequence s;
  CHECK(tree.resume(a, s) == 256);
  s = {};
  for (const size_t left : {192, 128, 64, 0}) {
    REQUIRE(tree.evict());
    CHECK(tree.known(b) == left);
  }
  CHECK(tree.known(a) == 256);
  CHECK(tree.known(c) == 256);
  // What a sequence uses gives nothing back and stays.
  CHECK(tree.resume(c, s) == 256);
  while (tree.evict()) {
  }
  CHECK(tree.known(a) == 0);
  CHECK(tree.known(c) == 256);
  CHECK(cache.free_pages() == 8);
}

TEST_CASE("a copy makes its own room, and does without where there is none") {
  KvCache cache(shape(), 4);
  PrefixTree tree(cache);
  const std::vector<TokenId> a = numbers(100, 1000), b = numbers(100, 2000);
  keep_new(cache, tree, a);
  keep_new(cache, tree, b);
  CHECK(cache.free_pages() == 0);
  KvSequence s;
  CHECK(tree.resume(b, s) == 100);  // a's end went
  CHECK(tree.known(a) == 64);
  KvSequence t;
  CHECK(tree.resume(b, t) == 100);  // then the rest of it
  CHECK(tree.known(a) == 0);
  KvSequence u;
  // Nothing is left but b's own end, which nobody else needs.
  const size_t length = tree.resume(b, u);
  CHECK((length == 64 || length == 100));
  CHECK(holds(cache, b, u));
}

TEST_CASE("with windows a beginning is resumed only where the window's pages are") {
  const size_t window = 100;
  KvCache cache(shape(window), 60);
  CHECK(cache.groups() == 3);
  PrefixTree tree(cache);
  const std::vector<TokenId> all = numbers(640);
  {
    KvSequence s = cache.make_sequence();
    for (size_t until = 64; until <= 640; until += 64) {
      compute(cache, all, s, until);
      tree.keep(all, s, until == 640 ? PrefixTree::At::end : PrefixTree::At::way);
    }
  }
  CHECK(cache.free_pages() == 30);  // the tree has all blocks of all groups
  std::vector<TokenId> other = all;
  other[330] = -1;
  CHECK(tree.known(other) == 320);
  KvSequence s;
  REQUIRE(tree.resume(other, s) == 320);
  CHECK(holds(cache, other, s));
  s = {};
  // Windowed pages go first where nobody resumed or ended: not those before 320 and before 640.
  for (int i = 0; i < 4; ++i) REQUIRE(tree.evict());
  CHECK(tree.known(all) == 640);
  CHECK(tree.known(other) == 320);
  std::vector<TokenId> third = all;
  third[200] = -1;
  CHECK(tree.known(third) < 192);
  while (tree.evict()) {
    REQUIRE(tree.resume(all, s) == tree.known(all));
    CHECK(holds(cache, all, s));
    s = {};
  }
  CHECK(cache.free_pages() == 60);
  CHECK(tree.empty());
}

TEST_CASE("where all layers are windowed, nodes run out first: the least recently used goes") {
  KvShape windowed{.layers = 2, .kv_heads = 1, .head_dim = kDim, .type = KvType::f16};
  windowed.window = 50;
  windowed.windowed = {true, true};
  KvCache cache(windowed, 16);
  PrefixTree tree(cache);
  const std::vector<TokenId> a = numbers(7 * 64), b = numbers(7 * 64, 1000),
                             c = numbers(7 * 64, 2000);
  // A whole sequence takes seven nodes and, behind its window, two pages.
  const auto keep = [&](const std::vector<TokenId>& tokens) {
    KvSequence s = cache.make_sequence();
    for (size_t until = 64; until <= tokens.size(); until += 64) compute(cache, tokens, s, until);
    tree.keep(tokens, s, PrefixTree::At::end);
  };
  keep(a);
  keep(b);
  REQUIRE(cache.free_pages() > 8);
  KvSequence s;
  REQUIRE(tree.resume(a, s) == a.size());
  s = {};
  keep(c);
  CHECK(tree.known(a) == a.size());
  CHECK(tree.known(b) == 0);
  CHECK(tree.known(c) == c.size());
}

TEST_CASE("whatever is kept, resumed and evicted, a resumed sequence holds its own past") {
  const auto seed =
      static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  MESSAGE("seed " << seed);
  std::vector<KvShape> shapes = {shape(), shape(40), shape(100)};
  shapes.push_back(shape(70));
  shapes.back().windowed = {true, true, true};  // nodes without any page
  for (size_t which = 0; which < shapes.size(); ++which) {
    CAPTURE(which);
    Random random(seed, which);
    KvCache cache(shapes[which], 40 * KvCache::groups(shapes[which]));
    PrefixTree tree(cache);
    struct Live {
      std::vector<TokenId> tokens;
      KvSequence sequence;
    };
    std::vector<Live> live;
    // Prompts are paths in a tree of few branches, so that they share.
    const auto prompt = [&] {
      std::vector<TokenId> ids;
      const size_t length = 1 + random.below(500);
      TokenId branch = 0;
      for (size_t t = 0; t < length; ++t) {
        if (t % 50 == 17) branch = branch * 2 + static_cast<TokenId>(random.below(4) == 0);
        ids.push_back(branch);
      }
      return ids;
    };
    for (int round = 0; round < 400; ++round) {
      const size_t action = random.below(10);
      if (action < 3 && live.size() < 4) {
        Live one{prompt(), {}};
        const size_t known = tree.known(one.tokens);
        const size_t got = tree.resume(one.tokens, one.sequence);
        REQUIRE(got <= known);
        REQUIRE(got / 64 == known / 64);
        REQUIRE(holds(cache, one.tokens, one.sequence));
        live.push_back(std::move(one));
      } else if (action < 8 && !live.empty()) {
        Live& one = live[random.below(live.size())];
        const size_t have = one.sequence.tokens(), left = one.tokens.size() - have;
        if (left > 0) {
          const size_t count = 1 + random.below(std::min<size_t>(left, 150));
          cache.trim(one.sequence);
          bool room = cache.pages_for(one.sequence, count) <= cache.free_pages();
          while (!room && tree.evict())
            room = cache.pages_for(one.sequence, count) <= cache.free_pages();
          if (!room) continue;
          compute(cache, one.tokens, one.sequence, have + count);
          tree.keep(one.tokens, one.sequence, PrefixTree::At::way);
        }
        REQUIRE(holds(cache, one.tokens, one.sequence));
      } else if (!live.empty()) {
        const auto at = live.begin() + static_cast<ptrdiff_t>(random.below(live.size()));
        if (random.below(3) > 0) tree.keep(at->tokens, at->sequence, PrefixTree::At::end);
        live.erase(at);
      }
      if (random.below(40) == 0) tree.evict();
    }
    live.clear();
    while (tree.evict()) {
    }
    tree.clear();
    CHECK(cache.free_pages() == cache.total_pages());
  }
}
