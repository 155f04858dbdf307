#include "serve/scheduler.h"

#include <condition_variable>
#include <mutex>

#include "client.h"  // comes_true
#include "fake_backend.h"
#include "support.h"

using namespace moru;

namespace {

// Gathers a job's updates.
class Inbox {
 public:
  std::function<void(Update)> taker() {
    return [this](Update update) {
      const std::lock_guard lock(mutex_);
      updates_.push_back(std::move(update));
    };
  }
  size_t count() const {
    const std::lock_guard lock(mutex_);
    return updates_.size();
  }
  std::string text(size_t choice) const {
    const std::lock_guard lock(mutex_);
    std::string out;
    for (const Update& u : updates_)
      if (!u.error && u.choice == choice) out += u.event.text;
    return out;
  }
  size_t finished() const {
    const std::lock_guard lock(mutex_);
    size_t n = 0;
    for (const Update& u : updates_) n += u.event.finish.has_value();
    return n;
  }
  std::vector<ApiError> errors() const {
    const std::lock_guard lock(mutex_);
    std::vector<ApiError> out;
    for (const Update& u : updates_)
      if (u.error) out.push_back(*u.error);
    return out;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Update> updates_;
};

GenerationRequest request(std::string_view prompt) {
  return {.prompt = FakeBackend::ids_of(prompt), .max_tokens = 100};
}

}  // namespace

TEST_CASE("jobs of several threads are answered, each with its own text") {
  FakeBackend backend;
  Scheduler scheduler(backend, 1000);
  constexpr size_t kThreads = 8, kJobs = 20;
  std::vector<Inbox> inboxes(kThreads * kJobs);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (size_t j = 0; j < kJobs; ++j) {
        const size_t n = t * kJobs + j;
        CHECK(scheduler.submit({{request(fmt::format("안녕 {}", n))}, inboxes[n].taker()}));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(comes_true([&] { return scheduler.open_choices() == 0; }));
  for (size_t n = 0; n < inboxes.size(); ++n)
    CHECK(inboxes[n].text(0) == fmt::format("안녕 {}", n));
}

TEST_CASE("choices of one prompt wait for its first token, other prompts do not") {
  FakeBackend backend;
  backend.hold = true;
  Scheduler scheduler(backend, 100);
  Inbox inbox;
  scheduler.submit(
      {{request("aa"), request("aa"), request("aa"), request("b"), request("b")}, inbox.taker()});
  const size_t steps = backend.steps;
  REQUIRE(comes_true([&] { return backend.steps > steps + 3; }));
  CHECK(backend.submitted == 2);
  backend.hold = false;
  CHECK(comes_true([&] { return inbox.finished() == 5; }));
  CHECK(backend.submitted == 5);
  for (const size_t i : {0, 1, 2}) CHECK(inbox.text(i) == "aa");
  for (const size_t i : {3, 4}) CHECK(inbox.text(i) == "b");
}

TEST_CASE("more than the limit is not accepted, and room comes back") {
  FakeBackend backend;
  backend.hold = true;
  Scheduler scheduler(backend, 3);
  Inbox inbox;
  CHECK(
      !scheduler.submit({{request("a"), request("b"), request("c"), request("d")}, inbox.taker()}));
  const auto first = scheduler.submit({{request("a"), request("b")}, inbox.taker()});
  REQUIRE(first);
  CHECK(scheduler.submit({{request("c")}, inbox.taker()}));
  CHECK(!scheduler.submit({{request("d")}, inbox.taker()}));
  CHECK(scheduler.open_choices() == 3);
  scheduler.cancel(*first);
  CHECK(comes_true([&] { return scheduler.open_choices() == 1; }));
  CHECK(backend.cancelled == 2);
  CHECK(scheduler.submit({{request("e"), request("f")}, inbox.taker()}));
}

TEST_CASE("a request that the backend refuses ends its job alone") {
  FakeBackend backend;
  Scheduler scheduler(backend, 10);
  Inbox bad, good;
  scheduler.submit({{request("first"), request("!"), request("third")}, bad.taker()});
  scheduler.submit({{request("fine")}, good.taker()});
  CHECK(comes_true([&] { return scheduler.open_choices() == 0; }));
  REQUIRE(bad.errors().size() == 1);
  CHECK(bad.errors()[0].status == 400);
  CHECK(bad.count() == 1);
  CHECK(good.text(0) == "fine");
}

TEST_CASE("a step that fails ends every job, and later jobs run") {
  FakeBackend backend;
  backend.hold = true;
  Scheduler scheduler(backend, 10);
  Inbox one, two, later;
  scheduler.submit({{request("a")}, one.taker()});
  scheduler.submit({{request("b"), request("b")}, two.taker()});
  backend.fail_steps = true;
  CHECK(comes_true([&] { return scheduler.open_choices() == 0; }));
  CHECK(one.errors().size() == 1);
  CHECK(two.errors().size() == 1);
  CHECK(two.errors().at(0).status == 507);
  backend.fail_steps = backend.hold = false;
  scheduler.submit({{request("c")}, later.taker()});
  CHECK(comes_true([&] { return later.finished() == 1; }));
}

TEST_CASE("giving up ends jobs with the error, also later ones") {
  FakeBackend backend;
  backend.hold = true;
  Scheduler scheduler(backend, 10);
  Inbox before, after;
  scheduler.submit({{request("a")}, before.taker()});
  scheduler.give_up(stopping_error());
  CHECK(comes_true([&] { return before.errors().size() == 1; }));
  scheduler.submit({{request("b")}, after.taker()});
  CHECK(comes_true([&] { return after.errors().size() == 1; }));
  CHECK(after.errors().at(0).status == 503);
}

TEST_CASE("with nothing to do no step runs, and it ends with jobs under way") {
  FakeBackend backend;
  {
    Scheduler scheduler(backend, 10);
    Inbox inbox;
    scheduler.submit({{request("a")}, inbox.taker()});
    REQUIRE(comes_true([&] { return inbox.finished() == 1; }));
    const size_t steps = backend.steps;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(backend.steps == steps);
  }
  backend.hold = true;
  Inbox left;
  Scheduler scheduler(backend, 10);
  scheduler.submit({{request("a")}, left.taker()});
}
