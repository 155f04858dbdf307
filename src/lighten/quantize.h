// Rounds rows of f32 weights into ggml's block types, so that the error that matters is least.
//
// What matters is the output of the layer, y = W·x. With importance_j = E[x_j²] over calibration
// text, rounding weight W_j by δ costs about importance_j·δ²; as llama.cpp found by experience,
// large weights deserve a little more, so the weight of element j is
//
//   w_j = importance_j · sqrt(σ² + W_j²)      σ²: the row's mean square, or twice the super-block's
//
// and every search here minimises Σ w_j (W_j − Ŵ_j)². It is never worse in that sum than rounding
// under the scale that the largest element asks for, since that rounding is one of the candidates.
#pragma once
#include <cstddef>
#include <span>

#include "engine/row_ops.h"  // Floats
#include "formats/dtype.h"

namespace moru {

// Whether quantize_row writes this type.
bool can_quantize(DType type);

// x: [cols], cols a multiple of the type's block; importance: [cols], or empty for all alike;
// out: bytes_of(type, cols). Writes Q8_0, Q6_K, Q5_K, Q4_K, Q3_K, Q5_0, Q5_1, Q4_0, Q4_1, IQ4_NL,
// IQ4_XS, and F32, F16, BF16. Pure: the same input gives the same bytes.
//
// Importance is relative: only its ratios inside a row count, and one that is 0 is raised to a
// small share of the row's mean, so that columns that calibration never saw still get a scale.
// Values beyond what a type can hold are rounded to its largest.
// Errors: bad_input for NaN and infinity in x, and for NaN, infinity and numbers below 0 in
// importance; `where` is the column.
void quantize_row(DType type, Floats x, Floats importance, std::span<std::byte> out);

// Σ w_j (x_j − y_j)² with quantize_row's weights for this type, in double: the yardstick of its
// searches. y: [cols], a decoded row.
double weighted_error(DType type, Floats x, Floats importance, Floats y);

}  // namespace moru
