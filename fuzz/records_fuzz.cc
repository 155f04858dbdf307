// Any bytes as a file of rows: rows or problems come out, or an Error, and never anything else.
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/error.h"
#include "base/text.h"
#include "formats/records.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string path =
      (std::filesystem::temp_directory_path() / "moru-records-fuzz-").string() +
      std::to_string(::getpid()) + ".csv";
  // Not write_file: a sync for each input would be most of the time.
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    moru::RecordReader reader(path);
    while (const auto row = reader.next()) {
      MORU_CHECK(row->value.is_object());
      MORU_CHECK(row->line >= 1 && row->line <= size + 1);
      MORU_CHECK(!moru::find_invalid_utf8(row->value.dump()));
    }
  } catch (const moru::Error&) {
  }
  return 0;
}
