// What the files that implement value.h share. Not for others.
#pragma once
#include <cstdint>

#include "formats/jinja/value.h"

namespace moru::jinja {

// Values nest at most this deep: printing, comparing and dropping them recurses.
inline constexpr uint32_t kMaxDepth = 500;

uint32_t depth_of(const Value& v);
[[noreturn]] void fail_on_depth(const Runtime& runtime);
bool is_tuple(const Sequence& sequence);

}  // namespace moru::jinja
