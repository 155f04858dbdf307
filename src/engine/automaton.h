// The states of a Program, made as they are met: a pushdown automaton whose states are sets of
// places, each with all stacks that it may have, so that ambiguity costs no more than its places.
//
// A state's masks and transitions do not change once made. Where counters are far from their
// limits they can be taken for one another: an automaton with a horizon does so, and then tells
// the truth about the next `horizon` bytes alone. So a string of at most 1,000 characters has a few
// states, not 1,000.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/grammar.h"

namespace moru {

class Automaton {
 public:
  using State = uint32_t;
  static constexpr State kDead = 0;
  static constexpr size_t kEverything = SIZE_MAX;

  // `program` must outlive it. `horizon`: bytes that a caller looks ahead from a state that
  // start() or import() gave; kEverything: states are exact.
  explicit Automaton(const Program& program, size_t horizon = kEverything);

  State start();
  // The state of another automaton of the same program.
  State import(const Automaton& other, State state);
  State next(State state, uint8_t byte) {
    const State known = next_[state * classes_ + program_->class_of[byte]];
    return known != kUnknown ? known : make_next(state, program_->class_of[byte]);
  }
  bool accepts(State state) const { return states_[state].accepts; }
  // The one byte that can follow; nullopt if there are more, or none, or the text may end here.
  std::optional<uint8_t> only_byte(State state) const;
  // Whether nothing can follow.
  bool is_final(State state) const { return states_[state].count == 0; }

  // How many plain characters (grammar.h) may follow at once in any order, and whether no text of
  // more plain characters is possible.
  struct PlainRoom {
    size_t characters;
    bool exact;
  };
  PlainRoom plain_room(State state) const { return states_[state].plain; }

  size_t states() const { return states_.size(); }
  // The most counters and callers that one place of a state has at once: what ambiguity costs.
  size_t widest_stack() const { return widest_stack_; }

 private:
  static constexpr State kUnknown = std::numeric_limits<State>::max();
  using Stacks = uint32_t;  // a set of stacks, by number; equal sets have equal numbers

  // A stack's top, and what may lie below it.
  struct Frame {
    uint32_t site;   // a place to return to, or kLoop | a loop, or kBottom
    uint32_t count;  // of a loop
    Stacks below;
    bool operator==(const Frame&) const = default;
    auto operator<=>(const Frame&) const = default;
  };
  struct Place {
    uint32_t at;
    Stacks stacks;
    bool operator==(const Place&) const = default;
  };
  struct StateData {
    uint32_t first, count;  // of places_
    bool accepts;
    PlainRoom plain;
  };

  State make_next(State state, uint8_t byte_class);
  Stacks intern(std::vector<Frame> frames);
  Stacks unite(Stacks a, Stacks b);
  Stacks push(uint32_t site, uint32_t count, Stacks below);
  Stacks import_stacks(const Automaton& other, Stacks stacks,
                       std::unordered_map<Stacks, Stacks>& known);
  std::span<const Frame> frames(Stacks stacks) const {
    return {frames_.data() + sets_[stacks].first, sets_[stacks].second};
  }
  uint32_t clamp(const Program::Loop& loop, uint64_t count) const;
  void reach(uint32_t at, Stacks stacks);
  void reach_loop(uint32_t loop, std::span<const Frame> counters);
  State intern_reached();
  PlainRoom find_plain_room(std::span<const Place> places) const;

  const Program* program_;
  size_t horizon_, classes_;
  size_t widest_stack_ = 0;

  std::vector<Frame> frames_;
  std::vector<std::pair<uint32_t, uint32_t>> sets_;  // first, count of frames_
  std::unordered_multimap<uint64_t, Stacks> set_of_hash_;
  std::unordered_map<uint64_t, Stacks> united_;

  std::vector<Place> places_;
  std::vector<StateData> states_;
  std::vector<State> next_;  // [states, classes]
  std::unordered_multimap<uint64_t, State> state_of_hash_;

  // What a step has reached so far: by instruction, its stacks and the step in which that was.
  struct Reached {
    uint64_t step = 0;
    Stacks stacks = 0;
    bool waiting = false;
  };
  std::vector<Reached> reached_;
  std::vector<uint32_t> reached_order_, waiting_;
  uint64_t step_ = 0;
};

}  // namespace moru
