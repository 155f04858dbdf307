// A list of short texts, one after the other in one buffer: four bytes each beside their own, where
// a std::string takes 32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace moru {

class TextList {
 public:
  using value_type = std::string_view;
  static constexpr size_t kMostBytes = UINT32_MAX;  // of all texts

  TextList() = default;
  TextList(const std::vector<std::string>& texts) {  // NOLINT: a list is a list
    for (const std::string& text : texts) push_back(text);
  }
  TextList(std::initializer_list<std::string_view> texts) {
    for (const std::string_view text : texts) push_back(text);
  }

  // Whether `bytes` more have room.
  bool has_room(size_t bytes) const { return bytes <= kMostBytes - bytes_.size(); }
  void push_back(std::string_view text) {
    MORU_CHECK(has_room(text.size()));
    bytes_ += text;
    ends_.push_back(static_cast<uint32_t>(bytes_.size()));
  }
  void reserve(size_t count, size_t bytes) {
    ends_.reserve(count);
    bytes_.reserve(bytes);
  }

  size_t size() const { return ends_.size(); }
  size_t bytes() const { return bytes_.size(); }  // of all texts
  bool empty() const { return ends_.empty(); }
  // Lives until the list changes.
  std::string_view operator[](size_t i) const {
    const size_t begin = i == 0 ? 0 : ends_[i - 1];
    return std::string_view(bytes_).substr(begin, ends_[i] - begin);
  }
  bool operator==(const TextList&) const = default;

 private:
  std::string bytes_;
  std::vector<uint32_t> ends_;
};

}  // namespace moru
