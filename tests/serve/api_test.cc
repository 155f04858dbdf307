#include "serve/api.h"

#include <mutex>

#include "client.h"
#include "fake_backend.h"
#include "serve/api_error.h"
#include "support.h"

using namespace moru;
using namespace std::chrono_literals;

namespace {

using Json = nlohmann::ordered_json;

// The whole server over the fake model.
class TestServer {
 public:
  explicit TestServer(ApiOptions options = {}, size_t max_choices = 64, HttpOptions http = {})
      : scheduler_(backend, max_choices),
        api_(with_log(std::move(options)), backend, scheduler_),
        server_([this](std::shared_ptr<HttpExchange> e) { api_.handle(std::move(e)); },
                std::move(http), [this] { scheduler_.give_up(stopping_error()); }) {}

  FakeBackend backend;

  uint16_t port() const { return server_.port(); }
  Scheduler& scheduler() { return scheduler_; }
  void begin_stop() { server_.begin_stop(); }
  void stop() { server_.stop(); }
  std::vector<Json> log() const {
    const std::lock_guard lock(mutex_);
    return log_;
  }

 private:
  ApiOptions with_log(ApiOptions options) {
    options.model_name = "모델/tiny";
    options.fingerprint = "fp_123";
    options.log = [this](std::string_view line) {
      const std::lock_guard lock(mutex_);
      log_.push_back(Json::parse(line));
    };
    return options;
  }

  mutable std::mutex mutex_;
  std::vector<Json> log_;
  Scheduler scheduler_;
  Api api_;
  RunningServer server_;
};

constexpr std::string_view kChat = "/v1/chat/completions", kCompletions = "/v1/completions";

std::string chat_body(std::string_view content, std::string_view more = "") {
  return fmt::format(R"({{"messages": [{{"role": "user", "content": "{}"}}]{}}})", content, more);
}

std::string content_of(const Response& r, size_t choice = 0) {
  REQUIRE(r.status == 200);
  return r.json()["choices"][choice]["message"]["content"];
}

// The text of one choice of a stream; checks the frame around it.
std::string streamed(const Response& r, size_t choice = 0) {
  REQUIRE(r.status == 200);
  const auto events = r.events();
  REQUIRE(!events.empty());
  CHECK(events.back() == "[DONE]");
  std::string out;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    CHECK(!find_invalid_utf8(events[i]));
    const Json chunk = Json::parse(events[i]);
    for (const Json& c : chunk["choices"])
      if (c["index"] == choice)
        out += c.contains("delta") ? c["delta"].value("content", "") : c["text"].get<std::string>();
  }
  return out;
}

}  // namespace

TEST_CASE("a chat is answered") {
  TestServer server;
  const Response r = Client(server.port()).post(kChat, chat_body("안녕하세요"));
  const Json json = r.json();
  CHECK(json["id"].get<std::string>().starts_with("chatcmpl-"));
  CHECK(json["object"] == "chat.completion");
  CHECK(json["model"] == "모델/tiny");
  CHECK(json["system_fingerprint"] == "fp_123");
  CHECK(content_of(r) == "안녕하세요");
  CHECK(json["choices"][0]["finish_reason"] == "stop");
  CHECK(json["usage"] == Json::parse(R"({"prompt_tokens": 15, "completion_tokens": 5,
            "total_tokens": 20, "prompt_tokens_details": {"cached_tokens": 1}})"));
  CHECK(r.headers.contains("x-request-id"));
}

TEST_CASE("max_tokens ends an answer by length, and its absence does not") {
  TestServer server;
  const Json json =
      Client(server.port()).post(kChat, chat_body("abc", R"(, "max_tokens": 2)")).json();
  CHECK(json["choices"][0]["message"]["content"] == "ab");
  CHECK(json["choices"][0]["finish_reason"] == "length");
  const std::string much(900, 'x');
  CHECK(content_of(Client(server.port()).post(kChat, chat_body(much))) == much);
}

TEST_CASE("a stream gives whole characters, a role first and a reason last") {
  TestServer server;
  const std::string text = "한국어 문장 🤖 end";
  Client client(server.port());
  for (int i = 0; i < 2; ++i) {  // on one connection
    const Response r = client.post(kChat, chat_body(text, R"(, "stream": true)"));
    CHECK(r.headers.at("content-type") == "text/event-stream; charset=utf-8");
    CHECK(streamed(r) == text);
    const auto events = r.events();
    const Json first = Json::parse(events.front()), last = Json::parse(events[events.size() - 2]);
    CHECK(first["choices"][0]["delta"] == Json::parse(R"({"role": "assistant", "content": ""})"));
    CHECK(last["choices"][0]["delta"] == Json::object());
    CHECK(last["choices"][0]["finish_reason"] == "stop");
    CHECK(first["id"] == last["id"]);
  }
}

TEST_CASE("a stream tells its usage if asked") {
  TestServer server;
  const Response r =
      Client(server.port())
          .post(kChat,
                chat_body("ab", R"(, "stream": true, "stream_options": {"include_usage": true})"));
  const auto events = r.events();
  const Json usage = Json::parse(events[events.size() - 2]);
  CHECK(usage["choices"] == Json::array());
  CHECK(usage["usage"]["completion_tokens"] == 2);
  CHECK(streamed(r) == "ab");
}

TEST_CASE("several choices are told apart, streamed or not, and share the prompt's cost") {
  TestServer server;
  Client client(server.port());
  const Response whole = client.post(kChat, chat_body("abc", R"(, "n": 3)"));
  for (const size_t i : {0, 1, 2}) {
    CHECK(content_of(whole, i) == "abc");
    CHECK(whole.json()["choices"][i]["index"] == i);
  }
  CHECK(whole.json()["usage"]["prompt_tokens"] == 3);
  CHECK(whole.json()["usage"]["completion_tokens"] == 9);
  const Response stream = client.post(kChat, chat_body("abc", R"(, "n": 2, "stream": true)"));
  CHECK(streamed(stream, 0) == "abc");
  CHECK(streamed(stream, 1) == "abc");
}

TEST_CASE("completions take texts and ids, echo them, and give logprobs") {
  TestServer server;
  Client client(server.port());
  const Json one = client.post(kCompletions, R"({"prompt": "안녕", "max_tokens": 1})").json();
  CHECK(one["id"].get<std::string>().starts_with("cmpl-"));
  CHECK(one["object"] == "text_completion");
  CHECK(one["choices"][0]["text"] == "안");
  CHECK(one["choices"][0]["finish_reason"] == "length");

  const Json many =
      client.post(kCompletions, R"({"prompt": ["a", [98, 99]], "echo": true, "n": 2})").json();
  REQUIRE(many["choices"].size() == 4);
  CHECK(many["choices"][1]["text"] == "aa");
  CHECK(many["choices"][2]["text"] == "bcbc");
  CHECK(many["usage"]["prompt_tokens"] == 3);

  const Json logprobs = client.post(kCompletions, R"({"prompt": "xy", "logprobs": 2})")
                            .json()["choices"][0]["logprobs"];
  CHECK(logprobs["tokens"] == Json::parse(R"(["x", "y"])"));
  CHECK(logprobs["text_offset"] == Json::parse("[0, 1]"));
  CHECK(logprobs["top_logprobs"][1] == Json::parse(R"({"y": -0.5, "<end>": -1.5})"));

  const Response stream = client.post(
      kCompletions, R"({"prompt": "x안y", "logprobs": 1, "echo": false, "stream": true})");
  CHECK(streamed(stream) == "x안y");
  const auto events = stream.events();
  CHECK(Json::parse(events[2])["choices"][0]["logprobs"]["text_offset"] == Json::parse("[2]"));
  CHECK(streamed(client.post(kCompletions, R"({"prompt": "q", "echo": true, "stream": true})")) ==
        "qq");
}

TEST_CASE("chat logprobs") {
  TestServer server;
  const Json json = Client(server.port())
                        .post(kChat, chat_body("x", R"(, "logprobs": true, "top_logprobs": 1)"))
                        .json();
  CHECK(json["choices"][0]["logprobs"]["content"] == Json::parse(R"([{"token": "x",
      "logprob": -0.5, "bytes": [120],
      "top_logprobs": [{"token": "x", "logprob": -0.5, "bytes": [120]}]}])"));
}

TEST_CASE("what is wrong is said in an error object of the right status") {
  TestServer server({.api_key = "geheim"});
  constexpr std::string_view kKey = "Authorization: Bearer geheim\r\n";
  struct Row {
    std::string_view method, path, headers, body;
    int status;
    std::string_view code, param;
  };
  constexpr std::string_view kJson = "Content-Type: application/json\r\n";
  const std::string json_and_key = fmt::format("{}{}", kJson, kKey);
  const std::string long_prompt = fmt::format(R"({{"prompt": "{:x>1001}"}})", "");
  const std::vector<Row> table = {
      {"GET", "/", "", "", 404, "unknown_url", ""},
      {"GET", "/v1/embeddings", kKey, "", 404, "unknown_url", ""},
      {"POST", "/v1/models", kKey, "", 405, "method_not_allowed", ""},
      {"GET", "/v1/chat/completions", kKey, "", 405, "method_not_allowed", ""},
      {"OPTIONS", "/v1/chat/completions", "", "", 405, "method_not_allowed", ""},
      {"GET", "/v1/models", "", "", 401, "invalid_api_key", ""},
      {"GET", "/v1/models", "Authorization: Bearer geheim2\r\n", "", 401, "invalid_api_key", ""},
      {"GET", "/v1/models", "Authorization: Bearer gehei\r\n", "", 401, "invalid_api_key", ""},
      {"POST", kChat, kJson, "{}", 401, "invalid_api_key", ""},
      {"GET", "/v1/models/other", kKey, "", 404, "model_not_found", "model"},
      {"GET", "/v1/models/%zz", kKey, "", 404, "model_not_found", "model"},
      {"POST", kChat, kKey, "{}", 415, "unsupported_media_type", ""},
      {"GET", "/health", "Origin: http://evil.example\r\n", "", 403, "origin_not_allowed", ""},
      {"POST", kChat, json_and_key, "{", 400, "invalid_json", ""},
      {"POST", kChat, json_and_key, "\xFF\xFE", 400, "invalid_json", ""},
      {"POST", kChat, json_and_key, R"({"messages": 1})", 400, "invalid_type", "messages"},
      {"POST", kCompletions, json_and_key, R"({"prompt": "a", "model": "gpt-4"})", 404,
       "model_not_found", "model"},
      {"POST", kCompletions, json_and_key, R"({"prompt": ""})", 400, "invalid_value", "prompt"},
      {"POST", kCompletions, json_and_key, R"({"prompt": [300]})", 400, "invalid_value", "prompt"},
      {"POST", kCompletions, json_and_key, long_prompt, 400, "context_length_exceeded", "prompt"},
      {"POST", kCompletions, json_and_key, R"x({"prompt": "a", "guided_regex": "("})x", 400,
       "invalid_value", "guided_regex"},
      {"POST", kCompletions, json_and_key, R"({"prompt": "a", "guided_json": {"not": {}}})", 400,
       "unsupported_parameter", "guided_json"},
      {"POST", kCompletions, json_and_key, R"({"prompt": "!"})", 400, "", ""},
      {"POST", kCompletions, json_and_key, R"({"prompt": "!", "stream": true})", 400, "", ""},
  };
  for (const Row& row : table) {
    CAPTURE(row.method);
    CAPTURE(row.path);
    CAPTURE(row.body.substr(0, 100));
    Client client(server.port());
    client.send(fmt::format("{} {} HTTP/1.1\r\nHost: a\r\n{}Content-Length: {}\r\n\r\n{}",
                            row.method, row.path, row.headers, row.body.size(), row.body));
    const Response r = client.read();
    CHECK(r.status == row.status);
    CHECK(r.headers.at("content-type") == "application/json");
    const Json error = r.json().at("error");
    CHECK(error.at("message").is_string());
    CHECK(error.at("type") == "invalid_request_error");
    const auto text = [](const Json& v) { return v.is_null() ? "" : v.get<std::string>(); };
    CHECK(text(error.at("code")) == row.code);
    CHECK(text(error.at("param")) == row.param);
    if (row.status == 405) CHECK(!r.headers.at("allow").empty());
  }
  CHECK(Client(server.port()).get("/v1/models", kKey).status == 200);
  CHECK(Client(server.port()).get("/health").status == 200);
}

TEST_CASE("the model is listed, and found under its name as URLs spell it") {
  TestServer server;
  Client client(server.port());
  CHECK(client.get("/v1/models").json()["data"][0]["id"] == "모델/tiny");
  CHECK(client.get("/v1/models/%EB%AA%A8%EB%8D%B8%2ftiny").json()["id"] == "모델/tiny");
  CHECK(client.get("/v1/models/%EB%AA%A8%EB%8D%B8/tiny").status == 200);
  CHECK(client.post(kChat, chat_body("a", R"(, "model": "모델/tiny")")).status == 200);
}

TEST_CASE("a model without a chat template says so; completions work") {
  TestServer server;
  server.backend.no_template = true;
  Client client(server.port());
  const Response r = client.post(kChat, chat_body("a"));
  CHECK(r.status == 400);
  CHECK(r.json()["error"]["message"].get<std::string>().find("no chat template") !=
        std::string::npos);
  CHECK(client.post(kCompletions, R"({"prompt": "a"})").status == 200);
}

TEST_CASE("a client that goes away ends its answer") {
  for (const char* stream : {"false", "true"}) {
    TestServer server;
    server.backend.hold = true;
    Client client(server.port());
    client.post_only(kChat, chat_body("abc", fmt::format(R"(, "n": 2, "stream": {})", stream)));
    REQUIRE(comes_true([&] { return server.backend.submitted == 1; }));
    CHECK(server.scheduler().open_choices() == 2);
    client.close();
    CHECK(comes_true([&] { return server.scheduler().open_choices() == 0; }));
    CHECK(server.backend.cancelled == 1);
    CHECK(comes_true([&] { return server.log().size() == 1; }));
    CHECK(server.log()[0]["status"] == 499);
  }
}

TEST_CASE("a full queue is said at once, with when to come again, and health still answers") {
  TestServer server({}, 2);
  server.backend.hold = true;
  Client one(server.port()), two(server.port()), three(server.port());
  one.post_only(kChat, chat_body("a"));
  two.post_only(kChat, chat_body("b"));
  REQUIRE(comes_true([&] { return server.scheduler().open_choices() == 2; }));
  const Response r = three.post(kChat, chat_body("c"));
  CHECK(r.status == 429);
  CHECK(r.headers.at("retry-after") == "2");
  CHECK(r.json()["error"]["code"] == "queue_full");
  const Json health = three.get("/health").json();
  CHECK(health["status"] == "ok");
  CHECK(health["answers_open"] == 2);
  server.backend.hold = false;
  CHECK(content_of(one.read()) == "a");
  CHECK(content_of(two.read()) == "b");
  CHECK(content_of(three.post(kChat, chat_body("c"))) == "c");
}

TEST_CASE("a failed step is a server error, in a stream the last event") {
  TestServer server;
  Client whole(server.port());
  server.backend.fail_steps = true;
  const Response r = whole.post(kChat, chat_body("abc", R"(, "stream": true)"));
  CHECK(r.status == 507);
  CHECK(r.json()["error"]["type"] == "server_error");

  server.backend.fail_steps = false;
  Client stream(server.port());
  const std::string much(900, 'x');
  stream.post_only(kChat, chat_body(much, R"(, "stream": true)"));
  REQUIRE(comes_true([&] { return server.backend.steps > 3; }));
  server.backend.fail_steps = true;
  const auto events = stream.read().events();
  CHECK(events.size() > 1);
  CHECK(Json::parse(events.back())["error"]["type"] == "server_error");
}

TEST_CASE("many clients at once get the answers that each would get alone") {
  TestServer server({}, 1000);
  constexpr int kClients = 16, kRequests = 12;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int c = 0; c < kClients; ++c) {
    threads.emplace_back([&, c] {
      Client client(server.port());
      for (int i = 0; i < kRequests; ++i) {
        const bool stream = (c + i) % 2 == 0;
        const std::string text = fmt::format("손님 {} 질문 {} {:x>{}}", c, i, "", i * 7);
        client.post_only(kChat, chat_body(text, stream ? R"(, "stream": true)" : ""));
        const Response r = client.read();
        std::string got;
        if (!stream && r.status == 200) got = r.json()["choices"][0]["message"]["content"];
        if (stream) {
          for (size_t at = 0; (at = r.body.find("data: {", at)) != std::string::npos; ++at) {
            const std::string data = r.body.substr(at + 6, r.body.find("\n\n", at) - at - 6);
            got += Json::parse(data)["choices"][0]["delta"].value("content", "");
          }
        }
        wrong += got != text;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  // An answer is counted as ended after its last byte has gone.
  CHECK(comes_true([&] { return server.scheduler().open_choices() == 0; }));
}

TEST_CASE("stopping finishes answers under way; what outlives the grace is told") {
  for (const bool in_time : {true, false}) {
    CAPTURE(in_time);
    TestServer server({}, 64, {.grace = in_time ? 30'000ms : 50ms});
    server.backend.hold = true;
    Client whole(server.port()), stream(server.port());
    whole.post_only(kChat, chat_body("abc"));
    stream.post_only(kChat, chat_body("abc", R"(, "stream": true)"));
    REQUIRE(comes_true([&] { return server.backend.submitted == 2; }));
    server.begin_stop();
    if (in_time) {
      server.backend.hold = false;
      CHECK(content_of(whole.read()) == "abc");
      CHECK(streamed(stream.read()) == "abc");
    } else {
      const Response r = whole.read();
      CHECK(r.status == 503);
      CHECK(r.headers.at("retry-after") == "5");
      CHECK(r.json()["error"]["code"] == "server_stopping");
      CHECK(stream.read().status == 503);
    }
    server.stop();
  }
}

TEST_CASE("each request leaves one line in the log, without what was said") {
  TestServer server;
  Client client(server.port());
  client.post(kChat, chat_body("비밀", R"(, "stream": true)"));
  client.get("/health");
  client.post(kChat, "{");
  REQUIRE(comes_true([&] { return server.log().size() == 3; }));
  const Json chat = server.log()[0];
  CHECK(chat["route"] == "POST /v1/chat/completions");
  CHECK(chat["status"] == 200);
  CHECK(chat["stream"] == true);
  CHECK(chat["prompt_tokens"] == 6);
  CHECK(chat["completion_tokens"] == 2);
  CHECK(chat["ms_to_first_token"].is_number_integer());
  CHECK(chat["tokens_per_second"].is_number());
  CHECK(chat.dump().find("비밀") == std::string::npos);
  CHECK(server.log()[1]["route"] == "GET /health");
  CHECK(server.log()[2]["status"] == 400);
}

TEST_CASE("metrics are Prometheus text, for anyone, and say what the last step left") {
  TestServer server({.api_key = "secret"});
  Client client(server.port());
  const auto value = [&](const std::string& name) {
    const Response reply = client.get("/metrics");
    CHECK(reply.status == 200);
    CHECK(reply.headers.at("content-type") == "text/plain; version=0.0.4");
    const size_t type = reply.body.find("# TYPE moru_" + name + " ");
    const size_t at = reply.body.find("\nmoru_" + name + " ");
    REQUIRE(type != std::string::npos);
    REQUIRE(at != std::string::npos);
    CHECK(type < at);
    return std::stod(reply.body.substr(at + 7 + name.size()));
  };
  CHECK(value("answers_open") == 0);
  CHECK(value("kv_pages") == 100);
  CHECK(value("steps_total") == 0);
  server.backend.hold = true;
  Client asking(server.port());
  asking.post_only(kChat, chat_body("abc"), "Authorization: Bearer secret\r\n");
  CHECK(comes_true([&] { return value("answers_running") == 1; }));
  CHECK(value("answers_open") == 1);
  CHECK(comes_true([&] { return value("steps_total") > 2; }));
  server.backend.hold = false;
  CHECK(comes_true([&] { return value("answers_open") == 0; }));
}
