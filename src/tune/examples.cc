#include "tune/examples.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/random.h"

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
  uint32_t source;
};
static_assert(sizeof(Record) == 40);

uint64_t content_hash(const Example& e) {
  // Sign bits are free in ids: they take the mask.
  std::vector<uint32_t> packed(e.ids.size());
  for (size_t i = 0; i < packed.size(); ++i)
    packed[i] = static_cast<uint32_t>(e.ids[i]) | uint32_t{e.trained[i]} << 31;
  const std::string hex = sha256(std::as_bytes(std::span(packed)));
  return std::stoull(hex.substr(0, 16), nullptr, 16);
}

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

// Records and values, in memory or mapped.
class Examples::Store {
 public:
  std::span<const Record> records() const {
    if (!index_file_) return records_;
    const auto bytes = index_file_->bytes();
    return {reinterpret_cast<const Record*>(bytes.data()), bytes.size() / sizeof(Record)};
  }
  const std::byte* values() const { return value_file_ ? value_file_->bytes().data() : memory_.data(); }

  // Beyond `limit` bytes of memory what was added goes to files called `spill`; empty: never.
  void start(std::filesystem::path spill, size_t limit) {
    spill_ = std::move(spill);
    limit_ = limit;
  }
  void add(const Example& e, uint32_t source) {
    const Record record{
        .place = size_,
        .prompt_hash = e.hash,
        .content_hash = content_hash(e),
        .tokens = static_cast<uint32_t>(e.ids.size()),
        .learnt = static_cast<uint32_t>(e.trained_tokens()),
        .line = static_cast<uint32_t>(std::min<uint64_t>(e.line, UINT32_MAX)),
        .source = source,
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
    map(spill_);
    return true;
  }
  void map(const std::filesystem::path& spill) {
    value_file_.emplace(with_ending(spill, ".values"));
    index_file_.emplace(with_ending(spill, ".index"));
  }

 private:
  std::vector<Record> records_;
  std::vector<std::byte> memory_, row_;
  size_t size_ = 0, limit_ = 0;
  std::filesystem::path spill_;
  std::optional<AtomicFile> index_out_, values_out_;
  std::optional<MappedFile> index_file_, value_file_;
};

Examples::Examples(std::shared_ptr<const Store> store) : store_(std::move(store)) {
  which_.resize(store_->records().size());
  for (size_t i = 0; i < which_.size(); ++i) which_[i] = static_cast<uint32_t>(i);
}

Examples::Examples(std::span<const Example> examples) {
  auto store = std::make_shared<Store>();
  for (const Example& e : examples) store->add(e, static_cast<uint32_t>(e.source));
  *this = Examples(std::move(store));
}

ExampleView Examples::operator[](size_t i) const {
  const Record& r = store_->records()[which_[i]];
  const std::byte* at = store_->values() + r.place;
  return {.ids = {reinterpret_cast<const TokenId*>(at), r.tokens},
          .trained = {reinterpret_cast<const uint8_t*>(at + r.tokens * sizeof(TokenId)), r.tokens},
          .line = r.line,
          .source = r.source,
          .hash = r.prompt_hash,
          .content = r.content_hash,
          .learnt = r.learnt};
}

Examples Examples::subset(std::span<const uint32_t> places) const {
  Examples out;
  out.store_ = store_;
  out.which_.reserve(places.size());
  for (const uint32_t place : places) out.which_.push_back(which_[place]);
  return out;
}

uint64_t Examples::tokens() const {
  uint64_t n = 0;
  for (size_t i = 0; i < size(); ++i) n += (*this)[i].ids.size();
  return n;
}
uint64_t Examples::trained_tokens() const {
  uint64_t n = 0;
  for (size_t i = 0; i < size(); ++i) n += (*this)[i].learnt;
  return n;
}
size_t Examples::longest() const {
  size_t n = 0;
  for (size_t i = 0; i < size(); ++i) n = std::max(n, (*this)[i].ids.size());
  return n;
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
    throw Error(ErrorKind::bad_input,
                {.where = fmt::format("{}: line {}{}{}", first.file.string(), first.row.line,
                                      first.row.field.empty() ? "" : ": ", first.row.field),
                 .what = fmt::format("{}; {} rows are bad so far", first.row.what, noted_),
                 .cure = fmt::format("correct them, or allow more than --max-bad {}",
                                     request_.max_bad)});
  }

 private:
  const LoadExamples& request_;
  LoadedExamples& into_;
  uint64_t noted_ = 0;
};

// Reads one source into the store; returns how many examples it gave.
uint64_t load_source(Pool& pool, const ModelFiles& files, const LoadExamples& request,
                     size_t source, Account& account, uint64_t& rows_before,
                     Examples::Store& store) {
  const DataSource& from = request.sources[source];
  DataOptions options = request.rows;
  if (options.prompt_column.empty()) options.format = from.format;
  const ExampleMaker maker(files, options);
  RecordReader reader(from.path);
  std::vector<Row> batch;
  std::vector<Dataset> made;
  uint64_t examples = 0;
  size_t told = 0;  // of the reader's problems
  for (bool more = true; more;) {
    batch.clear();
    size_t bytes = 0;
    while (batch.size() < kBatchRows && bytes < kBatchBytes) {
      std::optional<Row> row = reader.next();
      if (!row) {
        more = false;
        break;
      }
      bytes += row->bytes;
      batch.push_back(std::move(*row));
    }
    made.assign(batch.size(), {});
    constexpr size_t kTogether = 8;
    pool.each((batch.size() + kTogether - 1) / kTogether, [&](size_t item) {
      const size_t end = std::min(batch.size(), (item + 1) * kTogether);
      for (size_t i = item * kTogether; i < end; ++i) {
        maker.add(batch[i], made[i]);
        batch[i].value = nullptr;
      }
    });
    for (; told < reader.problems().size(); ++told) {
      account.add({.rows = 1, .bad = 1});
      account.note(from.path, reader.problems()[told]);
    }
    for (const Dataset& one : made) {
      account.add(one.counts);
      for (const RowProblem& problem : one.problems) account.note(from.path, problem);
      for (const Example& e : one.examples) {
        store.add(e, static_cast<uint32_t>(source));
        ++examples;
      }
    }
    rows_before += batch.size();
    if (request.progress) request.progress(rows_before);
  }
  return examples;
}

// Places [first, first + count) as often as the source's weight says: whole copies, then a part
// that the seed chooses.
void mix(const DataSource& source, size_t number, uint64_t seed, uint32_t first, uint32_t count,
         std::vector<uint32_t>& places) {
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) order[i] = first + i;
  double share = source.weight;
  if (source.num_samples != 0 && source.num_samples < count)
    share *= static_cast<double>(source.num_samples) / count;
  const auto take = static_cast<uint64_t>(std::llround(share * count));
  for (uint64_t copies = take / std::max<uint32_t>(1, count); copies > 0; --copies)
    places.insert(places.end(), order.begin(), order.end());
  const size_t rest = count == 0 ? 0 : take % count;
  if (rest == 0) return;
  Random random(seed, kMixStream + number);
  random.shuffle(std::span(order));
  order.resize(rest);
  std::sort(order.begin(), order.end());
  places.insert(places.end(), order.begin(), order.end());
}

// Places of the examples that no earlier one equals.
std::vector<uint32_t> first_of_each(const Examples& examples) {
  std::vector<uint32_t> order(examples.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
  std::vector<uint64_t> hashes(order.size());
  for (size_t i = 0; i < order.size(); ++i) hashes[i] = examples[i].content;
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return std::pair(hashes[a], a) < std::pair(hashes[b], b);
  });
  std::vector<uint32_t> kept;
  for (size_t i = 0; i < order.size(); ++i)
    if (i == 0 || hashes[order[i]] != hashes[order[i - 1]]) kept.push_back(order[i]);
  std::sort(kept.begin(), kept.end());
  return kept;
}

// What an earlier run left, if it was made from the same.
bool reuse(const LoadExamples& request, Examples::Store& store, std::vector<uint64_t>& per_source,
           LoadedExamples& out) {
  const std::filesystem::path path = with_ending(request.spill, ".json");
  if (request.spill.empty() || request.key.empty() || !std::filesystem::exists(path)) return false;
  const ordered_json j = ordered_json::parse(read_file(path), nullptr, false);
  if (!j.is_object() || j.value("key", "") != request.key || !j.contains("counts")) return false;
  store.map(request.spill);
  out.counts = counts_from(j["counts"]);
  per_source = j.value("per_source", std::vector<uint64_t>());
  for (const ordered_json& p : j.value("problems", ordered_json::array()))
    out.problems.push_back({p.value("file", ""), {p.value("line", uint64_t{0}),
                                                  p.value("field", ""), p.value("what", "")}});
  uint64_t examples = 0;
  for (const uint64_t n : per_source) examples += n;
  return per_source.size() == request.sources.size() && examples == store.records().size();
}

}  // namespace

LoadedExamples load_examples(Pool& pool, const ModelFiles& files, const LoadExamples& request) {
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
      per_source.push_back(load_source(pool, files, request, s, account, rows, *store));
      if (per_source.back() == 0) refuse_unusable(request.sources[s].path, out.counts,
                                                  out.problems.empty() ? nullptr
                                                                       : &out.problems[0].row);
    }
    if (store->finish()) {
      ordered_json problems = ordered_json::array();
      for (const FileProblem& p : out.problems)
        problems.push_back({{"file", p.file.string()},
                            {"line", p.row.line},
                            {"field", p.row.field},
                            {"what", p.row.what}});
      write_file(with_ending(request.spill, ".json"),
                 ordered_json{{"key", request.key},
                              {"per_source", per_source},
                              {"counts", to_json(out.counts)},
                              {"problems", problems}}
                         .dump(2) +
                     "\n");
    }
  }

  Examples all(store);
  if (request.deduplicate) {
    const std::vector<uint32_t> kept = first_of_each(all);
    out.counts.duplicates = all.size() - kept.size();
    size_t at = 0, first = 0;
    for (uint64_t& count : per_source) {
      const size_t end = first + count, from = at;
      while (at < kept.size() && kept[at] < end) ++at;
      first = end;
      count = at - from;
    }
    all = all.subset(kept);
  }
  const bool whole =
      std::all_of(request.sources.begin(), request.sources.end(),
                  [](const DataSource& s) { return s.weight == 1 && s.num_samples == 0; });
  if (whole) {
    out.examples = std::move(all);
    return out;
  }
  std::vector<uint32_t> places;
  uint32_t first = 0;
  for (size_t s = 0; s < request.sources.size(); ++s) {
    const auto count = static_cast<uint32_t>(per_source[s]);
    mix(request.sources[s], s, request.seed, first, count, places);
    first += count;
  }
  out.examples = all.subset(places);
  return out;
}

void remove_examples(const std::filesystem::path& spill) {
  for (const char* ending : {".index", ".values", ".json"})
    std::filesystem::remove(with_ending(spill, ending));
}

ExampleSplit split_by_hash(const Examples& examples, double fraction) {
  // The smallest hash, the one after it and the largest: one prompt stays on either side.
  uint64_t smallest = UINT64_MAX, second = UINT64_MAX, largest = 0;
  for (size_t i = 0; i < examples.size(); ++i) {
    const uint64_t h = examples[i].hash;
    if (h < smallest) second = std::exchange(smallest, h);
    else if (h > smallest && h < second) second = h;
    largest = std::max(largest, h);
  }
  if (fraction <= 0 || examples.empty() || smallest == largest) return {examples, {}};
  const long double share = (1 - std::min<long double>(fraction, 1)) * 0x1p64L;
  const uint64_t limit = share >= 0x1p64L ? UINT64_MAX : static_cast<uint64_t>(share);
  const uint64_t from = std::clamp(limit, second, largest);
  std::vector<uint32_t> train, validation;
  for (size_t i = 0; i < examples.size(); ++i)
    (examples[i].hash >= from ? validation : train).push_back(static_cast<uint32_t>(i));
  return {examples.subset(train), examples.subset(validation)};
}

}  // namespace moru
