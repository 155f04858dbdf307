#include "tune/examples.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/permutation.h"
#include "tune/text_data.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

constexpr size_t kKeptProblems = 100;
// Rows that are read before they are made together, by all threads.
constexpr size_t kBatchRows = 1024, kBatchBytes = size_t{4} << 20;
// Streams of the seed; epochs use those from 2³² (data.cc).
constexpr uint64_t kMixStream = uint64_t{1} << 33;

// One example of the index, as it lies in memory and on disk.
struct Record {
  uint64_t place;  // of its ids among the values, in bytes
  uint64_t prompt_hash, content_hash;
  uint32_t tokens, learnt;
  uint32_t line;  // saturated
  uint32_t source, mark;
  uint32_t unused = 0;
};
static_assert(sizeof(Record) == 48);
constexpr int kLayout = 2;  // of the files

size_t padded(size_t bytes) { return (bytes + 3) / 4 * 4; }

ordered_json to_json(const DataCounts& c) {
  return {{"rows", c.rows},
          {"truncated", c.truncated},
          {"without_answer", c.without_answer},
          {"bad", c.bad},
          {"split_by_turn", c.split_by_turn},
          {"without_end", c.without_end},
          {"duplicates", c.duplicates},
          {"not_nfc", c.not_nfc}};
}
DataCounts counts_from(const ordered_json& j) {
  const auto count = [&](const char* key) { return j.value(key, uint64_t{0}); };
  return {.rows = count("rows"),
          .truncated = count("truncated"),
          .without_answer = count("without_answer"),
          .bad = count("bad"),
          .split_by_turn = count("split_by_turn"),
          .without_end = count("without_end"),
          .duplicates = count("duplicates"),
          .not_nfc = count("not_nfc")};
}

std::filesystem::path with_ending(std::filesystem::path name, const char* ending) {
  name += ending;
  return name;
}

}  // namespace

uint64_t content_hash(const Example& e) {
  // Sign bits are free in ids: they take the mask.
  std::vector<uint32_t> packed(e.ids.size());
  for (size_t i = 0; i < packed.size(); ++i)
    packed[i] = static_cast<uint32_t>(e.ids[i]) | uint32_t{e.trained[i]} << 31;
  return short_sha256(std::as_bytes(std::span(packed)));
}

namespace {

// A mapped file whose pages are given back every so many reads: memory holds what was read since,
// however large the file.
class ReadFile {
 public:
  explicit ReadFile(const std::filesystem::path& path) : file_(path) {}

  std::span<const std::byte> bytes() const { return file_.bytes(); }
  // A read at any place, after which what was read before may be given back: pointers stay good,
  // as the file is read again.
  const std::byte* at(size_t place, size_t size) const {
    // A page that is missing comes with its neighbours.
    constexpr size_t kAround = size_t{64} << 10;
    const size_t cost = size + kAround;
    if (held_.fetch_add(cost, std::memory_order_relaxed) + cost > kHeld) {
      held_.store(0, std::memory_order_relaxed);
      file_.forget(file_.bytes());
    }
    return file_.bytes().data() + place;
  }
  void forget(std::span<const std::byte> part) const { file_.forget(part); }

 private:
  static constexpr size_t kHeld = size_t{32} << 20;
  MappedFile file_;
  mutable std::atomic<size_t> held_ = 0;
};

// Records that a pass over all of them has in memory at a time.
constexpr size_t kPass = size_t{1} << 16;

}  // namespace

// Records and values, in memory or mapped.
class Examples::Store {
 public:
  size_t size() const { return index_file_ ? mapped_records().size() : records_.size(); }
  const Record& record(size_t i) const {
    if (!index_file_) return records_[i];
    return *reinterpret_cast<const Record*>(index_file_->at(i * sizeof(Record), sizeof(Record)));
  }
  const std::byte* values(size_t place, size_t size) const {
    return value_file_ ? value_file_->at(place, size) : memory_.data() + place;
  }
  const std::byte* all_values() const {
    return value_file_ ? value_file_->bytes().data() : memory_.data();
  }
  // visit(i, record) for all, in order.
  template <typename Visit>
  void each(Visit&& visit) const {
    const std::span<const Record> all = index_file_ ? mapped_records() : std::span(records_);
    for (size_t first = 0; first < all.size(); first += kPass) {
      const auto part = all.subspan(first, std::min(kPass, all.size() - first));
      for (size_t i = 0; i < part.size(); ++i) visit(first + i, part[i]);
      if (index_file_) index_file_->forget(std::as_bytes(part));
    }
  }
  // Where lists of its examples may go; empty: they stay in memory.
  const std::filesystem::path& spill() const { return spill_; }

  // Beyond `limit` bytes of memory what was added goes to files called `spill`; empty: never.
  void start(std::filesystem::path spill, size_t limit) {
    spill_ = std::move(spill);
    limit_ = limit;
  }
  size_t limit() const { return limit_; }
  void add(const Example& e) {
    const Record record{
        .place = size_,
        .prompt_hash = e.hash,
        .content_hash = e.content,
        .tokens = static_cast<uint32_t>(e.ids.size()),
        .learnt = static_cast<uint32_t>(e.trained_tokens()),
        .line = static_cast<uint32_t>(std::min<uint64_t>(e.line, UINT32_MAX)),
        .source = static_cast<uint32_t>(e.source),
        .mark = e.mark,
    };
    const size_t id_bytes = e.ids.size() * sizeof(TokenId);
    const size_t bytes = padded(id_bytes + e.trained.size());
    row_.assign(bytes, std::byte{0});
    std::memcpy(row_.data(), e.ids.data(), id_bytes);
    std::memcpy(row_.data() + id_bytes, e.trained.data(), e.trained.size());
    size_ += bytes;
    if (!values_out_ && !spill_.empty() && size_ > limit_) {
      values_out_.emplace(with_ending(spill_, ".values"));
      index_out_.emplace(with_ending(spill_, ".index"));
      values_out_->write(memory_);
      index_out_->write(std::as_bytes(std::span(records_)));
      memory_ = {};
      records_ = {};
    }
    if (values_out_) {
      values_out_->write(row_);
      index_out_->write(std::as_bytes(std::span(&record, 1)));
    } else {
      memory_.insert(memory_.end(), row_.begin(), row_.end());
      records_.push_back(record);
    }
  }
  bool finish() {
    if (!values_out_) return false;
    values_out_->commit();
    index_out_->commit();
    values_out_.reset();
    index_out_.reset();
    map();
    return true;
  }
  void map() {
    value_file_.emplace(with_ending(spill_, ".values"));
    index_file_.emplace(with_ending(spill_, ".index"));
  }

 private:
  std::span<const Record> mapped_records() const {
    const auto bytes = index_file_->bytes();
    return {reinterpret_cast<const Record*>(bytes.data()), bytes.size() / sizeof(Record)};
  }

  std::vector<Record> records_;
  std::vector<std::byte> memory_, row_;
  size_t size_ = 0, limit_ = 0;
  std::filesystem::path spill_;
  std::optional<AtomicFile> index_out_, values_out_;
  std::optional<ReadFile> index_file_, value_file_;
};

// Places in a store, in memory or, where they are many, in a file that has no name any more.
class Examples::Places {
 public:
  Places(std::filesystem::path spill, size_t limit) : spill_(std::move(spill)), limit_(limit) {}

  size_t size() const { return size_; }
  size_t operator[](size_t i) const {
    if (!file_) return list_[i];
    uint32_t place = 0;
    std::memcpy(&place, file_->at(i * sizeof place, sizeof place), sizeof place);
    return place;
  }
  // visit(i, place) for all, in order.
  template <typename Visit>
  void each(Visit&& visit) const {
    for (size_t first = 0; first < size_; first += kPass) {
      const size_t count = std::min(kPass, size_ - first);
      const std::span<const uint32_t> part =
          file_ ? std::span(reinterpret_cast<const uint32_t*>(file_->bytes().data()) + first, count)
                : std::span(list_).subspan(first, count);
      for (size_t i = 0; i < count; ++i) visit(first + i, part[i]);
      if (file_) file_->forget(std::as_bytes(part));
    }
  }

  void add(size_t place) {
    list_.push_back(static_cast<uint32_t>(place));
    ++size_;
    if (spill_.empty() || list_.size() * sizeof(uint32_t) < limit_) return;
    if (!out_) out_.emplace(name());
    flush();
  }
  void finish() {
    if (!out_) return;
    flush();
    out_->commit();
    out_.reset();
    file_.emplace(name());
    std::filesystem::remove(name());
    list_ = {};
  }

 private:
  std::filesystem::path name() const {
    return with_ending(spill_, fmt::format(".{}.places", fmt::ptr(this)).c_str());
  }
  void flush() {
    out_->write(std::as_bytes(std::span(list_)));
    list_.clear();
  }

  std::filesystem::path spill_;
  size_t limit_ = 0, size_ = 0;
  std::vector<uint32_t> list_;  // all, or what is not written yet
  std::optional<AtomicFile> out_;
  std::optional<ReadFile> file_;
};

Examples::Examples(std::shared_ptr<const Store> store)
    : store_(std::move(store)), size_(store_->size()) {}

Examples::Examples(std::span<const Example> examples) {
  auto store = std::make_shared<Store>();
  for (Example e : examples) {
    e.content = content_hash(e);
    store->add(e);
  }
  *this = Examples(std::move(store));
}

namespace {

// Nothing of the tokens is read yet.
ExampleView view_of(const Record& r, const std::byte* values) {
  return {
      .ids = {reinterpret_cast<const TokenId*>(values), r.tokens},
      .trained = {reinterpret_cast<const uint8_t*>(values + r.tokens * sizeof(TokenId)), r.tokens},
      .line = r.line,
      .source = r.source,
      .hash = r.prompt_hash,
      .content = r.content_hash,
      .learnt = r.learnt,
      .mark = r.mark};
}

}  // namespace

size_t Examples::at(size_t i) const { return places_ ? (*places_)[i] : i; }

ExampleView Examples::operator[](size_t i) const {
  const Record& r = store_->record(at(i));
  return view_of(r, store_->values(r.place, r.tokens * (sizeof(TokenId) + 1)));
}

size_t Examples::length(size_t i) const { return store_->record(at(i)).tokens; }

void Examples::each(const std::function<void(size_t, const ExampleView&)>& visit) const {
  if (!store_) return;
  const std::byte* values = store_->all_values();
  if (places_)
    places_->each([&](size_t i, size_t place) {
      const Record& r = store_->record(place);
      visit(i, view_of(r, values + r.place));
    });
  else
    store_->each([&](size_t i, const Record& r) { visit(i, view_of(r, values + r.place)); });
}

ExampleStats Examples::stats() const {
  ExampleStats stats;
  each([&](size_t, const ExampleView& e) { stats.add(e.ids.size(), e.learnt); });
  return stats;
}

Examples::Builder::Builder(const Examples& from)
    : from_(from),
      places_(from.store_
                  ? std::make_unique<Places>(from.store_->spill(), from.store_->limit() / 16)
                  : std::make_unique<Places>("", 0)) {}
Examples::Builder::~Builder() = default;

void Examples::Builder::add(size_t place) { places_->add(from_.at(place)); }

Examples Examples::Builder::finish() {
  places_->finish();
  Examples out;
  out.store_ = from_.store_;
  out.size_ = places_->size();
  out.places_ = std::move(places_);
  return out;
}

namespace {

// Counts and problems of all files, and when they are too many.
class Account {
 public:
  Account(const LoadExamples& request, LoadedExamples& into) : request_(request), into_(into) {}

  void add(const DataCounts& c) {
    DataCounts& t = into_.counts;
    t.rows += c.rows;
    t.truncated += c.truncated;
    t.without_answer += c.without_answer;
    t.bad += c.bad;
    t.split_by_turn += c.split_by_turn;
    t.without_end += c.without_end;
    t.not_nfc += c.not_nfc;
  }
  void note(const std::filesystem::path& file, const RowProblem& problem) {
    if (into_.problems.size() < kKeptProblems) into_.problems.push_back({file, problem});
    if (++noted_ <= request_.max_bad) return;
    const FileProblem& first = into_.problems.front();
    throw Error(
        ErrorKind::bad_input,
        {.where = fmt::format("{}: line {}{}{}", first.file.string(), first.row.line,
                              first.row.field.empty() ? "" : ": ", first.row.field),
         .what = fmt::format("{}; {} rows are bad so far", first.row.what, noted_),
         .cure = fmt::format("correct them, or allow more than --max-bad {}", request_.max_bad)});
  }

 private:
  const LoadExamples& request_;
  LoadedExamples& into_;
  uint64_t noted_ = 0;
};

// The rows of a source in batches that take up about as much memory each.
class Batches {
 public:
  Batches(const DataSource& from, bool raw_text) : reader_(from.path, raw_text) {}

  struct Batch {
    std::vector<Row> rows;
    std::vector<RowProblem> problems;  // that were met on the way
    bool last = false;
  };
  Batch next() {
    Batch batch;
    size_t bytes = 0;
    while (batch.rows.size() < kBatchRows && bytes < kBatchBytes) {
      std::optional<Row> row = reader_.next();
      if (!row) {
        batch.last = true;
        break;
      }
      bytes += row->bytes;
      batch.rows.push_back(std::move(*row));
    }
    for (; told_ < reader_.problems().size(); ++told_)
      batch.problems.push_back(reader_.problems()[told_]);
    return batch;
  }

 private:
  SourceReader reader_;
  size_t told_ = 0;  // of the reader's problems
};

// Reads one source into the store; returns how many examples it gave. While the rows of one batch
// are made, those of the next are read.
uint64_t load_source(Pool& pool, const LoadExamples& request, const MakeExamples& make,
                     size_t source, Account& account, uint64_t& rows_before,
                     Examples::Store& store) {
  const DataSource& from = request.sources[source];
  Batches batches(from, request.raw_text);
  uint64_t examples = 0;
  std::vector<Dataset> made;
  for (Batches::Batch batch = batches.next(), next;; batch = std::move(next)) {
    std::exception_ptr unread;  // what was read before is told first
    made.assign(batch.rows.size(), {});
    constexpr size_t kTogether = 8;
    pool.each(1 + (batch.rows.size() + kTogether - 1) / kTogether, [&](size_t item) {
      if (item == 0) {
        if (batch.last) return;
        try {
          next = batches.next();
        } catch (...) {
          unread = std::current_exception();
        }
        return;
      }
      const size_t end = std::min(batch.rows.size(), item * kTogether);
      for (size_t i = (item - 1) * kTogether; i < end; ++i) {
        make(batch.rows[i], source, made[i]);
        batch.rows[i].value = nullptr;
        for (Example& e : made[i].examples) {
          e.source = source;
          if (e.content == 0) e.content = content_hash(e);
        }
      }
    });
    for (const RowProblem& problem : batch.problems) {
      account.add({.rows = 1, .bad = 1});
      account.note(from.path, problem);
    }
    for (const Dataset& one : made) {
      account.add(one.counts);
      for (const RowProblem& problem : one.problems) account.note(from.path, problem);
      for (const Example& e : one.examples) store.add(e);
      examples += one.examples.size();
    }
    rows_before += batch.rows.size();
    if (request.progress) request.progress(rows_before);
    if (unread) std::rethrow_exception(unread);
    if (batch.last) return examples;
  }
}

// Places [first, first + count) as often as the source's weight says: whole copies, then a part
// that the seed chooses.
void mix(const DataSource& source, size_t number, uint64_t seed, size_t first, size_t count,
         Examples::Builder& mixture) {
  if (count == 0) return;
  double share = source.weight;
  if (source.num_samples != 0 && source.num_samples < count)
    share *= static_cast<double>(source.num_samples) / static_cast<double>(count);
  const auto take = static_cast<uint64_t>(std::llround(share * static_cast<double>(count)));
  for (uint64_t copies = take / count; copies > 0; --copies)
    for (size_t i = 0; i < count; ++i) mixture.add(first + i);
  const size_t rest = take % count;
  if (rest == 0) return;
  const Permutation order(count, seed, kMixStream + number);
  std::vector<bool> chosen(count);
  for (size_t i = 0; i < rest; ++i) chosen[order[i]] = true;
  for (size_t i = 0; i < count; ++i)
    if (chosen[i]) mixture.add(first + i);
}

// What an earlier run left, if it was made from the same.
bool reuse(const LoadExamples& request, Examples::Store& store, std::vector<uint64_t>& per_source,
           LoadedExamples& out) {
  const std::filesystem::path path = with_ending(request.spill, ".json");
  if (request.spill.empty() || request.key.empty() || !std::filesystem::exists(path)) return false;
  const ordered_json j = ordered_json::parse(read_file(path), nullptr, false);
  if (!j.is_object() || j.value("key", "") != request.key || j.value("layout", 0) != kLayout ||
      !j.contains("counts"))
    return false;
  store.start(request.spill, request.memory_bytes);
  store.map();
  out.counts = counts_from(j["counts"]);
  per_source = j.value("per_source", std::vector<uint64_t>());
  for (const ordered_json& p : j.value("problems", ordered_json::array()))
    out.problems.push_back(
        {p.value("file", ""),
         {p.value("line", uint64_t{0}), p.value("field", ""), p.value("what", "")}});
  uint64_t examples = 0;
  for (const uint64_t n : per_source) examples += n;
  return per_source.size() == request.sources.size() && examples == store.size();
}

}  // namespace

LoadedExamples load_examples(Pool& pool, const ModelFiles& files, const LoadExamples& request) {
  if (request.raw_text)
    return load_examples(pool, request, [&](const Row& row, size_t, Dataset& into) {
      add_text(files, request.rows, row, into);
    });
  std::vector<ExampleMaker> makers;
  for (const DataSource& source : request.sources) {
    DataOptions options = request.rows;
    if (options.prompt_column.empty()) options.format = source.format;
    makers.emplace_back(files, options);
  }
  return load_examples(pool, request, [&](const Row& row, size_t source, Dataset& into) {
    makers[source].add(row, into);
  });
}

LoadedExamples load_examples(Pool& pool, const LoadExamples& request, const MakeExamples& make) {
  LoadedExamples out;
  auto store = std::make_shared<Examples::Store>();
  std::vector<uint64_t> per_source;
  if (!reuse(request, *store, per_source, out)) {
    out = {};
    per_source.clear();
    store = std::make_shared<Examples::Store>();
    store->start(request.spill, request.memory_bytes);
    Account account(request, out);
    uint64_t rows = 0;
    for (size_t s = 0; s < request.sources.size(); ++s) {
      per_source.push_back(load_source(pool, request, make, s, account, rows, *store));
      if (per_source.back() == 0)
        refuse_unusable(request.sources[s].path, out.counts,
                        out.problems.empty() ? nullptr : &out.problems[0].row);
    }
    if (store->finish()) {
      ordered_json problems = ordered_json::array();
      for (const FileProblem& p : out.problems)
        problems.push_back({{"file", p.file.string()},
                            {"line", p.row.line},
                            {"field", p.row.field},
                            {"what", p.row.what}});
      write_file(with_ending(request.spill, ".json"), ordered_json{{"key", request.key},
                                                                   {"layout", kLayout},
                                                                   {"per_source", per_source},
                                                                   {"counts", to_json(out.counts)},
                                                                   {"problems", problems}}
                                                              .dump(2) +
                                                          "\n");
    }
  }

  Examples all(store);
  if (request.deduplicate) {
    const std::vector<bool> kept = first_of_each(all);
    Examples::Builder once(all);
    size_t place = 0;
    for (uint64_t& count : per_source) {
      const size_t end = place + count;
      for (count = 0; place < end; ++place) {
        if (!kept[place]) continue;
        once.add(place);
        ++count;
      }
    }
    out.counts.duplicates = all.size();
    all = once.finish();
    out.counts.duplicates -= all.size();
  }
  const bool whole =
      std::all_of(request.sources.begin(), request.sources.end(),
                  [](const DataSource& s) { return s.weight == 1 && s.num_samples == 0; });
  if (whole) {
    out.examples = std::move(all);
    return out;
  }
  Examples::Builder mixture(all);
  size_t first = 0;
  for (size_t s = 0; s < request.sources.size(); ++s) {
    mix(request.sources[s], s, request.seed, first, per_source[s], mixture);
    first += per_source[s];
  }
  out.examples = mixture.finish();
  return out;
}

void remove_examples(const std::filesystem::path& spill) {
  for (const char* ending : {".index", ".values", ".json"})
    std::filesystem::remove(with_ending(spill, ending));
  // Lists that a killed process was writing.
  const std::filesystem::path folder = spill.has_parent_path() ? spill.parent_path() : ".";
  if (!std::filesystem::is_directory(folder)) return;
  std::vector<std::filesystem::path> lists;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(spill.filename().string() + ".") && name.find(".places") != name.npos)
      lists.push_back(entry.path());
  }
  for (const std::filesystem::path& list : lists) std::filesystem::remove(list);
}

std::vector<bool> first_of_each(const Examples& examples) {
  // Equal examples have equal hashes, which are dealt to passes that memory holds one of.
  constexpr size_t kHashes = size_t{1} << 21;
  const uint64_t passes = (examples.size() + kHashes - 1) / kHashes;
  std::vector<bool> first(examples.size());
  std::vector<std::pair<uint64_t, uint32_t>> seen;
  for (uint64_t pass = 0; pass < passes; ++pass) {
    seen.clear();
    examples.each([&](size_t i, const ExampleView& e) {
      if (e.content % passes == pass) seen.emplace_back(e.content, static_cast<uint32_t>(i));
    });
    std::sort(seen.begin(), seen.end());
    for (size_t i = 0; i < seen.size(); ++i)
      first[seen[i].second] = i == 0 || seen[i].first != seen[i - 1].first;
  }
  return first;
}

ExampleSplit split_by_hash(const Examples& examples, double fraction) {
  // The smallest hash, the one after it and the largest: one prompt stays on either side.
  uint64_t smallest = UINT64_MAX, second = UINT64_MAX, largest = 0;
  ExampleStats all;
  examples.each([&](size_t, const ExampleView& e) {
    const uint64_t h = e.hash;
    if (h < smallest)
      second = std::exchange(smallest, h);
    else if (h > smallest && h < second)
      second = h;
    largest = std::max(largest, h);
    all.add(e.ids.size(), e.learnt);
  });
  if (fraction <= 0 || examples.empty() || smallest == largest)
    return {examples, {}, std::move(all), {}};
  const long double share = (1 - std::min<long double>(fraction, 1)) * 0x1p64L;
  const uint64_t limit = share >= 0x1p64L ? UINT64_MAX : static_cast<uint64_t>(share);
  const uint64_t from = std::clamp(limit, second, largest);
  ExampleSplit split;
  Examples::Builder train(examples), validation(examples);
  examples.each([&](size_t i, const ExampleView& e) {
    const bool held = e.hash >= from;
    (held ? validation : train).add(i);
    (held ? split.validation_stats : split.train_stats).add(e.ids.size(), e.learnt);
  });
  split.train = train.finish();
  split.validation = validation.finish();
  return split;
}

}  // namespace moru
