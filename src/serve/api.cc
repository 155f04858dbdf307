#include "serve/api.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/hash.h"
#include "base/text.h"
#include "serve/wire.h"

namespace moru {
namespace {

constexpr int kRetryWhenFull_s = 2;
// A client that went away before its answer; nginx's number for it. For the log alone.
constexpr int kClientGone = 499;

uint64_t random_bits() {
  thread_local std::random_device device;
  return uint64_t{device()} << 32 | device();
}

std::string random_id(const char* prefix) {
  return fmt::format("{}-{:016x}{:08x}", prefix, random_bits(), random_bits() >> 32);
}

// "%ED%95%9C" to bytes; nullopt where it is not well-formed.
std::optional<std::string> percent_decoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const auto digit = [&](size_t at) {
      return at < text.size()
                 ? std::string_view("0123456789abcdef")
                       .find(static_cast<char>(std::tolower(static_cast<unsigned char>(text[at]))))
                 : std::string_view::npos;
    };
    const size_t high = digit(i + 1), low = digit(i + 2);
    if (high == std::string_view::npos || low == std::string_view::npos) return std::nullopt;
    out += static_cast<char>(high << 4 | low);
    i += 2;
  }
  return out;
}

// The media type of a Content-Type, in lower case, without its parameters.
std::string media_type(std::string_view value) {
  std::string type(value.substr(0, value.find(';')));
  while (!type.empty() && type.back() == ' ') type.pop_back();
  for (char& c : type) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return type;
}

ApiError no_such_model(std::string_view name, const std::vector<std::string>& served) {
  return {.status = 404,
          .message = fmt::format("The model '{}' does not exist; '{}' is served here.",
                                 truncate_to_width(name, 80), fmt::join(served, "', '")),
          .param = "model",
          .code = "model_not_found"};
}

}  // namespace

// What a request asks the backend for, chat or not.
struct Api::Question {
  bool chat;
  AnswerOptions options;
  std::vector<std::vector<TokenId>> prompts;
  std::vector<std::string> echoes;  // by prompt: what its answers begin with; or empty
};

struct Api::Route {
  const char* method;
  std::string_view path;  // one that ends in '/' has all below it
  bool needs_key;
  void (Api::*run)(const std::shared_ptr<Call>&);
};

const Api::Route Api::kRoutes[] = {
    {"GET", "/health", false, &Api::health},
    {"GET", "/metrics", false, &Api::metrics},
    {"GET", "/v1/models", true, &Api::models},
    {"GET", "/v1/models/", true, &Api::models},
    {"POST", "/v1/chat/completions", true, &Api::chat},
    {"POST", "/v1/completions", true, &Api::completions},
};

// One request and what is known of its answer so far. Runs on its exchange's strand.
class Api::Call : public std::enable_shared_from_this<Call> {
 public:
  Call(const ApiOptions& options, std::shared_ptr<HttpExchange> exchange)
      : options_(options), exchange_(std::move(exchange)) {}

  const HttpRequest& request() const { return exchange_->request(); }

  void reply(std::string body, std::string content_type = "application/json") {
    exchange_->send(
        {.body = std::move(body), .headers = headers(), .content_type = std::move(content_type)});
    log(200);
  }

  void refuse(const ApiError& error, HttpHeaders more = {}) {
    HttpHeaders all = headers();
    all.insert(all.end(), more.begin(), more.end());
    if (error.retry_after_s != 0)
      all.emplace_back("Retry-After", std::to_string(error.retry_after_s));
    if (error.status == 401) all.emplace_back("WWW-Authenticate", "Bearer");
    exchange_->send({.status = error.status, .body = body_of(error), .headers = std::move(all)});
    log(error.status);
  }

  // From here on, updates make the reply.
  void expect(const Question& question, ReplyWriter writer) {
    writer_.emplace(std::move(writer));
    const AnswerOptions& o = question.options;
    chat_ = question.chat;
    stream_ = o.stream;
    include_usage_ = o.include_usage;
    choices_per_prompt_ = o.choices;
    const size_t count = question.prompts.size() * o.choices;
    choices_.resize(count);
    open_ = count;
    if (question.echoes.empty()) return;
    for (size_t i = 0; i < count; ++i) choices_[i].echo = question.echoes[i / o.choices];
  }

  void cancel_when_gone(Scheduler& scheduler, uint64_t job) {
    exchange_->on_gone([self = shared_from_this(), &scheduler, job] {
      scheduler.cancel(job);
      self->log(kClientGone);
    });
  }

  // For the scheduler's thread: the work is done on the strand.
  void deliver(Update update) {
    exchange_->post([self = shared_from_this(), u = std::move(update)] { self->take(u); });
  }

 private:
  struct Choice {
    Answer answer;           // of a stream, the text and logprobs are not kept
    std::string echo;        // not yet given
    size_t text_offset = 0;  // code points given
    bool opened = false;
    size_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  };

  HttpHeaders headers() const { return {{"X-Request-Id", id_}}; }

  void take(const Update& update) {
    if (ended_) return;
    if (update.error) return fail(*update.error);
    Choice& choice = choices_[update.choice];
    const GenerationEvent& event = update.event;
    choice.prompt_tokens = event.prompt_tokens;
    choice.cached_tokens = event.cached_tokens;
    choice.completion_tokens = event.completion_tokens;
    if (!first_token_s_ && event.completion_tokens > 0) first_token_s_ = watch_.seconds();
    const std::string text = std::exchange(choice.echo, {}) + event.text;
    if (stream_) {
      send_part(update.choice, text, event);
    } else {
      choice.answer.text += text;
      choice.answer.logprobs.insert(choice.answer.logprobs.end(), event.logprobs.begin(),
                                    event.logprobs.end());
    }
    if (!event.finish) return;
    choice.answer.finish = *event.finish;
    if (--open_ == 0) finish();
  }

  void send_part(size_t index, const std::string& text, const GenerationEvent& event) {
    Choice& choice = choices_[index];
    if (!std::exchange(begun_, true)) exchange_->begin_events(headers());
    if (chat_ && !std::exchange(choice.opened, true)) exchange_->event(writer_->opening(index));
    if (!text.empty() || !event.logprobs.empty())
      exchange_->event(writer_->part(index, text, event.logprobs, choice.text_offset));
    choice.text_offset += count_code_points(text);
    if (event.finish) exchange_->event(writer_->closing(index, *event.finish));
  }

  void finish() {
    if (!stream_) {
      std::vector<Answer> answers;
      for (Choice& choice : choices_) answers.push_back(std::move(choice.answer));
      return reply(writer_->whole(answers, usage()));
    }
    if (include_usage_) exchange_->event(writer_->usage(usage()));
    exchange_->event("[DONE]");
    exchange_->end_events();
    log(200);
  }

  void fail(const ApiError& error) {
    if (!begun_) return refuse(error);
    // The status is gone: the error is the last event.
    exchange_->event(body_of(error));
    exchange_->end_events();
    log(error.status);
  }

  Usage usage() const {
    Usage usage;
    for (size_t i = 0; i < choices_.size(); ++i) {
      usage.completion_tokens += choices_[i].completion_tokens;
      if (i % choices_per_prompt_ != 0) continue;  // its prompt is counted once
      usage.prompt_tokens += choices_[i].prompt_tokens;
      usage.cached_tokens += choices_[i].cached_tokens;
    }
    return usage;
  }

  void log(int status) {
    if (std::exchange(ended_, true) || !options_.log) return;
    const double seconds = watch_.seconds();
    const auto ms = [](double s) { return static_cast<int64_t>(s * 1000 + 0.5); };
    nlohmann::ordered_json line = {{"time", utc_now()},
                                   {"id", id_},
                                   {"route", request().method + " " + request().path},
                                   {"status", status},
                                   {"ms", ms(seconds)}};
    if (!choices_.empty()) {
      const Usage used = usage();
      line["stream"] = stream_;
      line["prompt_tokens"] = used.prompt_tokens;
      line["cached_tokens"] = used.cached_tokens;
      line["completion_tokens"] = used.completion_tokens;
      if (first_token_s_) {
        line["ms_to_first_token"] = ms(*first_token_s_);
        const double since = seconds - *first_token_s_;
        const auto later = static_cast<double>(used.completion_tokens) - 1;
        if (later > 0 && since > 0) line["tokens_per_second"] = std::round(later / since * 10) / 10;
      }
    }
    options_.log(line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }

  const ApiOptions& options_;
  std::shared_ptr<HttpExchange> exchange_;
  std::string id_ = random_id("req");
  Stopwatch watch_;
  std::optional<ReplyWriter> writer_;
  std::vector<Choice> choices_;
  size_t choices_per_prompt_ = 1, open_ = 0;
  bool chat_ = false, stream_ = false, include_usage_ = false, begun_ = false, ended_ = false;
  std::optional<double> first_token_s_;
};

Api::Api(ApiOptions options, const Backend& backend, Scheduler& scheduler)
    : options_(std::move(options)), backend_(backend), scheduler_(scheduler) {}

void Api::handle(std::shared_ptr<HttpExchange> exchange) {
  const auto call = std::make_shared<Call>(options_, std::move(exchange));
  try {
    route(call);
  } catch (const Error& error) {
    call->refuse(api_error_of(error));
  }
}

void Api::route(const std::shared_ptr<Call>& call) {
  const HttpRequest& request = call->request();
  // A browser says which page asks. Pages of other origins have no business here (CORS is off),
  // and this server has no pages.
  if (!request.header("Origin").empty())
    return call->refuse({.status = 403,
                         .message = "Requests from web pages are not allowed (CORS is off).",
                         .code = "origin_not_allowed"});
  std::string allowed;
  for (const Route& route : kRoutes) {
    const bool below = route.path.ends_with('/');
    if (below ? !request.path.starts_with(route.path) : request.path != route.path) continue;
    const std::string method = request.method == "HEAD" ? "GET" : request.method;
    if (method != route.method) {
      allowed = route.method;
      continue;
    }
    if (route.needs_key && !options_.api_key.empty()) {
      // Hashes, so that the time taken tells nothing about the key.
      const std::string wanted = sha256("Bearer " + options_.api_key);
      if (sha256(request.header("Authorization")) != wanted)
        return call->refuse({.status = 401,
                             .message = "The API key is missing or wrong; send it as "
                                        "'Authorization: Bearer KEY'.",
                             .code = "invalid_api_key"});
    }
    if (method == "POST" && media_type(request.header("Content-Type")) != "application/json")
      return call->refuse({.status = 415,
                           .message = "The Content-Type must be application/json.",
                           .code = "unsupported_media_type"});
    return (this->*route.run)(call);
  }
  const std::string what =
      fmt::format("{} {}", request.method, truncate_to_width(request.path, 80));
  if (!allowed.empty())
    return call->refuse({.status = 405,
                         .message = fmt::format("{} is not possible; use {}.", what, allowed),
                         .code = "method_not_allowed"},
                        {{"Allow", allowed}});
  call->refuse(
      {.status = 404, .message = fmt::format("There is no {} here.", what), .code = "unknown_url"});
}

void Api::health(const std::shared_ptr<Call>& call) {
  call->reply(nlohmann::ordered_json{{"status", "ok"},
                                     {"model", options_.model_name},
                                     {"answers_open", scheduler_.open_choices()},
                                     {"answers_max", scheduler_.max_choices()}}
                  .dump());
}

// The text format of Prometheus, version 0.0.4.
void Api::metrics(const std::shared_ptr<Call>& call) {
  const GeneratorLoad load = scheduler_.load();
  std::string body;
  const auto line = [&](const char* name, const char* type, const char* help, double value) {
    body += fmt::format("# HELP moru_{} {}\n# TYPE moru_{} {}\nmoru_{} {}\n", name, help, name,
                        type, name, value);
  };
  const auto count = [](size_t n) { return static_cast<double>(n); };
  line("answers_open", "gauge", "Answers accepted and not ended.",
       count(scheduler_.open_choices()));
  line("answers_running", "gauge", "Answers that the last step could carry.", count(load.running));
  line("answers_waiting", "gauge", "Answers that waited for room or for a prompt like theirs.",
       count(load.waiting));
  line("kv_pages", "gauge", "Pages of the cache of keys and values.", count(load.pages));
  line("kv_pages_used", "gauge", "Pages in use, also by beginnings kept for later prompts.",
       count(load.pages_used));
  line("prompt_tokens_total", "counter", "Tokens of prompts computed.", count(load.prompt_tokens));
  line("cached_tokens_total", "counter", "Tokens of prompts found in the cache.",
       count(load.cached_tokens));
  line("completion_tokens_total", "counter", "Tokens generated.", count(load.completion_tokens));
  line("steps_total", "counter", "Steps of the engine.", count(load.steps));
  line("step_seconds_total", "counter", "Time spent in steps.", load.step_seconds);
  line("sent_back_total", "counter", "Times that an answer lost its cache to an older one.",
       count(load.sent_back));
  call->reply(std::move(body), "text/plain; version=0.0.4");
}

void Api::models(const std::shared_ptr<Call>& call) {
  constexpr std::string_view kPath = "/v1/models";
  const std::string_view rest = std::string_view(call->request().path).substr(kPath.size());
  if (rest.empty()) return call->reply(models_body(model_names(), options_.created));
  const std::string name = percent_decoded(rest.substr(1)).value_or("");
  if (name != options_.model_name && backend_.adapter(name) == nullptr)
    return call->refuse(no_such_model(name, model_names()));
  call->reply(model_body(name, options_.created));
}

// The model, then its adapters.
std::vector<std::string> Api::model_names() const {
  std::vector<std::string> names = backend_.adapters();
  names.insert(names.begin(), options_.model_name);
  return names;
}

void Api::chat(const std::shared_ptr<Call>& call) {
  const WireLimits limits{.vocab = backend_.vocab(), .max_choices = scheduler_.max_choices()};
  auto parsed = parse_chat(call->request().body, limits, random_bits());
  if (const ApiError* error = std::get_if<ApiError>(&parsed)) return call->refuse(*error);
  auto& request = std::get<ChatRequest>(parsed);
  std::vector<TokenId> ids;
  try {
    ids = backend_.encode_chat(request.messages);
  } catch (const Error& error) {
    return call->refuse(
        {.message = error.what(), .param = "messages", .code = "chat_template_refuses"});
  }
  ask(call, {.chat = true, .options = std::move(request.options), .prompts = {std::move(ids)}});
}

void Api::completions(const std::shared_ptr<Call>& call) {
  const WireLimits limits{.vocab = backend_.vocab(), .max_choices = scheduler_.max_choices()};
  auto parsed = parse_completion(call->request().body, limits, random_bits());
  if (const ApiError* error = std::get_if<ApiError>(&parsed)) return call->refuse(*error);
  auto& request = std::get<CompletionRequest>(parsed);
  Question question{.chat = false, .options = std::move(request.options)};
  for (auto& prompt : request.prompts) {
    const std::string* text = std::get_if<std::string>(&prompt);
    if (request.echo)
      question.echoes.push_back(
          text != nullptr ? *text : backend_.decode(std::get<std::vector<TokenId>>(prompt)));
    question.prompts.push_back(text != nullptr ? backend_.encode_text(*text)
                                               : std::move(std::get<std::vector<TokenId>>(prompt)));
  }
  ask(call, std::move(question));
}

void Api::ask(const std::shared_ptr<Call>& call, Question question) {
  const AnswerOptions& o = question.options;
  const char* param = question.chat ? "messages" : "prompt";
  const std::string& model = o.model.empty() ? options_.model_name : o.model;
  const Adapter* adapter = model == options_.model_name ? nullptr : backend_.adapter(model);
  if (adapter == nullptr && model != options_.model_name)
    return call->refuse(no_such_model(model, model_names()));
  for (const auto& prompt : question.prompts) {
    if (prompt.empty())
      return call->refuse({.message = fmt::format("Invalid '{}': it has no tokens.", param),
                           .param = param,
                           .code = "invalid_value"});
    if (prompt.size() > backend_.longest_prompt())
      return call->refuse({.message = fmt::format("The context holds {} tokens of prompt, but '{}' "
                                                  "has {}.",
                                                  backend_.longest_prompt(), param, prompt.size()),
                           .param = param,
                           .code = "context_length_exceeded"});
  }

  std::shared_ptr<const Language> language;
  if (o.constraint) {
    try {
      language = languages_.find(*o.constraint);
    } catch (const Error& error) {
      return call->refuse(
          {.message = fmt::format("Invalid '{}': {}", o.constraint_field, error.what()),
           .param = o.constraint_field,
           .code =
               error.kind() == ErrorKind::unsupported ? "unsupported_parameter" : "invalid_value"});
    }
  }

  Job job;
  for (const auto& prompt : question.prompts) {
    for (size_t i = 0; i < o.choices; ++i) {
      GenerationRequest request{.prompt = prompt,
                                .max_tokens = o.max_tokens.value_or(backend_.longest_prompt()),
                                .sampling = o.sampling,
                                .stop_ids = backend_.stop_ids(),
                                .stop_texts = o.stop,
                                .language = language,
                                .adapter = adapter,
                                .top_logprobs = o.top_logprobs};
      request.sampling.seed = seed_of_choice(o.sampling.seed, i);
      job.choices.push_back(std::move(request));
    }
  }
  job.deliver = [call](Update update) { call->deliver(std::move(update)); };
  const bool chat = question.chat;
  call->expect(question, ReplyWriter({.chat = chat,
                                      .id = random_id(chat ? "chatcmpl" : "cmpl"),
                                      .created = static_cast<int64_t>(std::time(nullptr)),
                                      .model = model,
                                      .fingerprint = options_.fingerprint,
                                      .logprobs = o.top_logprobs.has_value(),
                                      .include_usage = o.include_usage},
                                     [this](TokenId id) { return backend_.bytes_of(id); }));
  const auto number = scheduler_.submit(std::move(job));
  if (!number)
    return call->refuse({.status = 429,
                         .message = "Too many answers are waiting; try again in a moment.",
                         .type = "rate_limit_error",
                         .code = "queue_full",
                         .retry_after_s = kRetryWhenFull_s});
  call->cancel_when_gone(scheduler_, *number);
}

}  // namespace moru
