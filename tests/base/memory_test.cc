#include "base/memory.h"

#include <doctest/doctest.h>

#include <cstdint>

#include "base/files.h"
#include "support.h"

using namespace moru;

TEST_CASE("the smallest memory limit on the way to the root counts, of either version of cgroups") {
  const TempDir root;
  const auto write = [&](const std::filesystem::path& file, const char* text) {
    std::filesystem::create_directories((root.path() / file).parent_path());
    write_file(root.path() / file, text);
  };
  CHECK(cgroup_memory_bytes(root.path(), "0::/\n") == SIZE_MAX);
  write("a/b/memory.max", "max\n");
  write("a/memory.max", "1000\n");
  CHECK(cgroup_memory_bytes(root.path(), "0::/a/b\n") == 1000);
  CHECK(cgroup_memory_bytes(root.path(), "0::/\n") == SIZE_MAX);
  write("a/b/memory.max", "700\n");
  CHECK(cgroup_memory_bytes(root.path(), "0::/a/b\n") == 700);

  // A container sees its own group at the root and the path of the host.
  write("memory/memory.limit_in_bytes", "900\n");
  CHECK(cgroup_memory_bytes(root.path(), "12:cpu,memory:/docker/17\n0::/\n") == 900);
  CHECK(cgroup_memory_bytes(root.path(), "12:cpu:/docker/17\n") == SIZE_MAX);
  CHECK(cgroup_memory_bytes(root.path(), "no line of that file") == SIZE_MAX);
}

TEST_CASE("a process may use something, and has used some of it") {
  CHECK(usable_memory_bytes() > peak_memory_bytes());
  CHECK(peak_memory_bytes() > 0);
}
