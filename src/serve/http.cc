#include "serve/http.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <atomic>
#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <csignal>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_set>

#include "base/error.h"
#include "serve/api_error.h"

namespace moru {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using ErrorCode = beast::error_code;
using Strand = asio::strand<asio::io_context::executor_type>;
using namespace std::chrono_literals;

constexpr size_t kReadBytes = 16 << 10;
// What a refused client may still send before the connection is cut, so that it gets to read why.
constexpr size_t kLingerBytes = 16 << 20;
constexpr auto kLingerTime = 2s;
// For the last bytes to go out after the grace.
constexpr auto kLastTime = 2s;
constexpr auto kAcceptPause = 100ms;  // out of file descriptors: wait for some to come back

bool same_name(std::string_view a, std::string_view b) {
  return beast::iequals({a.data(), a.size()}, {b.data(), b.size()});
}

std::string text_of(beast::string_view view) { return {view.data(), view.size()}; }

std::string head_text(int status, bool close, const HttpHeaders& headers) {
  const beast::string_view reason = http::obsolete_reason(http::int_to_status(unsigned(status)));
  std::string out = fmt::format("HTTP/1.1 {} {}\r\nServer: moru\r\n", status, text_of(reason));
  for (const auto& [name, value] : headers) out += fmt::format("{}: {}\r\n", name, value);
  out += close ? "Connection: close\r\n\r\n" : "Connection: keep-alive\r\n\r\n";
  return out;
}

std::string whole_text(const HttpReply& reply, bool close, bool without_body) {
  HttpHeaders headers = {{"Content-Type", reply.content_type},
                         {"Content-Length", std::to_string(reply.body.size())}};
  headers.insert(headers.end(), reply.headers.begin(), reply.headers.end());
  std::string out = head_text(reply.status, close, headers);
  if (!without_body) out += reply.body;
  return out;
}

std::string refusal_text(int status, std::string message) {
  return whole_text({.status = status, .body = body_of(refusal(status, std::move(message)))}, true,
                    false);
}

// What a broken request gets; nullopt for a connection that merely ended.
std::optional<std::string> refusal_of(const ErrorCode& ec, const HttpOptions& options) {
  if (ec == http::error::header_limit)
    return refusal_text(
        431, fmt::format("The header is larger than {} bytes.", options.header_bytes_max));
  if (ec == http::error::body_limit)
    return refusal_text(413,
                        fmt::format("The body is larger than {} bytes.", options.body_bytes_max));
  if (ec == http::error::end_of_stream || ec == http::error::partial_message) return std::nullopt;
  if (ec.category() == make_error_code(http::error::bad_method).category())
    return refusal_text(400, fmt::format("This is not HTTP/1.1: {}.", ec.message()));
  return std::nullopt;
}

}  // namespace

std::string_view HttpRequest::header(std::string_view name) const {
  for (const auto& [key, value] : headers)
    if (same_name(key, name)) return value;
  return {};
}

// Lives on its connection's strand; the exchange's calls are posted there.
struct HttpExchange::State {
  explicit State(Strand s) : strand(std::move(s)), news(strand) {}

  Strand strand;
  asio::steady_timer news;  // never expires; cancelled to wake the connection
  HttpRequest request;
  bool close = false;         // the connection ends with this exchange
  bool without_body = false;  // HEAD
  bool chunked = true;        // HTTP/1.0 gets its events as they are, up to the end
  std::string outgoing;       // not yet written
  bool begun = false, done = false, gone = false;
  std::function<void()> on_gone;

  void wake() { news.cancel(); }

  void write_chunk(std::string_view data) {
    if (chunked) {
      outgoing += fmt::format("{:x}\r\n{}\r\n", data.size(), data);
    } else {
      outgoing += data;
    }
  }

  void leave() {
    if (gone || done) return;
    gone = true;
    if (on_gone) std::exchange(on_gone, nullptr)();
    wake();
  }
};

const HttpRequest& HttpExchange::request() const { return state_->request; }

void HttpExchange::post(std::function<void()> work) { asio::post(state_->strand, std::move(work)); }

void HttpExchange::on_gone(std::function<void()> call) {
  if (state_->gone) return call();
  if (!state_->done) state_->on_gone = std::move(call);
}

void HttpExchange::send(HttpReply reply) {
  post([s = state_, reply = std::move(reply)] {
    if (s->gone) return;
    MORU_CHECK(!s->begun);
    s->begun = s->done = true;
    s->outgoing += whole_text(reply, s->close, s->without_body);
    s->wake();
  });
}

void HttpExchange::begin_events(HttpHeaders headers) {
  post([s = state_, headers = std::move(headers)]() mutable {
    if (s->gone) return;
    MORU_CHECK(!s->begun);
    s->begun = true;
    headers.insert(headers.begin(), {"Content-Type", "text/event-stream; charset=utf-8"});
    headers.emplace_back("Cache-Control", "no-cache");
    headers.emplace_back("X-Accel-Buffering", "no");  // a proxy shall not hold events back
    if (s->chunked) headers.emplace_back("Transfer-Encoding", "chunked");
    s->outgoing += head_text(200, s->close, headers);
    s->wake();
  });
}

void HttpExchange::event(std::string_view data) {
  post([s = state_, frame = fmt::format("data: {}\n\n", data)] {
    if (s->gone || s->done) return;
    MORU_CHECK(s->begun);
    s->write_chunk(frame);
    s->wake();
  });
}

void HttpExchange::end_events() {
  post([s = state_] {
    if (s->gone || s->done) return;
    if (s->chunked) s->outgoing += "0\r\n\r\n";
    s->done = true;
    s->wake();
  });
}

namespace {

// What connections share.
struct Shared {
  HttpOptions options;
  HttpServer::Handler handler;
  std::atomic<bool> stopping = false;
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Shared& shared, tcp::socket socket, Strand strand)
      : shared_(shared), strand_(std::move(strand)), stream_(std::move(socket)) {}

  const Strand& strand() const { return strand_; }

  // On the strand, as everything below.
  asio::awaitable<void> serve() {
    ErrorCode ignored;
    stream_.socket().set_option(tcp::no_delay(true), ignored);
    try {
      while (co_await wait_for_request()) {
        const auto exchange = co_await read_request();
        if (exchange == nullptr) break;
        co_await answer(*exchange, exchange);
        if (exchange->gone || exchange->close) break;
      }
    } catch (const std::exception&) {
      // Out of memory for this connection: it ends, the others go on.
    }
    stream_.socket().shutdown(tcp::socket::shutdown_both, ignored);
    stream_.socket().close(ignored);
  }

  // Too many connections: says so.
  asio::awaitable<void> turn_away() {
    co_await refuse(refusal_text(503, "There are too many connections."));
  }

  void stop_if_idle() {
    if (idle_) stream_.socket().cancel();
  }

 private:
  static auto into(ErrorCode& ec) { return asio::redirect_error(asio::use_awaitable, ec); }

  // True once a request's first bytes are there.
  asio::awaitable<bool> wait_for_request() {
    if (buffer_.size() > 0) co_return true;
    if (shared_.stopping) co_return false;
    ErrorCode ec;
    idle_ = true;
    stream_.expires_after(shared_.options.idle_time);
    const size_t count = co_await stream_.async_read_some(buffer_.prepare(kReadBytes), into(ec));
    idle_ = false;
    buffer_.commit(count);
    co_return !ec;
  }

  // nullptr: there is none, or it was refused.
  asio::awaitable<std::shared_ptr<HttpExchange::State>> read_request() {
    const HttpOptions& o = shared_.options;
    http::request_parser<http::string_body> parser;
    parser.header_limit(o.header_bytes_max);
    parser.body_limit(o.body_bytes_max);
    ErrorCode ec;
    stream_.expires_after(o.header_time);
    co_await http::async_read_header(stream_, buffer_, parser, into(ec));
    if (!ec && !parser.is_done()) {
      if (beast::iequals(parser.get()[http::field::expect], "100-continue")) {
        static constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
        co_await asio::async_write(stream_, asio::buffer(kContinue), into(ec));
      }
      stream_.expires_after(o.body_time);
      if (!ec) co_await http::async_read(stream_, buffer_, parser, into(ec));
    }
    if (ec) {
      if (auto text = refusal_of(ec, o)) co_await refuse(std::move(*text));
      co_return nullptr;
    }

    auto message = parser.release();
    auto exchange = std::make_shared<HttpExchange::State>(strand_);
    const std::string target = text_of(message.target());
    exchange->request.method = text_of(message.method_string());
    exchange->request.path = target.substr(0, target.find('?'));
    for (const auto& field : message)
      exchange->request.headers.emplace_back(text_of(field.name_string()), text_of(field.value()));
    exchange->request.body = std::move(message.body());
    exchange->close = !message.keep_alive() || shared_.stopping;
    exchange->chunked = message.version() >= 11;
    if (!exchange->chunked) exchange->close = true;
    exchange->without_body = message.method() == http::verb::head;
    co_return exchange;
  }

  asio::awaitable<void> answer(HttpExchange::State& exchange,
                               std::shared_ptr<HttpExchange::State> shared) {
    try {
      shared_.handler(std::make_shared<HttpExchange>(shared));
    } catch (const std::exception&) {
      HttpExchange(shared).send(
          {.status = 500,
           .body = body_of(refusal(500, "The server failed; it is not your fault."))});
    }
    watch(shared);
    while (!exchange.gone && !(exchange.done && exchange.outgoing.empty())) {
      ErrorCode ec;
      if (exchange.outgoing.empty()) {
        exchange.news.expires_at(asio::steady_timer::time_point::max());
        co_await exchange.news.async_wait(into(ec));
        continue;
      }
      const std::string bytes = std::exchange(exchange.outgoing, {});
      stream_.expires_after(shared_.options.write_time);
      co_await asio::async_write(stream_, asio::buffer(bytes), into(ec));
      stream_.expires_never();
      if (ec) exchange.leave();
    }
    if (shared_.stopping) exchange.close = true;
    ErrorCode ignored;
    stream_.socket().cancel(ignored);  // the watch
  }

  // Notices a client that goes away while its answer is under way. Bytes of a next request end the
  // watch: they say that it is still there.
  void watch(std::shared_ptr<HttpExchange::State> exchange) {
    stream_.socket().async_wait(
        tcp::socket::wait_read, [self = shared_from_this(), exchange](ErrorCode ec) {
          if (ec || exchange->done) return;
          char byte;
          const ssize_t count =
              ::recv(self->stream_.socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
          if (count > 0) return;
          if (count < 0 && (errno == EAGAIN || errno == EINTR)) return self->watch(exchange);
          exchange->leave();
        });
  }

  // Sends the last words and waits for the client to have read them: closing at once, with bytes
  // of the request unread, would destroy them on their way (RFC 9112, section 9.6).
  asio::awaitable<void> refuse(std::string text) {
    ErrorCode ec;
    stream_.expires_after(kLingerTime);
    co_await asio::async_write(stream_, asio::buffer(text), into(ec));
    if (ec) co_return;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ec);
    std::string unread(kReadBytes, '\0');
    for (size_t left = kLingerBytes; !ec && left > 0;) {
      const size_t count = co_await stream_.async_read_some(asio::buffer(unread), into(ec));
      left -= std::min(left, count);
    }
  }

  Shared& shared_;
  Strand strand_;
  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
  bool idle_ = false;
};

[[noreturn]] void refuse_address(const HttpOptions& options, ErrorKind kind, std::string what,
                                 std::string cure) {
  throw Error(kind, {.where = fmt::format("{}:{}", options.host, options.port),
                     .what = std::move(what),
                     .cure = std::move(cure)});
}

}  // namespace

struct HttpServer::State {
  Shared shared;
  asio::io_context io;
  Strand control;  // the members below live on it
  tcp::acceptor acceptor;
  asio::signal_set signals;
  asio::steady_timer timer;
  std::function<void()> give_up;
  std::unordered_set<std::shared_ptr<Connection>> connections;
  bool given_up = false;

  explicit State(HttpOptions options)
      : shared{.options = std::move(options)},
        io(static_cast<int>(shared.options.threads)),
        control(asio::make_strand(io.get_executor())),
        acceptor(control),
        signals(control),
        timer(control) {
    listen();
  }

  void listen() {
    const HttpOptions& o = shared.options;
    ErrorCode ec;
    const asio::ip::address address =
        asio::ip::make_address(o.host == "localhost" ? "127.0.0.1" : o.host, ec);
    if (ec)
      refuse_address(o, ErrorKind::usage, "the host is not an IP address",
                     "take 127.0.0.1, or 0.0.0.0 for every interface");
    const tcp::endpoint endpoint(address, o.port);
    acceptor.open(endpoint.protocol(), ec);
    if (!ec) acceptor.set_option(tcp::acceptor::reuse_address(true), ec);
    if (!ec) acceptor.bind(endpoint, ec);
    if (!ec) acceptor.listen(asio::socket_base::max_listen_connections, ec);
    if (ec)
      refuse_address(o, ErrorKind::io, fmt::format("cannot listen there: {}", ec.message()),
                     "choose another --host or --port; 0 takes a free port");
  }

  asio::awaitable<void> accept() {
    while (!shared.stopping) {
      ErrorCode ec;
      const Strand strand = asio::make_strand(io.get_executor());
      tcp::socket socket(strand);
      co_await acceptor.async_accept(socket, asio::redirect_error(asio::use_awaitable, ec));
      if (ec == asio::error::operation_aborted) co_return;
      if (ec) {
        asio::steady_timer pause(control, kAcceptPause);
        co_await pause.async_wait(asio::redirect_error(asio::use_awaitable, ec));
        continue;
      }
      const bool room = connections.size() < shared.options.connections_max;
      auto connection = std::make_shared<Connection>(shared, std::move(socket), strand);
      connections.insert(connection);
      asio::co_spawn(strand, room ? connection->serve() : connection->turn_away(),
                     [this, connection](const std::exception_ptr&) {
                       asio::post(control, [this, connection] {
                         connections.erase(connection);
                         if (shared.stopping && connections.empty()) timer.cancel();
                       });
                     });
    }
  }

  void wait_for_signal() {
    signals.async_wait([this](ErrorCode ec, int) {
      if (ec) return;
      if (shared.stopping) return end_grace();
      begin_stop();
      wait_for_signal();
    });
  }

  void begin_stop() {
    if (shared.stopping.exchange(true)) return;
    ErrorCode ignored;
    acceptor.close(ignored);
    for (const auto& connection : connections)
      asio::post(connection->strand(), [connection] { connection->stop_if_idle(); });
    if (connections.empty()) return finish();
    timer.expires_after(shared.options.grace);
    timer.async_wait([this](ErrorCode ec) {
      if (!ec || connections.empty()) end_grace();
    });
  }

  // The grace is over, or nobody is left to wait for.
  void end_grace() {
    if (connections.empty()) return finish();
    if (given_up) return io.stop();
    given_up = true;
    if (give_up) give_up();
    timer.expires_after(kLastTime);
    timer.async_wait([this](ErrorCode ec) {
      if (!ec || connections.empty()) finish();
    });
  }

  void finish() {
    ErrorCode ignored;
    signals.cancel(ignored);
    io.stop();
  }
};

HttpServer::HttpServer(HttpOptions options) : state_(new State(std::move(options))) {}
HttpServer::~HttpServer() = default;

uint16_t HttpServer::port() const { return state_->acceptor.local_endpoint().port(); }

bool HttpServer::stopping() const { return state_->shared.stopping; }

void HttpServer::stop() {
  asio::post(state_->control, [s = state_.get()] { s->begin_stop(); });
}

void HttpServer::run(Handler handler, std::function<void()> give_up) {
  State& s = *state_;
  s.shared.handler = std::move(handler);
  s.give_up = std::move(give_up);
  if (s.shared.options.stop_on_signals) {
    s.signals.add(SIGINT);
    s.signals.add(SIGTERM);
    s.wait_for_signal();
  }
  asio::co_spawn(s.control, s.accept(), asio::detached);
  std::vector<std::thread> others;
  for (size_t i = 1; i < s.shared.options.threads; ++i) others.emplace_back([&s] { s.io.run(); });
  s.io.run();
  for (std::thread& thread : others) thread.join();
}

}  // namespace moru
