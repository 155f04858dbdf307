#include "base/threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"

namespace moru {
namespace {

// About 20 µs on a current core: longer than any gap inside a decode step, shorter than what a
// person or a neighbour on the same core would notice.
constexpr int kSpins = 4000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Waits until `word` differs from `value`: spins first, then sleeps.
void wait_change(std::atomic<uint32_t>& word, uint32_t value, std::atomic<uint32_t>& sleepers) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != value) return;
    pause();
  }
  while (word.load(std::memory_order_acquire) == value) {
    sleepers.fetch_add(1);
    if (word.load() == value) futex_wait(word, value);
    sleepers.fetch_sub(1);
  }
}

}  // namespace

struct Pool::State {
  alignas(64) std::atomic<uint32_t> round{0};  // changes when a job is posted
  std::atomic<uint32_t> round_sleepers{0};
  alignas(64) std::atomic<uint32_t> busy{0};  // workers that have not finished the job
  std::atomic<uint32_t> busy_sleepers{0};
  void (*work)(void*, size_t) = nullptr;
  void* context = nullptr;
  std::atomic<bool> stop{false};
  std::mutex error_mutex;
  std::exception_ptr error;
  std::vector<std::thread> threads;

  void call(size_t index) {
    try {
      work(context, index);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  void serve(size_t index) {
    uint32_t seen = 0;
    for (;;) {
      wait_change(round, seen, round_sleepers);
      seen = round.load(std::memory_order_acquire);
      if (stop.load()) return;
      call(index);
      if (busy.fetch_sub(1) == 1 && busy_sleepers.load() > 0) futex_wake(busy);
    }
  }
};

Pool::Pool(size_t threads) : state_(std::make_unique<State>()) {
  MORU_CHECK(threads >= 1);
  for (size_t i = 1; i < threads; ++i)
    state_->threads.emplace_back([state = state_.get(), i] { state->serve(i); });
}

Pool::~Pool() {
  state_->stop.store(true);
  state_->round.fetch_add(1);
  futex_wake(state_->round);
  for (std::thread& thread : state_->threads) thread.join();
}

size_t Pool::size() const { return state_->threads.size() + 1; }

void Pool::run_raw(void (*work)(void*, size_t), void* context) {
  State& s = *state_;
  s.work = work;
  s.context = context;
  if (!s.threads.empty()) {
    s.busy.store(static_cast<uint32_t>(s.threads.size()));
    s.round.fetch_add(1);
    if (s.round_sleepers.load() > 0) futex_wake(s.round);
  }
  s.call(0);
  for (uint32_t left = s.busy.load(std::memory_order_acquire); left != 0;
       left = s.busy.load(std::memory_order_acquire))
    wait_change(s.busy, left, s.busy_sleepers);
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

}  // namespace moru
