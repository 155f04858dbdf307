// Speed of quantized products, each as a share of two limits that are measured in the same run:
// the read bandwidth and the rate of int16 dots (vpdpwssd; vpmaddwd and an addition on AVX2).
//
//   matmul_bench [types, as Q4_K,Q8_0] [counts of tokens, as 1,4,512]
#include <fmt/format.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/half.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include "engine/quant_matrix.h"
#include "formats/dtype.h"

namespace {

using namespace moru;

constexpr size_t kBytes = 384 << 20;  // of a working set: well past any last-level cache

// The shortest of several runs, in seconds.
double best_seconds(double total, const std::function<void()>& run) {
  run();
  double best = 1e9;
  const Stopwatch whole;
  do {
    const Stopwatch one;
    run();
    best = std::min(best, one.seconds());
  } while (whole.seconds() < total);
  return best;
}

double read_bandwidth(Pool& pool) {
  PageBuffer memory(kBytes);
  std::memset(memory.data(), 1, kBytes);
  std::vector<int> sums(pool.size() * 16);
  constexpr size_t kTask = 1 << 20;
  const double seconds = best_seconds(1, [&] {
    pool.each(pool.size(), [&](size_t thread) {
      const size_t tasks = kBytes / kTask;
      const size_t begin = tasks * thread / pool.size(), end = tasks * (thread + 1) / pool.size();
      const auto* at = static_cast<const __m128i*>(memory.data()) + begin * kTask / 16;
      const auto* stop = static_cast<const __m128i*>(memory.data()) + end * kTask / 16;
      __m128i sum[4] = {};
      for (; at != stop; at += 16)
        for (int i = 0; i < 16; ++i) sum[i % 4] = _mm_add_epi32(sum[i % 4], _mm_load_si128(at + i));
      sums[thread * 16] = _mm_cvtsi128_si32(
          _mm_add_epi32(_mm_add_epi32(sum[0], sum[1]), _mm_add_epi32(sum[2], sum[3])));
    });
  });
  return static_cast<double>(kBytes) / seconds;
}

// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
constexpr size_t kSteps = 4'000'000;
__attribute__((target("avx512f,avx512vnni"))) int dots_avx512() {
  __m512i sum[12], w = _mm512_set1_epi16(3);
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (size_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) sum[j] = _mm512_dpwssd_epi32(sum[j], w, w);
    asm volatile("" : "+v"(w));
  }
  int out = 0;
  for (const __m512i& s : sum) out += _mm_cvtsi128_si32(_mm512_castsi512_si128(s));
  return out;
}
__attribute__((target("avx2"))) int dots_avx2() {
  __m256i sum[12], w = _mm256_set1_epi16(3);
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (size_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(w, w));
      asm volatile("" : "+x"(w));
    }
  }
  int out = 0;
  for (const __m256i& s : sum) out += _mm_cvtsi128_si32(_mm256_castsi256_si128(s));
  return out;
}

double int16_rate(Pool& pool) {  // operations, two a multiply-add, a second
  const bool wide = isa() == Isa::avx512;
  if (isa() == Isa::scalar) return 0;
  std::vector<int> sink(pool.size() * 16);
  const double seconds = best_seconds(0.5, [&] {
    pool.each(pool.size(),
              [&](size_t thread) { sink[thread * 16] = wide ? dots_avx512() : dots_avx2(); });
  });
  return static_cast<double>(pool.size() * kSteps) * 12 * (wide ? 64 : 32) / seconds;
}

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
  const double bandwidth = read_bandwidth(pool), peak = int16_rate(pool);
  fmt::print("{}\nread bandwidth {:.1f} GB/s, int16 dots {:.0f} GOP/s\n", machine_name(),
             bandwidth / 1e9, peak / 1e9);
  fmt::print("{:8} {:>14} {:>5} {:>9} {:>8} {:>6} {:>8} {:>6}\n", "type", "rows x cols", "m", "µs",
             "GB/s", "of bw", "GOP/s", "of int16");
  for (const std::string& name : types) {
    const std::optional<DType> type = dtype_from_name(name);
    if (!type || !is_quantized(*type)) {
      fmt::print("{}: not a quantized type\n", name);
      return 2;
    }
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
    QuantizedRows rows;
    std::vector<float> x(size_t{512} * 576, 0.5f);
    const double each =
        best_seconds(0.05, [&] { quantize_rows(pool, x.data(), 576, 512, 576, rows); });
    if (name == types.front()) fmt::print("quantize 512 x 576: {:.1f} µs\n", each * 1e6);
  }
  return 0;
}
