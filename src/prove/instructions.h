// What moru asks every model beside a company's own questions: whether it still does as it is told,
// and still reads plain text as well as before. A tuned model can win on its task and lose both.
#pragma once
#include <span>
#include <string_view>

#include "prove/questions.h"

namespace moru {

// Instructions whose following a rule can check: so many words, one case, a given end, JSON, a
// language … in English and Korean, after the idea of IFEval (arXiv:2311.07911). The set is part of
// the program: scores of one version compare.
QuestionSet instruction_questions();

// Short passages of plain English and Korean, to measure a model's loss on.
std::span<const std::string_view> general_passages();

}  // namespace moru
