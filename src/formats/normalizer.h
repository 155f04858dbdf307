// What is done to text before it is split: the `normalizer` of a tokenizer.json.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/pretokenizer.h"

namespace moru {

struct NormalizerStep {
  enum class Kind { form, replace, prepend, strip };
  Kind kind = Kind::form;
  NormalForm form = NormalForm::nfc;
  std::optional<Matcher> matcher;    // replace: each match becomes `text`
  std::string text;                  // replace; prepend: put before a text that is not empty
  bool left = false, right = false;  // strip white space
};

class Normalizer {
 public:
  void add(NormalizerStep step) { steps_.push_back(std::move(step)); }
  bool empty() const { return steps_.empty(); }
  std::string run(std::string_view text) const;
  // Equal descriptions do alike.
  std::string description() const;

 private:
  std::vector<NormalizerStep> steps_;
};

}  // namespace moru
