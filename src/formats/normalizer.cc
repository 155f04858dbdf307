#include "formats/normalizer.h"

#include <fmt/format.h>

#include "base/error.h"

namespace moru {
namespace {

// A hostile list of replacements could double a text step by step.
constexpr size_t kMaxGrowth = 64;

std::string replace_matches(const Matcher& matcher, std::string_view text, std::string_view by) {
  std::string out;
  out.reserve(text.size() + text.size() / 4);
  size_t done = 0, from = 0;
  while (from <= text.size()) {
    const std::optional<Regex::Match> match = matcher.find(text, from);
    if (!match) break;
    out.append(text.substr(done, match->begin - done));
    out.append(by);
    done = from = match->end;
    if (match->begin == match->end) {
      if (from == text.size()) break;
      from += first_character(text.substr(from)).bytes;
    }
  }
  out.append(text.substr(done));
  return out;
}

std::string_view strip(std::string_view text, bool left, bool right) {
  const auto is_space = [](Character c) { return (class_of(c.code) & kSpace) != 0; };
  while (left && !text.empty() && is_space(first_character(text)))
    text.remove_prefix(first_character(text).bytes);
  while (right && !text.empty() && is_space(last_character(text)))
    text.remove_suffix(last_character(text).bytes);
  return text;
}

}  // namespace

std::string Normalizer::run(std::string_view text) const {
  std::string now(text);
  for (const NormalizerStep& step : steps_) {
    switch (step.kind) {
      case NormalizerStep::Kind::form:
        now = normalize(now, step.form);
        break;
      case NormalizerStep::Kind::replace:
        now = replace_matches(*step.matcher, now, step.text);
        break;
      case NormalizerStep::Kind::prepend:
        if (!now.empty()) now.insert(0, step.text);
        break;
      case NormalizerStep::Kind::strip:
        now = std::string(strip(now, step.left, step.right));
        break;
    }
    if (now.size() / kMaxGrowth > text.size() + 64)
      throw Error(ErrorKind::bad_input,
                  {.where = "tokenizer.json: normalizer",
                   .what = fmt::format("makes {} bytes of a text of {}", now.size(), text.size()),
                   .cure = "the file is damaged or hostile"});
  }
  return now;
}

std::string Normalizer::description() const {
  std::string all;
  for (const NormalizerStep& step : steps_) {
    switch (step.kind) {
      case NormalizerStep::Kind::form:
        all += fmt::format("form {};", static_cast<int>(step.form));
        break;
      case NormalizerStep::Kind::replace:
        all += fmt::format("replace {} by \"{}\";", step.matcher->name(), step.text);
        break;
      case NormalizerStep::Kind::prepend:
        all += fmt::format("prepend \"{}\";", step.text);
        break;
      case NormalizerStep::Kind::strip:
        all += fmt::format("strip {} {};", step.left, step.right);
        break;
    }
  }
  return all;
}

}  // namespace moru
