#include "base/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <functional>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace moru {
namespace {

constexpr size_t kBufferBytes = 1 << 20;

[[noreturn]] void fail_on(const std::filesystem::path& path, const char* action) {
  const int code = errno;
  ErrorKind kind = ErrorKind::io;
  std::string cure;
  if (code == ENOENT) {
    kind = ErrorKind::not_found;
    cure = "check the path";
  } else if (code == ENOSPC || code == EDQUOT || code == ENOMEM) {
    kind = ErrorKind::no_space;
    cure = "free some space and run the command again";
  } else if (code == EISDIR) {
    cure = "name a file, not a folder";
  } else if (code == ENOTDIR) {
    cure = "name a folder, not a file";
  } else if (code == EACCES || code == EPERM || code == EROFS) {
    cure = "check the permissions";
  }
  throw Error(kind, {.where = path.string(),
                     .what = fmt::format("cannot {}: {}", action, std::strerror(code)),
                     .cure = cure});
}

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags, const char* action)
      : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
    if (fd_ < 0) fail_on(path, action);
  }
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  int fd_;
};

// Size of a regular file; a folder or a device is refused before anything reads it.
size_t size_of(int fd, const std::filesystem::path& path) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) fail_on(path, "read");
  if (!S_ISREG(status.st_mode)) {
    errno = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
    fail_on(path, "read");
  }
  return static_cast<size_t>(status.st_size);
}

void write_all(int fd, const char* data, size_t size, const std::filesystem::path& path) {
  while (size > 0) {
    const ssize_t n = ::write(fd, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_on(path, "write");
    data += n;
    size -= static_cast<size_t>(n);
  }
}

// The process that holds the lock, as it wrote it there; empty if that cannot be read.
std::string holder(int fd) {
  std::array<char, 32> text{};
  const ssize_t n = ::pread(fd, text.data(), text.size() - 1, 0);
  std::string_view number(text.data(), n > 0 ? static_cast<size_t>(n) : 0);
  number = number.substr(0, number.find_first_not_of("0123456789"));
  return number.empty() ? "" : fmt::format(" (process {})", number);
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const Descriptor fd(path, O_RDONLY, "open");
  size_ = size_of(fd, path);
  if (size_ == 0) return;
  void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
  if (mapped == MAP_FAILED) fail_on(path, "map");
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::forget(std::span<const std::byte> part) const {
  const std::less_equal<const std::byte*> before;  // also where pointers do not belong together
  if (!before(data_, part.data()) || !before(part.data() + part.size(), data_ + size_)) return;
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t begin = (static_cast<size_t>(part.data() - data_) + page - 1) / page * page;
  const size_t end = static_cast<size_t>(part.data() + part.size() - data_) / page * page;
  if (begin < end) ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_DONTNEED);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string read_file(const std::filesystem::path& path) {
  const Descriptor fd(path, O_RDONLY, "open");
  std::string content(size_of(fd, path), '\0');
  size_t at = 0;
  while (at < content.size()) {
    const ssize_t n = ::read(fd, content.data() + at, content.size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_on(path, "read");
    if (n == 0) break;
    at += static_cast<size_t>(n);
  }
  content.resize(at);
  return content;
}

AtomicFile::AtomicFile(std::filesystem::path path)
    : path_(std::move(path)), beside_(path_.string() + ".partial") {
  fd_ = ::open(beside_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) fail("create");
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(beside_.c_str());
}

void AtomicFile::fail(const char* action) const { fail_on(path_, action); }

void AtomicFile::flush() {
  write_all(fd_, buffer_.data(), buffer_.size(), path_);
  buffer_.clear();
}

void AtomicFile::write(std::string_view text) {
  size_ += text.size();
  if (buffer_.size() + text.size() >= kBufferBytes) flush();
  // Large pieces are not copied: a tensor may be half of all memory.
  if (text.size() >= kBufferBytes)
    write_all(fd_, text.data(), text.size(), path_);
  else
    buffer_ += text;
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  write(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
}

void AtomicFile::commit() {
  flush();
  if (::fsync(fd_) != 0) fail("sync");
  ::close(std::exchange(fd_, -1));
  if (::rename(beside_.c_str(), path_.c_str()) != 0) {
    const int code = errno;
    ::unlink(beside_.c_str());
    errno = code;
    fail("rename into place");
  }
  // The rename itself must survive a power cut.
  const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : ".";
  const int folder_fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_fd >= 0) {
    ::fsync(folder_fd);
    ::close(folder_fd);
  }
}

void write_file(const std::filesystem::path& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content);
  file.commit();
}

void append_line(const std::filesystem::path& path, std::string_view line) {
  const Descriptor fd(path, O_WRONLY | O_CREAT | O_APPEND, "open");
  std::string whole(line);
  whole += '\n';
  write_all(fd, whole.data(), whole.size(), path);
  if (::fdatasync(fd) != 0) fail_on(path, "sync");
}

void make_folder(const std::filesystem::path& path) {
  std::error_code code;
  std::filesystem::create_directories(path, code);
  if (!code) return;
  errno = code.value();
  fail_on(path, "create the folder");
}

FolderLock::FolderLock(const std::filesystem::path& folder, const std::filesystem::path& file) {
  fd_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd_ < 0) fail_on(file, "open the lock");
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    const int code = errno;
    const std::string who = holder(fd_);
    ::close(fd_);
    errno = code;
    if (code != EWOULDBLOCK) fail_on(file, "take the lock");
    throw Error(ErrorKind::usage,
                {.where = folder.string(),
                 .what = fmt::format("another moru is at work in this folder{}", who),
                 .cure = "wait for it to end, or write to another folder"});
  }
  const std::string pid = fmt::format("{}\n", ::getpid());
  // Only a help for the message above: if it cannot be written, the lock holds all the same.
  if (::ftruncate(fd_, 0) != 0 || ::pwrite(fd_, pid.data(), pid.size(), 0) < 0) errno = 0;
}

FolderLock::~FolderLock() { ::close(fd_); }

}  // namespace moru
