// The endpoint as the vendor's own client library sees it (tests/parity/openai_client.py).
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <string>

TEST_CASE("the openai package talks to moru serve") {
  const char* model = std::getenv("MORU_TEST_MODEL");
  if (model == nullptr) {
    MESSAGE("skipped: MORU_TEST_MODEL names no model");
    return;
  }
  const std::string command =
      std::string("python3 " MORU_SOURCE_DIR "/tests/parity/openai_client.py ") + MORU_PROGRAM +
      " " + model;
  const int status = std::system(command.c_str());
  REQUIRE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 77) {
    MESSAGE("skipped: the openai package is not to be had");
    return;
  }
  CHECK(WEXITSTATUS(status) == 0);
}
