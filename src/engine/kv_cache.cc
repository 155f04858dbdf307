// Layout. A page is kPageTokens positions of everything:
//
//   page → layer → kv head → | K: [head_dim][64 tokens] | V: [64 tokens][head_dim] |
//
// K lies transposed, so that one vector register holds one element of 16 consecutive keys and the
// scores of 16 keys grow side by side without sums across lanes. V is a row per token: the weighted
// sum runs along head_dim. A head's K and V of a page are one stretch of 2 · 64 · head_dim words
// (16 KB for 64 of f16), which is what attention reads at a time.
#include "engine/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/memory.h"
#include "engine/float_kernels.h"

namespace moru {

static_assert(kPageTokens == kKeyPage);

struct KvCache::State {
  KvShape shape;
  size_t word = 2;        // bytes
  size_t head_bytes = 0;  // K or V of one head in one page
  size_t page_bytes = 0;
  PageBuffer buffer;  // untouched pages cost nothing yet
  std::byte* memory = nullptr;
  std::vector<uint32_t> free;   // the next page to hand out is the last
  std::vector<uint32_t> users;  // sequences per page

  std::byte* keys(uint32_t page, size_t layer, size_t kv_head) const {
    return memory + page * page_bytes + (layer * shape.kv_heads + kv_head) * 2 * head_bytes;
  }
  uint32_t take() {
    const uint32_t page = free.back();
    free.pop_back();
    users[page] = 1;
    return page;
  }
  void let_go(uint32_t page) {
    MORU_DCHECK(users[page] > 0);
    if (--users[page] == 0) free.push_back(page);
  }
  // A sequence that was cut inside a shared page would write what others read.
  bool writes_shared(const KvSequence& sequence) const {
    const size_t at = sequence.tokens() / kPageTokens;
    return at < sequence.pages().size() && users[sequence.pages()[at]] > 1;
  }
  uint32_t copy_of(uint32_t page) {
    const uint32_t copy = take();
    std::memcpy(memory + copy * page_bytes, memory + page * page_bytes, page_bytes);
    return copy;
  }
};

KvSequence::~KvSequence() {
  if (cache_ != nullptr) cache_->truncate(*this, 0);
}
KvSequence::KvSequence(KvSequence&& other) noexcept
    : cache_(std::exchange(other.cache_, nullptr)),
      pages_(std::move(other.pages_)),
      tokens_(std::exchange(other.tokens_, 0)) {
  other.pages_.clear();
}
KvSequence& KvSequence::operator=(KvSequence&& other) noexcept {
  if (this == &other) return *this;
  if (cache_ != nullptr) cache_->truncate(*this, 0);
  cache_ = std::exchange(other.cache_, nullptr);
  pages_ = std::move(other.pages_);
  tokens_ = std::exchange(other.tokens_, 0);
  other.pages_.clear();
  return *this;
}

KvCache::KvCache(const KvShape& shape, size_t pages) : state_(std::make_unique<State>()) {
  MORU_CHECK(pages > 0 && pages < UINT32_MAX);
  MORU_CHECK(shape.layers > 0 && shape.kv_heads > 0);
  MORU_CHECK(shape.head_dim > 0 && shape.head_dim % 16 == 0);
  State& s = *state_;
  s.shape = shape;
  s.word = shape.type == KvType::f16 ? 2 : 4;
  s.head_bytes = kPageTokens * shape.head_dim * s.word;
  s.page_bytes = page_bytes(shape);
  s.buffer = PageBuffer(pages * s.page_bytes);
  s.memory = static_cast<std::byte*>(s.buffer.data());
  s.users.assign(pages, 0);
  s.free.resize(pages);
  for (size_t i = 0; i < pages; ++i) s.free[i] = static_cast<uint32_t>(pages - 1 - i);
}
KvCache::~KvCache() = default;

size_t KvCache::page_bytes(const KvShape& shape) {
  return shape.layers * shape.kv_heads * 2 * kPageTokens * shape.head_dim *
         (shape.type == KvType::f16 ? 2 : 4);
}
const KvShape& KvCache::shape() const { return state_->shape; }
size_t KvCache::free_pages() const { return state_->free.size(); }
size_t KvCache::total_pages() const { return state_->users.size(); }

KvSequence KvCache::make_sequence() {
  KvSequence sequence;
  sequence.cache_ = this;
  return sequence;
}

bool KvCache::fork(const KvSequence& from, size_t tokens, KvSequence& into) {
  MORU_CHECK(from.cache_ == this && tokens <= from.tokens_ && &from != &into);
  State& s = *state_;
  const size_t full = tokens / kPageTokens;
  const bool partial = tokens % kPageTokens != 0;
  if (partial && s.free.empty()) return false;
  KvSequence made = make_sequence();
  made.pages_.assign(from.pages_.begin(), from.pages_.begin() + static_cast<ptrdiff_t>(full));
  for (const uint32_t page : made.pages_) ++s.users[page];
  if (partial) made.pages_.push_back(s.copy_of(from.pages_[full]));
  made.tokens_ = tokens;
  into = std::move(made);
  return true;
}

size_t KvCache::pages_for(const KvSequence& sequence, size_t count) const {
  if (count == 0) return 0;
  const size_t want = (sequence.tokens_ + count + kPageTokens - 1) / kPageTokens;
  const size_t have = sequence.pages_.size();
  return (want > have ? want - have : 0) + (state_->writes_shared(sequence) ? 1 : 0);
}

bool KvCache::reserve(KvSequence& sequence, size_t count) {
  MORU_CHECK(sequence.cache_ == this);
  State& s = *state_;
  size_t need = pages_for(sequence, count);
  if (need > s.free.size()) return false;
  if (need == 0) return true;
  if (s.writes_shared(sequence)) {
    uint32_t& page = sequence.pages_[sequence.tokens_ / kPageTokens];
    const uint32_t shared = std::exchange(page, s.copy_of(page));
    s.let_go(shared);
    --need;
  }
  for (size_t i = 0; i < need; ++i) sequence.pages_.push_back(s.take());
  return true;
}

void KvCache::truncate(KvSequence& sequence, size_t tokens) {
  MORU_CHECK(sequence.cache_ == this && tokens <= sequence.tokens_);
  const size_t keep = (tokens + kPageTokens - 1) / kPageTokens;
  while (sequence.pages_.size() > keep) {
    state_->let_go(sequence.pages_.back());
    sequence.pages_.pop_back();
  }
  sequence.tokens_ = tokens;
}

void KvCache::write(const KvSequence& sequence, size_t layer, size_t first, size_t count,
                    const float* k, const float* v, size_t ld) {
  const State& s = *state_;
  MORU_DCHECK(layer < s.shape.layers && first + count <= sequence.pages_.size() * kPageTokens);
  const FloatKernels& kernels = float_kernels();
  const bool f16 = s.shape.type == KvType::f16;
  const size_t dim = s.shape.head_dim;
  for (size_t done = 0; done < count;) {
    const size_t column = (first + done) % kPageTokens;
    const size_t part = std::min(count - done, kPageTokens - column);
    const uint32_t page = sequence.pages_[(first + done) / kPageTokens];
    MORU_DCHECK(s.users[page] == 1);
    for (size_t head = 0; head < s.shape.kv_heads; ++head) {
      std::byte* to = s.keys(page, layer, head);
      const size_t from = done * ld + head * dim;
      kernels.put_keys(k + from, ld, column, part, dim, f16, to);
      kernels.put_values(v + from, ld, column, part, dim, f16, to + s.head_bytes);
    }
    done += part;
  }
}

void KvCache::advance(KvSequence& sequence, size_t count) {
  MORU_DCHECK(sequence.tokens_ + count <= sequence.pages_.size() * kPageTokens);
  sequence.tokens_ += count;
}

const void* KvCache::keys(uint32_t page, size_t layer, size_t kv_head) const {
  return state_->keys(page, layer, kv_head);
}
const void* KvCache::values(uint32_t page, size_t layer, size_t kv_head) const {
  return state_->keys(page, layer, kv_head) + state_->head_bytes;
}

}  // namespace moru
