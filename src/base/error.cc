#include "base/error.h"

#include <fmt/format.h>

#include <array>
#include <cstdio>
#include <cstdlib>

namespace moru {
namespace {

struct KindRow {
  int exit_code;
  int http_status;
};

// In the order of ErrorKind. Exit codes follow sysexits.h where it has one.
constexpr std::array<KindRow, 7> kKinds = {{
    {65, 400},   // bad_input
    {64, 400},   // usage
    {66, 404},   // not_found
    {69, 501},   // unsupported
    {73, 507},   // no_space
    {74, 500},   // io
    {130, 503},  // interrupted
}};

}  // namespace

int exit_code(ErrorKind kind) { return kKinds[static_cast<size_t>(kind)].exit_code; }
int http_status(ErrorKind kind) { return kKinds[static_cast<size_t>(kind)].http_status; }

Error::Error(ErrorKind kind, Parts parts) : kind_(kind), parts_(std::move(parts)) {
  message_ = parts_.where.empty() ? parts_.what : fmt::format("{}: {}", parts_.where, parts_.what);
  if (!parts_.cure.empty()) message_ += fmt::format(" ({})", parts_.cure);
}

void check_failed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "moru: internal error: %s does not hold at %s:%d\n", condition, file, line);
  std::abort();
}

}  // namespace moru
