// All examples of a training run, from any number of files, in constant memory.
//
// Rows are rendered and tokenised once. While the result is small it stays in memory; beyond that
// it goes to files that are mapped, of which memory holds what was read last and nothing else, and
// any example is found in one step:
//
//   NAME.index    a fixed record an example: where its tokens are, how many, from which line
//   NAME.values   its ids, i32, then one byte a token: learnt or not; padded to four bytes
//   NAME.json     what they were made from: a run that starts again uses them
//
// Lists of examples (of a split, a mixture) that are long are files too, without a name.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
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
  size_t source = 0;     // which of the data sources
  uint64_t hash = 0;     // of the prompt's text
  uint64_t content = 0;  // of ids and mask: equal examples have equal ones
  size_t learnt = 0;     // trained_tokens()
  uint32_t mark = 0;

  size_t trained_tokens() const { return learnt; }
};

// Of ids and mask.
uint64_t content_hash(const Example& example);

// What a list of examples adds up to.
struct ExampleStats {
  uint64_t tokens = 0, learnt = 0;
  std::map<size_t, uint64_t> lengths;  // how many examples have so many tokens

  void add(size_t length, size_t learnt_of_it) {
    tokens += length;
    learnt += learnt_of_it;
    ++lengths[length];
  }
  size_t longest() const { return lengths.empty() ? 0 : lengths.rbegin()->first; }
};

// A list of examples of a store, in any order and with repetitions. Copies share the store. Several
// threads may read.
class Examples {
 public:
  class Store;
  class Places;
  class Builder;
  Examples() = default;
  explicit Examples(std::shared_ptr<const Store> store);  // all, in order
  Examples(std::span<const Example> examples);            // kept in memory

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  ExampleView operator[](size_t i) const;
  size_t length(size_t i) const;  // tokens
  ExampleStats stats() const;
  // visit(place in this list, example) for all, in order. Made for what an example's record says:
  // tokens that are read here stay in memory.
  void each(const std::function<void(size_t, const ExampleView&)>& visit) const;

 private:
  size_t at(size_t i) const;  // in the store
  std::shared_ptr<const Store> store_;
  std::shared_ptr<const Places> places_;  // null: all of the store, in order
  size_t size_ = 0;
};

// Makes a list of examples of another list, place by place.
class Examples::Builder {
 public:
  explicit Builder(const Examples& from);
  ~Builder();
  void add(size_t place);  // of `from`
  // Error: io, no_space.
  Examples finish();

 private:
  const Examples& from_;
  std::unique_ptr<Places> places_;
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
  bool raw_text = false;     // rows of text (text_data.h)
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

// The same of other rows: `make` appends what a row of data source number `source` becomes, or a
// problem, and counts it. It is called by all threads of the pool.
using MakeExamples = std::function<void(const Row& row, size_t source, Dataset& into)>;
LoadedExamples load_examples(Pool& pool, const LoadExamples& request, const MakeExamples& make);

// Removes the files that load_examples may have written under this name.
void remove_examples(const std::filesystem::path& spill);

// Whether each example is the first of those that equal it. In bounded memory: a bit an example.
std::vector<bool> first_of_each(const Examples& examples);

// The examples whose prompt's hash falls in the last `fraction` of all hashes are set aside: the
// same rows whatever else the file holds. At least one prompt is on either side if there are two
// and fraction > 0.
struct ExampleSplit {
  Examples train, validation;
  ExampleStats train_stats, validation_stats;
};
ExampleSplit split_by_hash(const Examples& examples, double fraction);

}  // namespace moru
