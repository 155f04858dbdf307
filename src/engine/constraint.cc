#include "engine/constraint.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "engine/json_schema.h"
#include "engine/regex_grammar.h"

namespace moru {
namespace {

// States and masks that are kept; beyond, all are made anew.
constexpr size_t kMaxStates = 50'000;
constexpr size_t kMaxMaskBytes = 64 << 20;
// An answer's own states; beyond, all but the current one are forgotten.
constexpr size_t kMaxExactStates = 1'000;
constexpr size_t kKnownLanguages = 16;

void set_bit(std::span<uint64_t> bits, TokenId id) {
  bits[static_cast<size_t>(id) / 64] |= uint64_t{1} << (static_cast<size_t>(id) % 64);
}

// How many plain characters `bytes` is; nullopt if it is anything else.
std::optional<size_t> plain_length(std::string_view bytes) {
  size_t count = 0;
  for (const CodePoint c : CodePoints(bytes)) {
    if (!c.well_formed || c.value < 0x20 || c.value == '"' || c.value == '\\') return std::nullopt;
    ++count;
  }
  return count;
}

Vocabulary::Tree make_tree(std::vector<std::pair<std::string, TokenId>> tokens) {
  std::sort(tokens.begin(), tokens.end());
  Vocabulary::Tree tree;
  std::vector<uint32_t> open;  // nodes on the way to the last token
  std::string_view last;
  const auto close_to = [&](size_t depth) {
    for (; open.size() > depth; open.pop_back())
      tree.nodes[open.back()].after = static_cast<uint32_t>(tree.nodes.size());
  };
  for (const auto& [bytes, id] : tokens) {
    const auto shared = static_cast<size_t>(
        std::mismatch(last.begin(), last.end(), bytes.begin(), bytes.end()).first - last.begin());
    close_to(shared);
    for (size_t i = shared; i < bytes.size(); ++i) {
      open.push_back(static_cast<uint32_t>(tree.nodes.size()));
      tree.nodes.push_back({.after = 0,
                            .first = static_cast<uint32_t>(tree.tokens.size()),
                            .depth = static_cast<uint16_t>(i + 1),
                            .byte = static_cast<uint8_t>(bytes[i])});
    }
    tree.tokens.push_back(id);
    last = bytes;
  }
  close_to(0);
  tree.nodes.push_back({.after = 0, .first = static_cast<uint32_t>(tree.tokens.size())});
  return tree;
}

Program program_of(const ConstraintSource& source) {
  switch (source.kind) {
    case ConstraintSource::Kind::json_object:
      return json_object_program();
    case ConstraintSource::Kind::json_schema:
      return json_schema_program(source.text);
    case ConstraintSource::Kind::regex:
      return regex_program(source.text);
  }
  MORU_CHECK(false);
}

}  // namespace

Language::Language(const ConstraintSource& source) : program_(program_of(source)) {}

bool Language::accepts(std::string_view text) const {
  Automaton automaton(program_);
  Automaton::State state = automaton.start();
  for (const char c : text) {
    state = automaton.next(state, static_cast<uint8_t>(c));
    if (state == Automaton::kDead) return false;
  }
  return automaton.accepts(state);
}

std::shared_ptr<const Language> LanguageCache::find(const ConstraintSource& source) {
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [known, language] : known_)
      if (known == source) return language;
  }
  // Outside of the lock: a large schema takes its time.
  auto made = std::make_shared<const Language>(source);
  const std::lock_guard lock(mutex_);
  if (known_.size() == kKnownLanguages) known_.pop_front();
  known_.emplace_back(source, made);
  return made;
}

Vocabulary::Vocabulary(const Tokenizer& tokenizer, size_t vocab) : vocab_(vocab) {
  using Tokens = std::vector<std::pair<std::string, TokenId>>;
  std::array<Tokens, kLayers> plain, others;
  const size_t words = (vocab + 63) / 64;
  for (Layer& layer : layers_) layer.plain_bits.resize((kPlainCharacters + 1) * words);
  const size_t count = std::min(vocab, tokenizer.vocab_size());
  for (size_t i = 0; i < count; ++i) {
    const auto id = static_cast<TokenId>(i);
    std::string bytes = tokenizer.bytes_of(id);
    if (bytes.empty() || bytes.size() > std::numeric_limits<uint16_t>::max()) continue;
    size_t at = 0;
    while (bytes.size() > kLayerBytes[at]) ++at;
    Layer& layer = layers_[at];
    layer.longest = std::max(layer.longest, bytes.size());
    const std::optional<size_t> length = plain_length(bytes);
    if (!length || *length > kPlainCharacters) {
      others[at].emplace_back(std::move(bytes), id);
      continue;
    }
    for (size_t n = *length; n <= kPlainCharacters; ++n)
      set_bit(std::span(layer.plain_bits).subspan(n * words, words), id);
    plain[at].emplace_back(std::move(bytes), id);
  }
  for (size_t at = 0; at < kLayers; ++at) {
    layers_[at].plain = make_tree(std::move(plain[at]));
    layers_[at].others = make_tree(std::move(others[at]));
  }
}

std::span<const uint64_t> Vocabulary::Layer::plain_up_to(size_t characters) const {
  const size_t words = plain_bits.size() / (kPlainCharacters + 1);
  return std::span(plain_bits).subspan(std::min(characters, kPlainCharacters) * words, words);
}

TokenMasks::TokenMasks(std::shared_ptr<const Language> language,
                       std::shared_ptr<const Vocabulary> vocabulary)
    : language_(std::move(language)),
      vocabulary_(std::move(vocabulary)),
      mask_((vocabulary_->vocab() + 63) / 64) {
  size_t longest = 0;
  for (const Vocabulary::Layer& layer : vocabulary_->layers())
    longest = std::max(longest, layer.longest);
  path_.resize(longest + 1);
  make_layers();
}

void TokenMasks::make_layers() {
  layers_.clear();
  for (const Vocabulary::Layer& layer : vocabulary_->layers())
    layers_.push_back({.automaton = Automaton(language_->program(), layer.longest), .masks = {}});
}

void TokenMasks::add_tokens(const Vocabulary::Tree& tree, Automaton& automaton,
                            Automaton::State state, std::vector<uint64_t>& bits) {
  path_[0] = state;
  const size_t end = tree.nodes.size() - 1;
  for (size_t i = 0; i < end;) {
    const Vocabulary::TreeNode& node = tree.nodes[i];
    const Automaton::State reached = automaton.next(path_[node.depth - 1], node.byte);
    if (reached == Automaton::kDead) {
      i = node.after;
      continue;
    }
    path_[node.depth] = reached;
    for (uint32_t t = node.first; t < tree.nodes[i + 1].first; ++t) set_bit(bits, tree.tokens[t]);
    ++i;
  }
}

const std::vector<uint64_t>& TokenMasks::layer_mask(size_t layer, const Automaton& exact,
                                                    Automaton::State state) {
  const Vocabulary::Layer& tokens = vocabulary_->layers()[layer];
  auto& [automaton, masks] = layers_[layer];
  const Automaton::State near = automaton.import(exact, state);
  const auto [found, is_new] = masks.try_emplace(near);
  std::vector<uint64_t>& bits = found->second;
  if (!is_new) return bits;
  bits.resize(mask_.size());
  const Automaton::PlainRoom room = automaton.plain_room(near);
  if (room.characters > 0) {
    const auto plain = tokens.plain_up_to(room.characters);
    std::copy(plain.begin(), plain.end(), bits.begin());
  }
  // Plain tokens are known already where there is room for all, or for no more than there is.
  const size_t most = std::min(tokens.longest, Vocabulary::kPlainCharacters);
  if (room.characters < most && !room.exact) add_tokens(tokens.plain, automaton, near, bits);
  add_tokens(tokens.others, automaton, near, bits);
  return bits;
}

std::span<const uint64_t> TokenMasks::mask(const Automaton& exact, Automaton::State state) {
  size_t states = 0, masks = 0;
  for (const Layer& layer : layers_) {
    states += layer.automaton.states();
    masks += layer.masks.size();
  }
  if (states > kMaxStates || masks * mask_.size() * 8 > kMaxMaskBytes) make_layers();
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const std::vector<uint64_t>& bits = layer_mask(layer, exact, state);
    for (size_t word = 0; word < mask_.size(); ++word)
      mask_[word] = layer == 0 ? bits[word] : mask_[word] | bits[word];
  }
  return mask_;
}

Constraint::Constraint(std::shared_ptr<TokenMasks> masks)
    : masks_(std::move(masks)), exact_(masks_->language().program()), state_(exact_.start()) {}

bool Constraint::take(std::string_view bytes) {
  if (exact_.states() > kMaxExactStates) {
    Automaton fresh(masks_->language().program());
    state_ = fresh.import(exact_, state_);
    exact_ = std::move(fresh);
  }
  Automaton::State state = state_;
  for (const char c : bytes) {
    state = exact_.next(state, static_cast<uint8_t>(c));
    if (state == Automaton::kDead) return false;
  }
  state_ = state;
  return true;
}

std::string Constraint::forced(size_t most) {
  std::string bytes;
  Automaton::State state = state_;
  while (bytes.size() < most) {
    const std::optional<uint8_t> byte = exact_.only_byte(state);
    if (!byte) break;
    bytes += static_cast<char>(*byte);
    state = exact_.next(state, *byte);
  }
  return bytes;
}

void apply_mask(std::span<const uint64_t> mask, std::span<float> logits) {
  for (size_t word = 0; word < mask.size(); ++word) {
    const size_t at = word * 64, count = std::min<size_t>(64, logits.size() - at);
    float* x = &logits[at];
    uint64_t gone = ~mask[word];
    if (count < 64) gone &= (uint64_t{1} << count) - 1;
    if (std::popcount(gone) <= 32) {
      for (; gone != 0; gone &= gone - 1) x[std::countr_zero(gone)] = -INFINITY;
      continue;
    }
    // Most go: those that stay are put back.
    float kept[64];
    for (uint64_t stay = mask[word]; stay != 0; stay &= stay - 1)
      kept[std::countr_zero(stay)] = x[std::countr_zero(stay)];
    std::fill_n(x, count, -INFINITY);
    for (uint64_t stay = mask[word]; stay != 0; stay &= stay - 1)
      x[std::countr_zero(stay)] = kept[std::countr_zero(stay)];
  }
}

}  // namespace moru
