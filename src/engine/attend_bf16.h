// The inner loops of training's attention in bf16, where the processor multiplies it (AVX512_BF16):
// what attend_block and attend_backward_tile of float_kernels.h compute, with operands of products
// rounded to bf16, among them probabilities and their gradients. Sums, softmax and log-sum-exp stay
// f32. No softcap.
//
// Included by a file of one level, so integer types alone (float_kernels.h says why).
#pragma once
#include <cstddef>
#include <cstdint>

#include "engine/float_kernels.h"

namespace moru {

inline constexpr size_t kAttendBf16Rows = 96;  // most rows of a block or a tile

// Bytes of workspace, aligned to 64, of either function.
constexpr size_t attend_bf16_bytes(size_t head_dim) {
  const size_t forward =
      (2 * kKeyBlock + kAttendBf16Rows) * head_dim + kAttendBf16Rows * (32 + kKeyBlock + 32);
  const size_t backward = (3 * kKeyPage + 4 * kAttendBf16Rows) * head_dim +
                          kAttendBf16Rows * (2 * 32 + 3 * kKeyPage + 32);
  return 2 * (forward > backward ? forward : backward) + 1024;
}

// `same_keys`: keys and values are those of the call before with this workspace, for as many rows
// that see as many of them. f16 must be false.
void attend_block_bf16_avx512(const AttendBlock& block, bool same_keys, void* workspace) noexcept;
void attend_backward_tile_bf16_avx512(const AttendBackwardTile& tile, bool same_keys,
                                      void* workspace) noexcept;

}  // namespace moru
