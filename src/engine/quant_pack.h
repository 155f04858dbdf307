// From a GGUF's blocks to the panels of quant_kernels.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "engine/quant_kernels.h"
#include "formats/dtype.h"

namespace moru {

struct PanelSize {
  size_t codes_at, bytes;  // where code records begin; of the whole panel, a multiple of 64
};
PanelSize panel_size(DType type, size_t cols);

// Packs `count` ≤ 16 rows of `cols` columns, which lie one after the other in `rows`, into a
// panel; missing rows become zeros. Pure: panels can be packed by different threads.
void pack_panel(DType type, const std::byte* rows, size_t count, size_t cols, uint8_t* panel);

}  // namespace moru
