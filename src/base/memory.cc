#include "base/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
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
  constexpr size_t kHugePage = 2 << 20;
  if (bytes >= kHugePage) ::madvise(mapped, bytes, MADV_HUGEPAGE);
  data_ = mapped;
}

PageBuffer::~PageBuffer() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

size_t peak_memory_bytes() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<size_t>(usage.ru_maxrss) * 1024;
}

size_t usable_memory_bytes() {
  const size_t machine =
      static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  std::ifstream in("/sys/fs/cgroup/memory.max");
  std::string limit;
  if (!(in >> limit) || limit == "max") return machine;
  return std::min(machine, static_cast<size_t>(std::strtoull(limit.c_str(), nullptr, 10)));
}

}  // namespace moru
