// Large buffers straight from the operating system, aligned to pages and, where it can, in huge
// pages: weights, caches and arenas. Zero-filled, touched by whoever writes first.
#pragma once
#include <cstddef>
#include <filesystem>
#include <string_view>
#include <utility>

namespace moru {

class PageBuffer {
 public:
  PageBuffer() = default;
  // Error: no_space.
  explicit PageBuffer(size_t bytes);
  ~PageBuffer();
  PageBuffer(PageBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  PageBuffer& operator=(PageBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  void* data() { return data_; }
  const void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Peak resident memory of this process so far, in bytes.
size_t peak_memory_bytes();
// What this process may use: the machine's memory or a limit of its cgroups, the smallest one.
size_t usable_memory_bytes();
// The smallest limit of the cgroups, v1 or v2, that `own` (the text of /proc/self/cgroup) names and
// of those above them, mounted at `mounted`; SIZE_MAX if there is none.
size_t cgroup_memory_bytes(const std::filesystem::path& mounted, std::string_view own);

}  // namespace moru
