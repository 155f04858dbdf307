// Splitting text into the words within which BPE merges.
//
// A PreTokenizer is a list of steps; each cuts every piece that the one before left, and sees
// nothing beyond that piece. A step finds the matches of a pattern. The patterns that model
// families share are hand-written scanners over Unicode classes; any other runs through PCRE2.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "formats/regex.h"
#include "formats/unicode.h"

namespace moru {

// The pattern that GPT-2 began and later families vary:
//   contractions | words | digits | punctuation | \s*[\r\n]+ | \s+(?!\S) | \s+
struct WordShape {
  enum class Contractions : uint8_t { none, lower_first, any_case_first, any_case_suffix };
  enum class Words : uint8_t {
    after_space,      //  ?\p{L}+
    after_any,        // [^\r\n\p{L}\p{N}]?\p{L}+
    after_any_cased,  // [^\r\n\p{L}\p{N}]?U*W+ | [^\r\n\p{L}\p{N}]?U+W*, U upper-like, W lower-like
  };
  enum class Digits : uint8_t { after_space, up_to_1, up_to_3, any };  // ` ?\p{N}+`, \p{N}{1,3} …

  Contractions contractions = Contractions::none;
  Words words = Words::after_any;
  uint16_t letters = kLetter;                          // the class of a word's characters
  uint16_t not_before = kLetter | kNumber | kNewline;  // what no word takes before it
  bool ascii_punctuation_first = false;  // [!-/:-@\[-`{-~][A-Za-z]+ is tried before all
  Digits digits = Digits::up_to_3;
  bool no_digits = false;
  // Punctuation: any character without these classes; or, where `punctuation` is set, with those.
  uint16_t not_punctuation = kSpace | kLetter | kNumber;
  uint16_t punctuation = 0;
  std::string_view punctuation_tail = "\r\n";  // characters that may follow punctuation
  bool newlines = true;                        // \s*[\r\n]+
};

// A run of one class: \p{N}{1,3}, [一-龥…]+.
struct Run {
  uint16_t classes = 0;
  std::span<const std::pair<char32_t, char32_t>> ranges = {};  // or these code points
  size_t at_most = SIZE_MAX;
};

struct Literal {
  std::string text;
};

class Matcher {
 public:
  // A regular expression: a scanner if it is a known one, else PCRE2. Error: unsupported.
  static Matcher of_regex(const std::string& where, std::string_view pattern);
  static Matcher of_text(std::string text);

  std::optional<Regex::Match> find(std::string_view text, size_t from) const;
  // Equal names match alike.
  const std::string& name() const { return name_; }
  // Whether matches follow each other without a gap in any text.
  bool covers_all() const { return covers_all_; }

 private:
  std::string name_;
  bool covers_all_ = false;
  std::variant<WordShape, Run, Literal, Regex> pattern_;
};

// What becomes of matches and of the text between them; as `tokenizers` names it.
enum class SplitBehavior { isolated, removed, contiguous, merged_with_previous, merged_with_next };

struct PreTokenizerStep {
  enum class Kind { split, prefix_space, metaspace };
  Kind kind = Kind::split;
  // split:
  std::optional<Matcher> matcher;
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;  // what lies between matches counts as the match
  // metaspace: spaces become ▁, and one is put in front of …
  enum class Prepend { never, first, always };
  Prepend prepend = Prepend::never;  // … no piece, the piece that starts the text, every piece
  bool split_at_spaces = false;      // and every ▁ begins a piece
};

class PreTokenizer {
 public:
  void add(PreTokenizerStep step);

  // Calls `emit(std::string_view)` for every word, in order. `starts_text`: nothing stands before.
  template <typename Emit>
  void split(std::string_view text, bool starts_text, Emit&& emit) const {
    run(0, text, starts_text, Sink(emit));
  }
  // Equal descriptions split alike.
  std::string description() const;

 private:
  // A reference to a callable; lives as long as the call.
  struct Sink {
    template <typename Emit>
    explicit Sink(Emit& emit)
        : object(&emit), call([](void* o, std::string_view piece, bool starts_text) {
            if constexpr (std::is_invocable_v<Emit&, std::string_view, bool>)
              (*static_cast<Emit*>(o))(piece, starts_text);
            else
              (*static_cast<Emit*>(o))(piece);
          }) {}
    void* object;
    void (*call)(void*, std::string_view, bool);
    void operator()(std::string_view piece, bool starts_text) const {
      call(object, piece, starts_text);
    }
  };
  void run(size_t step, std::string_view text, bool starts_text, Sink emit) const;
  static void apply(const PreTokenizerStep& step, std::string_view text, bool starts_text,
                    Sink emit);

  std::vector<PreTokenizerStep> steps_;
};

// What a GGUF's tokenizer.ggml.pre stands for: the name is the contract, the file holds no pattern.
struct KnownPre {
  std::string_view name;
  std::span<const std::string_view> patterns;  // steps, each a Split(Isolated) by this regex
  bool nfc = false;                            // the family's tokenizer.json normalizes
  bool ignore_merges = false;                  // a word that is in the vocabulary is taken whole
  bool adds_bos = false;                       // where the file does not say
};
std::span<const KnownPre> known_pres();
PreTokenizer pre_tokenizer_of(const KnownPre& pre);

}  // namespace moru
