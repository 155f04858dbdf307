#include "engine/automaton.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/error.h"

namespace moru {
namespace {

using Op = Program::Op;
constexpr uint32_t kNowhere = Program::kNowhere;
constexpr uint32_t kLoop = uint32_t{1} << 31;
constexpr uint32_t kBottom = kLoop - 1;

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
  return hash ^ hash >> 29;
}

}  // namespace

Automaton::Automaton(const Program& program, size_t horizon)
    : program_(&program), horizon_(horizon), classes_(program.byte_of_class.size()) {
  reached_.resize(program.code.size());
  // The dead state: no places, and nothing leads out of it.
  states_.push_back({0, 0, false, {0, false}});
  next_.resize(classes_, kDead);
}

Automaton::State Automaton::start() {
  ++step_;
  reach(program_->start, push(kBottom, 0, 0));
  return intern_reached();
}

// Counts that the next `horizon` repetitions cannot tell apart become one. Each repetition reads a
// byte at least.
uint32_t Automaton::clamp(const Program::Loop& loop, uint64_t count) const {
  if (loop.max == UINT32_MAX) count = std::min<uint64_t>(count, loop.min);
  if (horizon_ == kEverything) return static_cast<uint32_t>(count);
  if (count < loop.min) {
    if (loop.min - count > horizon_) count = loop.min - horizon_ - 1;
  } else if (loop.max != UINT32_MAX && loop.max - count > horizon_) {
    count = loop.min;
  }
  return static_cast<uint32_t>(count);
}

Automaton::Stacks Automaton::intern(std::vector<Frame> set) {
  uint64_t hash = set.size();
  for (const Frame& f : set) hash = mixed(mixed(hash, uint64_t{f.site} << 32 | f.count), f.below);
  const auto [first, last] = set_of_hash_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const auto known = frames(it->second);
    if (std::equal(known.begin(), known.end(), set.begin(), set.end())) return it->second;
  }
  const auto number = static_cast<Stacks>(sets_.size());
  sets_.emplace_back(static_cast<uint32_t>(frames_.size()), static_cast<uint32_t>(set.size()));
  frames_.insert(frames_.end(), set.begin(), set.end());
  set_of_hash_.emplace(hash, number);
  widest_stack_ = std::max(widest_stack_, set.size());
  return number;
}

Automaton::Stacks Automaton::push(uint32_t site, uint32_t count, Stacks below) {
  return intern({{site, count, below}});
}

// Frames that agree but for what lies below them become one frame over both.
Automaton::Stacks Automaton::unite(Stacks a, Stacks b) {
  if (a == b) return a;
  if (a > b) std::swap(a, b);
  const uint64_t key = uint64_t{a} << 32 | b;
  if (const auto known = united_.find(key); known != united_.end()) return known->second;
  std::vector<Frame> all(frames(a).begin(), frames(a).end());
  all.insert(all.end(), frames(b).begin(), frames(b).end());
  std::sort(all.begin(), all.end());
  std::vector<Frame> merged;
  for (const Frame& f : all) {
    if (!merged.empty() && merged.back().site == f.site && merged.back().count == f.count) {
      merged.back().below = unite(merged.back().below, f.below);
    } else {
      merged.push_back(f);
    }
  }
  const Stacks united = intern(std::move(merged));
  united_.emplace(key, united);
  return united;
}

void Automaton::reach(uint32_t at, Stacks stacks) {
  Reached& r = reached_[at];
  if (r.step != step_) {
    r = {.step = step_, .stacks = stacks};
    reached_order_.push_back(at);
  } else {
    const Stacks all = unite(r.stacks, stacks);
    if (all == r.stacks) return;
    r.stacks = all;
  }
  if (std::exchange(r.waiting, true) == false) waiting_.push_back(at);
}

// The head of a loop, with the counters that have come to it.
void Automaton::reach_loop(uint32_t loop, std::span<const Frame> counters) {
  const Program::Loop& l = program_->loops[loop];
  std::vector<Frame> again;
  for (const Frame& f : counters) {
    if (f.count < l.max) again.push_back(f);
    if (f.count >= l.min) reach(l.exit, f.below);
  }
  if (!again.empty()) reach(l.body, intern(std::move(again)));
}

Automaton::State Automaton::intern_reached() {
  // Everything that can be reached without a byte.
  while (!waiting_.empty()) {
    const uint32_t at = waiting_.back();
    waiting_.pop_back();
    reached_[at].waiting = false;
    const Stacks stacks = reached_[at].stacks;
    const Program::Instruction& i = program_->code[at];
    switch (i.op) {
      case Op::bytes:
      case Op::accept:
        break;
      case Op::fork:
        for (uint32_t t = i.first; t < i.last; ++t) reach(program_->targets[t], stacks);
        break;
      case Op::call:
        reach(i.first, i.last == kNowhere ? stacks : push(i.last, 0, stacks));
        break;
      case Op::ret: {
        const std::vector<Frame> tops(frames(stacks).begin(), frames(stacks).end());
        for (const Frame& f : tops) reach(f.site, f.below);
        break;
      }
      case Op::enter: {
        const Frame counter = {kLoop | i.first, clamp(program_->loops[i.first], 0), stacks};
        reach_loop(i.first, {&counter, 1});
        break;
      }
      case Op::next: {
        std::vector<Frame> counters(frames(stacks).begin(), frames(stacks).end());
        for (Frame& f : counters) f.count = clamp(program_->loops[i.first], uint64_t{f.count} + 1);
        // Clamping may have made two alike.
        std::sort(counters.begin(), counters.end());
        size_t kept = 0;
        for (const Frame& f : counters) {
          if (kept > 0 && counters[kept - 1].count == f.count) {
            counters[kept - 1].below = unite(counters[kept - 1].below, f.below);
          } else {
            counters[kept++] = f;
          }
        }
        counters.resize(kept);
        reach_loop(i.first, counters);
        break;
      }
    }
  }

  std::vector<Place> places;
  bool accepts = false;
  for (const uint32_t at : reached_order_) {
    const Op op = program_->code[at].op;
    if (op == Op::bytes) places.push_back({at, reached_[at].stacks});
    accepts = accepts || op == Op::accept;
  }
  const PlainRoom plain = find_plain_room(places);
  reached_order_.clear();
  if (places.empty() && !accepts) return kDead;

  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.at < b.at; });
  uint64_t hash = accepts ? 1 : 2;
  for (const Place& p : places) hash = mixed(hash, uint64_t{p.at} << 32 | p.stacks);
  const auto [first, last] = state_of_hash_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const StateData& s = states_[it->second];
    if (s.accepts == accepts && std::equal(places.begin(), places.end(), places_.begin() + s.first,
                                           places_.begin() + s.first + s.count))
      return it->second;
  }
  const auto number = static_cast<State>(states_.size());
  states_.push_back({static_cast<uint32_t>(places_.size()), static_cast<uint32_t>(places.size()),
                     accepts, plain});
  places_.insert(places_.end(), places.begin(), places.end());
  next_.resize(next_.size() + classes_, kUnknown);
  state_of_hash_.emplace(hash, number);
  return number;
}

Automaton::PlainRoom Automaton::find_plain_room(std::span<const Place> places) const {
  size_t room = 0;
  std::vector<uint32_t> readers;
  for (const Place& p : places) {
    if (program_->reads_plain[p.at]) {
      room = SIZE_MAX;
      readers.push_back(p.at);
      continue;
    }
    for (const Frame& f : frames(p.stacks)) {
      if ((f.site & kLoop) == 0) continue;
      const Program::Loop& l = program_->loops[f.site & ~kLoop];
      if (l.plain != p.at) continue;
      readers.push_back(p.at);
      room = std::max(room, l.max == UINT32_MAX ? SIZE_MAX : size_t{l.max - f.count});
    }
  }
  if (room == 0) return {0, false};
  bool exact = true;
  for (const Place& p : places) {
    if (std::find(readers.begin(), readers.end(), p.at) != readers.end()) continue;
    const Program::Instruction& i = program_->code[p.at];
    for (uint32_t r = i.first; r < i.last; ++r) {
      // A byte from here on that is neither ", \ nor a control may begin a plain character.
      const Program::Range& range = program_->ranges[r];
      const bool only_special =
          range.high < 0x20 || (range.low == range.high && (range.low == '"' || range.low == '\\'));
      exact = exact && only_special;
    }
  }
  return {room, exact};
}

Automaton::State Automaton::make_next(State state, uint8_t byte_class) {
  const uint8_t byte = program_->byte_of_class[byte_class];
  ++step_;
  const StateData& s = states_[state];
  for (uint32_t p = s.first; p < s.first + s.count; ++p) {
    const Place place = places_[p];
    const Program::Instruction& i = program_->code[place.at];
    for (uint32_t r = i.first; r < i.last; ++r) {
      const Program::Range& range = program_->ranges[r];
      if (range.low <= byte && byte <= range.high) reach(range.target, place.stacks);
    }
  }
  const State made = intern_reached();
  next_[state * classes_ + byte_class] = made;
  return made;
}

std::optional<uint8_t> Automaton::only_byte(State state) const {
  const StateData& s = states_[state];
  if (s.accepts || s.count == 0) return std::nullopt;
  std::optional<uint8_t> only;
  for (uint32_t p = s.first; p < s.first + s.count; ++p) {
    const Program::Instruction& i = program_->code[places_[p].at];
    for (uint32_t r = i.first; r < i.last; ++r) {
      const Program::Range& range = program_->ranges[r];
      if (range.low != range.high || (only && *only != range.low)) return std::nullopt;
      only = range.low;
    }
  }
  return only;
}

Automaton::Stacks Automaton::import_stacks(const Automaton& other, Stacks stacks,
                                           std::unordered_map<Stacks, Stacks>& known) {
  if (const auto found = known.find(stacks); found != known.end()) return found->second;
  std::vector<Frame> set;
  for (const Frame& f : other.frames(stacks)) {
    Frame mine = f;
    if (f.site != kBottom) mine.below = import_stacks(other, f.below, known);
    if ((f.site & kLoop) != 0) mine.count = clamp(program_->loops[f.site & ~kLoop], f.count);
    set.push_back(mine);
  }
  Stacks made = intern({set[0]});
  for (size_t i = 1; i < set.size(); ++i) made = unite(made, intern({set[i]}));
  known.emplace(stacks, made);
  return made;
}

Automaton::State Automaton::import(const Automaton& other, State state) {
  if (state == kDead) return kDead;
  ++step_;
  std::unordered_map<Stacks, Stacks> known;
  const StateData& s = other.states_[state];
  if (s.accepts) reach(program_->accept, 0);
  for (uint32_t p = s.first; p < s.first + s.count; ++p) {
    const Place& place = other.places_[p];
    reach(place.at, import_stacks(other, place.stacks, known));
  }
  return intern_reached();
}

}  // namespace moru
