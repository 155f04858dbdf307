// The one pool that computes. Work is a function of the thread's index; every thread runs it, the
// caller included, and run() returns when all are done. Threads spin for a moment between phases,
// then sleep, so that an idle program uses no processor.
//
// Kernels split their work by a fixed grid, never by the number of threads, so that results are
// the same bits for any pool.
#pragma once
#include <atomic>
#include <cstddef>
#include <functional>
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

  // Calls work(index) once on each thread, index in [0, size()). The first exception is rethrown
  // here after all threads have finished. Not reentrant, one caller at a time.
  template <typename Work>
  void run(Work&& work) {
    auto* pointer = &work;
    run_raw([](void* context, size_t index) { (*static_cast<decltype(pointer)>(context))(index); },
            pointer);
  }

  // Calls item(i) for each i in [0, count), handed out in order to whichever thread is free.
  template <typename Item>
  void each(size_t count, Item&& item) {
    if (count == 0) return;
    if (count == 1) return item(size_t{0});
    std::atomic<size_t> next{0};
    run([&](size_t) {
      for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
           i = next.fetch_add(1, std::memory_order_relaxed))
        item(i);
    });
  }

 private:
  void run_raw(void (*work)(void*, size_t), void* context);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
