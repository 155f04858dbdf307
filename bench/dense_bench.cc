// Speed of dense bf16 products in the shapes of a training step, each as a share of what the
// processor's bf16 multiply-adds reach alone, measured in the same run.
//
//   dense_bench [--threads N] [rows, as 2048,512]
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/cpu.h"
#include "base/half.h"
#include "base/memory.h"
#include "base/random.h"
#include "engine/dense.h"
#include "engine/machine.h"

using namespace moru;

namespace {

PageBuffer random_bf16(size_t count, uint64_t stream) {
  PageBuffer buffer(2 * count);
  Random random(1, stream);
  auto* values = static_cast<uint16_t*>(buffer.data());
  for (size_t i = 0; i < count; ++i) values[i] = bf16_from_f32(random.uniform() - 0.5f);
  return buffer;
}

struct Shape {
  const char* name;
  char form;  // t: matmul_nt, n: matmul_nn, g: matmul_tn
  size_t out, in;
};
// y = x [rows, in] · wᵀ, dx = dy [rows, out] · w, dw = dyᵀ · x, with w [out, in].
constexpr Shape kShapes[] = {
    {"q forward", 't', 576, 576},
    {"k forward", 't', 192, 576},
    {"gate forward", 't', 1536, 576},
    {"down forward", 't', 576, 1536},
    {"head forward", 't', 49152, 576},
    {"gate backward", 'n', 1536, 576},
    {"down backward", 'n', 576, 1536},
    {"head backward", 'n', 8192, 576},
    {"gate dW", 'g', 1536, 576},
    {"down dW", 'g', 576, 1536},
    {"q dW", 'g', 576, 576},
    {"A forward", 't', 48, 576},
    {"A of down", 't', 16, 1536},
    {"B forward", 't', 1536, 16},
    {"du", 'n', 1536, 16},
    {"dB", 'g', 1536, 16},
    {"dA", 'g', 48, 576},
};

}  // namespace

int main(int argc, char** argv) {
  size_t threads = usable_threads();
  std::string rows_list = "2048";
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--threads" && i + 1 < argc)
      threads = static_cast<size_t>(std::atoi(argv[++i]));
    else
      rows_list = argv[i];
  }
  Pool pool(threads);
  const double peak = measure_machine(pool).bf16;
  fmt::print("{}, {} threads: bf16 {:.0f} GFLOP/s\n", machine_name(), threads, peak / 1e9);
  for (size_t at = 0; at < rows_list.size();) {
    const size_t comma = std::min(rows_list.find(',', at), rows_list.size());
    const auto rows = static_cast<size_t>(std::atoi(rows_list.substr(at, comma - at).c_str()));
    at = comma + 1;
    double flops = 0, time = 0;
    for (const Shape& s : kShapes) {
      const size_t m = s.out > 40000 ? std::min<size_t>(rows, 512) : rows;
      const PageBuffer x = random_bf16(m * s.in, 1), w = random_bf16(s.out * s.in, 2),
                       dy = random_bf16(m * s.out, 3);
      PageBuffer y(4 * std::max({m * s.in, m * s.out, s.out * s.in}));
      const DenseView xv = DenseView::bf16(static_cast<const uint16_t*>(x.data()), m, s.in),
                      wv = DenseView::bf16(static_cast<const uint16_t*>(w.data()), s.out, s.in),
                      dv = DenseView::bf16(static_cast<const uint16_t*>(dy.data()), m, s.out);
      const double seconds = best_seconds(0.3, [&] {
        if (s.form == 't')
          matmul_nt(pool, xv, wv, {.data = y.data(), .ld = s.out});
        else if (s.form == 'n')
          matmul_nn(pool, dv, wv, {.data = y.data(), .ld = s.in});
        else
          matmul_tn(pool, dv, xv, {.data = y.data(), .ld = s.in, .accumulate = true});
      });
      const double work = 2.0 * static_cast<double>(m * s.in * s.out);
      flops += work;
      time += seconds;
      fmt::print("{:5} {:14} [{:5} × {:4}] {:9.3f} ms {:6.0f} GFLOP/s {:5.1f} %\n", m, s.name,
                 s.out, s.in, seconds * 1e3, work / seconds / 1e9, 100 * work / seconds / peak);
    }
    fmt::print("{:5} all: {:.1f} %\n", rows, 100 * flops / time / peak);
  }
  return 0;
}
