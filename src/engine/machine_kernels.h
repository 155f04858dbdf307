// Loops that do nothing but what is to be measured, one table per level of the instruction set.
// Included by files of one level, so by integer types alone (float_kernels.h says why).
#pragma once
#include <cstddef>

namespace moru {

// A loop of independent operations whose operands stay in registers.
struct RateKernel {
  float (*run)(size_t steps) noexcept;  // null where the level has no such instruction
  size_t operations;                    // of one step: two for each multiply-add
};

struct MachineKernels {
  RateKernel f32, bf16, int16, int8;
  // Reads `bytes`, a multiple of 1024, from `data`, which is 64-byte aligned.
  float (*read)(const void* data, size_t bytes) noexcept;
};

extern const MachineKernels kScalarMachineKernels, kAvx2MachineKernels, kAvx512MachineKernels;

}  // namespace moru
