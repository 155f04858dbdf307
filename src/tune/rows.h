// Rows of training data, whatever format they are in, as conversations.
//
// Shapes are told apart row by row:
//
//   {text}                                             raw text
//   {messages} · {conversations} (ShareGPT)            a conversation; tools, system
//   {prompt, completion}                               texts or lists of messages
//   {instruction, input, output, history, system}      Alpaca
//   {prompt, chosen, rejected} · {chosen, rejected}    a preference, texts or messages; without a
//                                                      prompt the common beginning is it
//   {conversations, chosen, rejected}                  a preference as LLaMA-Factory has it
//   {instruction, input, output: [chosen, rejected]}   a comparison
//   any conversation with {label} or {kto_tag}         an answer that is wanted or not (KTO)
//
// A LLaMA-Factory dataset_info.json, or --prompt-column and --completion-column, name the columns
// otherwise.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace moru {

// Where the parts of a row stand, under dataset_info.json's names.
struct RowColumns {
  std::string prompt = "instruction", query = "input", response = "output", history = "history";
  std::string messages, system = "system", tools = "tools";  // messages: by the format
  std::string chosen = "chosen", rejected = "rejected", kto_tag;
};
// How a turn is written.
struct RowTags {
  std::string role = "from", content = "value";
  std::string user = "human", assistant = "gpt", observation = "observation";
  std::string function = "function_call", system = "system";
};
struct RowFormat {
  enum class Shape { detect, alpaca, sharegpt, openai, pair } shape = Shape::detect;
  bool ranking = false;  // rows are preferences
  RowColumns columns;    // of alpaca, sharegpt and openai; of pair prompt and response
  RowTags tags;          // of sharegpt and openai
};

// Everything that decides how a row is read.
nlohmann::ordered_json to_json(const RowFormat& format);

struct TrainingRow {
  enum class Kind {
    text,          // `text`
    conversation,  // `messages`, with at least one answer
    preference,    // `messages` asks; `chosen` and `rejected` are turns that answer
    rated,         // `messages` asks; `chosen` answers and is wanted if `desirable`
  } kind = Kind::conversation;
  std::string text;
  nlohmann::ordered_json messages = nlohmann::ordered_json::array();
  nlohmann::ordered_json chosen, rejected;  // lists of messages
  bool desirable = true;
  nlohmann::ordered_json tools;  // null where there are none
};

// Why a row cannot be used: what stands at which field.
struct UnusableRow {
  std::string field, what;
};

// Throws UnusableRow.
TrainingRow read_row(const nlohmann::ordered_json& row, const RowFormat& format = {});
// What stands before the first answer: the identity of a row when data is split.
std::string prompt_text(const nlohmann::ordered_json& messages);

// One data set of a LLaMA-Factory dataset_info.json.
struct DataSetInfo {
  std::string name;
  std::filesystem::path file;  // beside dataset_info.json
  RowFormat format;
  uint64_t num_samples = 0;  // 0: all
};
// Those of `names`, or all. Errors: not_found; bad_input naming the key; unsupported (a data set
// that must be downloaded, images, an unknown formatting).
std::vector<DataSetInfo> read_dataset_info(const std::filesystem::path& path,
                                           const std::vector<std::string>& names = {});

}  // namespace moru
