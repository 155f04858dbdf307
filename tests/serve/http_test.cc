#include "serve/http.h"

#include <fmt/format.h>

#include <atomic>

#include "client.h"
#include "support.h"

using namespace moru;
using namespace std::chrono_literals;

namespace {

void echo(std::shared_ptr<HttpExchange> exchange) {
  const HttpRequest& r = exchange->request();
  exchange->send(
      {.body = fmt::format("{} {} {}", r.method, r.path, r.body), .headers = {{"X-Test", "1"}}});
}

}  // namespace

TEST_CASE("a connection serves one request after the other") {
  RunningServer server(echo);
  Client client(server.port());
  for (int i = 0; i < 3; ++i) {
    const Response r = client.post("/a?b=c", "body");
    CHECK(r.status == 200);
    CHECK(r.body == "POST /a body");
    CHECK(r.headers.at("content-type") == "application/json");
    CHECK(r.headers.at("connection") == "keep-alive");
    CHECK(r.headers.at("x-test") == "1");
    CHECK(!r.headers.contains("access-control-allow-origin"));
  }
}

TEST_CASE("requests sent before their turn are answered in order") {
  RunningServer server(echo);
  Client client(server.port());
  std::string three;
  for (const char* path : {"/1", "/2", "/3"})
    three += fmt::format("GET {} HTTP/1.1\r\nHost: a\r\n\r\n", path);
  client.send(three);
  for (const char* path : {"/1", "/2", "/3"})
    CHECK(client.read().body == fmt::format("GET {} ", path));
}

TEST_CASE("chunked bodies, HEAD, Connection: close and HTTP/1.0 are understood") {
  RunningServer server(echo);
  Client client(server.port());
  client.send(
      "POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
      "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
  CHECK(client.read().body == "POST /c abcde");
  client.send("HEAD /h HTTP/1.1\r\nHost: a\r\n\r\n");
  const Response head = client.read(true);
  CHECK(head.status == 200);
  CHECK(head.headers.at("content-length") == "8");
  CHECK(client.get("/x", "Connection: close\r\n").headers.at("connection") == "close");
  CHECK(client.rest().empty());

  Client old(server.port());
  old.send("GET /old HTTP/1.0\r\n\r\n");
  const Response r = old.read();
  CHECK(r.body == "GET /old ");
  CHECK(r.headers.at("connection") == "close");
}

TEST_CASE("a client that waits for 100 Continue gets it") {
  RunningServer server(echo);
  Client client(server.port());
  client.send("POST /e HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
  std::this_thread::sleep_for(20ms);
  client.send("ab");
  CHECK(client.read().body == "POST /e ab");
}

TEST_CASE("events arrive as chunks, one a frame, while the answer is under way") {
  std::shared_ptr<HttpExchange> kept;
  std::atomic<bool> here = false;
  RunningServer server([&](std::shared_ptr<HttpExchange> exchange) {
    exchange->begin_events({{"X-Test", "2"}});
    exchange->event("{\"text\":\"안녕\"}");
    kept = exchange;
    here = true;
  });
  Client client(server.port());
  client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
  REQUIRE(comes_true([&] { return here.load(); }));
  kept->event("[DONE]");
  kept->end_events();
  const Response r = client.read();
  CHECK(r.status == 200);
  CHECK(r.headers.at("content-type") == "text/event-stream; charset=utf-8");
  CHECK(r.headers.at("x-test") == "2");
  CHECK(r.chunks == std::vector<std::string>{"data: {\"text\":\"안녕\"}\n\n", "data: [DONE]\n\n"});

  here = false;
  Client old(server.port());  // HTTP/1.0 knows no chunks
  old.send("GET / HTTP/1.0\r\n\r\n");
  REQUIRE(comes_true([&] { return here.load(); }));
  kept->end_events();
  CHECK(old.read().body == "data: {\"text\":\"안녕\"}\n\n");
  server.stop();
  kept.reset();
}

TEST_CASE("a client that goes away is noticed, with and without a stream") {
  for (const bool stream : {true, false}) {
    CAPTURE(stream);
    std::atomic<int> gone = 0;
    std::atomic<bool> here = false;
    std::shared_ptr<HttpExchange> kept;
    RunningServer server([&](std::shared_ptr<HttpExchange> exchange) {
      if (stream) exchange->begin_events({});
      exchange->on_gone([&] { ++gone; });
      kept = exchange;
      here = true;
    });
    Client client(server.port());
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    REQUIRE(comes_true([&] { return here.load(); }));
    CHECK(gone == 0);
    client.close();
    CHECK(comes_true([&] { return gone == 1; }));
    if (stream) kept->event("late");  // does nothing
    if (!stream) kept->send({});
    server.stop();
    kept.reset();
  }
}

TEST_CASE("a client that does not read is dropped in time") {
  std::atomic<int> gone = 0;
  RunningServer server(
      [&](std::shared_ptr<HttpExchange> exchange) {
        exchange->on_gone([&] { ++gone; });
        exchange->begin_events({});
        const std::string much(1 << 20, 'x');
        for (int i = 0; i < 16; ++i) exchange->event(much);
      },
      {.write_time = 100ms});
  Client client(server.port());
  client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
  CHECK(comes_true([&] { return gone == 1; }));
}

TEST_CASE("what a handler throws becomes a reply of status 500") {
  RunningServer server([](std::shared_ptr<HttpExchange>) { throw std::runtime_error("secret"); });
  Client client(server.port());
  for (int i = 0; i < 2; ++i) {
    const Response r = client.get("/");
    CHECK(r.status == 500);
    CHECK(r.json()["error"]["type"] == "server_error");
    CHECK(r.body.find("secret") == std::string::npos);
  }
}

TEST_CASE("hostile requests are refused with an error object, and the connection ends") {
  RunningServer server(echo, {.header_bytes_max = 1024, .body_bytes_max = 1000});
  struct Row {
    std::string bytes;
    int status;
  };
  const std::string long_header(2000, 'a'), body(1001, 'x');
  const std::vector<Row> table = {
      {fmt::format("GET /{} HTTP/1.1\r\n\r\n", long_header), 431},
      {fmt::format("GET / HTTP/1.1\r\nX: {}\r\n\r\n", long_header), 431},
      {fmt::format("GET / HTTP/1.1\r\nX: {:a>1000000}", ""), 431},
      {"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n", 413},
      {fmt::format("POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n{}", body), 413},
      {"POST / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n", 413},
      {fmt::format("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n{}\r\n0\r\n\r\n",
                   body),
       413},
      {"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400},
      {"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400},
      {"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400},
      {"hello\r\n\r\n", 400},
      {std::string("\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03 tls\r\n\r\n", 20), 400},
      {"GET / HTTP/9.9\r\n\r\n", 400},
      {std::string("GET / HTTP/1.1\r\nA\0B: c\r\n\r\n", 26), 400},
      {"GET / HTTP/1.1\r\n: c\r\n\r\n", 400},
  };
  for (const Row& row : table) {
    CAPTURE(row.bytes.substr(0, 100));
    Client client(server.port());
    client.send(row.bytes);
    const Response r = client.read();
    CHECK(r.status == row.status);
    if (r.status != 0) CHECK(r.json()["error"].size() == 4);
    CHECK(client.rest().empty());
  }
  CHECK(Client(server.port()).get("/still").status == 200);
}

TEST_CASE("a client that sends too slowly, or nothing, is dropped in time") {
  RunningServer server(echo, {.idle_time = 150ms, .header_time = 150ms, .body_time = 150ms});
  Client silent(server.port());
  CHECK(silent.rest().empty());

  const auto drip = [&](std::string_view start) {
    Client slow(server.port());
    slow.send(start);
    int sent = 0;
    while (sent < 1000 && slow.send("a")) {
      ++sent;
      std::this_thread::sleep_for(10ms);
    }
    return sent;
  };
  CHECK(drip("GET / HTTP/1.1\r\nX: ") < 1000);
  CHECK(drip("POST / HTTP/1.1\r\nContent-Length: 2000\r\n\r\n") < 1000);
  CHECK(Client(server.port()).get("/still").status == 200);
}

TEST_CASE("connections past the limit are turned away") {
  RunningServer server(echo, {.connections_max = 2});
  Client one(server.port()), two(server.port());
  CHECK(one.get("/").status == 200);
  CHECK(two.get("/").status == 200);
  Client three(server.port());
  const Response r = three.read();
  CHECK(r.status == 503);
  CHECK(r.json()["error"]["type"] == "server_error");
  three.close();
  one.close();
  CHECK(comes_true([&] { return Client(server.port()).get("/").status == 200; }));
}

TEST_CASE("stopping lets answers under way finish and closes idle connections") {
  std::shared_ptr<HttpExchange> kept;
  std::atomic<bool> here = false;
  RunningServer server([&](std::shared_ptr<HttpExchange> exchange) {
    if (exchange->request().path == "/idle") return echo(exchange);
    kept = exchange;
    here = true;
  });
  const uint16_t port = server.port();
  Client idle(port), busy(port);
  CHECK(idle.get("/idle").status == 200);
  busy.send("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n");
  REQUIRE(comes_true([&] { return here.load(); }));
  server.begin_stop();
  CHECK(idle.rest().empty());
  CHECK(comes_true([&] { return !Client(port).connected(); }));
  kept->send({.body = "done"});
  CHECK(busy.read().body == "done");
  CHECK(busy.rest().empty());
  server.stop();
  kept.reset();
}

TEST_CASE("after the grace the handler is asked to give up, and what is left is cut off") {
  std::shared_ptr<HttpExchange> obedient, deaf;
  std::atomic<int> here = 0;
  std::atomic<bool> asked = false;
  RunningServer server(
      [&](std::shared_ptr<HttpExchange> exchange) {
        (exchange->request().path == "/deaf" ? deaf : obedient) = exchange;
        ++here;
      },
      {.threads = 1, .grace = 50ms},
      [&] {
        asked = true;
        obedient->send({.status = 503, .body = "sorry"});
      });
  Client one(server.port()), two(server.port());
  one.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
  two.send("GET /deaf HTTP/1.1\r\nHost: a\r\n\r\n");
  REQUIRE(comes_true([&] { return here == 2; }));
  server.stop();
  CHECK(asked);
  CHECK(one.read().body == "sorry");
  obedient.reset();
  deaf.reset();
}

TEST_CASE("an address that cannot be had is refused, naming it") {
  RunningServer server(echo);
  const Error taken = error_from([&] { HttpServer({.port = server.port()}); });
  CHECK(taken.kind() == ErrorKind::io);
  CHECK(taken.where() == fmt::format("127.0.0.1:{}", server.port()));
  CHECK(error_from([] { HttpServer({.host = "example"}); }).kind() == ErrorKind::usage);
}
