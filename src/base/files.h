// Files as the rest of the program needs them: read whole, mapped, or written so that a crash
// leaves either the old file or the new one.
#pragma once
#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace moru {

// A read-only mapping of a whole file. Errors: not_found, io.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Gives back the memory of pages that lie whole within `part` of bytes(). Reading them again
  // takes them from the file again.
  void forget(std::span<const std::byte> part) const;

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The whole content. Errors: not_found, io.
std::string read_file(const std::filesystem::path& path);

// A file that appears at `path` only when it is whole: written beside the target, synced and
// renamed by commit(); removed if commit() is never reached. Errors: io, no_space.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  size_t size() const { return size_; }
  void commit();

 private:
  [[noreturn]] void fail(const char* action) const;
  void flush();

  std::filesystem::path path_, beside_;
  std::string buffer_;
  int fd_ = -1;
  size_t size_ = 0;
};

// Writes `content` to `path` through an AtomicFile.
void write_file(const std::filesystem::path& path, std::string_view content);

// Appends one line to `path` and syncs it: the journal's primitive. A crash may leave a partial
// last line, which readers skip.
void append_line(const std::filesystem::path& path, std::string_view line);

// Creates the folder and its parents. Errors: io.
void make_folder(const std::filesystem::path& path);

// A folder in which no other process works while this one does: `file`, inside it, is locked until
// the object or the process ends, and stays there. Errors: usage if another process holds it, io.
class FolderLock {
 public:
  FolderLock(const std::filesystem::path& folder, const std::filesystem::path& file);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace moru
