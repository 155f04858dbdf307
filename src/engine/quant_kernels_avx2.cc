#include "engine/quant_kernels.h"
namespace moru {
const QuantKernels& quant_kernels_avx2() noexcept { return quant_kernels_scalar(); }
}  // namespace moru
