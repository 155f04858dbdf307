// The one pool that computes. Work is a list of items; the caller and the pool's threads take them
// in order until none is left, and each() returns when all are done. Threads spin for a moment
// between phases, then sleep, so that an idle program uses no processor. A thread that wakes too
// late for a phase is not waited for: a busy neighbour on its core costs its share of the work and
// no more.
//
// Kernels split their work by a fixed grid, never by the number of threads, so that results are
// the same bits for any pool.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace moru {

class Pool {
 public:
  // What is left to one thread of a phase's items (base/pieces.h): two 32-bit numbers.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };

  // `threads` ≥ 1; 1 starts no thread.
  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  size_t size() const;
  // Which of a pool's threads the calling one is: 0 for one that is not a pool's own.
  static size_t thread();
  // One for each thread; for the phase under way alone.
  std::span<Share> shares();

  // Memory that the calling thread will read first in a later phase. While it waits for other
  // threads or for a phase it asks for these bytes, a line at a time, so that memory does not idle
  // where one thread has work that others do not share. An address that is none does no harm.
  static void read_ahead(const void* from, size_t bytes);

  // Calls item(i) for each i in [0, count), handed out in order to whichever thread is free. The
  // first exception is rethrown here after all threads have stopped; items not yet begun are left
  // out. Not reentrant, one caller at a time.
  template <typename Item>
  void each(size_t count, Item&& item) {
    if (count == 0) return;
    if (count == 1) return item(size_t{0});
    auto* pointer = &item;
    run([](void* context, size_t i) { (*static_cast<decltype(pointer)>(context))(i); }, pointer,
        count);
  }

 private:
  void run(void (*item)(void*, size_t), void* context, size_t count);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
