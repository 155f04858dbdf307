// Training by several processes, on one machine or several: mpirun -n 4 moru tune …
//
// Every process ("rank") holds the whole model and runs the same loop. The batches of a step are
// dealt in rounds, batch i to rank i mod size; what they lost is shared, and their gradients are
// added in the order of batches, so that any number of ranks reaches the bits of one process. All
// decisions follow from shared numbers and are taken by every rank alike; rank 0 alone writes and
// speaks.
//
//   round 0        round 1          each batch's gradient from zeros, then
//   rank 0: b0     rank 0: b2
//   rank 1: b1     rank 1: b3       ((g0 + g1) + g2) + g3
//
// MPI is known to ranks.cc alone; one process needs none.
#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/threads.h"

namespace moru {

// Of a step's `of` batches, those that are computed at a time: `count` of them from `first` on.
struct Round {
  size_t first = 0, count = 1, of = 1;
  bool is_last() const { return first + count == of; }
};

class Ranks {
 public:
  virtual ~Ranks() = default;

  size_t rank() const { return rank_; }
  size_t size() const { return size_; }
  size_t on_this_machine() const { return on_this_machine_; }  // of all ranks
  bool leads() const { return rank_ == 0; }

  // `bytes`, as long on every rank, become those of `owner`.
  virtual void share(std::span<std::byte> bytes, size_t owner) = 0;
  // Whether one of the ranks says so.
  virtual bool any(bool here) = 0;

  // Takes the gradient of this rank's batch of a round (of batch first + rank, if that is in the
  // round; otherwise it is not read). After the last round `gradient` is the sum over the step's
  // batches, on every rank. Rounds of a step come in order and are called by all.
  virtual void add(Pool& pool, std::span<float> gradient, const Round& round) = 0;
  // Bytes that add() takes beside a gradient of so many floats where a step has several batches.
  virtual size_t sum_bytes(size_t parameters) const = 0;

  // What rank 0 can still do where mpirun is about to kill in the middle of a long step: called on
  // another thread, at most once, before the process ends; tells what it has done, or nothing if it
  // could not. Empty: nothing can be done any more, and none is under way.
  virtual void set_rescue(std::function<std::string()> rescue) = 0;

  // Runs this process's part of a run. What all ranks throw, rank 0 throws on, and the others
  // return its exit code (0 for none) and are to end without a word. What one rank alone throws it
  // says itself, and ends them all; so does the death of a rank. `asked` tells that a signal has
  // asked to stop.
  virtual int run(const std::function<void()>& work, bool (*asked)()) = 0;

 protected:
  size_t rank_ = 0, size_ = 1, on_this_machine_ = 1;
};

// The one process that most runs are.
class OneRank : public Ranks {
 public:
  void share(std::span<std::byte>, size_t) override {}
  bool any(bool here) override { return here; }
  void add(Pool& pool, std::span<float> gradient, const Round& round) override;
  size_t sum_bytes(size_t parameters) const override { return parameters * sizeof(float); }
  void set_rescue(std::function<std::string()>) override {}
  int run(const std::function<void()>& work, bool (*asked)()) override;

 private:
  std::vector<float> sum_;  // of a step's earlier batches
};

// The ranks that mpirun started this process as one of; OneRank where nothing did. Once a process.
// Error: unsupported, if this program was built without MPI or they do not find each other; the
// first of them alone throws it, the others' run() returns its exit code.
std::unique_ptr<Ranks> join_ranks();

template <typename T>
void share_value(Ranks& ranks, T& value, size_t owner = 0) {
  ranks.share(std::as_writable_bytes(std::span(&value, 1)), owner);
}
// A string or a vector of plain values: its length too.
template <typename List>
void share_list(Ranks& ranks, List& list, size_t owner = 0) {
  size_t size = list.size();
  share_value(ranks, size, owner);
  list.resize(size);
  ranks.share(std::as_writable_bytes(std::span(list.data(), list.size())), owner);
}

}  // namespace moru
