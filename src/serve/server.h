// `moru serve`: a model behind OpenAI's API.
#pragma once
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>

#include "serve/engine_backend.h"

namespace moru {

struct ServeOptions {
  EngineBackendOptions backend;
  std::string host = "127.0.0.1";
  uint16_t port = 8080;    // 0: a free one
  std::string api_key;     // empty: none is asked for
  std::string model_name;  // empty: the file's or folder's name
  size_t waiting = 128;    // answers that may wait for one of `backend.sequences`
  std::chrono::milliseconds grace{30'000};
  std::filesystem::path log;  // a JSON line a request; "-": standard error; empty: none
};

// Loads the model, prints the address and serves until SIGINT or SIGTERM.
// Errors: those of EngineBackend and HttpServer; io (the log).
void serve(ServeOptions options);

}  // namespace moru
