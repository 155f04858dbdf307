#include "tune/contamination.h"

#include <fmt/format.h>

#include "support.h"

using namespace moru;

namespace {

std::string words(int from, int count) {
  std::string text;
  for (int i = from; i < from + count; ++i)
    text += fmt::format("{}word{}", i == from ? "" : " ", i);
  return text;
}

}  // namespace

TEST_CASE("thirteen words in a row are an overlap, twelve are none") {
  EvaluationTexts evaluation;
  evaluation.add("Before. " + words(0, 30) + ", after");
  CHECK_FALSE(evaluation.overlap("quite other " + words(4, 12) + " text"));
  CHECK(evaluation.overlap("quite other " + words(4, 13) + " text") == words(4, 13));
  CHECK(evaluation.overlap("x " + words(17, 13)) == words(17, 13));
}

TEST_CASE("case, punctuation and Unicode form hide nothing") {
  EvaluationTexts evaluation;
  evaluation.add("The café opens at nine, closes at six; on Sundays it never opens at all!");
  CHECK(evaluation.overlap("the CAFE\u0301 opens at Nine closes at Six on sundays it never opens"));
}

TEST_CASE("a short text is an overlap only as a whole") {
  EvaluationTexts evaluation;
  evaluation.add("What is 15 % of 240?");
  CHECK(evaluation.overlap("what is 15% of 240"));
  CHECK_FALSE(evaluation.overlap("What is 15 % of 250?"));
  CHECK_FALSE(evaluation.overlap("So: what is 15 % of 240?"));
  CHECK_FALSE(evaluation.overlap(""));
  CHECK_FALSE(evaluation.overlap("?!"));
}

TEST_CASE("Korean counts by syllables, and spacing hides nothing") {
  EvaluationTexts evaluation;
  evaluation.add(
      "다음 달부터 요금제를 바꾸고 싶은데 위약금이 얼마나 나오는지 미리 알 수 있을까요?");
  // 26 of its syllables, spaced otherwise, within another text.
  CHECK(evaluation.overlap(
      "저기요, 다음달 부터 요금제를 바꾸고싶은데 위약금이 얼마나 나오는지 미리요"));
  CHECK_FALSE(evaluation.overlap("다음 달부터 요금제를 바꾸고 싶은데 위약금 없이 되나요?"));
  EvaluationTexts japanese;
  japanese.add("来月から料金プランを変更したいのですが、違約金がいくらになるか事前に分かりますか");
  CHECK(
      japanese.overlap("すみません、来月から料金プランを変更したいのですが違約金がいくらになるか"));
}

TEST_CASE("what many evaluation texts share is an instruction, not an overlap") {
  const std::string instruction = words(0, 20);
  EvaluationTexts few, many;
  for (int i = 0; i < 10; ++i) few.add(fmt::format("{} item{}", instruction, i));
  for (int i = 0; i < 11; ++i) many.add(fmt::format("{} item{}", instruction, i));
  CHECK(few.overlap(instruction + " new"));
  CHECK_FALSE(many.overlap(instruction + " new"));
  CHECK(many.overlap(instruction + " item3"));  // as a whole
  // The same text a hundred times is still one.
  EvaluationTexts repeated;
  for (int i = 0; i < 100; ++i) repeated.add(instruction);
  CHECK(repeated.overlap(instruction + " new"));
}

TEST_CASE("files give every text of their rows") {
  const TempDir folder;
  EvaluationTexts evaluation;
  evaluation.add_file(folder.file(
      "q.jsonl",
      "{\"id\": 1, \"messages\": [{\"role\": \"user\", \"content\": \"How far is it?\"}]}\n"));
  evaluation.add_file(folder.file("q.csv", "question,answer\r\nHow late is it?,noon\r\n"));
  evaluation.add_file(folder.file("q.txt", "How old is it?\nsecond line"));
  CHECK(evaluation.overlap("how far is it"));
  CHECK(evaluation.overlap("how late is it"));
  CHECK(evaluation.overlap("how old is it"));
  CHECK(evaluation.overlap("Second line."));
  CHECK_FALSE(evaluation.overlap("How warm is it?"));
  CHECK(error_from([&] { evaluation.add_file(folder.path() / "none.jsonl"); }).kind() ==
        ErrorKind::not_found);
}
