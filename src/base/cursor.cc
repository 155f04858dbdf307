#include "base/cursor.h"

#include <fmt/format.h>

#include <cstring>

namespace moru {
namespace {
constexpr const char* kCutShort = "the file is cut short or damaged: fetch or convert it again";
}

void Cursor::refuse(Refusal refusal) const {
  throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: {}", where_, refusal.field),
                                     .what = std::move(refusal.what),
                                     .cure = std::move(refusal.cure)});
}

std::span<const std::byte> Cursor::bytes(size_t count, std::string_view field) {
  if (count > left())
    refuse({std::string(field),
            fmt::format("needs {} bytes at offset {}, but {} are left", count, at_, left()),
            kCutShort});
  const auto result = data_.subspan(at_, count);
  at_ += count;
  return result;
}

template <typename T>
T Cursor::read(std::string_view field) {
  T value;
  std::memcpy(&value, bytes(sizeof(T), field).data(), sizeof(T));
  return value;
}
template uint8_t Cursor::read(std::string_view);
template uint16_t Cursor::read(std::string_view);
template uint32_t Cursor::read(std::string_view);
template uint64_t Cursor::read(std::string_view);
template float Cursor::read(std::string_view);
template double Cursor::read(std::string_view);

std::string_view Cursor::text(std::string_view field, size_t max) {
  const uint64_t length = u64(field);
  if (length > max)
    refuse({std::string(field), fmt::format("is {} bytes long, more than {}", length, max),
            "the file is damaged or hostile"});
  const auto raw = bytes(length, field);
  return {reinterpret_cast<const char*>(raw.data()), raw.size()};
}

size_t Cursor::times(size_t a, size_t b, std::string_view field) const {
  size_t product = 0;
  if (__builtin_mul_overflow(a, b, &product))
    refuse({std::string(field), fmt::format("{} times {} is too large", a, b),
            "the file is damaged or hostile"});
  return product;
}

std::span<const std::byte> Cursor::data_at(size_t offset, size_t count,
                                           std::string_view field) const {
  if (offset > data_.size() || count > data_.size() - offset)
    refuse({std::string(field),
            fmt::format("wants {} bytes at {}, but the file has {}", count, offset, data_.size()),
            kCutShort});
  return data_.subspan(offset, count);
}

void Cursor::seek(size_t position, std::string_view field) {
  if (position > data_.size())
    refuse({std::string(field),
            fmt::format("stands at {}, but the file has {} bytes", position, data_.size()),
            kCutShort});
  at_ = position;
}

}  // namespace moru
