#include "serve/server.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <mutex>
#include <string_view>

#include "base/error.h"
#include "base/hash.h"
#include "serve/api.h"
#include "serve/http.h"
#include "serve/scheduler.h"

namespace moru {
namespace {

namespace fs = std::filesystem;

// Lines of a log, whole whichever threads write them.
class LineLog {
 public:
  explicit LineLog(const fs::path& path) {
    if (path.empty()) return;
    file_.reset(path == "-" ? stderr : std::fopen(path.c_str(), "ae"));
    if (file_ == nullptr)
      throw Error(ErrorKind::io, {.where = path.string(),
                                  .what = fmt::format("cannot be opened: {}", std::strerror(errno)),
                                  .cure = "choose another --log"});
  }

  explicit operator bool() const { return file_ != nullptr; }

  void write(std::string_view line) {
    const std::lock_guard lock(mutex_);
    std::fwrite(line.data(), 1, line.size(), file_.get());
    std::fputc('\n', file_.get());
    std::fflush(file_.get());
  }

 private:
  struct Close {
    void operator()(std::FILE* file) const {
      if (file != stderr) std::fclose(file);
    }
  };
  std::mutex mutex_;
  std::unique_ptr<std::FILE, Close> file_;
};

// "models/tiny.gguf" and "models/tiny/" are both "tiny"; "forged/model.gguf" is "forged".
std::string name_of_model(const fs::path& given) {
  fs::path path = fs::absolute(given).lexically_normal();
  if (path.filename().empty() || path.filename() == "model.gguf") path = path.parent_path();
  const std::string name =
      path.extension() == ".gguf" ? path.stem().string() : path.filename().string();
  return name.empty() ? "model" : name;
}

const char* name_of(Profile profile) {
  switch (profile) {
    case Profile::exact:
      return "exact";
    case Profile::bf16:
      return "bf16";
    case Profile::f32:
      return "f32";
  }
  return "";
}

constexpr double kMiB = 1 << 20;

}  // namespace

void serve(ServeOptions options) {
  LineLog log(options.log);
  const fs::path model = options.backend.model;
  const size_t sequences = options.backend.sequences;
  EngineBackend backend(std::move(options.backend));
  const std::string name = options.model_name.empty() ? name_of_model(model) : options.model_name;
  if (backend.adapter(name) != nullptr)
    throw Error(ErrorKind::usage, {.where = "--adapter " + name,
                                   .what = "has the model's own name",
                                   .cure = "name it otherwise: NAME=FOLDER"});
  const std::string hash = sha256_of_path(model);

  // Made before the scheduler, which calls its exchanges, and so destroyed after it.
  HttpServer http({.host = options.host,
                   .port = options.port,
                   .stop_on_signals = true,
                   .grace = options.grace});
  Scheduler scheduler(backend, sequences + options.waiting);
  ApiOptions api_options{.model_name = name,
                         .fingerprint = "fp_" + hash.substr(0, 12),
                         .api_key = options.api_key,
                         .created = static_cast<int64_t>(std::time(nullptr))};
  if (log) api_options.log = [&log](std::string_view line) { log.write(line); };
  Api api(std::move(api_options), backend, scheduler);

  const std::string host =
      options.host.find(':') == std::string::npos ? options.host : "[" + options.host + "]";
  fmt::print("moru serves {} ({}, {} tokens of context, sha256 {}) at http://{}:{}/v1\n", name,
             name_of(backend.model().profile), backend.longest_prompt() + 1, hash.substr(0, 12),
             host, http.port());
  const KvCache& cache = backend.cache();
  fmt::print("keys and values take at most {:.0f} MiB ({}), weights {:.0f} MiB\n",
             static_cast<double>(cache.bytes()) / kMiB, name_of(cache.shape().type),
             static_cast<double>(backend.model().weight_bytes()) / kMiB);
  for (const std::string& adapter : backend.adapters())
    fmt::print("  and its adapter {}\n", adapter);
  std::fflush(stdout);
  http.run([&api](std::shared_ptr<HttpExchange> exchange) { api.handle(std::move(exchange)); },
           [&scheduler] { scheduler.give_up(stopping_error()); });
  fmt::print("moru has stopped\n");
}

}  // namespace moru
