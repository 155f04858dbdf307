// The one thread that computes: it takes jobs from any thread, runs the backend's steps while there
// are any, and hands each step's news back. With nothing to do it sleeps.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "serve/api_error.h"
#include "serve/backend.h"

namespace moru {

// News of a job: an event of one of its choices, or the error that ends the whole job.
struct Update {
  size_t choice = 0;
  GenerationEvent event;
  std::optional<ApiError> error;
};

struct Job {
  // Choices with equal prompts in a row compute that prompt once: the others start when the first
  // has its first token, and find the prompt in the cache.
  std::vector<GenerationRequest> choices;
  // Called on the scheduler's thread: must not wait.
  std::function<void(Update)> deliver;
};

class Scheduler {
 public:
  // `backend` must outlive it. At most `max_choices` are accepted at once, over all jobs.
  Scheduler(Backend& backend, size_t max_choices);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Any thread. The job's number, or nullopt where the queue is full.
  std::optional<uint64_t> submit(Job job);
  // Drops a job; updates that are under way may still come. Unknown numbers are ignored.
  void cancel(uint64_t job);
  // Ends every job with `error`, also those that come later.
  void give_up(const ApiError& error);

  size_t open_choices() const;  // accepted and not ended
  GeneratorLoad load() const;   // the backend's, after the last step
  size_t max_choices() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
