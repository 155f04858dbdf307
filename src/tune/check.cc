#include "tune/check.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>

#include "base/text.h"
#include "tune/preference_data.h"

namespace moru {
namespace {

constexpr size_t kShownProblems = 5;
// Examples whose texts are read for tokens a syllable: enough for two digits.
constexpr size_t kSampled = 2000;

// Pieces of text in styles, broken into lines of `width` columns.
class Lines {
 public:
  Lines(size_t width, bool colour) : width_(width), colour_(colour) {}

  enum class Style { plain, learnt, control, learnt_control };
  void add(std::string_view text, Style style) {
    for (size_t at = 0; at < text.size();) {
      const CodePoint c = code_point_at(text, at);
      std::string character(text.substr(at, c.bytes));
      at += c.bytes;
      if (c.value == '\n') {
        flush();
        continue;
      }
      // What a terminal would act on is shown instead.
      if (c.value == '\t')
        character = "→";
      else if (c.value < 0x20 || c.value == 0x7F || !c.well_formed)
        character = c.well_formed ? fmt::format("\\x{:02x}", static_cast<unsigned>(c.value)) : "�";
      const size_t columns = display_width(character);
      const size_t marks = style != style_ ? marks_between(style_, style) : 0;
      if (used_ + marks + columns + closing(style) > width_) flush();
      turn(style);
      line_ += character;
      used_ += columns;
    }
  }
  std::string finish() {
    if (!line_.empty()) flush();
    return std::move(out_);
  }

 private:
  static bool learnt(Style s) { return s == Style::learnt || s == Style::learnt_control; }
  size_t closing(Style s) const { return !colour_ && learnt(s) ? 2 : 0; }
  size_t marks_between(Style from, Style to) const {
    return !colour_ && learnt(from) != learnt(to) ? 2 : 0;
  }
  void turn(Style to) {
    if (to == style_) return;
    if (!colour_) {
      if (learnt(style_) && !learnt(to)) line_ += "]]", used_ += 2;
      if (!learnt(style_) && learnt(to)) line_ += "[[", used_ += 2;
    } else {
      constexpr const char* kCodes[] = {"\033[0m", "\033[0;30;42m", "\033[0;36m", "\033[0;34;42m"};
      line_ += kCodes[static_cast<size_t>(to)];
    }
    style_ = to;
  }
  // Each line stands for itself: its styles end with it.
  void flush() {
    turn(Style::plain);
    out_ += line_ + "\n";
    line_.clear();
    used_ = 0;
  }

  size_t width_;
  bool colour_;
  std::string out_, line_;
  size_t used_ = 0;
  Style style_ = Style::plain;
};

std::string text_of(const Tokenizer& tokenizer, TokenId id) {
  return tokenizer.is_control(id) ? std::string(tokenizer.piece(id)) : tokenizer.bytes_of(id);
}

// Whether a text may be cut at byte `at`.
bool between_characters(std::string_view text, size_t at) {
  return at >= text.size() || (static_cast<unsigned char>(text[at]) & 0xC0) != 0x80;
}

}  // namespace

CheckedExamples load_checked(Pool& pool, const ModelFiles& files, Method method,
                             LoadExamples request) {
  request.raw_text = method == Method::text;
  return {method, method == Method::dpo   ? load_pairs(pool, files, request)
                  : method == Method::kto ? load_labelled(pool, files, request)
                                          : load_examples(pool, files, request)};
}

std::string_view CheckedExamples::answer(size_t i) const {
  if (method == Method::dpo) return i % 2 == 0 ? "chosen" : "rejected";
  if (method != Method::kto) return {};
  return LabelledList(data.examples)[i].desirable ? "wanted" : "not wanted";
}

std::string show_example(const ModelFiles& files, const ExampleView& e, const std::string& file,
                         const ShowOptions& options) {
  const Tokenizer& tokenizer = files.tokenizer;
  const TokenId last = e.ids.back();
  const bool ends = stops_of(files)[static_cast<size_t>(last)] && e.trained.back() != 0;
  std::string end =
      ends ? fmt::format("ends with {}, learnt", tokenizer.piece(last)) : "no end token learnt";
  std::string out = wrap_to_width(fmt::format("--- {} line {}: {} tokens, {} learnt, {}", file,
                                              e.line, e.ids.size(), e.learnt, end),
                                  options.width, 4);

  // Bytes of a character may lie in several tokens: those of one style are joined first.
  Lines lines(options.width, options.colour);
  std::string run;
  for (size_t i = 0; i < e.ids.size(); ++i) {
    const bool learnt = e.trained[i] != 0, control = tokenizer.is_control(e.ids[i]);
    run += text_of(tokenizer, e.ids[i]);
    const bool same = i + 1 < e.ids.size() && (e.trained[i + 1] != 0) == learnt &&
                      tokenizer.is_control(e.ids[i + 1]) == control;
    if (same) continue;
    using Style = Lines::Style;
    lines.add(run, learnt ? (control ? Style::learnt_control : Style::learnt)
                          : (control ? Style::control : Style::plain));
    run.clear();
  }
  out += lines.finish();

  std::string ids = "ids";
  for (size_t i = 0; i < e.ids.size(); ++i) {
    if (e.ids.size() > 2 * options.max_ids && i == options.max_ids) {
      ids += " …";
      i = e.ids.size() - options.max_ids;
    }
    const std::string id = std::to_string(e.ids[i]);
    ids += e.trained[i] != 0 ? " [" + id + "]" : " " + id;
  }
  return out + wrap_to_width(ids, options.width, 4);
}

namespace {

// What examples add up to that are looked at together.
struct Oddities {
  ExampleStats stats;
  uint64_t ends_learnt = 0, double_bos = 0, cut_characters = 0, spelled = 0;
  uint64_t syllables = 0, hangul_tokens = 0;

  void add(const Oddities& more) {
    stats.tokens += more.stats.tokens;
    stats.learnt += more.stats.learnt;
    for (const auto& [length, count] : more.stats.lengths) stats.lengths[length] += count;
    ends_learnt += more.ends_learnt;
    double_bos += more.double_bos;
    cut_characters += more.cut_characters;
    spelled += more.spelled;
    syllables += more.syllables;
    hangul_tokens += more.hangul_tokens;
  }
};

// Korean syllables of a text, and the tokens that have a part in them.
void count_hangul(std::string_view text, std::span<const size_t> begins, Oddities& out) {
  size_t token = 0, counted = begins.size();  // the last token that counts
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    if (c.value >= 0xAC00 && c.value <= 0xD7A3) {
      ++out.syllables;
      while (token + 1 < begins.size() && begins[token + 1] <= at) ++token;
      for (size_t t = token; t < begins.size() && begins[t] < at + c.bytes; ++t) {
        if (t == counted) continue;
        counted = t;
        ++out.hangul_tokens;
      }
    }
    at += c.bytes;
  }
}

void look_at(const Tokenizer& tokenizer, const std::vector<bool>& stops, const ExampleView& e,
             bool sampled, Oddities& out) {
  out.stats.add(e.ids.size(), e.learnt);
  out.ends_learnt += e.trained.back() != 0 && stops[static_cast<size_t>(e.ids.back())];
  const std::optional<TokenId> bos = tokenizer.bos();
  out.double_bos += bos && e.ids.size() > 1 && e.ids[0] == *bos && e.ids[1] == *bos;

  // The whole text, and where each token begins in it.
  std::string text;
  std::vector<size_t> begins;
  begins.reserve(e.ids.size());
  for (const TokenId id : e.ids) {
    begins.push_back(text.size());
    if (tokenizer.is_control(id))
      text += '\n';
    else
      tokenizer.append_bytes_of(id, text);
  }
  bool cut = find_invalid_utf8(text).has_value();
  for (size_t t = 1; t < e.ids.size(); ++t)
    cut = cut || (e.trained[t] != e.trained[t - 1] && !between_characters(text, begins[t]));
  out.cut_characters += cut;
  out.spelled += !tokenizer.control_spans(text).empty();
  if (sampled) count_hangul(text, begins, out);
}

}  // namespace

DataReport report_of(Pool& pool, const ModelFiles& files, const Examples& examples) {
  const Tokenizer& tokenizer = files.tokenizer;
  const std::vector<bool> stops = stops_of(files);
  Oddities all;
  constexpr size_t kTogether = 256, kItems = 256;
  for (size_t first = 0; first < examples.size(); first += kTogether * kItems) {
    const size_t count = std::min(kTogether * kItems, examples.size() - first);
    std::vector<Oddities> parts((count + kTogether - 1) / kTogether);
    pool.each(parts.size(), [&](size_t item) {
      const size_t begin = first + item * kTogether,
                   end = std::min(first + count, begin + kTogether);
      for (size_t i = begin; i < end; ++i)
        look_at(tokenizer, stops, examples[i], i < kSampled, parts[item]);
    });
    for (const Oddities& part : parts) all.add(part);
  }
  DataReport r;
  r.tokens = all.stats.tokens;
  r.learnt = all.stats.learnt;
  r.longest = all.stats.longest();
  r.ends_learnt = all.ends_learnt;
  r.double_bos = all.double_bos;
  r.cut_characters = all.cut_characters;
  r.spelled = all.spelled;
  // The length of which so many examples are shorter, or as long.
  const auto quantile = [&](uint64_t rank) {
    auto l = all.stats.lengths.begin();
    while (l != all.stats.lengths.end() && rank >= l->second) rank -= (l++)->second;
    return l == all.stats.lengths.end() ? 0 : l->first;
  };
  r.median = quantile(examples.size() / 2);
  r.p95 = quantile(examples.size() * 95 / 100);
  const std::vector<bool> first = first_of_each(examples);
  r.duplicates = static_cast<uint64_t>(std::count(first.begin(), first.end(), false));
  if (all.syllables != 0)
    r.tokens_per_hangul =
        static_cast<double>(all.hangul_tokens) / static_cast<double>(all.syllables);
  return r;
}

std::string show_report(const ModelFiles& files, const LoadedExamples& data, const DataReport& r,
                        size_t width) {
  const DataCounts& c = data.counts;
  const uint64_t examples = data.examples.size();
  std::string out;
  const auto line = [&](const std::string& text) { out += wrap_to_width(text, width, 4); };
  const auto note = [&](uint64_t count, const char* what) {
    if (count != 0) line(fmt::format("{:>8} {}", count, what));
  };
  line(fmt::format("--- {} rows: {} examples, {} tokens, {} learnt ({:.0f} %)", c.rows, examples,
                   r.tokens, r.learnt,
                   100.0 * static_cast<double>(r.learnt) /
                       static_cast<double>(std::max<uint64_t>(1, r.tokens))));
  line(fmt::format("{:>8} tokens in half of them, {} in 95 %, {} in the longest", r.median, r.p95,
                   r.longest));
  if (r.tokens_per_hangul != 0)
    line(fmt::format("{:>8.2f} tokens for a Korean syllable", r.tokens_per_hangul));
  const std::string bos =
      files.tokenizer.bos() ? std::string(files.tokenizer.piece(*files.tokenizer.bos())) : "none";
  line(fmt::format("{:>8} end with a learnt end token; BOS is {}", r.ends_learnt, bos));
  note(examples - r.ends_learnt, "do not: the model may not learn to stop there");
  note(c.without_end, "had no end token and were given EOS");
  note(r.double_bos, "begin with two BOS");
  note(c.truncated, "were cut to the maximum length");
  note(r.cut_characters, "have a border inside a character");
  note(r.spelled, "spell a control token, which stays text as when serving");
  note(c.split_by_turn,
       "conversations are learnt turn by turn: the template rewrites earlier ones");
  note(c.not_nfc, "rows hold decomposed text (NFD); --normalize nfc composes it");
  note(r.duplicates + c.duplicates,
       c.duplicates != 0 ? "duplicates were dropped" : "repeat an earlier one; see --deduplicate");
  note(c.without_answer, "rows were dropped: nothing left to learn");
  note(c.bad, "rows were dropped: not understood");
  for (size_t i = 0; i < std::min(kShownProblems, data.problems.size()); ++i) {
    const auto& [file, row] = data.problems[i];
    line(fmt::format("    {}: line {}: {}{}{}", file.filename().string(), row.line, row.field,
                     row.field.empty() ? "" : " ", row.what));
  }
  return out;
}

}  // namespace moru
