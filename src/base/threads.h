// The one pool that computes. Work is a list of items; the caller and the pool's threads take them
// in order until none is left, and each() returns when all are done. Threads spin for a moment
// between phases, then sleep, so that an idle program uses no processor. A thread that wakes too
// late for a phase is not waited for: a busy neighbour on its core costs its share of the work and
// no more.
//
// Kernels split their work by a fixed grid, never by the number of threads, so that results are
// the same bits for any pool.
#pragma once
#include <cstddef>
#include <memory>

namespace moru {

class Pool {
 public:
  // `threads` ≥ 1; 1 starts no thread.
  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  size_t size() const;

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
