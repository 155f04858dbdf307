#include "engine/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <list>

#include "base/clock.h"
#include "base/error.h"
#include "engine/draft.h"
#include "engine/prefix_tree.h"
#include "engine/row_ops.h"
#include "engine/step_cost.h"

namespace moru {
namespace {

// Languages whose masks are kept.
constexpr size_t kKnownMasks = 8;
constexpr size_t kMostForcedBytes = 256;
// The smallest part of a prompt that a step is worth, where time is short.
constexpr size_t kMinPart = 32;
// Tokens of a step that leaves a part of a prompt for later.
constexpr size_t kStepMultiple = 16;

size_t common_prefix(std::span<const TokenId> a, std::span<const TokenId> b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                             a.begin());
}

// Lets text through until a stop text is whole; holds back what may still become one.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {
    std::erase_if(stops_, [](const std::string& s) { return s.empty(); });
  }

  bool stopped() const { return stopped_; }

  std::string push(std::string_view text) {
    held_ += text;
    size_t end = std::string::npos;
    for (const std::string& stop : stops_) end = std::min(end, held_.find(stop));
    if (end != std::string::npos) {
      stopped_ = true;
      held_.resize(end);
      return std::exchange(held_, {});
    }
    size_t keep = 0;
    for (const std::string& stop : stops_) {
      for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
        if (std::string_view(held_).substr(held_.size() - n) ==
            std::string_view(stop).substr(0, n)) {
          keep = n;
          break;
        }
      }
    }
    std::string out = held_.substr(0, held_.size() - keep);
    held_.erase(0, out.size());
    return out;
  }

  std::string finish() { return std::exchange(held_, {}); }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

struct Active {
  uint64_t number;
  GenerationRequest request;
  std::vector<TokenId> tokens;  // prompt and answer
  KvSequence sequence;          // holds a beginning of `tokens`
  bool admitted = false;
  size_t planned = 0, before = 0;  // tokens of this step, and of the sequence before it
  LookupDraft lookup;
  DraftAccount account;
  std::vector<TokenId> draft;  // of this step: the last token and guesses at what follows; or empty
  size_t cached_tokens = 0, completion_tokens = 0;
  TextStream text;
  StopFilter stop;
  std::vector<TokenId> breakers;  // of DRY, in this vocabulary
  std::optional<Constraint> constraint;

  Active(uint64_t n, GenerationRequest r, const Tokenizer& tokenizer)
      : number(n),
        request(std::move(r)),
        tokens(request.prompt),
        lookup(request.drafts ? request.prompt.size() + request.max_tokens : 0),
        text(tokenizer),
        stop(request.stop_texts) {
    draft.reserve(DraftAccount::kLongest + 1);
    if (request.sampling.dry_multiplier > 0)
      breakers = tokens_holding(tokenizer, request.sampling.dry_sequence_breakers);
    tokens.reserve(tokens.size() + request.max_tokens);
  }

  size_t pending() const { return tokens.size() - sequence.tokens(); }
};

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

struct Generator::State {
  Engine& engine;
  const Tokenizer& tokenizer;
  GeneratorOptions options;
  PrefixTree tree;
  uint64_t next_number = 1;
  std::list<Active> requests;  // in order of submission; the admitted ones compute
  Sampler sampler;
  std::vector<float> untouched;                         // a row of logits as the model gave it
  std::vector<float> ends;                              // and of it, the stop ids' logits
  std::shared_ptr<const Vocabulary> vocabulary;         // made for the first constraint
  std::deque<std::shared_ptr<TokenMasks>> known_masks;  // of the languages last seen
  struct Row {
    Active* active;
    size_t index;  // in its span
  };
  std::vector<Row> rows;  // that want logits, in order
  RowCost row_cost;
  Drafted drafted;
  StepCost cost;
  GeneratorLoad totals;
  uint64_t last_prompt = 0;  // the last request whose prompt had its turn

  // Of one step.
  std::vector<StepSpan> spans;
  std::vector<Active*> stepping, prompts;
  std::vector<GenerationEvent> events;
  StepWork work;

  State(Engine& the_engine, const Tokenizer& the_tokenizer, GeneratorOptions the_options)
      : engine(the_engine),
        tokenizer(the_tokenizer),
        options(std::move(the_options)),
        tree(the_engine.cache()) {
    if (!options.now) options.now = steady_seconds;
    for (auto* list : {&stepping, &prompts}) list->reserve(options.sequences);
    spans.reserve(options.sequences);
    events.reserve(options.sequences);
  }

  KvCache& cache() { return engine.cache(); }

  // Gives `a` the longest beginning that is computed already; at least one token is left to
  // compute, since its logits are wanted. Not admitted, if another prompt is just computing more
  // of what both begin with. Keys and values are one adapter's alone; the tree has none's.
  void admit(Active& a) {
    const std::span<const TokenId> wanted_tokens(a.tokens.data(), a.tokens.size() - 1);
    const std::span<const TokenId> kept_tokens =
        a.request.adapter == nullptr ? wanted_tokens : std::span<const TokenId>();
    const size_t known = tree.known(kept_tokens);
    const Active* best = nullptr;
    size_t shared = std::max(known, kMinCopiedTokens - 1);
    for (const Active& other : requests) {
      if (!other.admitted || other.request.adapter != a.request.adapter) continue;
      const size_t common = common_prefix(wanted_tokens, other.tokens);
      const size_t computed = other.sequence.tokens();
      const size_t coming = std::min(common, other.request.prompt.size());
      if (coming > computed && coming >= known + kMinCopiedTokens) return;
      if (std::min(common, computed) > shared) {
        shared = std::min(common, computed);
        best = &other;
      }
    }
    a.admitted = true;
    if (best == nullptr || !cache().fork(best->sequence, shared, a.sequence))
      shared = tree.resume(kept_tokens, a.sequence);
    if (a.completion_tokens > 0) return;
    a.cached_tokens = shared;
    totals.cached_tokens += shared;
  }

  // Room for `count` more tokens of `a`: the tree gives up the oldest beginnings, then the youngest
  // other request is sent back to wait (it will compute again). False if `a` must wait itself.
  bool make_room(Active& a, size_t count) {
    cache().trim(a.sequence);
    while (!cache().reserve(a.sequence, count)) {
      if (tree.evict()) continue;
      Active* youngest = nullptr;
      for (Active& other : requests)
        if (other.admitted && other.number > a.number) youngest = &other;
      if (youngest == nullptr) {
        // Beginnings of no use alone may lie under blocks of `a`.
        const auto oldest = std::find_if(requests.begin(), requests.end(),
                                         [](const Active& other) { return other.admitted; });
        if (&*oldest != &a) return false;
        // submit() takes no request that does not fit alone: were the tree empty, pages would be
        // another generator's, and waiting for them endless.
        MORU_CHECK(!tree.empty());
        tree.clear();
        continue;
      }
      youngest->admitted = false;
      youngest->sequence = {};
      std::erase(stepping, youngest);
      ++totals.sent_back;
    }
    return true;
  }

  void keep(const Active& a, PrefixTree::At at) {
    if (a.request.adapter == nullptr) tree.keep(a.tokens, a.sequence, at);
  }

  // Chooses this step's tokens: one of each answer under way, then parts of prompts.
  void plan() {
    stepping.clear();
    spans.clear();
    work = {};
    size_t admitted = 0;
    for (Active& a : requests) {
      if (!a.admitted && admitted < options.sequences) admit(a);
      admitted += a.admitted;
    }
    size_t room = engine.step_tokens();
    const auto answers =
        static_cast<size_t>(std::count_if(requests.begin(), requests.end(), [](const Active& a) {
          return a.admitted && a.pending() == 1;
        }));
    size_t guesses = 0;
    for (Active& a : requests) {
      a.draft.clear();
      if (!a.admitted || a.pending() != 1 || room == 0 || !make_room(a, 1)) continue;
      if (room > answers + guesses) guess(a, answers, guesses);
      if (!a.draft.empty() && !cache().reserve(a.sequence, a.draft.size())) a.draft.clear();
      const size_t count = std::max<size_t>(a.draft.size(), 1);
      guesses += count - 1;
      take_part(a, count);
      room -= std::min(room, count);
    }
    options.step_seconds > 0 ? share_time(room) : fill(room);
    rows.clear();
    for (Active* a : stepping) {
      if (a->draft.empty()) {
        spans.push_back(
            {&a->sequence, std::span(a->tokens).subspan(a->sequence.tokens(), a->planned),
             a->planned == a->pending() ? a->planned - 1 : a->planned, a->request.adapter});
      } else {
        spans.push_back({&a->sequence, a->draft, 0, a->request.adapter});
      }
      for (size_t i = spans.back().logits_from; i < a->planned; ++i) rows.push_back({a, i});
    }
  }

  // Prompts in order, each as far as there is room.
  void fill(size_t room) {
    for (Active& a : requests) {
      if (!a.admitted || a.pending() <= 1 || room == 0) continue;
      const size_t count = std::min(room, a.pending());
      if (!make_room(a, count)) continue;
      take_part(a, count);
      room -= count;
    }
  }

  // Prompts get equal parts of the time that answers leave, short ones no more than they need. As
  // many as the time gives a part worth having, beginning after the one that had the last turn.
  void share_time(size_t room) {
    prompts.clear();
    for (Active& a : requests)
      if (a.admitted && a.pending() > 1) prompts.push_back(&a);
    if (prompts.empty() || room == 0) return;
    const auto turn = std::find_if(prompts.begin(), prompts.end(),
                                   [&](const Active* a) { return a->number > last_prompt; });
    std::rotate(prompts.begin(), turn, prompts.end());
    const size_t possible =
        cost.affordable(work, prompts.front()->sequence.tokens(), room, options.step_seconds);
    prompts.resize(std::clamp<size_t>(possible / kMinPart, 1, prompts.size()));
    last_prompt = prompts.back()->number;
    std::sort(prompts.begin(), prompts.end(), [](const Active* a, const Active* b) {
      return a->pending() != b->pending() ? a->pending() < b->pending() : a->number < b->number;
    });

    for (size_t i = 0; i < prompts.size() && room > 0; ++i) {
      Active& a = *prompts[i];
      if (!a.admitted) continue;  // sent back by one before it
      const double now = cost.seconds(work);
      const double share = (options.step_seconds - now) / static_cast<double>(prompts.size() - i);
      const size_t most = std::min(room, a.pending());
      size_t count = cost.affordable(work, a.sequence.tokens(), most, now + share);
      if (i == 0) count = std::max(count, std::min(most, kMinPart));  // something moves on
      // Steps of few sizes: dense products prepare a kernel for each.
      const size_t odd = (work.tokens + count) % kStepMultiple;
      if (count < a.pending() && odd < count) count -= odd;
      if (count == 0 || !make_room(a, count)) continue;
      take_part(a, count);
      room -= count;
    }
  }

  // A draft for `a`, if it is likely to pay in a step of `answers` tokens and `guesses` of others.
  void guess(Active& a, size_t answers, size_t guesses) {
    if (!a.request.drafts || engine.model().profile != Profile::exact) return;
    const size_t before = answers + guesses;
    if (before + DraftAccount::kShortest > RowCost::kMostRows) return;
    size_t most = a.account.length(draft_cost(answers, guesses, DraftAccount::kShortest));
    most =
        std::min({most, RowCost::kMostRows - before, a.request.max_tokens - a.completion_tokens - 1,
                  engine.model().config.context - a.tokens.size()});
    const std::span<const TokenId> found = a.lookup.find(a.tokens, most);
    if (found.empty() || cache().pages_for(a.sequence, 1 + found.size()) > cache().free_pages())
      return;
    a.draft.assign(1, a.tokens.back());
    a.draft.insert(a.draft.end(), found.begin(), found.end());
  }

  // What a draft costs, in tokens that the step's answers would have had in its time.
  double draft_cost(size_t answers, size_t guesses, size_t tokens) const {
    return row_cost.of_more(answers + guesses, tokens) * static_cast<double>(answers);
  }

  // Whether the answer ends with the draft's tokens up to `index`, and so wants its logits.
  bool follows_draft(const Active& a, size_t index) const {
    const size_t start = a.sequence.tokens() - a.draft.size();
    return a.tokens.size() == start + index + 1 &&
           std::equal(a.draft.begin(), a.draft.begin() + static_cast<ptrdiff_t>(index) + 1,
                      a.tokens.begin() + static_cast<ptrdiff_t>(start));
  }

  // After a step: keys and values of wrong guesses go, and the accounts are settled.
  void settle_drafts(double seconds) {
    const bool answers_alone = std::all_of(stepping.begin(), stepping.end(), [](const Active* a) {
      return a->planned == 1 || !a->draft.empty();
    });
    if (answers_alone) row_cost.learn(rows.size(), seconds);
    for (Active* a : stepping) {
      if (a->draft.empty()) {
        if (a->planned == 1) a->account.settle(0, 0, 0);
        continue;
      }
      const size_t start = a->sequence.tokens() - a->draft.size(), guesses = a->draft.size() - 1;
      const size_t same = common_prefix(a->draft, std::span(a->tokens).subspan(start));
      cache().truncate(a->sequence, start + same);
      drafted.tokens += guesses;
      drafted.right += same - 1;
      a->account.settle(guesses, same - 1, draft_cost(stepping.size(), 0, guesses));
    }
  }

  void take_part(Active& a, size_t count) {
    a.planned = count;
    a.before = a.sequence.tokens();
    stepping.push_back(&a);
    work.add(count, a.sequence.tokens());
  }

  void count_step(double seconds) {
    ++totals.steps;
    totals.step_seconds += seconds;
    for (const Active* a : stepping)
      if (a->before < a->request.prompt.size()) totals.prompt_tokens += a->planned;
  }

  // Rows [first, first + count) of those that want logits.
  void take_rows(size_t first, size_t count, float* logits) {
    const size_t vocab = engine.model().config.vocab;
    for (size_t i = 0; i < count; ++i) {
      const auto [active, index] = rows[first + i];
      Active& a = *active;
      if (index == 0 || a.draft.empty()) {
        GenerationEvent& begun = events.emplace_back();
        begun.request = a.number;
        begun.prompt_tokens = a.request.prompt.size();
        begun.cached_tokens = std::min(a.cached_tokens, a.request.prompt.size());
      } else if (events.back().finish || !follows_draft(a, index)) {
        continue;
      }
      GenerationEvent& event = events.back();
      take(a, {logits + i * vocab, vocab}, event);
      event.completion_tokens = a.completion_tokens;
      if (event.finish && !a.stop.stopped()) {
        // A character that the length limit cut in two is left out.
        if (*event.finish == Finish::stop) event.text += a.stop.push(a.text.finish());
        event.text += a.stop.finish();
      }
    }
  }

  // Masks of a language, kept for the next request that wants the same one.
  std::shared_ptr<TokenMasks> masks_of(const std::shared_ptr<const Language>& language) {
    for (const auto& masks : known_masks)
      if (&masks->language() == language.get()) return masks;
    if (vocabulary == nullptr)
      vocabulary = std::make_shared<Vocabulary>(tokenizer, engine.model().config.vocab);
    if (known_masks.size() == kKnownMasks) known_masks.pop_front();
    known_masks.push_back(std::make_shared<TokenMasks>(language, vocabulary));
    return known_masks.back();
  }

  // Tokens that the answer's language allows, and its end where that is allowed. False if there
  // are none: the vocabulary cannot spell what must come.
  bool constrain(Active& a, std::span<float> logits) {
    const std::span<const uint64_t> mask = a.constraint->mask();
    const bool may_end = a.constraint->accepts() && !a.request.stop_ids.empty();
    const bool may_go_on = std::any_of(mask.begin(), mask.end(), [](uint64_t w) { return w != 0; });
    ends.clear();
    for (const TokenId id : a.request.stop_ids) ends.push_back(logits[static_cast<size_t>(id)]);
    apply_mask(mask, logits);
    for (size_t i = 0; i < ends.size(); ++i)
      logits[static_cast<size_t>(a.request.stop_ids[i])] = may_end ? ends[i] : -INFINITY;
    return may_end || may_go_on;
  }

  // The ids of what must come next, but for the last: it might be the beginning of a longer token
  // that the model prefers.
  void add_forced(Active& a, GenerationEvent& event) {
    const std::string bytes = a.constraint->forced(kMostForcedBytes);
    if (bytes.size() < 2) return;
    const std::vector<TokenId> ids = tokenizer.encode(bytes, Tokenizer::Specials::literal);
    std::string spelled;
    for (const TokenId id : ids) spelled += tokenizer.bytes_of(id);
    if (spelled != bytes) return;  // this tokenizer changes texts
    for (size_t i = 0; i + 1 < ids.size() && !event.finish; ++i) add_token(a, ids[i], event);
  }

  // The answer goes on with `id`.
  void add_token(Active& a, TokenId id, GenerationEvent& event) {
    ++a.completion_tokens;
    ++totals.completion_tokens;
    a.tokens.push_back(id);
    event.text += a.stop.push(a.text.push(id));
    if (a.constraint) MORU_CHECK(a.constraint->take(tokenizer.bytes_of(id)));
    if (a.stop.stopped() || (a.constraint && a.constraint->complete())) {
      event.finish = Finish::stop;
    } else if (a.completion_tokens >= a.request.max_tokens ||
               a.tokens.size() >= engine.model().config.context) {
      event.finish = Finish::length;
    }
  }

  // One new token of `a`, from its logits.
  void take(Active& a, std::span<float> logits, GenerationEvent& event) {
    float lse = 0;
    if (a.request.top_logprobs) lse = log_sum_exp(logits);
    TokenLogprob logprob{};
    if (a.request.top_logprobs && *a.request.top_logprobs > 0) {
      logprob.top = top_logits(logits, *a.request.top_logprobs);
      for (auto& entry : logprob.top) entry.second -= lse;
    }
    // Choosing overwrites logits, so the reported value is looked up in a copy.
    if (a.request.top_logprobs) untouched.assign(logits.begin(), logits.end());
    if (a.constraint && !constrain(a, logits)) {
      event.finish = a.constraint->accepts() ? Finish::stop : Finish::length;
      return;
    }
    const TokenId id = sampler.choose(
        logits, a.request.sampling,
        {.history = a.tokens, .prompt_tokens = a.request.prompt.size(), .breakers = a.breakers});
    if (std::find(a.request.stop_ids.begin(), a.request.stop_ids.end(), id) !=
        a.request.stop_ids.end()) {
      ++a.completion_tokens;
      event.finish = Finish::stop;
      return;
    }
    if (a.request.top_logprobs) {
      logprob.id = id;
      logprob.logprob = untouched[static_cast<size_t>(id)] - lse;
      event.logprobs.push_back(std::move(logprob));
    }
    add_token(a, id, event);
    if (a.constraint && !a.request.top_logprobs && !event.finish) add_forced(a, event);
  }
};

Generator::Generator(Engine& engine, const Tokenizer& tokenizer, GeneratorOptions options)
    : state_(std::make_unique<State>(engine, tokenizer, std::move(options))) {}
Generator::~Generator() = default;

uint64_t Generator::submit(GenerationRequest request) {
  const Config& c = state_->engine.model().config;
  const size_t limit =
      std::min(c.context, state_->cache().longest_sequence(state_->engine.step_tokens()));
  if (request.prompt.empty())
    throw Error(ErrorKind::usage, {.where = "prompt", .what = "is empty", .cure = ""});
  if (request.prompt.size() >= limit)
    throw Error(ErrorKind::usage,
                {.where = "prompt",
                 .what = fmt::format("has {} tokens, but {} is the most that the context holds",
                                     request.prompt.size(), limit - 1),
                 .cure = "shorten it or allow a longer context"});
  check_sampling(request.sampling, c.vocab);
  request.max_tokens = std::min(request.max_tokens, limit - request.prompt.size());
  const uint64_t number = state_->next_number++;
  Active& a = state_->requests.emplace_back(number, std::move(request), state_->tokenizer);
  if (a.request.language) a.constraint.emplace(state_->masks_of(a.request.language));
  return number;
}

void Generator::cancel(uint64_t request) {
  state_->requests.remove_if([&](const Active& a) { return a.number == request; });
}

Generator::Drafted Generator::drafted() const { return state_->drafted; }
void Generator::forget() { state_->tree.clear(); }
GeneratorLoad Generator::load() const {
  State& s = *state_;
  GeneratorLoad load = s.totals;
  for (const Active& a : s.requests) ++(a.admitted ? load.running : load.waiting);
  load.pages = s.cache().total_pages();
  load.pages_used = load.pages - s.cache().free_pages();
  return load;
}
bool Generator::busy() const { return !state_->requests.empty(); }

void Generator::step(const std::function<void(const GenerationEvent&)>& emit) {
  State& s = *state_;
  // An answer of no tokens ends before it begins.
  for (auto it = s.requests.begin(); it != s.requests.end();) {
    if (it->request.max_tokens != 0) {
      ++it;
      continue;
    }
    emit({.request = it->number,
          .finish = Finish::length,
          .prompt_tokens = it->request.prompt.size()});
    it = s.requests.erase(it);
  }
  const double start = s.options.now();
  s.plan();
  if (s.spans.empty()) return;
  s.events.clear();
  const Stopwatch watch;
  s.engine.step(s.spans, [&s](size_t first, size_t count, float* logits) {
    s.take_rows(first, count, logits);
  });
  s.settle_drafts(watch.seconds());
  const double seconds = s.options.now() - start;
  s.cost.learn(s.work, seconds);
  s.count_step(seconds);
  for (Active* a : s.stepping) {
    const size_t computed = a->sequence.tokens();
    const bool prompt_ends =
        a->before < a->request.prompt.size() && computed >= a->request.prompt.size();
    if (prompt_ends || computed / kPageTokens != a->before / kPageTokens)
      s.keep(*a, prompt_ends ? PrefixTree::At::prompt_end : PrefixTree::At::way);
  }
  std::sort(s.events.begin(), s.events.end(),
            [](const auto& a, const auto& b) { return a.request < b.request; });
  for (const GenerationEvent& event : s.events) {
    if (event.finish) {
      const auto it = std::find_if(s.requests.begin(), s.requests.end(),
                                   [&](const Active& a) { return a.number == event.request; });
      s.keep(*it, PrefixTree::At::end);
      s.requests.erase(it);
    }
    emit(event);
  }
}

std::vector<GenerationResult> generate_all(
    Generator& generator, std::vector<GenerationRequest> requests,
    const std::function<void(size_t, const GenerationResult&)>& progress) {
  std::vector<GenerationResult> results(requests.size());
  std::vector<std::pair<uint64_t, size_t>> numbers;
  for (size_t i = 0; i < requests.size(); ++i)
    numbers.emplace_back(generator.submit(std::move(requests[i])), i);
  while (generator.busy()) {
    generator.step([&](const GenerationEvent& event) {
      const auto found = std::lower_bound(numbers.begin(), numbers.end(),
                                          std::pair<uint64_t, size_t>{event.request, 0});
      GenerationResult& result = results[found->second];
      result.text += event.text;
      result.logprobs.insert(result.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
      result.prompt_tokens = event.prompt_tokens;
      result.cached_tokens = event.cached_tokens;
      result.completion_tokens = event.completion_tokens;
      if (!event.finish) return;
      result.finish = *event.finish;
      if (progress) progress(found->second, result);
    });
  }
  return results;
}

std::vector<ContinuationScore> score_continuations(Engine& engine,
                                                   std::span<const Continuation> requests) {
  const size_t vocab = engine.model().config.vocab;
  std::vector<ContinuationScore> scores(requests.size());
  KvCache& cache = engine.cache();
  KvSequence shared = cache.make_sequence();
  std::span<const TokenId> shared_tokens;
  const auto no_logits = [](size_t, size_t, float*) {};

  for (size_t r = 0; r < requests.size(); ++r) {
    const Continuation& request = requests[r];
    MORU_CHECK(!request.prefix.empty() && !request.tokens.empty());
    // All but the prefix's last token are shared; the last one's logits are wanted each time.
    const std::span<const TokenId> prefix(request.prefix.data(), request.prefix.size() - 1);
    const size_t common = cache.truncate(shared, common_prefix(prefix, shared_tokens));
    for (size_t at = common; at < prefix.size();) {
      const size_t count = std::min(engine.step_tokens(), prefix.size() - at);
      const StepSpan span{&shared, prefix.subspan(at, count), count};
      engine.step({&span, 1}, no_logits);
      at += count;
    }
    shared_tokens = prefix;

    KvSequence own = cache.make_sequence();
    if (!cache.fork(shared, prefix.size(), own))
      throw Error(ErrorKind::no_space, {.where = "KV cache",
                                        .what = "has no room to score a continuation",
                                        .cure = "allow more cache"});
    std::vector<TokenId> fed{request.prefix.back()};
    fed.insert(fed.end(), request.tokens.begin(), request.tokens.end() - 1);
    for (size_t at = 0; at < fed.size();) {
      const size_t count = std::min(engine.step_tokens(), fed.size() - at);
      const StepSpan span{&own, std::span(fed).subspan(at, count), 0};
      engine.step({&span, 1}, [&](size_t first, size_t rows, float* logits) {
        for (size_t i = 0; i < rows; ++i) {
          const Floats row(logits + i * vocab, vocab);
          const auto target = static_cast<size_t>(request.tokens[at + first + i]);
          scores[r].logprob += double{row[target]} - double{log_sum_exp(row)};
          const auto best = std::max_element(row.begin(), row.end());
          scores[r].greedy &= static_cast<size_t>(best - row.begin()) == target;
        }
      });
      at += count;
    }
  }
  return scores;
}

}  // namespace moru
