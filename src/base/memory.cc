#include "base/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "base/error.h"

namespace moru {

PageBuffer::PageBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED)
    throw Error(ErrorKind::no_space, {.where = "memory",
                                      .what = fmt::format("{} MB are not to be had", bytes >> 20),
                                      .cure = "close other programs or take a smaller model"});
  data_ = mapped;
  // Whole huge pages alone: the one that the end falls into would cost what it does not hold.
  constexpr size_t kHugePage = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(mapped);
  const size_t before = -start % kHugePage;
  if (bytes >= before + kHugePage)
    ::madvise(static_cast<std::byte*>(mapped) + before, (bytes - before) / kHugePage * kHugePage,
              MADV_HUGEPAGE);
}

PageBuffer::~PageBuffer() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

size_t peak_memory_bytes() {
  // getrusage's ru_maxrss would do, but a process inherits it from the one that started it.
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);) {
    size_t kilobytes = 0;
    if (std::sscanf(line.c_str(), "VmHWM: %zu kB", &kilobytes) == 1) return kilobytes * 1024;
  }
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<size_t>(usage.ru_maxrss) * 1024;
}

size_t cgroup_memory_bytes(const std::filesystem::path& mounted, std::string_view own) {
  size_t smallest = SIZE_MAX;
  const auto read = [&](const std::filesystem::path& file) {
    std::ifstream in(file);
    size_t limit = 0;  // "max" is no number
    if (in >> limit) smallest = std::min(smallest, limit);
  };
  // Seen from inside a container the path may not exist: its limit is then the root's.
  const auto read_upwards = [&](std::filesystem::path root, std::string_view path,
                                const char* name) {
    std::filesystem::path group = std::filesystem::path(path).relative_path();
    for (; !group.empty(); group = group.parent_path()) read(root / group / name);
    read(root / name);
  };
  // A line each: hierarchy:controllers:path, where v2 has no controllers.
  std::istringstream lines{std::string(own)};
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string_view path = std::string_view(line).substr(second + 1);
    if (controllers == ",,") read_upwards(mounted, path, "memory.max");
    if (controllers.find(",memory,") != std::string::npos)
      read_upwards(mounted / "memory", path, "memory.limit_in_bytes");
  }
  return smallest;
}

size_t usable_memory_bytes() {
  const size_t machine =
      static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  std::ifstream in("/proc/self/cgroup");
  std::ostringstream own;
  own << in.rdbuf();
  return std::min(machine, cgroup_memory_bytes("/sys/fs/cgroup", own.str()));
}

}  // namespace moru
