#include "engine/float_kernels.h"

#include "base/cpu.h"

namespace moru {

const FloatKernels& float_kernels(Isa level) {
  switch (level) {
    case Isa::avx512:
      return kAvx512FloatKernels;
    case Isa::avx2:
      return kAvx2FloatKernels;
    case Isa::scalar:
      break;
  }
  return kScalarFloatKernels;
}

const FloatKernels& float_kernels() { return float_kernels(isa()); }

}  // namespace moru
