// A refused or failed request, as OpenAI's API words it: the value that parsing returns and the
// body that goes back.
#pragma once
#include <string>

#include "base/error.h"

namespace moru {

struct ApiError {
  int status = 400;
  std::string message;
  std::string type = "invalid_request_error";
  std::string param;      // the field; empty: null
  std::string code;       // empty: null
  int retry_after_s = 0;  // sent as Retry-After unless 0
};

// {"error": {"message", "type", "param", "code"}}
std::string body_of(const ApiError& error);
ApiError api_error_of(const Error& error);

// What the layers below the routes refuse: "server_error" from 500 on.
ApiError refusal(int status, std::string message);
ApiError stopping_error();  // 503

}  // namespace moru
