// A model without a model: a token is a byte, and the answer to a prompt is the prompt again, one
// character a step. Everything that a test of the server needs to turn is a knob.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <list>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "base/error.h"
#include "base/text.h"
#include "serve/backend.h"

namespace moru {

class FakeBackend final : public Backend {
 public:
  static constexpr TokenId kEnd = 256;  // a control token

  std::atomic<bool> hold = false;        // steps give nothing
  std::atomic<bool> fail_steps = false;  // steps throw
  std::atomic<bool> no_template = false;
  std::atomic<size_t> submitted = 0, cancelled = 0, steps = 0;

  static std::vector<TokenId> ids_of(std::string_view text) {
    std::vector<TokenId> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }

  std::vector<TokenId> encode_chat(const nlohmann::ordered_json& messages) const override {
    if (no_template)
      throw Error(ErrorKind::unsupported, {.where = "tiny.gguf",
                                           .what = "the model has no chat template",
                                           .cure = "give plain text instead of messages"});
    return ids_of(messages.back()["content"].get<std::string>());
  }
  std::vector<TokenId> encode_text(std::string_view text) const override { return ids_of(text); }
  std::string decode(std::span<const TokenId> ids) const override {
    std::string text;
    for (const TokenId id : ids) text += bytes_of(id);
    return text;
  }
  std::string bytes_of(TokenId id) const override {
    return id == kEnd ? "<end>" : std::string(1, static_cast<char>(id));
  }
  size_t vocab() const override { return 257; }
  size_t longest_prompt() const override { return 1000; }
  std::vector<TokenId> stop_ids() const override { return {kEnd}; }

  uint64_t submit(GenerationRequest request) override {
    ++submitted;
    if (request.prompt.front() == '!')
      throw Error(ErrorKind::usage, {.where = "prompt", .what = "is refused late", .cure = ""});
    std::string text = decode(request.prompt);
    open_.push_back({++number_, std::move(request), std::move(text)});
    return number_;
  }
  void cancel(uint64_t request) override {
    cancelled += open_.remove_if([&](const Open& o) { return o.number == request; });
  }
  GeneratorLoad load() const override {
    GeneratorLoad load;
    load.running = open_.size();
    load.steps = steps;
    load.pages = 100;
    return load;
  }
  bool busy() const override { return !open_.empty(); }
  void step(const std::function<void(const GenerationEvent&)>& emit) override {
    ++steps;
    if (fail_steps)
      throw Error(ErrorKind::no_space, {.where = "KV cache", .what = "is full", .cure = ""});
    std::this_thread::sleep_for(std::chrono::microseconds(hold ? 1000 : 100));
    if (hold) return;
    for (auto o = open_.begin(); o != open_.end();) {
      GenerationEvent event{.request = o->number};
      event.prompt_tokens = o->request.prompt.size();
      event.cached_tokens = 1;
      if (o->given < o->request.max_tokens && o->at < o->text.size()) {
        const size_t bytes = code_point_at(o->text, o->at).bytes;
        event.text = o->text.substr(o->at, bytes);
        if (o->request.top_logprobs)
          event.logprobs = logprobs(event.text, *o->request.top_logprobs);
        o->at += bytes;
        ++o->given;
      }
      event.completion_tokens = o->given;
      if (o->at >= o->text.size()) event.finish = Finish::stop;
      if (!event.finish && o->given >= o->request.max_tokens) event.finish = Finish::length;
      const bool ended = event.finish.has_value();
      o = ended ? open_.erase(o) : std::next(o);
      emit(event);
    }
  }

 private:
  struct Open {
    uint64_t number;
    GenerationRequest request;
    std::string text;
    size_t at = 0, given = 0;
  };

  static std::vector<TokenLogprob> logprobs(const std::string& text, size_t top) {
    std::vector<TokenLogprob> out;
    for (const TokenId id : ids_of(text)) {
      TokenLogprob one{.id = id, .logprob = -0.5f, .top = {}};
      if (top > 0) one.top.emplace_back(id, -0.5f);
      if (top > 1) one.top.emplace_back(kEnd, -1.5f);
      out.push_back(one);
    }
    return out;
  }

  uint64_t number_ = 0;
  std::list<Open> open_;
};

}  // namespace moru
