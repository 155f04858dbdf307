// Layout. A page is kPageTokens positions of the layers of one group:
//
//   page → layer of the group → kv head → | K: [head_dim][64 tokens] | V: [64 tokens][head_dim] |
//
// K lies transposed, so that one vector register holds one element of 16 consecutive keys and the
// scores of 16 keys grow side by side without sums across lanes. V is a row per token: the weighted
// sum runs along head_dim. A head's K and V of a page are one stretch of 2 · 64 · head_dim words
// (16 KB for 64 of f16), which is what attention reads at a time. In q8_0 each is followed by 64
// f32 scales, one a token. In i16 too, and words lie in pairs: see PageType in float_kernels.h.
#include "engine/kv_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/half.h"
#include "base/memory.h"
#include "engine/float_kernels.h"

namespace moru {

static_assert(kPageTokens == kKeyPage);

namespace {

// K or V of one head in one page.
size_t head_bytes(const KvShape& shape) {
  const size_t words = kPageTokens * shape.head_dim;
  switch (shape.type) {
    case KvType::f16:
    case KvType::bf16:
      return words * 2;
    case KvType::i16:
      return words * 2 + kPageTokens * sizeof(float);
    case KvType::q8_0:
      return words + kPageTokens * sizeof(float);
    case KvType::f32:
      return words * 4;
  }
  return 0;
}

// Where the values of one token stand in a page: word d at [d · stride].
struct Column {
  size_t at, stride;
};

void put_bf16(const float* x, size_t dim, Column to, std::byte* page) {
  auto* words = reinterpret_cast<uint16_t*>(page) + to.at;
  constexpr float kMost = 3.3895314e38f;
  for (size_t d = 0; d < dim; ++d)
    words[d * to.stride] = bf16_from_f32(x[d] > kMost ? kMost : x[d] < -kMost ? -kMost : x[d]);
}

// codes = round(x · 127 / max|x|) to nearest even; a token with a NaN is all NaN.
void put_q8(const float* x, size_t dim, Column to, size_t token, std::byte* page) {
  // 127 steps of the largest scale stay finite.
  constexpr float kMost = 3.4e38f, kRound = 12582912.0f;  // 1.5 · 2^23
  auto* codes = reinterpret_cast<int8_t*>(page) + to.at;
  auto* scales = reinterpret_cast<float*>(page + kPageTokens * dim);
  float largest = 0;
  bool nan = false;
  for (size_t d = 0; d < dim; ++d) {
    const float size = std::abs(x[d]);
    nan = nan || size != size;
    largest = size > largest ? size : largest;
  }
  largest = std::min(largest, kMost);
  scales[token] = nan ? std::numeric_limits<float>::quiet_NaN() : largest / 127;
  const float inverse = largest > 1e-30f ? 127 / largest : 0;
  for (size_t d = 0; d < dim; ++d) {
    const float code = std::min(127.0f, std::max(-127.0f, nan ? 0.0f : x[d] * inverse));
    codes[d * to.stride] = static_cast<int8_t>((code + kRound) - kRound);
  }
}

size_t blocks_for(size_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

bool is_windowed(const KvShape& shape, size_t layer) {
  return shape.window != 0 && !shape.windowed.empty() && shape.windowed[layer];
}
size_t windowed_layers(const KvShape& shape) {
  size_t count = 0;
  for (size_t layer = 0; layer < shape.layers; ++layer) count += is_windowed(shape, layer);
  return count;
}
size_t layers_per_group(const KvShape& shape) {
  const size_t windowed = windowed_layers(shape);
  return std::gcd(shape.layers - windowed, windowed);
}

}  // namespace

const char* name_of(KvType type) {
  switch (type) {
    case KvType::i16:
      return "i16";
    case KvType::f16:
      return "f16";
    case KvType::bf16:
      return "bf16";
    case KvType::q8_0:
      return "q8_0";
    case KvType::f32:
      return "f32";
  }
  return "";
}

struct KvCache::State {
  struct Place {
    size_t group, at;  // of a layer: its group, its place in the group's pages in bytes
  };

  KvShape shape;
  size_t groups = 1, full_groups = 1;
  size_t head_bytes = 0;  // K or V of one head in one page
  size_t page_bytes = 0;
  std::vector<Place> places;  // by layer
  PageBuffer buffer;          // untouched pages cost nothing yet
  std::byte* memory = nullptr;
  std::vector<uint32_t> free;    // the next page to hand out is the last
  std::vector<uint32_t> owners;  // per page

  std::byte* keys(uint32_t page, size_t layer, size_t kv_head) const {
    return memory + page * page_bytes + places[layer].at + kv_head * 2 * head_bytes;
  }
  uint32_t page_of(const KvSequence& s, size_t block, size_t layer) const {
    return s.pages_[block * groups + places[layer].group];
  }
  size_t blocks(const KvSequence& s) const { return s.pages_.size() / groups; }
  uint32_t take() {
    const uint32_t page = free.back();
    free.pop_back();
    owners[page] = 1;
    return page;
  }
  void let_go(uint32_t page) {
    if (page == kNoPage) return;
    MORU_DCHECK(owners[page] > 0);
    if (--owners[page] == 0) free.push_back(page);
  }
  uint32_t copy_of(uint32_t page) {
    const uint32_t copy = take();
    std::memcpy(memory + copy * page_bytes, memory + page * page_bytes, page_bytes);
    return copy;
  }
  // The pages of the block that the next token goes to; none where a new block begins there.
  std::span<uint32_t> open_block(KvSequence& s) const {
    const size_t at = s.tokens_ / kPageTokens;
    if (at >= blocks(s)) return {};
    return std::span(s.pages_).subspan(at * groups, groups);
  }
};

KvSequence::~KvSequence() {
  if (cache_ != nullptr) cache_->truncate(*this, 0);
}
KvSequence::KvSequence(KvSequence&& other) noexcept
    : cache_(std::exchange(other.cache_, nullptr)),
      pages_(std::move(other.pages_)),
      tokens_(std::exchange(other.tokens_, 0)),
      window_block_(std::exchange(other.window_block_, 0)) {
  other.pages_.clear();
}
KvSequence& KvSequence::operator=(KvSequence&& other) noexcept {
  if (this == &other) return *this;
  if (cache_ != nullptr) cache_->truncate(*this, 0);
  cache_ = std::exchange(other.cache_, nullptr);
  pages_ = std::move(other.pages_);
  tokens_ = std::exchange(other.tokens_, 0);
  window_block_ = std::exchange(other.window_block_, 0);
  other.pages_.clear();
  return *this;
}

KvCache::KvCache(const KvShape& shape, size_t pages) : state_(std::make_unique<State>()) {
  MORU_CHECK(pages > 0);
  if (pages >= kNoPage)
    throw Error(ErrorKind::no_space, {.where = "KV cache",
                                      .what = fmt::format("{} pages of memory are too many", pages),
                                      .cure = "give it less memory"});
  MORU_CHECK(shape.layers > 0 && shape.kv_heads > 0);
  MORU_CHECK(shape.head_dim > 0 && shape.head_dim % 16 == 0);
  State& s = *state_;
  s.shape = shape;
  s.head_bytes = head_bytes(shape);
  s.page_bytes = page_bytes(shape);
  const size_t per_group = layers_per_group(shape);
  s.groups = groups(shape);
  s.full_groups = s.groups - windowed_layers(shape) / per_group;
  size_t full = 0, windowed = s.full_groups * per_group;  // places in the order of groups
  for (size_t layer = 0; layer < shape.layers; ++layer) {
    const size_t place = is_windowed(shape, layer) ? windowed++ : full++;
    s.places.push_back(
        {.group = place / per_group, .at = place % per_group * shape.kv_heads * 2 * s.head_bytes});
  }
  s.buffer = PageBuffer(pages * s.page_bytes);
  s.memory = static_cast<std::byte*>(s.buffer.data());
  s.owners.assign(pages, 0);
  s.free.resize(pages);
  for (size_t i = 0; i < pages; ++i) s.free[i] = static_cast<uint32_t>(pages - 1 - i);
}
KvCache::~KvCache() = default;

size_t KvCache::page_bytes(const KvShape& shape) {
  return layers_per_group(shape) * shape.kv_heads * 2 * head_bytes(shape);
}
size_t KvCache::groups(const KvShape& shape) { return shape.layers / layers_per_group(shape); }
const KvShape& KvCache::shape() const { return state_->shape; }
size_t KvCache::groups() const { return state_->groups; }
size_t KvCache::full_groups() const { return state_->full_groups; }
size_t KvCache::free_pages() const { return state_->free.size(); }
size_t KvCache::total_pages() const { return state_->owners.size(); }

size_t KvCache::bytes() const { return state_->buffer.bytes(); }

size_t KvCache::longest_sequence(size_t step_tokens) const {
  const State& s = *state_;
  const size_t windowed = s.groups - s.full_groups;
  if (windowed == 0) return s.owners.size() / s.groups * kPageTokens;
  // A window, what is kept beyond it, a step's tokens, and a part of a block at either end.
  const size_t most = blocks_for(s.shape.window + kKeptTokens + step_tokens) + 2;
  const size_t all = s.owners.size() / s.groups;
  if (all <= most) return all * kPageTokens;
  if (s.full_groups == 0) return SIZE_MAX;
  return (s.owners.size() - windowed * most) / s.full_groups * kPageTokens;
}

KvSequence KvCache::make_sequence() {
  KvSequence sequence;
  sequence.cache_ = this;
  sequence.pages_.reserve(blocks_for(state_->shape.longest) * state_->groups);
  return sequence;
}

size_t KvCache::first_windowed_block(size_t tokens) const {
  const size_t window = state_->shape.window;
  return tokens + 1 > window ? (tokens + 1 - window) / kPageTokens : 0;
}

void KvCache::hold(uint32_t page) { ++state_->owners[page]; }
void KvCache::let_go(uint32_t page) { state_->let_go(page); }
size_t KvCache::owners(uint32_t page) const { return state_->owners[page]; }

void KvCache::append_block(KvSequence& into, std::span<const uint32_t> pages) {
  const State& s = *state_;
  MORU_CHECK(into.cache_ == this && pages.size() == s.groups);
  MORU_CHECK(into.tokens_ == s.blocks(into) * kPageTokens);
  for (const uint32_t page : pages)
    if (page != kNoPage) ++state_->owners[page];
  into.pages_.insert(into.pages_.end(), pages.begin(), pages.end());
  if (pages.back() == kNoPage) into.window_block_ = s.blocks(into);
  into.tokens_ += kPageTokens;
}

bool KvCache::append_copy(KvSequence& into, std::span<const uint32_t> pages, size_t count) {
  State& s = *state_;
  MORU_CHECK(into.cache_ == this && pages.size() == s.groups && count <= kPageTokens);
  MORU_CHECK(into.tokens_ == s.blocks(into) * kPageTokens);
  if (s.free.size() < s.groups) return false;
  for (const uint32_t page : pages) into.pages_.push_back(s.copy_of(page));
  into.tokens_ += count;
  return true;
}

bool KvCache::fork(const KvSequence& from, size_t tokens, KvSequence& into) {
  MORU_CHECK(from.cache_ == this && tokens <= from.tokens_ && &from != &into);
  const State& s = *state_;
  const bool windowed = s.full_groups < s.groups;
  if (windowed && tokens > 0 && first_windowed_block(tokens) < from.window_block_) return false;
  const size_t whole = tokens / kPageTokens, rest = tokens % kPageTokens;
  KvSequence made = make_sequence();
  const auto block = [&](size_t b) {
    return std::span(from.pages_).subspan(b * s.groups, s.groups);
  };
  for (size_t b = 0; b < whole; ++b) append_block(made, block(b));
  if (rest != 0 && !append_copy(made, block(whole), rest)) return false;
  trim(made);
  into = std::move(made);
  return true;
}

size_t KvCache::pages_for(const KvSequence& sequence, size_t count) const {
  if (count == 0) return 0;
  const State& s = *state_;
  const size_t want = blocks_for(sequence.tokens_ + count), have = s.blocks(sequence);
  size_t pages = want > have ? (want - have) * s.groups : 0;
  // A sequence that was cut inside a shared block would write what others read: it gets a copy.
  const size_t open = sequence.tokens_ / kPageTokens;
  for (size_t group = 0; group < s.groups && open < have; ++group)
    pages += s.owners[sequence.pages_[open * s.groups + group]] > 1;
  return pages;
}

bool KvCache::reserve(KvSequence& sequence, size_t count) {
  MORU_CHECK(sequence.cache_ == this);
  State& s = *state_;
  size_t need = pages_for(sequence, count);
  if (need > s.free.size()) return false;
  if (need == 0) return true;
  for (uint32_t& page : s.open_block(sequence)) {
    if (s.owners[page] == 1) continue;
    const uint32_t shared = std::exchange(page, s.copy_of(page));
    s.let_go(shared);
    --need;
  }
  for (size_t i = 0; i < need; ++i) sequence.pages_.push_back(s.take());
  return true;
}

void KvCache::trim(KvSequence& sequence) {
  State& s = *state_;
  if (s.full_groups == s.groups || sequence.tokens_ <= kKeptTokens) return;
  const size_t seen = first_windowed_block(sequence.tokens_ - kKeptTokens);
  for (; sequence.window_block_ < seen; ++sequence.window_block_)
    for (size_t group = s.full_groups; group < s.groups; ++group)
      s.let_go(std::exchange(sequence.pages_[sequence.window_block_ * s.groups + group], kNoPage));
}

size_t KvCache::truncate(KvSequence& sequence, size_t tokens) {
  MORU_CHECK(sequence.cache_ == this && tokens <= sequence.tokens_);
  State& s = *state_;
  if (s.full_groups < s.groups && first_windowed_block(tokens) < sequence.window_block_) tokens = 0;
  const size_t keep = blocks_for(tokens) * s.groups;
  while (sequence.pages_.size() > keep) {
    s.let_go(sequence.pages_.back());
    sequence.pages_.pop_back();
  }
  if (tokens == 0) sequence.window_block_ = 0;
  sequence.tokens_ = tokens;
  return tokens;
}

void KvCache::write(const KvSequence& sequence, size_t layer, size_t first, size_t count,
                    const float* k, const float* v, size_t ld) {
  const State& s = *state_;
  MORU_DCHECK(layer < s.shape.layers && first + count <= s.blocks(sequence) * kPageTokens);
  const FloatKernels& kernels = float_kernels();
  const KvType type = s.shape.type;
  const size_t dim = s.shape.head_dim;
  for (size_t done = 0; done < count;) {
    const size_t column = (first + done) % kPageTokens;
    const size_t part = std::min(count - done, kPageTokens - column);
    const uint32_t page = s.page_of(sequence, (first + done) / kPageTokens, layer);
    MORU_DCHECK(s.owners[page] == 1);
    for (size_t head = 0; head < s.shape.kv_heads; ++head) {
      std::byte* to = s.keys(page, layer, head);
      const size_t from = done * ld + head * dim;
      if (type != KvType::bf16 && type != KvType::q8_0) {
        const PageType page_type = type == KvType::i16   ? PageType::i16
                                   : type == KvType::f16 ? PageType::f16
                                                         : PageType::f32;
        kernels.put_keys(k + from, ld, column, part, dim, page_type, to);
        kernels.put_values(v + from, ld, column, part, dim, page_type, to + s.head_bytes);
        continue;
      }
      for (size_t t = 0; t < part; ++t) {
        const Column key{column + t, kPageTokens}, value{(column + t) * dim, 1};
        const float *k_row = k + from + t * ld, *v_row = v + from + t * ld;
        if (type == KvType::bf16) {
          put_bf16(k_row, dim, key, to);
          put_bf16(v_row, dim, value, to + s.head_bytes);
        } else {
          put_q8(k_row, dim, key, column + t, to);
          put_q8(v_row, dim, value, column + t, to + s.head_bytes);
        }
      }
    }
    done += part;
  }
}

void KvCache::advance(KvSequence& sequence, size_t count) {
  MORU_DCHECK(sequence.tokens_ + count <= state_->blocks(sequence) * kPageTokens);
  sequence.tokens_ += count;
}

const void* KvCache::keys(const KvSequence& sequence, size_t block, size_t layer,
                          size_t kv_head) const {
  const uint32_t page = state_->page_of(sequence, block, layer);
  return state_->keys(page == kNoPage ? 0 : page, layer, kv_head);
}
const void* KvCache::values(const KvSequence& sequence, size_t block, size_t layer,
                            size_t kv_head) const {
  return static_cast<const std::byte*>(keys(sequence, block, layer, kv_head)) + state_->head_bytes;
}

void KvCache::widen(const KvSequence& sequence, size_t block, size_t layer, size_t kv_head,
                    float* keys_to, float* values_to) const {
  const FloatKernels& kernels = float_kernels();
  const size_t dim = state_->shape.head_dim, words = kPageTokens * dim;
  const void* k = keys(sequence, block, layer, kv_head);
  const void* v = values(sequence, block, layer, kv_head);
  if (state_->shape.type == KvType::bf16) {
    kernels.widen_bf16(static_cast<const uint16_t*>(k), words, keys_to);
    kernels.widen_bf16(static_cast<const uint16_t*>(v), words, values_to);
    return;
  }
  MORU_CHECK(state_->shape.type == KvType::q8_0);
  const auto *k_codes = static_cast<const int8_t*>(k), *v_codes = static_cast<const int8_t*>(v);
  kernels.widen_q8_keys(k_codes, reinterpret_cast<const float*>(k_codes + words), dim, keys_to);
  kernels.widen_q8_values(v_codes, reinterpret_cast<const float*>(v_codes + words), dim, values_to);
}

}  // namespace moru
