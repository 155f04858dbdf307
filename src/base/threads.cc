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

thread_local size_t own_number = 0;

// What read_ahead() was last told, less what has been asked for.
struct Ahead {
  const char* at = nullptr;
  size_t lines = 0;
};
thread_local Ahead ahead;

constexpr size_t kLineBytes = 64;

// Waits until `word` differs from `value`: spins first, then sleeps.
void wait_change(std::atomic<uint32_t>& word, uint32_t value, std::atomic<uint32_t>& sleepers) {
  Ahead next = ahead;
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != value) {
      ahead = next;
      return;
    }
    if (next.lines == 0) {
      pause();
      continue;
    }
    // As many as a core has under way at a time, or so; the next look at the word waits for them.
    for (int line = 0; line < 4 && next.lines > 0; ++line, --next.lines, next.at += kLineBytes)
      __builtin_prefetch(next.at, 0, 2);  // into the second level
  }
  ahead = next;
  while (word.load(std::memory_order_acquire) == value) {
    sleepers.fetch_add(1);
    if (word.load() == value) futex_wait(word, value);
    sleepers.fetch_sub(1);
  }
}

}  // namespace

// A phase is open while its gate is: threads enter and leave by counting themselves in it. The
// caller closes the gate when no item is left and waits for those inside, so the job's fields never
// change under a thread that reads them.
struct Pool::State {
  static constexpr uint32_t kOpen = 1u << 31;  // the other bits: threads inside

  alignas(64) std::atomic<uint32_t> phase{0};  // changes when a phase opens
  std::atomic<uint32_t> phase_sleepers{0};
  alignas(64) std::atomic<uint32_t> gate{0};
  std::atomic<uint32_t> gate_sleepers{0};
  alignas(64) std::atomic<size_t> next{0};  // item to take
  size_t count = 0;
  void (*item)(void*, size_t) = nullptr;
  void* context = nullptr;
  std::atomic<bool> stop{false};
  std::mutex error_mutex;
  std::exception_ptr error;
  std::vector<Share> shares;
  std::vector<std::thread> threads;

  void take_items() {
    try {
      for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
           i = next.fetch_add(1, std::memory_order_relaxed))
        item(context, i);
    } catch (...) {
      next.store(count);
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  bool enter() {
    uint32_t seen = gate.load(std::memory_order_relaxed);
    while ((seen & kOpen) != 0)
      if (gate.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire)) return true;
    return false;
  }

  void leave() {
    if (gate.fetch_sub(1) == 1 && gate_sleepers.load() > 0) futex_wake(gate);
  }

  void serve() {
    for (uint32_t seen = 0; !stop.load();) {
      wait_change(phase, seen, phase_sleepers);
      seen = phase.load(std::memory_order_acquire);
      if (!enter()) continue;
      take_items();
      leave();
    }
  }
};

Pool::Pool(size_t threads) : state_(std::make_unique<State>()) {
  MORU_CHECK(threads >= 1);
  state_->shares = std::vector<Share>(threads);
  for (size_t i = 1; i < threads; ++i)
    state_->threads.emplace_back([state = state_.get(), i] {
      own_number = i;
      state->serve();
    });
}

Pool::~Pool() {
  state_->stop.store(true);
  state_->phase.fetch_add(1);
  futex_wake(state_->phase);
  for (std::thread& thread : state_->threads) thread.join();
}

size_t Pool::size() const { return state_->shares.size(); }
size_t Pool::thread() { return own_number; }
std::span<Pool::Share> Pool::shares() { return state_->shares; }

void Pool::read_ahead(const void* from, size_t bytes) {
  ahead = {static_cast<const char*>(from), (bytes + kLineBytes - 1) / kLineBytes};
}

void Pool::run(void (*item)(void*, size_t), void* context, size_t count) {
  State& s = *state_;
  s.item = item;
  s.context = context;
  s.count = count;
  s.next.store(0, std::memory_order_relaxed);
  if (!s.threads.empty()) {
    s.gate.store(State::kOpen, std::memory_order_release);
    s.phase.fetch_add(1);
    if (s.phase_sleepers.load() > 0) futex_wake(s.phase);
  }
  s.take_items();
  s.gate.fetch_and(~State::kOpen);
  for (uint32_t inside = s.gate.load(std::memory_order_acquire); inside != 0;
       inside = s.gate.load(std::memory_order_acquire))
    wait_change(s.gate, inside, s.gate_sleepers);
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

}  // namespace moru
