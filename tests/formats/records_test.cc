#include "formats/records.h"

#include <doctest/doctest.h>
#include <zlib.h>

#include <string>
#include <vector>

#include "support.h"

using namespace moru;
using namespace std::string_literals;

namespace {

struct Read {
  std::vector<Row> rows;
  std::vector<RowProblem> problems;
  std::vector<std::string> columns;
};

Read read_all(const std::filesystem::path& path) {
  RecordReader reader(path);
  Read read;
  while (std::optional<Row> row = reader.next()) read.rows.push_back(std::move(*row));
  CHECK(!reader.next());  // the end stays the end
  read.problems = reader.problems();
  read.columns = reader.columns();
  return read;
}

Read read_text(std::string_view content, std::string_view name = "rows") {
  const TempDir folder;
  return read_all(folder.file(name, content));
}

std::string gzip(std::string_view content) {
  z_stream stream{};
  REQUIRE(deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  std::string packed(deflateBound(&stream, content.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(content.data()));
  stream.avail_in = static_cast<uInt>(content.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  return packed;
}

Error refusal_of(std::string_view content, std::string_view name = "rows") {
  const TempDir folder;
  const auto path = folder.file(name, content);
  const Error error = error_from([&] { RecordReader{path}; });
  CHECK(error.kind() == ErrorKind::bad_input);
  CHECK(error.where() == path.string());
  return error;
}

}  // namespace

TEST_CASE("JSON Lines give a row per line, with its number, in the order of its keys") {
  const Read read =
      read_text("{\"b\": 1, \"a\": \"한글\"}\n\n  {\"c\": [1, {\"d\": null}]}  \r\n{}");
  REQUIRE(read.rows.size() == 3);
  CHECK(read.rows[0].line == 1);
  CHECK(read.rows[0].value.dump() == "{\"b\":1,\"a\":\"한글\"}");
  CHECK(read.rows[1].line == 3);
  CHECK(read.rows[1].value["c"][1].dump() == "{\"d\":null}");
  CHECK(read.rows[2].line == 4);
  CHECK(read.columns == std::vector<std::string>{"b", "a", "c"});
  CHECK(read.problems.empty());
}

TEST_CASE("a JSON array gives its elements, wherever their lines break") {
  const Read read = read_text(
      " [\n  {\"q\": \"a ] , } \\\" [\"},\n  {\n    \"q\":\n 2 }\n,{\"q\":3},{\"q\":[[4]]}]\n");
  REQUIRE(read.rows.size() == 4);
  CHECK(read.rows[0].value["q"] == "a ] , } \" [");
  CHECK(read.rows[0].line == 2);
  CHECK(read.rows[1].value["q"] == 2);
  CHECK(read.rows[1].line == 3);
  CHECK(read.rows[2].line == 6);
  CHECK(read.rows[3].value["q"][0][0] == 4);
  CHECK(read.problems.empty());
  CHECK(read_text("[]").rows.empty());
  CHECK(read_text("[ ]").problems.empty());
}

TEST_CASE("CSV gives strings under the header's names") {
  const Read read = read_text("id,question\r\n1,\"one, \"\"two\"\"\r\nthree\"\r\n\r\n2,한글\r\n3,");
  REQUIRE(read.rows.size() == 3);
  CHECK(read.rows[0].value.dump() == R"({"id":"1","question":"one, \"two\"\r\nthree"})");
  CHECK(read.rows[0].line == 2);
  CHECK(read.rows[1].value["question"] == "한글");
  CHECK(read.rows[1].line == 5);
  CHECK(read.rows[2].value["question"] == "");
  CHECK(read.columns == std::vector<std::string>{"id", "question"});
  CHECK(read.problems.empty());
}

TEST_CASE("the delimiter of CSV is found, and a byte-order mark is taken") {
  CHECK(read_text("\xEF\xBB\xBF"
                  "a;b\n1;2,5\n")
            .rows[0]
            .value["b"] == "2,5");
  CHECK(read_text("a\tb\n1\t2;5\n").rows[0].value["b"] == "2;5");
  CHECK(read_text("\"a;;;\",b\n1,2\n").rows[0].value["b"] == "2");
  CHECK(read_text("a,b\r1,2\r").rows[0].value["b"] == "2");
  CHECK(read_text("\xEF\xBB\xBF{\"a\":1}").rows[0].value["a"] == 1);
  CHECK(read_text("\xEF\xBB\xBF[{\"a\":1}]").rows[0].value["a"] == 1);
}

TEST_CASE("one column is CSV only in a file that is called so") {
  CHECK(read_text("question\nwhy?\n", "rows.csv").rows[0].value["question"] == "why?");
  CHECK(read_text(gzip("question\nwhy?\n"), "rows.csv.gz").rows.size() == 1);
  CHECK(refusal_of("Dear reader\nthis is a letter\n").problem().starts_with("neither"));
}

TEST_CASE("columns without a name get one, and two of one name are refused") {
  const Read read = read_text(",text\n0,x\n");
  CHECK(read.rows[0].value.dump() == R"({"column_1":"0","text":"x"})");
  CHECK(refusal_of("a,b,a\n1,2,3\n").problem() == "two columns are called a");
}

TEST_CASE("gzip is unpacked, also in several members, and damage is told") {
  const TempDir folder;
  const std::string packed = gzip("{\"a\":1}\n{\"a\":2}\n");
  CHECK(read_all(folder.file("x", packed)).rows.size() == 2);
  CHECK(read_all(folder.file("x", packed + packed)).rows.size() == 4);
  for (size_t cut = 3; cut < packed.size(); ++cut) {
    CAPTURE(cut);
    const auto path = folder.file("cut", packed.substr(0, cut));
    CHECK(error_from([&] { read_records(path); }).kind() == ErrorKind::bad_input);
  }
  std::string damaged = packed;
  damaged[packed.size() - 6] ^= 1;  // its checksum
  const auto path = folder.file("damaged", damaged);
  const Error error = error_from([&] { read_records(path); });
  CHECK(error.problem().starts_with("the gzip data is damaged"));
}

TEST_CASE("bad JSON rows are counted with their line, and the good ones are read") {
  const std::string nested = "{\"a\":" + std::string(100'000, '[') + "\n";
  const Read read = read_text(
      "{\"a\":1}\n"
      "{\"a\":}\n"
      "[1]\n"
      "{\"a\":\"\xFF\"}\n"
      "{\"a\":1e999}\n"
      "{\"a\":\"\\ud800\"}\n"
      "{\"a\":1} {\"b\":2}\n" +
      nested + "{\"a\":2}\n");
  CHECK(read.rows.size() == 2);
  REQUIRE(read.problems.size() == 7);
  for (size_t i = 0; i < read.problems.size(); ++i) CHECK(read.problems[i].line == i + 2);
  CHECK(read.problems[0].what.starts_with("broken JSON at byte 6 of the row: syntax error"));
  CHECK(read.problems[1].what == "a JSON array where an object belongs");
  CHECK(read.problems[2].what == "not UTF-8 at byte 7 of the row");
  CHECK(read.problems[3].what.starts_with("number overflow"));
  CHECK(read.problems[6].what == "nested deeper than 500");
}

TEST_CASE("what is not UTF-8 is told with the member that it stands in") {
  const auto field = [](const std::string& row) {
    const Read read = read_text(row + "\n{\"a\":1}\n");
    REQUIRE(read.problems.size() == 1);
    CHECK(read.problems[0].what.starts_with("not UTF-8 at byte "));
    return read.problems[0].field;
  };
  CHECK(field("{\"a\":1, \"b\" : \"x\\\"\xFF\"}") == "b");
  CHECK(field("{\"a\":[{\"c\":\"\xFF\"}],\"b\":2}") == "a");
  CHECK(field("{\"a\":1,\"\xFF\":2}").empty());
  CHECK(field("{\"a\":1}\xFF") == "");
}

TEST_CASE("a message about a bad row is short, however long the row is") {
  const Read read = read_text("{\"a\": \"" + std::string(1'000'000, 'x') + "\n");
  REQUIRE(read.problems.size() == 1);
  CHECK(read.problems[0].what.size() < 300);
}

TEST_CASE("bad elements of a JSON array are counted, and the good ones are read") {
  const Read read = read_text("[{\"a\":1},\n{\"a\":},\n7,\n\"x,]\", ,{\"a\":2}\n{\"a\":3},]\nmore");
  CHECK(read.rows.size() == 3);
  std::vector<uint64_t> lines;
  for (const RowProblem& problem : read.problems) lines.push_back(problem.line);
  CHECK(lines == std::vector<uint64_t>{2, 3, 4, 4, 5, 6});
  const Read cut = read_text("[{\"a\":1},\n{\"a\":");
  CHECK(cut.rows.size() == 1);
  REQUIRE(cut.problems.size() == 2);
  CHECK(cut.problems[1].what == "the file ends before the array does");
}

TEST_CASE("bad CSV rows are counted with their line and column, and the good ones are read") {
  const Read read = read_text(
      "a,b\n"
      "1\n"
      "1,2,3\n"
      "x\xFF,2\n"
      "1,\"2\"3\n"
      "1\"\",2\n"
      "1,2\n"
      "3,\"4\n5,6\n");
  CHECK(read.rows.size() == 1);
  REQUIRE(read.problems.size() == 6);
  for (size_t i = 0; i < 5; ++i) CHECK(read.problems[i].line == i + 2);
  CHECK(read.problems[0].what == "1 cells where the header has 2");
  CHECK(read.problems[1].what == "3 cells where the header has 2");
  CHECK(read.problems[2].field == "a");
  CHECK(read.problems[3].field == "b");
  CHECK(read.problems[4].field == "a");
  CHECK(read.problems[5].line == 8);
  CHECK(read.problems[5].what == "a quote that is not closed");
}

TEST_CASE("what is none of the three is refused, saying what it is") {
  CHECK(refusal_of("\x7F"
                   "ELF\0\0\0"s)
            .problem() == "a binary file where rows belong");
  CHECK(refusal_of("\xFF\xFE{\0}\0"s).problem() == "the text is UTF-16");
  CHECK(refusal_of("\xC1\xFA\xB9\xAE,\xB4\xE4\n1,2\n").cure().find("UTF-8") != std::string::npos);
  CHECK(refusal_of("{\n  \"a\": 1\n}\n").problem() == "a JSON object over several lines");
  CHECK(refusal_of("\"a\"b,c\n").problem().starts_with("the header"));
}

TEST_CASE("a file that is absent or a folder is an error that names it") {
  const TempDir folder;
  const auto absent = folder.path() / "absent.jsonl";
  const Error error = error_from([&] { RecordReader{absent}; });
  CHECK(error.kind() == ErrorKind::not_found);
  CHECK(error.where() == absent.string());
  CHECK(error_from([&] { RecordReader{folder.path()}; }).kind() == ErrorKind::io);
}

TEST_CASE("an empty file has no rows") {
  CHECK(read_text("").rows.empty());
  CHECK(read_text(" \n\n").rows.empty());
  CHECK(read_text("a,b\n").rows.empty());
}

TEST_CASE("rows longer than a chunk are read whole in every format") {
  const std::string large(3'000'000, 'x'), quotes(1'000'000, '"');
  CHECK(read_text("{\"a\":\"" + large + "\"}\n{\"a\":1}\n").rows[0].value["a"] == large);
  CHECK(read_text("[{\"a\":\"" + large + "\"},{\"a\":1}]").rows.size() == 2);
  const Read csv = read_text("a,b\n" + large + ",\"" + quotes + "\"\n1,2\n");
  REQUIRE(csv.rows.size() == 2);
  CHECK(csv.rows[0].value["a"] == large);
  CHECK(csv.rows[0].value["b"] == quotes.substr(0, quotes.size() / 2));
}

TEST_CASE("rows come out the same wherever a chunk ends") {
  // Leading space shifts every row against the chunks.
  const std::string rows = "{\"a\":\"\\\\\"},\n{\"b\":[1,\"]\"]},\n{\"c\":{}}]";
  for (size_t shift = 0; shift < rows.size() + 2; ++shift) {
    const Read read = read_text(std::string((256 << 10) - shift, ' ') + "[" + rows);
    CAPTURE(shift);
    CHECK(read.problems.empty());
    REQUIRE(read.rows.size() == 3);
    CHECK(read.rows[2].line == 3);
  }
  const std::string cells = "\"1\"\"\r\n\",2\r\n";
  for (size_t shift = 0; shift < cells.size() + 2; ++shift) {
    const std::string padding((256 << 10) - shift - 6, 'x');
    const Read read = read_text("a,b\n" + padding + ",\n" + cells);
    CAPTURE(shift);
    CHECK(read.problems.empty());
    REQUIRE(read.rows.size() == 2);
    CHECK(read.rows[1].value.dump() == R"({"a":"1\"\r\n","b":"2"})");
  }
}

TEST_CASE("reading all rows stops at one bad row too many, naming file, line and field") {
  const TempDir folder;
  const auto path = folder.file("pairs.csv", "q,a\n1,2\n3,\"4\"x\n5,6\n7\n");
  Error error = error_from([&] { read_records(path); });
  CHECK(error.kind() == ErrorKind::bad_input);
  CHECK(error.where() == path.string() + ": line 3: a");
  error = error_from([&] { read_records(path, 1); });
  CHECK(error.where() == path.string() + ": line 5");
  CHECK(read_records(path, 2).size() == 2);
}

TEST_CASE("an object of very many members is refused, not read in quadratic time") {
  std::string row = "{";
  for (int i = 0; i < 20'000; ++i) row.append("\"").append(std::to_string(i)).append("\":0,");
  row.back() = '}';
  const Read read = read_text(row + "\n{\"a\":1}\n");
  CHECK(read.rows.size() == 1);
  REQUIRE(read.problems.size() == 1);
  CHECK(read.problems[0].what == "an object of more than 10000 members");
}
