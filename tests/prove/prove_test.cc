#include "prove/prove.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "base/files.h"
#include "support.h"

using namespace moru;

namespace {

// 20 questions whose prompt is their number; every fourth is a choice.
QuestionSet twenty() {
  QuestionSet set{.where = "q.jsonl", .items = {}, .file_sha256 = "f", .asked_sha256 = "asked"};
  for (uint64_t i = 0; i < 20; ++i) {
    nlohmann::ordered_json row = {{"id", fmt::format("q{}", i)},
                                  {"prompt", std::to_string(i)},
                                  {"answer", fmt::format("a{}", i)}};
    if (i % 4 == 3) {
      row["choices"] = {"yes", "no"};
      row["answer"] = "no";
    }
    set.items.push_back(question_from_row("q.jsonl", {.line = i + 1, .value = row}));
  }
  return set;
}

// A model that knows the questions below `knows`, counts what it was asked, and takes its time.
struct Fake {
  size_t knows = 20, batch = 3, asked = 0;
  std::string sha = "model";

  Answerer answerer() {
    Answerer model{.name = "fake",
                   .model_sha256 = sha,
                   .engine = "exact",
                   .batch = batch,
                   .generate = {},
                   .score = {}};
    model.generate = [this](QuestionBatch questions, const AnswerLimits& limits) {
      std::vector<Reply> replies;
      for (const Question* q : questions) {
        const size_t number = std::stoul(q->messages[0]["content"].get<std::string>());
        replies.push_back({.text = number < knows ? fmt::format(" a{}\n", number) : "\xFF?",
                           .tokens_in = 10,
                           .tokens_out = 2,
                           .cut = limits.max_tokens < 2});
        ++asked;
      }
      usleep(2000);
      return replies;
    };
    model.score = [this](QuestionBatch questions) {
      std::vector<ChoiceReply> replies;
      for (const Question* q : questions) {
        const size_t number = std::stoul(q->messages[0]["content"].get<std::string>());
        replies.push_back(
            {.logprobs = {-1.0, number < knows ? -0.5 : -2.0}, .tokens_in = 5, .tokens_out = 2});
        ++asked;
      }
      return replies;
    };
    return model;
  }
};

std::vector<bool> verdicts(const Results& results) {
  std::vector<bool> correct;
  for (const ItemResult& item : results.items) correct.push_back(item.correct);
  return correct;
}

}  // namespace

TEST_CASE("every question is asked once and answered in order") {
  Fake fake{.knows = 10};
  const QuestionSet questions = twenty();
  std::vector<size_t> seen;
  const Results results =
      prove(questions, fake.answerer(),
            {.progress = [&](const ProveProgress& p) { seen.push_back(p.done); }});
  CHECK(fake.asked == 20);
  CHECK(seen == std::vector<size_t>{3, 6, 9, 12, 15, 18, 20});
  for (size_t i = 0; i < 20; ++i) {
    CAPTURE(i);
    CHECK(results.items[i].id == fmt::format("q{}", i));
    CHECK(results.items[i].correct == (i < 10));
    CHECK(results.items[i].reason.empty() == (i < 10));
  }
  CHECK(results.items[3].answer == "no");
  CHECK(results.items[12].answer == "\uFFFD?");
  const Tally sums = tally(results.items);
  CHECK(sums.correct == 10);
  CHECK(sums.tokens_in == 15 * 10 + 5 * 5);
  CHECK(sums.tokens_out == 40);
  CHECK(sums.accuracy() == 0.5);
  CHECK(sums.interval.low == wilson(10, 20).low);
  CHECK(sums.seconds >= 0.01);  // five batches of 2 ms
}

TEST_CASE("cost follows from measured time and the machine's price") {
  Tally sums;
  sums.total = 50;
  sums.seconds = 90;
  sums.tokens_in = 4000;
  sums.tokens_out = 500;
  CHECK(sums.usd_per_1000(0.10) == doctest::Approx(0.10 / 3600 * 90 / 50 * 1000));
  CHECK(sums.tokens_per_second() == 50);
  CHECK(sums.answers_per_second() == doctest::Approx(50.0 / 90));
  CHECK(Tally{}.usd_per_1000(1) == 0);
}

TEST_CASE("results come back from their file as they were") {
  const TempDir folder;
  const auto file = folder.path() / "r.jsonl";
  Fake fake{.knows = 7};
  const Results results = prove(twenty(), fake.answerer(),
                                {.limits = {.max_tokens = 1, .stop = {"\n"}},
                                 .choice_score = ChoiceScore::per_byte,
                                 .results = file});
  const Results read = read_results(file);
  CHECK(read.name == "fake");
  CHECK(read.key.limits.stop == std::vector<std::string>{"\n"});
  CHECK(read.key.choice_score == ChoiceScore::per_byte);
  REQUIRE(read.items.size() == 20);
  const auto find = [&](const std::string& id) {
    return *std::find_if(read.items.begin(), read.items.end(),
                         [&](const ItemResult& item) { return item.id == id; });
  };
  for (const ItemResult& item : results.items) {
    const ItemResult same = find(item.id);
    CHECK(same.prompt_sha256 == item.prompt_sha256);
    CHECK(same.answer == item.answer);
    CHECK(same.correct == item.correct);
    CHECK(same.reason == item.reason);
    CHECK(same.logprobs == item.logprobs);
    CHECK(same.tokens_in == item.tokens_in);
    CHECK(same.cut == item.cut);
    CHECK(same.seconds == item.seconds);
  }
}

TEST_CASE("a results file cut at any byte is taken up again to the same answers") {
  const TempDir folder;
  const auto file = folder.path() / "r.jsonl";
  const QuestionSet questions = twenty();
  Fake whole{.knows = 13};
  const std::vector<bool> expected =
      verdicts(prove(questions, whole.answerer(), {.results = file}));
  const std::string content = read_file(file);
  for (size_t cut = 0; cut <= content.size(); cut += 37) {
    CAPTURE(cut);
    folder.file("r.jsonl", content.substr(0, cut));
    const auto lines =
        std::count(content.begin(), content.begin() + static_cast<ptrdiff_t>(cut), '\n');
    Fake again{.knows = 13};
    CHECK(verdicts(prove(questions, again.answerer(), {.results = file})) == expected);
    CHECK(again.asked == 20 - static_cast<size_t>(std::max<ptrdiff_t>(0, lines - 1)));
    CHECK(read_results(file).items.size() == 20);
  }
}

TEST_CASE("a process killed while it asks loses only the batch it was at") {
  const TempDir folder;
  const auto file = folder.path() / "r.jsonl";
  const QuestionSet questions = twenty();
  const pid_t child = ::fork();
  if (child == 0) {
    Fake fake;
    prove(questions, fake.answerer(), {.results = file, .progress = [](const ProveProgress& p) {
                                         if (p.done >= 9) ::raise(SIGKILL);
                                       }});
    ::_exit(1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  REQUIRE(WIFSIGNALED(status));
  Fake fake;
  const Results results = prove(questions, fake.answerer(), {.results = file});
  CHECK(fake.asked == 11);
  CHECK(tally(results.items).correct == 20);
}

TEST_CASE("results of another model or other questions are refused, or replaced when asked to") {
  const TempDir folder;
  const auto file = folder.path() / "r.jsonl";
  QuestionSet questions = twenty();
  Fake fake;
  prove(questions, fake.answerer(), {.results = file});
  const auto refused = [&](const ProveOptions& options) {
    return error_from([&] { prove(questions, fake.answerer(), options); }).kind();
  };
  CHECK(refused({.limits = {.max_tokens = 7}, .results = file}) == ErrorKind::usage);
  fake.sha = "another";
  CHECK(refused({.results = file}) == ErrorKind::usage);
  fake.sha = "model";
  questions.asked_sha256 = "others";
  CHECK(refused({.results = file}) == ErrorKind::usage);
  Fake again;
  prove(questions, again.answerer(), {.results = file, .replace_other = true});
  CHECK(again.asked == 20);
  CHECK(read_results(file).items.size() == 20);
}

TEST_CASE("a results file that is none is refused, naming the line") {
  const TempDir folder;
  const auto refusal = [&](std::string_view content) {
    const auto file = folder.file("r.jsonl", content);
    return error_from([&] { read_results(file); });
  };
  CHECK(refusal("").problem() == "holds no results");
  CHECK(refusal("{}\n").where().ends_with("r.jsonl: line 1"));
  CHECK(refusal("[1]\n").kind() == ErrorKind::bad_input);
  Fake fake;
  const auto file = folder.path() / "good.jsonl";
  prove(twenty(), fake.answerer(), {.results = file});
  const std::string header = read_file(file).substr(0, read_file(file).find('\n') + 1);
  CHECK(refusal(header + "{\"id\": 3}\n").where().ends_with("line 2"));
  CHECK(refusal(header + "{\"id\": \n").problem() == "is not JSON");
}

TEST_CASE("a model that gives NaN is wrong, and says why") {
  Fake fake;
  Answerer model = fake.answerer();
  model.score = [](QuestionBatch batch) {
    return std::vector<ChoiceReply>(batch.size(), {.logprobs = {std::nan(""), -1}});
  };
  const Results results = prove(twenty(), model, {});
  CHECK(!results.items[3].correct);
  CHECK(results.items[3].reason.find("NaN") != std::string::npos);
}

TEST_CASE("two results on the same questions are compared pair by pair") {
  Fake strong{.knows = 16}, weak{.knows = 12};
  const Results before = prove(twenty(), strong.answerer(), {});
  Results after = prove(twenty(), weak.answerer(), {});
  after.items[17].correct = true;
  const Comparison c = compare(after, before);
  CHECK(c.counts.both == 12);
  CHECK(c.counts.neither == 3);
  CHECK(c.newly_wrong == std::vector<size_t>{12, 13, 14, 15});
  CHECK(c.newly_right == std::vector<size_t>{17});
  CHECK(c.p == mcnemar_exact({12, 1, 4, 3}));
  CHECK(c.ratio.low < 13.0 / 16);
  after.key.asked_sha256 = "others";
  CHECK(error_from([&] { compare(after, before); }).kind() == ErrorKind::bad_input);
}
