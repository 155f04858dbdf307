// HTTP/1.1 for a handler that may answer later, from any thread, at once or as a stream of events.
// RFC 9110, RFC 9112; server-sent events: the HTML standard, section 9.2.
//
// Every connection is a coroutine on its own strand. What a client can make the server keep or wait
// for is bounded: header and body sizes, the time for each, idle and unread connections, and their
// number. Bodies of refusals are OpenAI's error objects.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moru {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method, path;  // without the query, as sent (percent-encoded)
  HttpHeaders headers;
  std::string body;

  // "" where it is absent; names ignore case.
  std::string_view header(std::string_view name) const;
};

struct HttpReply {
  int status = 200;
  std::string body;
  HttpHeaders headers;  // besides Content-Type, Content-Length and Connection
  std::string content_type = "application/json";
};

// One request and the way back: exactly one send(), or one begin_events(), any event()s and one
// end_events(). All calls may come from any thread; they do nothing once the client is gone.
class HttpExchange {
 public:
  struct State;
  explicit HttpExchange(std::shared_ptr<State> state) : state_(std::move(state)) {}

  const HttpRequest& request() const;

  void send(HttpReply reply);
  void begin_events(HttpHeaders headers);
  void event(std::string_view data);  // one line: "data: …"
  void end_events();

  // Runs `work` after all that was posted before it, never two at once.
  void post(std::function<void()> work);
  // Called there, at most once, if the client goes before the reply is finished. To be set while
  // the handler runs or in posted work.
  void on_gone(std::function<void()> call);

 private:
  std::shared_ptr<State> state_;
};

struct HttpOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 8080;  // 0: a free one
  size_t threads = 2;
  bool stop_on_signals = false;  // SIGINT and SIGTERM stop() it; a second one ends the grace
  uint32_t header_bytes_max = 16 << 10;
  uint64_t body_bytes_max = 4 << 20;
  size_t connections_max = 512;
  std::chrono::milliseconds idle_time{75'000};    // between requests
  std::chrono::milliseconds header_time{10'000};  // from a header's first byte to its last
  std::chrono::milliseconds body_time{60'000};
  std::chrono::milliseconds write_time{30'000};  // for a client that does not read
  std::chrono::milliseconds grace{30'000};       // for answers under way when it stops
};

class HttpServer {
 public:
  // Binds and listens. Errors: usage (the host), io (the port is taken).
  explicit HttpServer(HttpOptions options);
  // Whoever may still call an exchange must have ended by now.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  uint16_t port() const;
  // Called on a strand of the exchange; what it throws becomes a reply of status 500.
  using Handler = std::function<void(std::shared_ptr<HttpExchange>)>;
  // Serves until it was stopped and the exchanges under way have ended. When the grace is over,
  // `give_up` is called, which shall end them; those that do not end are cut off.
  void run(Handler handler, std::function<void()> give_up = {});
  // Any thread: no new connections, and each open one ends with its exchange.
  void stop();
  bool stopping() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
