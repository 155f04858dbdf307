// What all flags of all commands have in common: how help shows them, and which values none of
// them takes.
#pragma once
#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

namespace moru {

// Help in 80 columns: a flag's name and kind of value, then what it does, then what it is where it
// is not given and where its values end.
std::shared_ptr<CLI::Formatter> help_format();

// Lets no flag of `app` or of its commands take an empty value (of a variable that is not set, in
// a script), nor one of numbers something that is no finite number or, where it counts, negative:
// CLI11 reads "" as 0, -1 as 2⁶⁴ − 1, and its ranges let NaN through.
void refuse_odd_values(CLI::App& app);

// Refuses those of `flags` that are given, since `why`: better than to ignore them. Error: usage.
void refuse_given(const CLI::App& command, const std::vector<const char*>& flags,
                  const std::string& why);

// Why flags that narrow down what is sampled are refused where nothing is.
inline constexpr const char* kWithoutSampling =
    "is about sampling, and at --temperature 0 the likeliest token is taken";

// What is wrong with the words of a command, as moru says it.
std::string problem_of(const CLI::ParseError& error);

// Bytes as people write them: 4GiB, 512 MiB, 300MB, 1.5g, 1000000. Below 2⁶⁰.
CLI::Validator memory_size();

}  // namespace moru
