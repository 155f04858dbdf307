// OpenAI's routes over a scheduler: reads a request, checks it, submits it, and writes its answers
// as they come.
//
//   GET /health · GET /metrics · GET /v1/models · GET /v1/models/{name}
//   POST /v1/chat/completions · POST /v1/completions
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/constraint.h"
#include "serve/backend.h"
#include "serve/http.h"
#include "serve/scheduler.h"

namespace moru {

struct ApiOptions {
  std::string model_name;
  std::string fingerprint;  // of the model's bytes
  std::string api_key;      // empty: everybody may ask
  int64_t created = 0;      // Unix time, of the model
  // Takes one JSON line a request, from any thread. May be empty.
  std::function<void(std::string_view line)> log;
};

class Api {
 public:
  // Both must outlive it.
  Api(ApiOptions options, const Backend& backend, Scheduler& scheduler);

  // Any thread; `this` must outlive the exchange.
  void handle(std::shared_ptr<HttpExchange> exchange);

 private:
  class Call;
  struct Question;
  struct Route;
  static const Route kRoutes[];

  void route(const std::shared_ptr<Call>& call);
  std::vector<std::string> model_names() const;
  void health(const std::shared_ptr<Call>& call);
  void metrics(const std::shared_ptr<Call>& call);
  void models(const std::shared_ptr<Call>& call);
  void chat(const std::shared_ptr<Call>& call);
  void completions(const std::shared_ptr<Call>& call);
  void ask(const std::shared_ptr<Call>& call, Question question);

  ApiOptions options_;
  const Backend& backend_;
  Scheduler& scheduler_;
  LanguageCache languages_;
};

}  // namespace moru
