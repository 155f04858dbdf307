#include "formats/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>

#include "base/error.h"

namespace moru {
namespace {

constexpr size_t kMaxPatternBytes = 64 << 10;
// Steps of backtracking for one match; a sane pattern needs a few per byte.
constexpr uint32_t kMatchLimit = 2'000'000;
constexpr size_t kHeapLimitKiB = 64 << 10;

// Oniguruma's white space and word characters, as members of a PCRE2 class. It takes the
// superscripts and fractions of Latin-1 for word characters.
constexpr std::string_view kSpaceMembers =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kWordMembers =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149}\x{1f150}-\x{1f169}\x{1f170}-\x{1f189})";

// Property names that both engines know and mean alike.
constexpr std::array<std::string_view, 45> kProperties = {
    "L",        "Lu",       "Ll",    "Lt",       "Lm",    "Lo",     "M",      "Mn",   "Mc",
    "Me",       "N",        "Nd",    "Nl",       "No",    "P",      "Pc",     "Pd",   "Ps",
    "Pe",       "Pi",       "Pf",    "Po",       "S",     "Sm",     "Sc",     "Sk",   "So",
    "Z",        "Zs",       "Zl",    "Zp",       "Cc",    "Cf",     "Co",     "Han",  "Hangul",
    "Hiragana", "Katakana", "Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Thai", "Devanagari"};

// Rewrites one Oniguruma pattern for PCRE2, or says what stands in the way.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    while (at_ < in_.size() && trouble_.empty()) {
      const char c = in_[at_];
      if (c == '\\') {
        escape(false);
      } else if (c == '[') {
        character_class();
      } else if (c == '(') {
        group();
      } else if (c == '^' || c == '$') {
        out_ += c == '^' ? "(?m:^)" : "(?m:$)";  // Oniguruma's are always about lines
        ++at_;
      } else {
        out_ += c;
        ++at_;
      }
    }
    return std::move(out_);
  }
  const std::string& trouble() const { return trouble_; }

 private:
  void refuse(std::string what) {
    if (trouble_.empty()) trouble_ = std::move(what);
    at_ = in_.size();
  }
  char peek(size_t ahead) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }

  // After '(': plain, (?:…), (?=…), (?!…), (?<=…), (?<!…), (?>…) and (?i:…).
  void group() {
    if (peek(1) == '*') return refuse("a verb (*…)");
    if (peek(1) != '?') {
      out_ += "(";
      ++at_;
      return;
    }
    for (const std::string_view opening :
         {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"})
      if (in_.substr(at_).starts_with(opening)) {
        out_ += opening;
        at_ += opening.size();
        return;
      }
    refuse(fmt::format("the group \"{}\"", in_.substr(at_, 4)));
  }

  void property() {
    const bool negated = in_[at_ + 1] == 'P';
    const size_t close = in_.find('}', at_);
    if (peek(2) != '{' || close == std::string_view::npos) return refuse("a property without {…}");
    std::string_view name = in_.substr(at_ + 3, close - at_ - 3);
    bool inverse = false;
    if (name.starts_with('^')) {
      inverse = true;
      name.remove_prefix(1);
    }
    if (std::find(kProperties.begin(), kProperties.end(), name) == kProperties.end())
      return refuse(fmt::format("the property {}", name));
    out_ += fmt::format("\\{}{{{}}}", negated != inverse ? 'P' : 'p', name);
    at_ = close + 1;
  }

  void escape(bool in_class) {
    const char c = peek(1);
    if (c == 'p' || c == 'P') return property();
    const auto set = [&](std::string_view members, bool negated) {
      if (in_class && negated) return refuse(fmt::format("\\{} in a class", c));
      out_ += in_class ? std::string(members) : fmt::format("[{}{}]", negated ? "^" : "", members);
      at_ += 2;
    };
    switch (c) {
      case 's':
        return set(kSpaceMembers, false);
      case 'S':
        return set(kSpaceMembers, true);
      case 'w':
        return set(kWordMembers, false);
      case 'W':
        return set(kWordMembers, true);
      case 'd':
        return set("\\p{Nd}", false);
      case 'D':
        return set("\\p{Nd}", true);
      case 'b':
        if (in_class) return refuse("\\b in a class");
        out_ += fmt::format("(?:(?<=[{0}])(?![{0}])|(?<![{0}])(?=[{0}]))", kWordMembers);
        at_ += 2;
        return;
      case 'r':
      case 'n':
      case 't':
      case 'f':
        out_ += {'\\', c};
        at_ += 2;
        return;
      case 'x':
        // \x{20AC} or \x20: both engines read them alike when whole.
        if (peek(2) == '{') {
          const size_t close = in_.find('}', at_);
          if (close == std::string_view::npos) return refuse("\\x without }");
          out_ += in_.substr(at_, close + 1 - at_);
          at_ = close + 1;
          return;
        }
        if (!std::isxdigit(static_cast<unsigned char>(peek(2))) ||
            !std::isxdigit(static_cast<unsigned char>(peek(3))) || peek(2) > '7')
          return refuse("\\x without two digits below 80");
        out_ += in_.substr(at_, 4);
        at_ += 4;
        return;
      case 'u': {
        const std::string_view digits = in_.substr(std::min(at_ + 2, in_.size()), 4);
        if (digits.size() != 4 || !std::all_of(digits.begin(), digits.end(), [](char d) {
              return std::isxdigit(static_cast<unsigned char>(d)) != 0;
            }))
          return refuse("\\u without four digits");
        out_ += fmt::format("\\x{{{}}}", digits);
        at_ += 6;
        return;
      }
      default:
        if (c == '\0' || std::isalnum(static_cast<unsigned char>(c)))
          return refuse(fmt::format("the escape \\{}", c));
        out_ += {'\\', c};
        at_ += 2;
    }
  }

  void character_class() {
    out_ += '[';
    ++at_;
    if (peek(0) == '^') {
      out_ += '^';
      ++at_;
    }
    if (peek(0) == ']') return refuse("a class that begins with ]");
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == ']') {
        out_ += ']';
        ++at_;
        return;
      }
      if (c == '[') return refuse("a class within a class");
      if (c == '&' && peek(1) == '&') return refuse("an intersection of classes");
      if (c == '\\') {
        escape(true);
      } else {
        out_ += c;
        ++at_;
      }
    }
    refuse("a class without end");
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_, trouble_;
};

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};

}  // namespace

struct Regex::Program {
  std::string where, pattern;
  std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>> code;
  std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>> limits;
};

Regex::Regex(std::string where, std::string_view pattern) : program_(new Program) {
  program_->where = std::move(where);
  program_->pattern = pattern;
  const auto refuse = [&](std::string_view why) {
    throw Error(ErrorKind::unsupported,
                {.where = program_->where,
                 .what = fmt::format("the pattern {} has {}", pattern.substr(0, 400), why),
                 .cure = "moru cannot split text the way this tokenizer does"});
  };
  if (pattern.size() > kMaxPatternBytes) refuse("more than 64 KiB");
  Translator translator(pattern);
  const std::string translated = translator.run();
  if (!translator.trouble().empty()) refuse(translator.trouble());

  const std::unique_ptr<pcre2_compile_context, Deleter<pcre2_compile_context_free>> context(
      pcre2_compile_context_create(nullptr));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), 100);
  int error = 0;
  size_t offset = 0;
  program_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                     translated.size(), PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C, &error,
                                     &offset, context.get()));
  if (!program_->code) {
    std::array<PCRE2_UCHAR, 256> message{};
    pcre2_get_error_message(error, message.data(), message.size());
    refuse(fmt::format("a fault: {}", reinterpret_cast<const char*>(message.data())));
  }
  // Without the just-in-time compiler the same matches are only slower.
  (void)pcre2_jit_compile(program_->code.get(), PCRE2_JIT_COMPLETE);
  program_->limits.reset(pcre2_match_context_create(nullptr));
  pcre2_set_match_limit(program_->limits.get(), kMatchLimit);
  pcre2_set_heap_limit(program_->limits.get(), kHeapLimitKiB);
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

std::optional<Regex::Match> Regex::find(std::string_view text, size_t from) const {
  // One match block a thread: pcre2_match_data is scratch, and allocating it costs more than most
  // matches.
  thread_local const std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>> scratch(
      pcre2_match_data_create(1, nullptr));
  const int result =
      pcre2_match(program_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                  from, PCRE2_NO_UTF_CHECK, scratch.get(), program_->limits.get());
  if (result == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (result < 0)
    throw Error(ErrorKind::unsupported,
                {.where = program_->where,
                 .what = fmt::format("the pattern {} takes too long on this text",
                                     std::string_view(program_->pattern).substr(0, 400)),
                 .cure = ""});
  const size_t* bounds = pcre2_get_ovector_pointer(scratch.get());
  return Match{bounds[0], std::max(bounds[0], bounds[1])};
}

}  // namespace moru
