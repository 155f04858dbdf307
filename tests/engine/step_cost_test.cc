#include "engine/step_cost.h"

#include <doctest/doctest.h>

#include <cmath>

#include "base/random.h"

using namespace moru;

namespace {

StepWork work_of(size_t tokens, size_t position) {
  StepWork work;
  work.add(tokens, position);
  return work;
}

// A machine: 3 ms a step, 0.2 ms a token, 0.1 µs a pair.
double seconds_of(const StepWork& work) {
  return 3e-3 + 2e-4 * double(work.tokens) + 1e-7 * work.pairs;
}

}  // namespace

TEST_CASE("pairs are tokens times the keys that they see") {
  CHECK(work_of(1, 0).pairs == 1);
  CHECK(work_of(3, 10).pairs == 11 + 12 + 13);
  StepWork both = work_of(2, 0);
  both.add(1, 7);
  CHECK(both.tokens == 3);
  CHECK(both.pairs == 1 + 2 + 8);
}

TEST_CASE("the cost curve is learnt, and still known after a thousand steps of one token") {
  StepCost cost;
  Random random(1);
  for (int i = 0; i < 60; ++i) {
    const StepWork work = work_of(1 + random.below(512), random.below(8000));
    cost.learn(work, seconds_of(work) * (0.95 + 0.1 * double(random.uniform())));
  }
  for (int i = 0; i < 1000; ++i) cost.learn(work_of(1, 100), seconds_of(work_of(1, 100)));
  for (const size_t tokens : {1, 64, 512})
    for (const size_t position : {0, 4000, 8000}) {
      const StepWork work = work_of(tokens, position);
      CHECK(cost.seconds(work) == doctest::Approx(seconds_of(work)).epsilon(0.1));
    }
}

TEST_CASE("steps that something else held up are not believed") {
  StepCost cost;
  Random random(2);
  for (int i = 0; i < 120; ++i) {
    const StepWork work = work_of(1 + random.below(512), random.below(4000));
    cost.learn(work, seconds_of(work) * (i % 7 == 3 ? 8 : 1));
  }
  const StepWork work = work_of(300, 2000);
  CHECK(cost.seconds(work) == doctest::Approx(seconds_of(work)).epsilon(0.15));
}

TEST_CASE("as many tokens are affordable as the time allows, fewer where the context is long") {
  StepCost cost;
  for (size_t tokens = 1; tokens <= 512; tokens *= 2)
    for (const size_t position : {0, 1000, 8000})
      cost.learn(work_of(tokens, position), seconds_of(work_of(tokens, position)));
  const StepWork answers = work_of(8, 100);
  for (const size_t position : {0, 3000, 8000}) {
    const size_t count = cost.affordable(answers, position, 10'000, 0.05);
    StepWork all = answers, more = answers;
    all.add(count, position);
    more.add(count + 2, position);
    CHECK(seconds_of(all) <= 0.05 * 1.001);
    CHECK(seconds_of(more) >= 0.05 * 0.999);
  }
  CHECK(cost.affordable(answers, 0, 20, 0.05) == 20);
  CHECK(cost.affordable(answers, 0, 1000, 0.001) == 0);
}

TEST_CASE("steps grow no faster than the curve is known") {
  StepCost cost;
  CHECK(cost.affordable({}, 0, 512, 0.2) == 32);
  CHECK(cost.affordable(work_of(30, 0), 0, 512, 0.2) == 2);
  cost.learn(work_of(1, 0), 1e-3);
  CHECK(cost.affordable({}, 0, 512, 0.2) == 32);
  cost.learn(work_of(32, 0), 4e-3);
  CHECK(cost.affordable({}, 0, 512, 0.2) == 64);
  // A first step that took too long: the next one is smaller, as if all of it came from its tokens.
  StepCost slow;
  slow.learn(work_of(32, 0), 0.8);
  CHECK(slow.affordable({}, 0, 512, 0.201) == 8);
  CHECK(slow.affordable({}, 0, 512, 0.01) == 0);
}

TEST_CASE("nothing sensible is learnt from nothing") {
  StepCost cost;
  cost.learn({}, 1);
  cost.learn(work_of(5, 0), 0);
  cost.learn(work_of(5, 0), std::nan(""));
  CHECK(cost.seconds(work_of(100, 100)) == 0);
}
