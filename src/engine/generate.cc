#include "engine/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <list>

#include "base/error.h"
#include "engine/row_ops.h"

namespace moru {
namespace {

// While answers are under way a step carries at most this many prompt tokens, so that a long
// prompt does not hold them up.
constexpr size_t kPromptTokensBesideAnswers = 128;
// Ended sequences that stay in the cache for prompts that begin alike.
constexpr size_t kRemembered = 64;
// A shorter common beginning is not worth a copied page.
constexpr size_t kMinShared = 16;

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
  size_t planned = 0;  // tokens of this step
  size_t cached_tokens = 0, completion_tokens = 0;
  TextStream text;
  StopFilter stop;

  Active(uint64_t n, GenerationRequest r, const Tokenizer& tokenizer)
      : number(n),
        request(std::move(r)),
        tokens(request.prompt),
        text(tokenizer),
        stop(request.stop_texts) {}

  size_t pending() const { return tokens.size() - sequence.tokens(); }
};

struct Remembered {
  std::vector<TokenId> tokens;
  KvSequence sequence;
};

}  // namespace

struct Generator::State {
  Engine& engine;
  const Tokenizer& tokenizer;
  size_t max_sequences;
  uint64_t next_number = 1;
  std::list<Active> requests;         // in order of submission; the admitted ones compute
  std::deque<Remembered> remembered;  // least recently used first
  Sampler sampler;
  std::vector<StepSpan> spans;
  std::vector<Active*> stepping;

  KvCache& cache() { return engine.cache(); }

  // Gives `a` the longest beginning that another sequence has already computed. At least one
  // token is left to compute: its logits are wanted.
  void admit(Active& a) {
    a.admitted = true;
    a.sequence = cache().make_sequence();
    const std::span<const TokenId> wanted(a.tokens.data(), a.tokens.size() - 1);
    const KvSequence* best = nullptr;
    size_t shared = kMinShared - 1;
    const auto offer = [&](const KvSequence& sequence, std::span<const TokenId> tokens) {
      const size_t n = std::min(common_prefix(wanted, tokens), sequence.tokens());
      if (n > shared) {
        shared = n;
        best = &sequence;
      }
    };
    for (const Active& other : requests)
      if (other.admitted && &other != &a) offer(other.sequence, other.tokens);
    size_t from_memory = remembered.size();
    for (size_t i = 0; i < remembered.size(); ++i) {
      const size_t before = shared;
      offer(remembered[i].sequence, remembered[i].tokens);
      if (shared > before) from_memory = i;
    }
    if (best != nullptr && cache().fork(*best, shared, a.sequence)) a.cached_tokens = shared;
    if (from_memory < remembered.size()) {  // recently used now
      std::rotate(remembered.begin() + static_cast<ptrdiff_t>(from_memory),
                  remembered.begin() + static_cast<ptrdiff_t>(from_memory) + 1, remembered.end());
    }
  }

  void remember(Active& a) {
    if (a.sequence.tokens() < kMinShared) return;
    a.tokens.resize(a.sequence.tokens());
    remembered.push_back({std::move(a.tokens), std::move(a.sequence)});
    if (remembered.size() > kRemembered) remembered.pop_front();
  }

  // Room for `count` more tokens of `a`: forgets ended sequences, then sends the youngest other
  // request back to wait (it will recompute). False if `a` must wait itself.
  bool make_room(Active& a, size_t count) {
    while (!cache().reserve(a.sequence, count)) {
      if (!remembered.empty()) {
        remembered.pop_front();
        continue;
      }
      Active* youngest = nullptr;
      for (Active& other : requests)
        if (other.admitted && other.number > a.number) youngest = &other;
      if (youngest == nullptr) return false;
      youngest->admitted = false;
      youngest->sequence = {};
      std::erase(stepping, youngest);
    }
    return true;
  }

  // Chooses this step's tokens: one of each answer under way, then prompts in order.
  void plan() {
    stepping.clear();
    spans.clear();
    size_t admitted = 0;
    for (Active& a : requests) {
      if (!a.admitted && admitted < max_sequences) admit(a);
      admitted += a.admitted;
    }
    size_t room = engine.step_tokens();
    for (Active& a : requests) {
      if (!a.admitted || a.pending() != 1 || room == 0 || !make_room(a, 1)) continue;
      take_part(a, 1);
      --room;
    }
    if (!stepping.empty()) room = std::min(room, kPromptTokensBesideAnswers);
    for (Active& a : requests) {
      if (!a.admitted || a.pending() <= 1 || room == 0) continue;
      const size_t count = std::min(room, a.pending());
      if (!make_room(a, count)) continue;
      take_part(a, count);
      room -= count;
    }
    for (Active* a : stepping)
      spans.push_back({&a->sequence, std::span(a->tokens).subspan(a->sequence.tokens(), a->planned),
                       a->planned == a->pending() ? a->planned - 1 : a->planned});
  }

  void take_part(Active& a, size_t count) {
    a.planned = count;
    stepping.push_back(&a);
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
    // Penalties overwrite logits, so the reported value is looked up in a copy of what matters.
    const std::vector<float> before = a.request.top_logprobs
                                          ? std::vector<float>(logits.begin(), logits.end())
                                          : std::vector<float>();
    const TokenId id =
        sampler.choose(logits, a.request.sampling, a.tokens, a.request.prompt.size());
    ++a.completion_tokens;
    if (std::find(a.request.stop_ids.begin(), a.request.stop_ids.end(), id) !=
        a.request.stop_ids.end()) {
      event.finish = Finish::stop;
      return;
    }
    a.tokens.push_back(id);
    if (a.request.top_logprobs) {
      logprob.id = id;
      logprob.logprob = before[static_cast<size_t>(id)] - lse;
      event.logprobs.push_back(std::move(logprob));
    }
    event.text = a.stop.push(a.text.push(id));
    if (a.stop.stopped()) {
      event.finish = Finish::stop;
    } else if (a.completion_tokens >= a.request.max_tokens ||
               a.tokens.size() >= engine.model().config.context) {
      event.finish = Finish::length;
    }
  }
};

Generator::Generator(Engine& engine, const Tokenizer& tokenizer, size_t sequences)
    : state_(new State{.engine = engine, .tokenizer = tokenizer, .max_sequences = sequences}) {}
Generator::~Generator() = default;

uint64_t Generator::submit(GenerationRequest request) {
  const Config& c = state_->engine.model().config;
  const size_t cache_tokens = state_->cache().total_pages() * kPageTokens;
  const size_t limit = std::min(c.context, cache_tokens);
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
  state_->requests.emplace_back(number, std::move(request), state_->tokenizer);
  return number;
}

void Generator::cancel(uint64_t request) {
  state_->requests.remove_if([&](const Active& a) { return a.number == request; });
}

void Generator::forget() { state_->remembered.clear(); }
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
  s.plan();
  if (s.spans.empty()) return;

  std::vector<size_t> wanted;  // indices of spans whose last token wants logits
  for (size_t i = 0; i < s.spans.size(); ++i)
    if (s.spans[i].logits_from < s.spans[i].tokens.size()) wanted.push_back(i);
  std::vector<GenerationEvent> events;
  const size_t vocab = s.engine.model().config.vocab;
  s.engine.step(s.spans, [&](size_t first, size_t count, float* logits) {
    for (size_t i = 0; i < count; ++i) {
      Active& a = *s.stepping[wanted[first + i]];
      GenerationEvent event{.request = a.number,
                            .prompt_tokens = a.request.prompt.size(),
                            .cached_tokens = std::min(a.cached_tokens, a.request.prompt.size())};
      s.take(a, {logits + i * vocab, vocab}, event);
      event.completion_tokens = a.completion_tokens;
      if (event.finish && !a.stop.stopped()) {
        // A character that the length limit cut in two is left out.
        if (*event.finish == Finish::stop) event.text += a.stop.push(a.text.finish());
        event.text += a.stop.finish();
      }
      events.push_back(std::move(event));
    }
  });
  std::sort(events.begin(), events.end(),
            [](const auto& a, const auto& b) { return a.request < b.request; });
  for (const GenerationEvent& event : events) {
    if (event.finish) {
      const auto it = std::find_if(s.requests.begin(), s.requests.end(),
                                   [&](const Active& a) { return a.number == event.request; });
      s.remember(*it);
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
    const size_t common = common_prefix(prefix, shared_tokens);
    cache.truncate(shared, common);
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
