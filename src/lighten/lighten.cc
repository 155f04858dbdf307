#include "lighten/lighten.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "base/error.h"
#include "engine/families.h"
#include "lighten/quantize.h"

namespace moru {
namespace {

constexpr size_t kRowsPerItem = 32;

// Encodes one tensor in GGUF's row order and values, whatever container it comes from.
struct Encoder {
  Pool& pool;
  const ModelFiles& files;
  bool gguf_interleaves;  // the family's GGUF keeps rotary pairs of q and k side by side

  std::vector<std::byte> encode(const Tensor& tensor, DType type,
                                std::span<const float> importance) const {
    const size_t cols = tensor.shape.back(), rows = tensor.count() / cols;
    const size_t out_bytes = bytes_of(type, cols);
    const bool reorder = gguf_interleaves && !files.qk_interleaved && is_query_or_key(tensor.name);
    const float offset = is_norm(tensor.name) ? files.norm_offset : 0;
    // Vectors of q and k (biases) are reordered value by value.
    MORU_CHECK(!reorder || tensor.shape.size() == 2 || rows == 1);
    std::vector<std::byte> out(rows * out_bytes);
    pool.each((rows + kRowsPerItem - 1) / kRowsPerItem, [&](size_t item) {
      std::vector<float> row(cols);
      std::vector<std::byte> room;
      for (size_t r = item * kRowsPerItem; r < std::min(rows, (item + 1) * kRowsPerItem); ++r) {
        dequantize(tensor.type, files.row(tensor, r, room), row);
        for (float& value : row) value += offset;
        if (reorder && rows == 1) {
          const std::vector<float> stored = row;
          for (size_t c = 0; c < cols; ++c)
            row[interleaved_row(c, files.config.head_dim)] = stored[c];
        }
        const size_t target = reorder && rows > 1 ? interleaved_row(r, files.config.head_dim) : r;
        try {
          quantize_row(type, row, importance, {out.data() + target * out_bytes, out_bytes});
        } catch (const Error& error) {
          throw Error(error.kind(),
                      {.where = fmt::format("{}: {}, row {}", files.path.string(), tensor.name, r),
                       .what = error.problem(),
                       .cure = "the model is damaged: fetch or tune it again"});
        }
      }
    });
    return out;
  }

  static bool is_norm(std::string_view name) { return name.ends_with("norm.weight"); }
};

}  // namespace

const Preset& preset_of(std::string_view name) {
  if (const Preset* preset = find_preset(name)) return *preset;
  std::string known;
  for (const Preset& preset : presets())
    known += fmt::format("{}{}", known.empty() ? "" : ", ", preset.name);
  throw Error(ErrorKind::usage, {.where = "--type",
                                 .what = fmt::format("there is no '{}'", name),
                                 .cure = "take one of " + known});
}

LightenResult lighten_model(Pool& pool, const ModelFiles& files, const Preset& preset,
                            const std::filesystem::path& out, const LightenOptions& options) {
  const Plan plan = plan_preset(preset, files.tensors,
                                {.heads = files.config.heads,
                                 .kv_heads = files.config.kv_heads,
                                 .experts = files.config.experts.count,
                                 .calibrated = options.importance != nullptr});
  GgufMetadata metadata = files.metadata;
  metadata.set("general.file_type", GgufScalar{preset.file_type});
  metadata.set("general.quantization_version", GgufScalar{uint32_t{2}});
  if (options.importance != nullptr)
    metadata.set("moru.quantize.calibration_tokens",
                 GgufScalar{static_cast<uint32_t>(options.importance->tokens)});

  const Encoder encoder{pool, files, gguf_interleaves_qk(*files.family)};
  LightenResult result{.notes = plan.notes};
  std::vector<std::vector<std::byte>> data;
  std::vector<Tensor> tensors;
  size_t weights = 0, bytes = 0, done = 0, total = 0;
  for (const Tensor& tensor : files.tensors) total += tensor.count();
  for (size_t i = 0; i < files.tensors.size(); ++i) {
    const Tensor& tensor = files.tensors[i];
    const DType type = plan.tensors[i].type;
    data.push_back(encoder.encode(tensor, type,
                                  options.importance != nullptr
                                      ? options.importance->of(tensor.name)
                                      : std::span<const float>()));
    tensors.push_back(tensor);
    tensors.back().type = type;
    tensors.back().data = data.back();
    weights += tensor.count();
    bytes += data.back().size();
    result.bytes_by_type[std::string(traits(type).name)] += data.back().size();
    done += tensor.count();
    if (options.progress) options.progress(static_cast<double>(done) / static_cast<double>(total));
  }
  write_gguf(out, metadata, tensors);
  result.file_bytes = std::filesystem::file_size(out);
  result.bits_per_weight = 8.0 * static_cast<double>(bytes) / static_cast<double>(weights);
  return result;
}

}  // namespace moru
