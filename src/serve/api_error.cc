#include "serve/api_error.h"

#include <nlohmann/json.hpp>
#include <utility>

namespace moru {
namespace {

constexpr int kRetryWhenStopping_s = 5;

}  // namespace

std::string body_of(const ApiError& error) {
  using Json = nlohmann::ordered_json;
  const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
  const Json body = {{"error",
                      {{"message", error.message},
                       {"type", error.type},
                       {"param", or_null(error.param)},
                       {"code", or_null(error.code)}}}};
  return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

ApiError refusal(int status, std::string message) {
  ApiError error{.status = status, .message = std::move(message)};
  if (status >= 500) error.type = "server_error";
  return error;
}

ApiError api_error_of(const Error& error) {
  return refusal(http_status(error.kind()), error.what());
}

ApiError stopping_error() {
  ApiError error = refusal(503, "The server is stopping.");
  error.code = "server_stopping";
  error.retry_after_s = kRetryWhenStopping_s;
  return error;
}

}  // namespace moru
