// Reads outside data byte by byte, knowing how many are left: no read can pass the end, and every
// refusal names the file and the field. Integers are little endian.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"

namespace moru {

class Cursor {
 public:
  // `where` names the file in errors; `data` must outlive the cursor.
  Cursor(std::string where, std::span<const std::byte> data)
      : where_(std::move(where)), data_(data) {}

  size_t position() const { return at_; }
  size_t left() const { return data_.size() - at_; }
  const std::string& where() const { return where_; }

  uint8_t u8(std::string_view field) { return read<uint8_t>(field); }
  uint16_t u16(std::string_view field) { return read<uint16_t>(field); }
  uint32_t u32(std::string_view field) { return read<uint32_t>(field); }
  uint64_t u64(std::string_view field) { return read<uint64_t>(field); }
  float f32(std::string_view field) { return read<float>(field); }
  double f64(std::string_view field) { return read<double>(field); }

  // The next `count` bytes.
  std::span<const std::byte> bytes(size_t count, std::string_view field);
  // A u64 length, at most `max`, then that many bytes.
  std::string_view text(std::string_view field, size_t max);
  // a · b, refused where it would pass SIZE_MAX.
  size_t times(size_t a, size_t b, std::string_view field) const;
  // `count` bytes at `offset` from the start of the data; the position does not move.
  std::span<const std::byte> data_at(size_t offset, size_t count, std::string_view field) const;
  // Moves to `position`, which must not pass the end.
  void seek(size_t position, std::string_view field);

  struct Refusal {
    std::string field, what, cure;
  };
  [[noreturn]] void refuse(Refusal refusal) const;

 private:
  template <typename T>
  T read(std::string_view field);

  std::string where_;
  std::span<const std::byte> data_;
  size_t at_ = 0;
};

}  // namespace moru
