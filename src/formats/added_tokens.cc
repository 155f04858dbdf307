#include "formats/added_tokens.h"

#include <algorithm>

#include "base/error.h"
#include "formats/unicode.h"

namespace moru {
namespace {

uint64_t edge_key(uint32_t node, uint8_t byte) { return (uint64_t{node} << 8 | byte) + 1; }
size_t edge_place(uint64_t key, size_t size) {
  return static_cast<size_t>((key * 0x9e3779b97f4a7c15u) >> 32) & (size - 1);
}

}  // namespace

void AddedTokens::add(AddedToken token) {
  MORU_CHECK(!token.content.empty());
  begins_[static_cast<uint8_t>(token.content[0])] = true;
  first_ = token.content[0];
  one_first_ = std::count(begins_.begin(), begins_.end(), true) == 1;
  uint32_t node = 0;
  for (const char c : token.content) {
    const auto byte = static_cast<uint8_t>(c);
    uint32_t next = child(node, byte);
    if (next == 0) {
      if (edge_count_ * 2 >= edges_.size()) {
        std::vector<Edge> bigger(edges_.size() * 2);
        for (const Edge& e : edges_) {
          if (e.key == 0) continue;
          size_t i = edge_place(e.key, bigger.size());
          while (bigger[i].key != 0) i = (i + 1) & (bigger.size() - 1);
          bigger[i] = e;
        }
        edges_.swap(bigger);
      }
      next = static_cast<uint32_t>(token_of_node_.size());
      token_of_node_.push_back(-1);
      const uint64_t key = edge_key(node, byte);
      size_t i = edge_place(key, edges_.size());
      while (edges_[i].key != 0) i = (i + 1) & (edges_.size() - 1);
      edges_[i] = {key, next};
      ++edge_count_;
    }
    node = next;
  }
  if (token_of_node_[node] >= 0) return;
  token_of_node_[node] = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(std::move(token));
}

uint32_t AddedTokens::child(uint32_t node, uint8_t byte) const {
  const uint64_t key = edge_key(node, byte);
  for (size_t i = edge_place(key, edges_.size()); edges_[i].key != 0;
       i = (i + 1) & (edges_.size() - 1))
    if (edges_[i].key == key) return edges_[i].child;
  return 0;
}

const AddedToken* AddedTokens::find(std::string_view text, size_t& from) const {
  if (tokens_.empty()) return nullptr;
  for (; from < text.size(); ++from) {
    // In most vocabularies all begin with "<".
    if (one_first_) from = std::min(text.find(first_, from), text.size() - 1);
    if (!begins_[static_cast<uint8_t>(text[from])]) continue;
    int32_t longest = -1;
    uint32_t node = 0;
    for (size_t at = from; at < text.size(); ++at) {
      node = child(node, static_cast<uint8_t>(text[at]));
      if (node == 0) break;
      if (token_of_node_[node] >= 0) longest = token_of_node_[node];
    }
    if (longest >= 0) return &tokens_[static_cast<size_t>(longest)];
  }
  return nullptr;
}

bool AddedTokens::touches_word(std::string_view text, size_t begin, size_t end) {
  const auto is_word = [](Character c) { return (class_of(c.code) & kWord) != 0; };
  return (begin > 0 && is_word(last_character(text.substr(0, begin)))) ||
         (end < text.size() && is_word(first_character(text.substr(end))));
}

std::pair<size_t, size_t> AddedTokens::strip(const AddedToken& token, std::string_view text,
                                             size_t begin, size_t end, size_t done) {
  while (token.lstrip && begin > done) {
    const Character c = last_character(text.substr(0, begin));
    if ((class_of(c.code) & kSpace) == 0) break;
    begin -= c.bytes;
  }
  while (token.rstrip && end < text.size()) {
    const Character c = first_character(text.substr(end));
    if ((class_of(c.code) & kSpace) == 0) break;
    end += c.bytes;
  }
  return {begin, end};
}

}  // namespace moru
