// The one exception of the program, and the checks that are not exceptions.
//
// Bad input, a missing file or a full disk throws Error where it is found; `main`, the request
// handler and the job runner catch it. Our own bugs crash through MORU_CHECK instead.
#pragma once
#include <exception>
#include <string>
#include <string_view>

namespace moru {

enum class ErrorKind {
  bad_input,    // outside data that is not what it says it is
  usage,        // flags that cannot be meant
  not_found,    // a file, model or tensor that is not there
  unsupported,  // well-formed, but not something moru does
  no_space,     // disk or memory
  io,           // the operating system refused
  interrupted,  // SIGINT or SIGTERM; work so far is kept
};

// The exit code of a command that ends with this kind (never 0).
int exit_code(ErrorKind kind);
// The HTTP status of a request that ends with this kind.
int http_status(ErrorKind kind);

class Error : public std::exception {
 public:
  struct Parts {
    std::string where;  // file and field: "model.gguf: tensor blk.0.attn_q.weight"
    std::string what;   // what is wrong
    std::string cure;   // what to do; may be empty
  };
  Error(ErrorKind kind, Parts parts);

  ErrorKind kind() const { return kind_; }
  const std::string& where() const { return parts_.where; }
  const std::string& problem() const { return parts_.what; }
  const std::string& cure() const { return parts_.cure; }
  // "where: what (cure)", one line.
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorKind kind_;
  Parts parts_;
  std::string message_;
};

// Reports a broken invariant of ours and aborts.
[[noreturn]] void check_failed(const char* condition, const char* file, int line);

}  // namespace moru

#define MORU_CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::moru::check_failed(#condition, __FILE__, __LINE__))
#ifdef NDEBUG
#define MORU_DCHECK(condition) static_cast<void>(0)
#else
#define MORU_DCHECK(condition) MORU_CHECK(condition)
#endif
