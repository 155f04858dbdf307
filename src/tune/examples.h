// All examples of a training run, from any number of files, in constant memory.
//
// Rows are rendered and tokenised once. While the result is small it stays in memory; beyond that
// it goes to two files that are mapped, so that the system keeps what is in use and nothing else,
// and any example is found in one step:
//
//   NAME.index    a fixed record an example: where its tokens are, how many, from which line
//   NAME.values   its ids, i32, then one byte a token: learnt or not; padded to four bytes
//   NAME.json     what they were made from: a run that starts again uses them
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/threads.h"
#include "tune/data.h"

namespace moru {

// An example in its store; lives as long as the store.
struct ExampleView {
  std::span<const TokenId> ids;
  std::span<const uint8_t> trained;
  uint64_t line = 0;
  size_t source = 0;  // which of the data sources
  uint64_t hash = 0;  // of the prompt's text
  uint64_t content = 0;  // of ids and mask: equal examples have equal ones
  size_t learnt = 0;  // trained_tokens()

  size_t trained_tokens() const { return learnt; }
};

// A list of examples of a store, in any order and with repetitions. Copies share the store.
class Examples {
 public:
  class Store;
  Examples() = default;
  explicit Examples(std::shared_ptr<const Store> store);  // all, in order
  Examples(std::span<const Example> examples);            // kept in memory

  size_t size() const { return which_.size(); }
  bool empty() const { return which_.empty(); }
  ExampleView operator[](size_t i) const;
  // Those at the given places.
  Examples subset(std::span<const uint32_t> places) const;

  uint64_t tokens() const;
  uint64_t trained_tokens() const;
  size_t longest() const;  // tokens of the longest

 private:
  std::shared_ptr<const Store> store_;
  std::vector<uint32_t> which_;
};

struct DataSource {
  std::filesystem::path path;
  RowFormat format;
  double weight = 1;         // examples of an epoch, as a share of those it has: 0.5, 2 …
  uint64_t num_samples = 0;  // take so many rows, chosen by the seed; 0: all
};

struct LoadExamples {
  std::vector<DataSource> sources;
  DataOptions rows;
  uint64_t max_bad = 100;    // rows that may be unusable; one more is an Error
  bool deduplicate = false;  // leave out examples that were there before
  uint64_t seed = 42;        // of what weights and num_samples choose
  // Beyond `memory_bytes` examples go to files of this name; empty: never.
  std::filesystem::path spill;
  size_t memory_bytes = size_t{64} << 20;
  std::string key;  // names what is loaded: files of another key are made anew
  std::function<void(uint64_t rows)> progress;  // called now and then
};

// A bad row, and of which file.
struct FileProblem {
  std::filesystem::path file;
  RowProblem row;
};

struct LoadedExamples {
  Examples examples;
  DataCounts counts;
  std::vector<FileProblem> problems;  // the first hundred
};

// Errors: those of RecordReader; bad_input where a source has no usable row or more than `max_bad`
// rows are bad, naming file, line and field; io, no_space.
LoadedExamples load_examples(Pool& pool, const ModelFiles& files, const LoadExamples& request);

// Removes the files that load_examples may have written under this name.
void remove_examples(const std::filesystem::path& spill);

// The examples whose prompt's hash falls in the last `fraction` of all hashes are set aside: the
// same rows whatever else the file holds. At least one prompt is on either side if there are two
// and fraction > 0.
struct ExampleSplit {
  Examples train, validation;
};
ExampleSplit split_by_hash(const Examples& examples, double fraction);

}  // namespace moru
