#include "tune/data.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/error.h"
#include "base/hash.h"
#include "base/text.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

// Streams of the seed; adapters use those from 0.
constexpr uint64_t kOrderStream = uint64_t{1} << 32;

// Whether every text of `value` is in composed form.
bool is_composed(const ordered_json& value) {
  if (value.is_string()) {
    const std::string& text = value.get_ref<const std::string&>();
    return nfc(text) == text;
  }
  return !value.is_structured() || std::all_of(value.begin(), value.end(), is_composed);
}

void compose(ordered_json& value) {
  if (value.is_string()) {
    std::string& text = value.get_ref<std::string&>();
    text = nfc(text);
  }
  if (value.is_structured())
    for (ordered_json& item : value) compose(item);
}

// Length of the longest common start that ends between characters.
size_t common_start(std::string_view a, std::string_view b) {
  size_t n = 0;
  while (n < a.size() && n < b.size() && a[n] == b[n]) ++n;
  const auto inside = [](std::string_view s, size_t at) {
    return at < s.size() && (static_cast<unsigned char>(s[at]) & 0xC0) == 0x80;
  };
  while (n > 0 && (inside(a, n) || inside(b, n))) --n;
  return n;
}

}  // namespace

const ordered_json& composed_row(const ordered_json& row, bool nfc, ordered_json& room,
                                 DataCounts& counts) {
  if (is_composed(row)) return row;
  ++counts.not_nfc;
  if (!nfc) return row;
  compose(room = row);
  return room;
}

size_t Example::trained_tokens() const {
  if (trained.empty()) return 0;
  return static_cast<size_t>(std::count(trained.begin() + 1, trained.end(), uint8_t{1}));
}

uint64_t Dataset::tokens() const {
  uint64_t n = 0;
  for (const Example& e : examples) n += e.ids.size();
  return n;
}
uint64_t Dataset::trained_tokens() const {
  uint64_t n = 0;
  for (const Example& e : examples) n += e.trained_tokens();
  return n;
}

std::vector<bool> stops_of(const ModelFiles& files) {
  std::vector<bool> stops(files.tokenizer.vocab_size());
  for (const std::vector<TokenId>& ids : {files.stop_ids, files.tokenizer.stop_ids()})
    for (const TokenId id : ids)
      if (id >= 0 && static_cast<size_t>(id) < stops.size()) stops[static_cast<size_t>(id)] = true;
  return stops;
}

ExampleMaker::ExampleMaker(const ModelFiles& files, DataOptions options)
    : files_(&files), options_(std::move(options)) {
  if (options_.prompt_column.empty() != options_.completion_column.empty())
    throw Error(ErrorKind::usage, {.where = "--prompt-column, --completion-column",
                                   .what = "one of the two is missing",
                                   .cure = "name both columns"});
  if (options_.plain_template.empty() && !files.chat_template)
    options_.plain_template = kPlainTemplate;
  const std::string& plain = options_.plain_template;
  if (!plain.empty() && plain.find("{completion}") == std::string::npos)
    throw Error(ErrorKind::usage, {.where = "--template",
                                   .what = fmt::format("\"{}\" has no {{completion}}", plain),
                                   .cure = "for example \"{prompt}\\n{completion}\""});
  if (!options_.prompt_column.empty()) {
    options_.format = {.shape = RowFormat::Shape::pair};
    options_.format.columns.prompt = options_.prompt_column;
    options_.format.columns.response = options_.completion_column;
  }
  stops_ = stops_of(files);
}

void ExampleMaker::add(const Row& row, Dataset& into) const {
  ++into.counts.rows;
  const auto problem = [&](std::string field, std::string what) {
    ++into.counts.bad;
    into.problems.push_back({row.line, std::move(field), std::move(what)});
  };
  try {
    ordered_json room;
    TrainingRow read =
        read_row(composed_row(row.value, options_.nfc, room, into.counts), options_.format);
    switch (read.kind) {
      case TrainingRow::Kind::text:
        return add_segments({read.text, {}}, {{{read.text.size(), Learnt::answer}}}, row.line,
                            short_sha256(read.text), into);
      case TrainingRow::Kind::conversation:
        if (!options_.system.empty() && read.messages.front()["role"] != "system")
          read.messages.insert(
              read.messages.begin(),
              ordered_json::object({{"role", "system"}, {"content", options_.system}}));
        return add_conversation(read.messages, read.tools, row.line, into);
      case TrainingRow::Kind::preference:
        throw UnusableRow{"rejected", "makes this row a preference: learn it by preference"};
      case TrainingRow::Kind::rated:
        throw UnusableRow{"label", "makes this row a rated answer: learn it by preference"};
    }
  } catch (const UnusableRow& unusable) {
    problem(unusable.field, unusable.what);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::bad_input) throw;
    problem("messages", error.what());  // the template refused the conversation
  }
}

void ExampleMaker::add_conversation(const ordered_json& messages, const ordered_json& tools,
                                    uint64_t line, Dataset& into) const {
  const uint64_t hash = short_sha256(prompt_text(messages));
  std::vector<size_t> answers;
  for (size_t i = 0; i < messages.size(); ++i)
    if (messages[i]["role"] == "assistant") answers.push_back(i);
  const size_t last = answers.back();
  const Learnt prompts = options_.train_on_prompt ? Learnt::all : Learnt::nothing;
  const auto first_turns = [&](size_t count) {
    return ordered_json(messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(count));
  };

  if (!options_.plain_template.empty()) {
    constexpr std::string_view kCompletion = "{completion}";
    const std::string& plain = options_.plain_template;
    PromptText whole = render_plain_prompt(plain, first_turns(last));
    const size_t prompt = whole.text.size();
    const auto content = messages[last].find("content");
    if (content == messages[last].end() || !content->is_string())
      throw UnusableRow{"content", "is not a text"};
    const std::string answer = *content;
    whole.append({answer, {{0, answer.size()}}});
    whole.append({plain.substr(plain.find(kCompletion) + kCompletion.size()), {}});
    return add_segments(whole, {{{prompt, prompts}, {whole.text.size(), Learnt::answer}}}, line,
                        hash, into);
  }

  // The rendering up to each answer, and with it.
  const auto render = [&](size_t turns, bool add_generation_prompt) {
    return render_chat(*files_, {.messages = first_turns(turns),
                                 .tools = tools,
                                 .add_generation_prompt = add_generation_prompt});
  };
  const PromptText whole = render(last + 1, false);
  std::vector<Segment> segments;
  size_t at = 0;
  bool pure = true;  // every rendering is a start of the whole one
  for (const size_t i : answers) {
    const PromptText before = render(i, true);
    const PromptText with = i == last ? whole : render(i + 1, false);
    pure = whole.starts_with(before) && whole.starts_with(with) && before.text.size() >= at &&
           with.text.size() >= before.text.size();
    if (!pure) break;
    segments.push_back({before.text.size(), prompts});
    segments.push_back({with.text.size(), i == last                  ? Learnt::answer
                                          : options_.train_on_prompt ? Learnt::all
                                          : options_.last_turn_only  ? Learnt::nothing
                                                                     : Learnt::answer});
    at = with.text.size();
  }
  if (pure) return add_segments(whole, segments, line, hash, into);

  // The template rewrites earlier turns (it drops old reasoning, say): one example for each answer,
  // rendered as it stands when that answer is due. Where prompts are learnt, the last of them is
  // all of the conversation; earlier ones would learn its turns again.
  const bool last_only = options_.last_turn_only || options_.train_on_prompt;
  if (!last_only) ++into.counts.split_by_turn;
  for (const size_t i : answers) {
    if (last_only && i != last) continue;
    const PromptText with = render(i + 1, false);
    const size_t same = common_start(render(i, true).text, with.text);
    add_segments(with, {{{same, prompts}, {with.text.size(), Learnt::answer}}}, line, hash, into);
  }
}

void ExampleMaker::add_segments(const PromptText& whole, std::span<const Segment> segments,
                                uint64_t line, uint64_t hash, Dataset& into) const {
  const Tokenizer& tokenizer = files_->tokenizer;
  const auto is_stop = [&](TokenId id) { return stops_[static_cast<size_t>(id)]; };
  Example e;
  e.line = line;
  e.hash = hash;

  // Ids of the whole text if each segment's start falls between its tokens as it does when the
  // model is asked; otherwise the segments' own ids.
  std::vector<size_t> cuts;
  for (const Segment& segment : segments.first(segments.size() - 1)) cuts.push_back(segment.end);
  const auto [all, counts] = tokenizer.encode(whole.text, whole.literal, cuts);
  std::vector<size_t> ends;
  for (const std::optional<size_t>& count : counts)
    if (count) ends.push_back(*count);
  const bool agrees = ends.size() == cuts.size();
  ends.push_back(all.size());
  size_t done = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    std::vector<TokenId> ids;
    if (agrees)
      ids.assign(all.begin() + static_cast<std::ptrdiff_t>(done),
                 all.begin() + static_cast<std::ptrdiff_t>(ends[i]));
    else
      ids = encode(tokenizer, whole.first(segments[i].end).from(i == 0 ? 0 : segments[i - 1].end));
    done = ends[std::min(i, ends.size() - 1)];
    size_t learnt = segments[i].learnt == Learnt::nothing ? 0 : ids.size();
    if (segments[i].learnt == Learnt::answer) {
      const auto stop = std::find_if(ids.rbegin(), ids.rend(), is_stop);
      const bool last = i + 1 == segments.size();
      if (stop != ids.rend()) {
        learnt = static_cast<size_t>(ids.rend() - stop);
        if (last) ids.resize(learnt);
      } else if (last && tokenizer.eos()) {
        ids.push_back(*tokenizer.eos());
        learnt = ids.size();
        ++into.counts.without_end;
      }
    }
    for (size_t k = 0; k < ids.size(); ++k) {
      e.ids.push_back(ids[k]);
      e.trained.push_back(k < learnt ? 1 : 0);
    }
  }

  // BOS once, whether the template writes it or the tokenizer adds it.
  size_t prefix = 0;
  if (const std::optional<TokenId> bos = tokenizer.bos()) {
    size_t found = 0;
    while (found < e.ids.size() && e.ids[found] == *bos) ++found;
    const size_t wanted = found > 0 || tokenizer.adds_bos() ? 1 : 0;
    if (found > wanted) {
      e.ids.erase(e.ids.begin(), e.ids.begin() + static_cast<std::ptrdiff_t>(found - wanted));
      e.trained.erase(e.trained.begin(),
                      e.trained.begin() + static_cast<std::ptrdiff_t>(found - wanted));
    } else if (found < wanted) {
      e.ids.insert(e.ids.begin(), *bos);
      e.trained.insert(e.trained.begin(), uint8_t{0});
    }
    if (wanted == 1) e.trained[0] = 0;
    prefix = wanted;
  }

  if (e.ids.size() > options_.max_length) {
    ++into.counts.truncated;
    if (options_.truncation == Truncation::keep_end) {
      const auto first = static_cast<std::ptrdiff_t>(prefix);
      const auto cut = static_cast<std::ptrdiff_t>(e.ids.size() - options_.max_length);
      e.ids.erase(e.ids.begin() + first, e.ids.begin() + first + cut);
      e.trained.erase(e.trained.begin() + first, e.trained.begin() + first + cut);
    } else {
      e.ids.resize(options_.max_length);
      // Not inside a character: its last bytes would be learnt as the end of a text.
      size_t keep = e.ids.size();
      for (size_t back = 0; back < 4 && keep > back; ++back) {
        std::string bytes;
        for (size_t i = keep - back - 1; i < keep; ++i) bytes += tokenizer.bytes_of(e.ids[i]);
        const bool starts_inside =
            !bytes.empty() && (static_cast<unsigned char>(bytes[0]) & 0xC0) == 0x80;
        if (starts_inside) continue;
        if (find_invalid_utf8(bytes)) keep -= back + 1;
        break;
      }
      e.ids.resize(keep);
      e.trained.resize(keep);
    }
  }
  if (e.trained_tokens() == 0) {
    ++into.counts.without_answer;
    return;
  }
  into.examples.push_back(std::move(e));
}

Dataset load_dataset(const std::filesystem::path& path, const ModelFiles& files,
                     const DataOptions& options) {
  RecordReader reader(path);
  const ExampleMaker maker(files, options);
  Dataset data;
  while (const std::optional<Row> row = reader.next()) maker.add(*row, data);
  for (const RowProblem& problem : reader.problems()) {
    ++data.counts.rows;
    ++data.counts.bad;
    data.problems.push_back(problem);
  }
  if (data.examples.empty())
    refuse_unusable(path, data.counts, data.problems.empty() ? nullptr : &data.problems[0]);
  return data;
}

void refuse_unusable(const std::filesystem::path& path, const DataCounts& counts,
                     const RowProblem* first) {
  const std::string why =
      first == nullptr ? fmt::format("none of {} rows leaves a token to learn", counts.rows)
                       : fmt::format("no row can be used; line {}: {}{}{}", first->line,
                                     first->field, first->field.empty() ? "" : " ", first->what);
  throw Error(ErrorKind::bad_input,
              {.where = path.string(),
               .what = why,
               .cure = "rows need prompt and completion, messages, conversations, or "
                       "instruction and output, for pairs chosen and rejected, for raw text "
                       "text; name other columns with --prompt-column and --completion-column"});
}

Permutation epoch_order(size_t count, uint64_t seed, uint64_t epoch) {
  return Permutation(count, seed, kOrderStream + epoch);
}

std::vector<std::vector<uint32_t>> pack(std::span<const size_t> lengths, size_t capacity) {
  std::vector<uint32_t> by_length(lengths.size());
  std::iota(by_length.begin(), by_length.end(), 0u);
  std::stable_sort(by_length.begin(), by_length.end(),
                   [&](uint32_t a, uint32_t b) { return lengths[a] > lengths[b]; });
  std::vector<std::vector<uint32_t>> batches;
  std::multimap<size_t, size_t> room;  // tokens left in a batch, and which
  for (const uint32_t i : by_length) {
    const auto fits = room.lower_bound(lengths[i]);
    if (fits == room.end()) {
      batches.push_back({i});
      if (lengths[i] < capacity) room.emplace(capacity - lengths[i], batches.size() - 1);
      continue;
    }
    const auto [left, batch] = *fits;
    room.erase(fits);
    batches[batch].push_back(i);
    if (left > lengths[i]) room.emplace(left - lengths[i], batch);
  }
  // Within a batch in the order given, so that what is learnt together reads in one order.
  for (std::vector<uint32_t>& batch : batches) std::sort(batch.begin(), batch.end());
  return batches;
}

}  // namespace moru
