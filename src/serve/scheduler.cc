#include "serve/scheduler.h"

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

namespace moru {
namespace {

struct Running {
  Job job;
  std::vector<size_t> leaders;  // by choice: the first choice of the same prompt
  std::vector<bool> submitted;
  std::vector<uint64_t> requests;  // the backend's numbers of the submitted choices
  size_t open = 0;                 // choices that have not ended
};

struct Owner {
  uint64_t job;
  size_t choice;
};

std::vector<size_t> leaders_of(const std::vector<GenerationRequest>& choices) {
  std::vector<size_t> leaders(choices.size());
  for (size_t i = 0; i < choices.size(); ++i) {
    const bool same = i > 0 && choices[i].prompt == choices[i - 1].prompt;
    leaders[i] = same ? leaders[i - 1] : i;
  }
  return leaders;
}

}  // namespace

struct Scheduler::State {
  Backend& backend;
  const size_t max_choices;

  mutable std::mutex mutex;
  std::condition_variable news;
  // Guarded by the mutex.
  std::vector<std::pair<uint64_t, Job>> submissions;
  std::vector<uint64_t> cancellations;
  std::optional<ApiError> given_up;
  bool stopping = false;
  uint64_t next_job = 1;
  size_t open_choices = 0;
  GeneratorLoad load;

  // The thread's own.
  std::map<uint64_t, Running> jobs;
  std::map<uint64_t, Owner> owners;  // by the backend's numbers
  std::thread thread;

  State(Backend& b, size_t most) : backend(b), max_choices(most), load(b.load()) {}

  void run() {
    for (;;) {
      std::vector<std::pair<uint64_t, Job>> arrived;
      std::vector<uint64_t> cancelled;
      std::optional<ApiError> end;
      {
        std::unique_lock lock(mutex);
        news.wait(lock, [&] {
          return stopping || !submissions.empty() || !cancellations.empty() || !jobs.empty();
        });
        if (stopping) return;
        arrived.swap(submissions);
        cancelled.swap(cancellations);
        end = given_up;
      }
      for (auto& [number, job] : arrived) begin(number, std::move(job));
      for (const uint64_t number : cancelled) drop(number);
      if (end) fail_all(*end);
      if (!jobs.empty()) step();
      const GeneratorLoad now = backend.load();
      const std::lock_guard lock(mutex);
      load = now;
    }
  }

  void begin(uint64_t number, Job job) {
    const size_t count = job.choices.size();
    Running running{.job = std::move(job), .submitted = std::vector<bool>(count), .open = count};
    running.leaders = leaders_of(running.job.choices);
    jobs.emplace(number, std::move(running));
    for (size_t i = 0; i < count; ++i)
      if (jobs.contains(number) && jobs.at(number).leaders[i] == i) submit_choice(number, i);
  }

  void submit_choice(uint64_t number, size_t choice) {
    Running& running = jobs.at(number);
    running.submitted[choice] = true;
    try {
      const uint64_t request = backend.submit(std::move(running.job.choices[choice]));
      running.requests.push_back(request);
      owners.emplace(request, Owner{number, choice});
    } catch (const Error& error) {
      fail(number, api_error_of(error));
    }
  }

  void step() {
    std::vector<Owner> begun;  // leaders may have begun: their followers can start
    try {
      backend.step([&](const GenerationEvent& event) {
        const auto owner = owners.find(event.request);
        if (owner == owners.end()) return;
        begun.push_back(owner->second);
        deliver(owner->second, event);
      });
    } catch (const Error& error) {
      return fail_all(api_error_of(error));
    } catch (const std::bad_alloc&) {
      return fail_all(refusal(507, "There is not enough memory for this step."));
    }
    for (const Owner& leader : begun) start_followers(leader);
  }

  void deliver(const Owner owner, const GenerationEvent& event) {
    Running& running = jobs.at(owner.job);
    running.job.deliver({.choice = owner.choice, .event = event});
    if (!event.finish) return;
    owners.erase(event.request);
    std::erase(running.requests, event.request);
    --running.open;
    release(1);
    if (running.open == 0) jobs.erase(owner.job);
  }

  void start_followers(const Owner& leader) {
    const auto found = jobs.find(leader.job);
    if (found == jobs.end()) return;
    const size_t count = found->second.leaders.size();
    for (size_t i = leader.choice + 1; i < count && jobs.contains(leader.job); ++i) {
      const Running& running = jobs.at(leader.job);
      if (running.leaders[i] == leader.choice && !running.submitted[i])
        submit_choice(leader.job, i);
    }
  }

  void release(size_t choices) {
    const std::lock_guard lock(mutex);
    open_choices -= choices;
  }

  void drop(uint64_t number) {
    const auto found = jobs.find(number);
    if (found == jobs.end()) return;
    for (const uint64_t request : found->second.requests) {
      backend.cancel(request);
      owners.erase(request);
    }
    release(found->second.open);
    jobs.erase(found);
  }

  void fail(uint64_t number, const ApiError& error) {
    const auto deliver = std::move(jobs.at(number).job.deliver);
    drop(number);
    deliver({.error = error});
  }

  void fail_all(const ApiError& error) {
    while (!jobs.empty()) fail(jobs.begin()->first, error);
  }
};

Scheduler::Scheduler(Backend& backend, size_t max_choices)
    : state_(new State(backend, max_choices)) {
  state_->thread = std::thread([this] { state_->run(); });
}

Scheduler::~Scheduler() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->news.notify_one();
  state_->thread.join();
}

std::optional<uint64_t> Scheduler::submit(Job job) {
  MORU_CHECK(!job.choices.empty());
  uint64_t number;
  {
    const std::lock_guard lock(state_->mutex);
    if (job.choices.size() > state_->max_choices - state_->open_choices) return std::nullopt;
    state_->open_choices += job.choices.size();
    number = state_->next_job++;
    state_->submissions.emplace_back(number, std::move(job));
  }
  state_->news.notify_one();
  return number;
}

void Scheduler::cancel(uint64_t job) {
  {
    const std::lock_guard lock(state_->mutex);
    state_->cancellations.push_back(job);
  }
  state_->news.notify_one();
}

void Scheduler::give_up(const ApiError& error) {
  {
    const std::lock_guard lock(state_->mutex);
    state_->given_up = error;
  }
  state_->news.notify_one();
}

size_t Scheduler::open_choices() const {
  const std::lock_guard lock(state_->mutex);
  return state_->open_choices;
}

GeneratorLoad Scheduler::load() const {
  const std::lock_guard lock(state_->mutex);
  return state_->load;
}

size_t Scheduler::max_choices() const { return state_->max_choices; }

}  // namespace moru
