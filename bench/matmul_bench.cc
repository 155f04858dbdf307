// Speed of quantized products, each as a share of two limits that are measured in the same run:
// the read bandwidth and the rate of int16 dots (vpdpwssd; vpmaddwd and an addition on AVX2).
//
//   matmul_bench [types, as Q4_K,Q8_0] [counts of tokens, as 1,4,512]
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/cpu.h"
#include "base/half.h"
#include "base/random.h"
#include "base/threads.h"
#include "engine/machine.h"
#include "engine/quant_matrix.h"
#include "formats/dtype.h"

namespace {

using namespace moru;

constexpr size_t kBytes = 384 << 20;  // of a working set: well past any last-level cache

std::vector<std::byte> random_blocks(DType type, size_t count) {
  std::vector<std::byte> data(bytes_of(type, count));
  Random random(1, static_cast<uint64_t>(type));
  for (size_t i = 0; i + 4 <= data.size(); i += 4) {
    const uint32_t word = random.u32() & 0x3f3f3f3fu;  // halves below 2, never a NaN
    std::memcpy(&data[i], &word, sizeof word);
  }
  return data;
}

struct Shape {
  size_t rows, cols;
};

// Matrices of one type, enough of them to exceed the caches.
struct Weights {
  std::vector<QuantMatrix> matrices;
  size_t bytes = 0, weights = 0;
};
Weights make(Pool& pool, DType type, Shape shape, size_t bytes_wanted) {
  Weights out;
  const std::vector<std::byte> data = random_blocks(type, shape.rows * shape.cols);
  do {
    out.matrices.push_back(QuantMatrix::pack(pool, type, shape.rows, shape.cols, data));
    out.bytes += data.size();
    out.weights += shape.rows * shape.cols;
  } while (out.bytes < bytes_wanted);
  return out;
}

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> out;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    out.emplace_back(text.substr(0, comma));
    text.remove_prefix(std::min(text.size(), comma + 1));
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  Pool pool(usable_threads());
  const std::vector<std::string> types = split(
      argc > 1 ? argv[1] : "Q4_0,Q4_1,Q5_0,Q5_1,Q8_0,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ4_NL,IQ4_XS,MXFP4");
  const std::vector<std::string> counts = split(argc > 2 ? argv[2] : "1,2,4,8,16,32,512");
  const MachineRates rates = measure_machine(pool);
  const double bandwidth = rates.read, peak = rates.int16;
  fmt::print("{}\nread bandwidth {:.1f} GB/s, int16 dots {:.0f} GOP/s\n", machine_name(),
             bandwidth / 1e9, peak / 1e9);
  {
    std::vector<float> x(size_t{512} * 576, 0.5f);
    QuantizedRows rows;
    const double quantize =
        best_seconds(0.1, [&] { quantize_rows(pool, x.data(), 576, 512, 576, rows); });
    fmt::print("quantize 512 x 576: {:.1f} µs\npack, GB/s of the file:", quantize * 1e6);
    for (const std::string& name : types) {
      const std::optional<DType> type = dtype_from_name(name);
      if (!type || !is_quantized(*type)) {
        fmt::print("{}: not a quantized type\n", name);
        return 2;
      }
      const std::vector<std::byte> data = random_blocks(*type, size_t{4096} * 1536);
      const double pack =
          best_seconds(0.1, [&] { QuantMatrix::pack(pool, *type, 4096, 1536, data); });
      fmt::print(" {} {:.1f}", name, static_cast<double>(data.size()) / pack / 1e9);
    }
    fmt::print("\n");
  }
  fmt::print("{:8} {:>14} {:>5} {:>9} {:>8} {:>6} {:>8} {:>6}\n", "type", "rows x cols", "m", "µs",
             "GB/s", "of bw", "GOP/s", "of int16");
  for (const std::string& name : types) {
    const std::optional<DType> type = dtype_from_name(name);
    const bool k_quant = traits(*type).block == 256;
    const Shape small = k_quant ? Shape{576, 1536} : Shape{1536, 576};
    for (const Shape shape : {small, Shape{49152, k_quant ? size_t{768} : size_t{576}}}) {
      for (const std::string& count : counts) {
        const size_t m = std::strtoul(count.c_str(), nullptr, 10);
        // Products of many tokens are bound by arithmetic: one pass over few matrices will do.
        const Weights w = make(pool, *type, shape, m <= 8 ? kBytes / 2 : size_t{4} << 20);
        std::vector<float> x(m * shape.cols), y(m * shape.rows);
        Random random(2);
        for (float& v : x) v = random.normal();
        QuantizedRows quantized;
        quantize_rows(pool, x.data(), shape.cols, m, shape.cols, quantized);
        const double seconds = best_seconds(0.3, [&] {
          for (const QuantMatrix& one : w.matrices)
            matmul(pool, quantized, one, y.data(), shape.rows);
        });
        const double bytes = static_cast<double>(w.bytes) / seconds;
        const double operations =
            2.0 * static_cast<double>(m) * static_cast<double>(w.weights) / seconds;
        fmt::print("{:8} {:>7}x{:<6} {:>5} {:>9.1f} {:>8.2f} {:>5.0f}% {:>8.1f} {:>5.0f}%\n", name,
                   shape.rows, shape.cols, m,
                   seconds * 1e6 / static_cast<double>(w.matrices.size()), bytes / 1e9,
                   100 * bytes / bandwidth, operations / 1e9, 100 * operations / peak);
      }
    }
  }
  // A run that something else disturbed shows here.
  const MachineRates again = measure_machine(pool);
  fmt::print("again: read bandwidth {:.1f} GB/s, int16 dots {:.0f} GOP/s\n", again.read / 1e9,
             again.int16 / 1e9);
  return 0;
}
