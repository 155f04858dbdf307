#include "forge/journal.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/files.h"
#include "support.h"

using namespace moru;
using Json = nlohmann::ordered_json;

namespace {

// Three stages that each append a letter to what came before; `log` says which of them worked.
struct Run {
  std::string log;
  Json inputs[3] = {{{"model", "m"}}, {{"lr", 0.1}}, {{"size", 4}}};

  std::string go(const std::filesystem::path& folder) {
    Journal journal(folder);
    std::string text;
    const char* names[3] = {"measure", "tune", "lighten"};
    for (size_t i = 0; i < 3; ++i) {
      const Journal::Stage stage =
          journal.run(names[i], inputs[i], [&](const std::filesystem::path&) {
            log += names[i][0];
            const std::string file = fmt::format("{}.txt", names[i]);
            write_file(folder / file, text + names[i][0]);
            return Journal::Product{{{"text", text + names[i][0]}}, {file}};
          });
      text = stage.output["text"];
    }
    return text;
  }
};

}  // namespace

TEST_CASE("finished stages are not done again") {
  const TempDir folder;
  Run first, second;
  CHECK(first.go(folder.path()) == "mtl");
  CHECK(first.log == "mtl");
  CHECK(second.go(folder.path()) == "mtl");
  CHECK(second.log == "");
}

TEST_CASE("a stage says whether it was reused and how long it took at first") {
  const TempDir folder;
  const auto run = [&] {
    Journal journal(folder.path());
    return journal.run("measure", {}, [](const std::filesystem::path&) {
      usleep(20'000);
      return Journal::Product{{{"n", 1}}};
    });
  };
  const Journal::Stage first = run(), second = run();
  CHECK(!first.reused);
  CHECK(first.seconds >= 0.02);
  CHECK(second.reused);
  CHECK(second.seconds == first.seconds);
  CHECK(second.output == first.output);
}

TEST_CASE("a changed input redoes its stage and all after it") {
  const TempDir folder;
  Run first;
  first.go(folder.path());
  Run second;
  second.inputs[1] = {{"lr", 0.2}};
  second.go(folder.path());
  CHECK(second.log == "tl");
  Run third;  // and back again
  third.go(folder.path());
  CHECK(third.log == "tl");
  Run fourth;
  fourth.inputs[0] = {{"model", "other"}};
  fourth.go(folder.path());
  CHECK(fourth.log == "mtl");
}

TEST_CASE("a file that is no longer what a stage wrote redoes that stage") {
  const TempDir folder;
  Run first;
  first.go(folder.path());
  folder.file("tune.txt", "xx");  // of the same size
  Run second;
  second.go(folder.path());
  CHECK(second.log == "tl");
  std::filesystem::remove(folder.path() / "lighten.txt");
  Run third;
  third.go(folder.path());
  CHECK(third.log == "l");
}

TEST_CASE("a damaged journal file counts as not finished") {
  const TempDir folder;
  for (const char* damage : {"", "{", "[]", "{\"key\": 3}"}) {
    Run first;
    first.go(folder.path());
    folder.file("journal/02-tune.json", damage);
    Run second;
    CHECK(second.go(folder.path()) == "mtl");
    CHECK(second.log == "tl");
  }
}

TEST_CASE("a failed stage stays unfinished, and what it kept is there again") {
  const TempDir folder;
  const auto attempt = [&](const Json& inputs, bool fails) {
    Journal journal(folder.path());
    std::string found;
    journal.run("tune", inputs, [&](const std::filesystem::path& scratch) {
      if (std::filesystem::exists(scratch / "checkpoint"))
        found = read_file(scratch / "checkpoint");
      write_file(scratch / "checkpoint", found + "x");
      if (fails)
        throw Error(ErrorKind::interrupted, {.where = "tune", .what = "stopped", .cure = ""});
      return Journal::Product{{{"found", found}}};
    });
    return found;
  };
  CHECK(error_from([&] { attempt({{"a", 1}}, true); }).kind() == ErrorKind::interrupted);
  CHECK(error_from([&] { attempt({{"a", 1}}, true); }).kind() == ErrorKind::interrupted);
  CHECK(attempt({{"a", 1}}, false) == "xx");
  CHECK(attempt({{"a", 2}}, false) == "");  // another key: nothing of the old work
}

TEST_CASE("a process killed in any stage goes on to the same result") {
  for (const char victim : std::string("mtl")) {
    CAPTURE(victim);
    const TempDir folder;
    const pid_t child = ::fork();
    if (child == 0) {
      Journal journal(folder.path());
      for (const char* name : {"measure", "tune", "lighten"})
        journal.run(name,
                    Run{}.inputs[name[0] == 'm'   ? 0
                                 : name[0] == 't' ? 1
                                                  : 2],
                    [&](const std::filesystem::path&) {
                      if (name[0] == victim) ::raise(SIGKILL);
                      const std::string text = name[0] == 'm' ? "m" : name[0] == 't' ? "mt" : "mtl";
                      const std::string file = fmt::format("{}.txt", name);
                      write_file(folder.path() / file, text);
                      return Journal::Product{{{"text", text}}, {file}};
                    });
      ::_exit(1);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    REQUIRE(WIFSIGNALED(status));
    Run again;
    CHECK(again.go(folder.path()) == "mtl");
    CHECK(again.log == std::string("mtl").substr(std::string("mtl").find(victim)));
  }
}

TEST_CASE("a second process in the same folder is refused, and a dead one leaves no lock") {
  const TempDir folder;
  {
    Journal first(folder.path());
    const Error error = error_from([&] { Journal second(folder.path()); });
    CHECK(error.kind() == ErrorKind::usage);
    CHECK(error.where() == folder.path().string());
    CHECK(error.problem() ==
          fmt::format("another moru is at work in this folder (process {})", ::getpid()));
  }
  Journal third(folder.path());
  const TempDir other;
  Journal fourth(other.path());
}

TEST_CASE("files in the journal's folder that are not its own are left alone") {
  const TempDir folder;
  folder.file("journal/notes.txt", "mine");
  folder.file("journal/99-later.json", "{}");
  folder.file("journal/7.json", "{}");
  Run run;
  run.go(folder.path());
  CHECK(read_file(folder.path() / "journal/notes.txt") == "mine");
  CHECK(std::filesystem::exists(folder.path() / "journal/7.json"));
  CHECK(!std::filesystem::exists(folder.path() / "journal/99-later.json"));
}
