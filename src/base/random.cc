#include "base/random.h"

#include <cmath>

namespace moru {
namespace {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace

uint32_t Random::u32() {
  const uint64_t block = counter_ / 4;
  const auto words = philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                             static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)},
                            static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
  return words[counter_++ % 4];
}

uint64_t Random::below(uint64_t n) {
  const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
  for (;;) {
    const uint64_t high = u32();
    const uint64_t value = high << 32 | u32();
    if (value < limit) return value % n;
  }
}

float Random::normal() {
  const double u = (static_cast<double>(u32()) + 1) * 0x1p-32, v = static_cast<double>(u32());
  return static_cast<float>(std::sqrt(-2 * std::log(u)) * std::cos(v * 0x1p-32 * 2 * M_PI));
}

}  // namespace moru
