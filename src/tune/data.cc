#include "tune/data.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/hash.h"
#include "base/random.h"
#include "base/text.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

// Streams of the seed; adapters use those from 0.
constexpr uint64_t kOrderStream = uint64_t{1} << 32;

uint64_t hash_of(std::string_view text) {
  return std::stoull(sha256(text).substr(0, 16), nullptr, 16);
}

// A row that cannot be used: what stands at which field.
struct Unusable {
  std::string field, what;
};

// The text of a cell. Numbers and booleans are taken as they are written.
std::string text_of(const ordered_json& row, const std::string& field) {
  const auto found = row.find(field);
  if (found == row.end()) throw Unusable{field, "is missing"};
  if (found->is_string()) return found->get<std::string>();
  if (found->is_null()) return {};
  if (found->is_number() || found->is_boolean()) return found->dump();
  throw Unusable{field, "is not a text"};
}
std::string text_or_empty(const ordered_json& row, const std::string& field) {
  return row.contains(field) ? text_of(row, field) : std::string();
}

// ShareGPT's words for roles, and OpenAI's.
std::string role_of(const std::string& word) {
  static const std::map<std::string, std::string> kRoles = {{"human", "user"},
                                                            {"user", "user"},
                                                            {"gpt", "assistant"},
                                                            {"assistant", "assistant"},
                                                            {"model", "assistant"},
                                                            {"bing", "assistant"},
                                                            {"chatgpt", "assistant"},
                                                            {"system", "system"},
                                                            {"developer", "system"},
                                                            {"tool", "tool"},
                                                            {"observation", "tool"},
                                                            {"function", "tool"},
                                                            {"function_call", "assistant"}};
  const auto found = kRoles.find(word);
  if (found == kRoles.end()) throw Unusable{"role", fmt::format("\"{}\" is no role", word)};
  return found->second;
}

ordered_json message(const std::string& role, const std::string& content) {
  return {{"role", role}, {"content", content}};
}

// {from, value} or {role, content} to OpenAI's shape.
ordered_json message_of(const ordered_json& turn) {
  if (!turn.is_object()) throw Unusable{"messages", "a turn is not an object"};
  const bool sharegpt = turn.contains("from");
  ordered_json out = sharegpt ? ordered_json::object() : turn;
  out["role"] = role_of(text_of(turn, sharegpt ? "from" : "role"));
  if (sharegpt) out["content"] = text_of(turn, "value");
  if (!out.contains("content") && !out.contains("tool_calls"))
    throw Unusable{"content", "is missing"};
  return out;
}

ordered_json messages_of(const ordered_json& list, const std::string& field) {
  if (!list.is_array() || list.empty()) throw Unusable{field, "is not a list of turns"};
  ordered_json out = ordered_json::array();
  for (const ordered_json& turn : list) out.push_back(message_of(turn));
  return out;
}

// A row as a conversation, whatever its format.
ordered_json conversation_of(const ordered_json& row, const DataOptions& options) {
  ordered_json messages = ordered_json::array();
  if (!options.prompt_column.empty()) {
    messages.push_back(message("user", text_of(row, options.prompt_column)));
    messages.push_back(message("assistant", text_of(row, options.completion_column)));
  } else if (row.contains("messages")) {
    messages = messages_of(row["messages"], "messages");
  } else if (row.contains("conversations")) {
    messages = messages_of(row["conversations"], "conversations");
  } else if (row.contains("prompt") && row.contains("completion")) {
    const auto append = [&](const char* field, const char* role) {
      if (row[field].is_array())
        for (const ordered_json& turn : messages_of(row[field], field)) messages.push_back(turn);
      else
        messages.push_back(message(role, text_of(row, field)));
    };
    append("prompt", "user");
    append("completion", "assistant");
  } else if (row.contains("instruction") && row.contains("output")) {
    if (const auto history = row.find("history"); history != row.end() && history->is_array()) {
      for (const ordered_json& pair : *history) {
        if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_string())
          throw Unusable{"history", "is not a list of [question, answer]"};
        messages.push_back(message("user", pair[0].get<std::string>()));
        messages.push_back(message("assistant", pair[1].get<std::string>()));
      }
    }
    const std::string instruction = text_of(row, "instruction");
    const std::string input = text_or_empty(row, "input");
    messages.push_back(message("user", input.empty() ? instruction : instruction + "\n" + input));
    messages.push_back(message("assistant", text_of(row, "output")));
  } else {
    throw Unusable{"",
                   "has neither messages, conversations, prompt and completion, instruction "
                   "and output, nor text"};
  }
  if (messages.front()["role"] != "system") {
    std::string system = text_or_empty(row, "system");
    if (system.empty()) system = options.system;
    if (!system.empty()) messages.insert(messages.begin(), message("system", system));
  }
  const bool answered = std::any_of(messages.begin(), messages.end(),
                                    [](const ordered_json& m) { return m["role"] == "assistant"; });
  if (!answered) throw Unusable{"messages", "no turn is the assistant's"};
  return messages;
}

ordered_json tools_of(const ordered_json& row) {
  const auto found = row.find("tools");
  if (found == row.end() || !found->is_string())
    return found == row.end() ? ordered_json() : *found;
  if (found->get_ref<const std::string&>().empty()) return {};
  ordered_json parsed = ordered_json::parse(found->get_ref<const std::string&>(), nullptr, false);
  if (parsed.is_discarded()) throw Unusable{"tools", "is not JSON"};
  return parsed;
}

// What stands before the first answer: the identity of a row for splits.
std::string prompt_text(const ordered_json& messages) {
  std::string text;
  for (const ordered_json& m : messages) {
    if (m["role"] == "assistant") break;
    if (m["role"] != "system" && m.contains("content"))
      text +=
          (m["content"].is_string() ? m["content"].get<std::string>() : m["content"].dump()) + "\n";
  }
  return text;
}

std::string replace(std::string text, std::string_view from, std::string_view to) {
  const size_t at = text.find(from);
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
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
  stops_.assign(files.tokenizer.vocab_size(), false);
  const auto mark = [&](TokenId id) {
    if (id >= 0 && static_cast<size_t>(id) < stops_.size()) stops_[static_cast<size_t>(id)] = true;
  };
  for (const TokenId id : files.stop_ids) mark(id);
  for (const TokenId id : files.tokenizer.stop_ids()) mark(id);
}

std::string ExampleMaker::render(const ordered_json& messages, const ordered_json& tools,
                                 bool add_generation_prompt) const {
  const Tokenizer& tokenizer = files_->tokenizer;
  const auto piece = [&](std::optional<TokenId> id) {
    return id ? std::string(tokenizer.piece(*id)) : std::string();
  };
  return files_->chat_template->render({.messages = messages,
                                        .tools = tools,
                                        .add_generation_prompt = add_generation_prompt,
                                        .bos_token = piece(tokenizer.bos()),
                                        .eos_token = piece(tokenizer.eos()),
                                        .extra = {}});
}

void ExampleMaker::add(const Row& row, Dataset& into) const {
  ++into.counts.rows;
  const auto problem = [&](std::string field, std::string what) {
    ++into.counts.bad;
    into.problems.push_back({row.line, std::move(field), std::move(what)});
  };
  try {
    const bool named = !options_.prompt_column.empty();
    if (!named && row.value.contains("text") && !row.value.contains("messages") &&
        !row.value.contains("prompt") && !row.value.contains("instruction")) {
      const std::string text = text_of(row.value, "text");
      return add_segments({{{text, true}}}, row.line, hash_of(text), into);
    }
    add_conversation(conversation_of(row.value, options_), tools_of(row.value), row.line, into);
  } catch (const Unusable& unusable) {
    problem(unusable.field, unusable.what);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::bad_input) throw;
    problem("messages", error.what());  // the template refused the conversation
  }
}

void ExampleMaker::add_conversation(const ordered_json& messages, const ordered_json& tools,
                                    uint64_t line, Dataset& into) const {
  const uint64_t hash = hash_of(prompt_text(messages));
  std::vector<size_t> answers;
  for (size_t i = 0; i < messages.size(); ++i)
    if (messages[i]["role"] == "assistant") answers.push_back(i);
  const size_t last = answers.back();
  const auto first_turns = [&](size_t count) {
    return ordered_json(messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(count));
  };

  if (!options_.plain_template.empty()) {
    std::string prompt;
    for (size_t i = 0; i < last; ++i) {
      if (!messages[i].contains("content") || !messages[i]["content"].is_string())
        throw Unusable{"content", "is not a text"};
      if (!prompt.empty()) prompt += "\n";
      prompt += messages[i]["content"].get<std::string>();
    }
    const std::string& plain = options_.plain_template;
    const size_t at = plain.find("{completion}");
    const std::string before = replace(plain.substr(0, at), "{prompt}", prompt);
    const std::string after = plain.substr(at + std::string_view("{completion}").size());
    return add_segments({{{before, false}, {text_of(messages[last], "content") + after, true}}},
                        line, hash, into);
  }

  // The rendering up to each answer, and with it.
  const std::string whole = render(first_turns(last + 1), tools, false);
  std::vector<Segment> segments;
  size_t at = 0;
  bool pure = true;  // every rendering is a start of the whole one
  for (const size_t i : answers) {
    const std::string before = render(first_turns(i), tools, true);
    const std::string with = i == last ? whole : render(first_turns(i + 1), tools, false);
    pure = whole.starts_with(before) && whole.starts_with(with) && before.size() >= at &&
           with.size() >= before.size();
    if (!pure) break;
    segments.push_back({whole.substr(at, before.size() - at), false});
    segments.push_back({whole.substr(before.size(), with.size() - before.size()),
                        i == last || !options_.last_turn_only});
    at = with.size();
  }
  if (pure) return add_segments(segments, line, hash, into);

  // The template rewrites earlier turns (it drops old reasoning, say): one example for each answer,
  // rendered as it stands when that answer is due.
  ++into.counts.split_by_turn;
  for (const size_t i : answers) {
    if (options_.last_turn_only && i != last) continue;
    const std::string before = render(first_turns(i), tools, true);
    const std::string with = render(first_turns(i + 1), tools, false);
    const size_t same = common_start(before, with);
    add_segments({{{with.substr(0, same), false}, {with.substr(same), true}}}, line, hash, into);
  }
}

void ExampleMaker::add_segments(std::span<const Segment> segments, uint64_t line, uint64_t hash,
                                Dataset& into) const {
  const Tokenizer& tokenizer = files_->tokenizer;
  const auto is_stop = [&](TokenId id) { return stops_[static_cast<size_t>(id)]; };
  Example e;
  e.line = line;
  e.hash = hash;

  // Ids of the whole text if each segment's start falls between its tokens as it does when the
  // model is asked; otherwise the segments' own ids.
  std::string text;
  for (const Segment& s : segments) text += s.text;
  const std::vector<TokenId> whole = tokenizer.encode(text);
  std::vector<size_t> ends;
  std::string start;
  bool agrees = true;
  for (size_t i = 0; i + 1 < segments.size() && agrees; ++i) {
    start += segments[i].text;
    const std::vector<TokenId> ids = tokenizer.encode(start);
    agrees = ids.size() <= whole.size() && std::equal(ids.begin(), ids.end(), whole.begin());
    ends.push_back(ids.size());
  }
  ends.push_back(whole.size());
  size_t done = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    std::vector<TokenId> ids;
    if (agrees)
      ids.assign(whole.begin() + static_cast<std::ptrdiff_t>(done),
                 whole.begin() + static_cast<std::ptrdiff_t>(ends[i]));
    else
      ids = tokenizer.encode(segments[i].text);
    done = ends[std::min(i, ends.size() - 1)];
    // An answer is learnt up to the token that ends it; what a template adds after that is not.
    size_t learnt = segments[i].learnt ? ids.size() : 0;
    if (segments[i].learnt) {
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
  if (data.examples.empty()) {
    const std::string why =
        data.problems.empty()
            ? fmt::format("none of {} rows leaves a token to learn", data.counts.rows)
            : fmt::format("no row can be used; line {}: {}{}{}", data.problems[0].line,
                          data.problems[0].field, data.problems[0].field.empty() ? "" : " ",
                          data.problems[0].what);
    throw Error(ErrorKind::bad_input,
                {.where = path.string(),
                 .what = why,
                 .cure = "rows need prompt and completion, messages, conversations, or "
                         "instruction and output; name other columns with --prompt-column and "
                         "--completion-column"});
  }
  return data;
}

Split split_by_hash(std::vector<Example> examples, double fraction) {
  Split split;
  if (fraction <= 0) {
    split.train = std::move(examples);
    return split;
  }
  // The largest hashes are set aside, at least that of one prompt and never those of all.
  std::set<uint64_t> hashes;
  for (const Example& e : examples) hashes.insert(e.hash);
  if (hashes.size() < 2) {
    split.train = std::move(examples);
    return split;
  }
  const long double share = (1 - std::min<long double>(fraction, 1)) * 0x1p64L;
  const uint64_t limit = share >= 0x1p64L ? UINT64_MAX : static_cast<uint64_t>(share);
  const uint64_t from = std::clamp(limit, *std::next(hashes.begin()), *hashes.rbegin());
  for (Example& e : examples)
    (e.hash >= from ? split.validation : split.train).push_back(std::move(e));
  return split;
}

std::vector<uint32_t> epoch_order(size_t count, uint64_t seed, uint64_t epoch) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  Random random(seed, kOrderStream + epoch);
  random.shuffle(std::span(order));
  return order;
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
