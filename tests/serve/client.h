// The least HTTP client that shows what the server sends (plain blocking sockets), and a server
// that runs for the length of a test.
#pragma once
#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "serve/http.h"

namespace moru {

struct Response {
  int status = 0;                              // 0: the connection ended first
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
  std::vector<std::string> chunks;             // of a chunked body

  nlohmann::ordered_json json() const { return nlohmann::ordered_json::parse(body); }
  // The data of a body of server-sent events.
  std::vector<std::string> events() const {
    std::vector<std::string> out;
    for (size_t at = 0; at < body.size();) {
      REQUIRE(body.substr(at, 6) == "data: ");
      const size_t end = body.find("\n\n", at);
      REQUIRE(end != std::string::npos);
      out.push_back(body.substr(at + 6, end - at - 6));
      at = end + 2;
    }
    return out;
  }
};

class Client {
 public:
  explicit Client(uint16_t port) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const timeval limit{.tv_sec = 60, .tv_usec = 0};  // a hang fails instead of hanging
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    connected_ = ::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  ~Client() { close(); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  bool connected() const { return connected_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  // False if the server has closed the connection.
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t count = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (count <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(count));
    }
    return true;
  }

  // Up to the end of the connection.
  std::string rest() {
    while (more()) {
    }
    return std::exchange(buffer_, {});
  }

  Response read(bool without_body = false) {
    Response out;
    do {
      out = {};
      const std::string head = until("\r\n\r\n");
      if (head.empty()) return out;
      out.status = std::stoi(head.substr(9, 3));
      for (size_t at = head.find("\r\n") + 2; at + 2 < head.size();) {
        const size_t end = head.find("\r\n", at), colon = head.find(": ", at);
        std::string name = head.substr(at, colon - at);
        for (char& c : name) c = static_cast<char>(::tolower(c));
        out.headers[name] = head.substr(colon + 2, end - colon - 2);
        at = end + 2;
      }
    } while (out.status == 100);
    if (without_body) return out;
    if (out.headers.contains("content-length")) {
      out.body = exactly(std::stoul(out.headers["content-length"]));
    } else if (out.headers.contains("transfer-encoding")) {
      while (const size_t size = std::stoul(until("\r\n"), nullptr, 16)) {
        out.chunks.push_back(exactly(size));
        out.body += out.chunks.back();
        until("\r\n");
      }
      until("\r\n");
    } else {
      out.body = rest();
    }
    return out;
  }

  Response get(std::string_view path, std::string_view headers = "") {
    send(fmt::format("GET {} HTTP/1.1\r\nHost: a\r\n{}\r\n", path, headers));
    return read();
  }
  Response post(std::string_view path, std::string_view body, std::string_view headers = "") {
    post_only(path, body, headers);
    return read();
  }
  void post_only(std::string_view path, std::string_view body, std::string_view headers = "") {
    send(
        fmt::format("POST {} HTTP/1.1\r\nHost: a\r\n{}Content-Type: application/json\r\n"
                    "Content-Length: {}\r\n\r\n{}",
                    path, headers, body.size(), body));
  }

 private:
  bool more() {
    char bytes[4096];
    const ssize_t count = ::recv(fd_, bytes, sizeof bytes, 0);
    if (count > 0) buffer_.append(bytes, static_cast<size_t>(count));
    return count > 0;
  }
  std::string exactly(size_t count) {
    while (buffer_.size() < count && more()) {
    }
    const std::string out = buffer_.substr(0, count);
    buffer_.erase(0, count);
    return out;
  }
  // With `mark`; "" if the connection ends before it.
  std::string until(std::string_view mark) {
    for (;;) {
      if (const size_t at = buffer_.find(mark); at != std::string::npos)
        return exactly(at + mark.size());
      if (!more()) return {};
    }
  }

  int fd_;
  bool connected_ = false;
  std::string buffer_;
};

// A server on a thread of its own and on a free port.
class RunningServer {
 public:
  explicit RunningServer(HttpServer::Handler handler, HttpOptions options = {},
                         std::function<void()> give_up = {})
      : server_(on_free_port(std::move(options))),
        thread_([this, handler, give_up] { server_.run(handler, give_up); }) {}
  ~RunningServer() { stop(); }

  uint16_t port() const { return server_.port(); }
  void begin_stop() { server_.stop(); }
  void stop() {
    if (!thread_.joinable()) return;
    server_.stop();
    thread_.join();
  }

 private:
  static HttpOptions on_free_port(HttpOptions options) {
    options.port = 0;
    return options;
  }
  HttpServer server_;
  std::thread thread_;
};

// Waits for what another thread will bring about.
template <typename Condition>
bool comes_true(Condition condition) {
  for (int i = 0; i < 4000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

}  // namespace moru
