// A training run at rest: everything that decides what its next step computes, in one file that is
// replaced as a whole.
#pragma once
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "tune/ranks.h"

namespace moru {

struct TrainingRun {
  std::vector<float> values, m, v;                 // adapter and moments
  std::vector<float> best;                         // adapter of the best validation; empty if none
  std::vector<float> recent_losses, recent_norms;  // what outliers are told by (guard.h)
  uint64_t step = 0;                               // steps taken
  uint64_t updates = 0;                            // of them, those that moved the adapter
  uint64_t epoch = 0, cursor = 0;                  // next example: its place in the epoch's order
  uint64_t skipped = 0, skipped_in_a_row = 0;
  uint64_t best_step = 0, without_improvement = 0;
  double best_loss = std::numeric_limits<double>::infinity();
  double first_loss = std::numeric_limits<double>::quiet_NaN();  // validation before step 1
  double loss_sum = 0;                                           // of this epoch's steps
  uint64_t loss_count = 0;
  double last_epoch_loss = 0;
  double seconds = 0;  // spent so far
  uint64_t tokens_done = 0;
};

// `fingerprint` names what the run computes: options, model and data. Errors: io, no_space.
void write_checkpoint(const std::filesystem::path& path, const std::string& fingerprint,
                      const TrainingRun& run);
// nullopt if there is none. Errors: usage for a run of another fingerprint; bad_input.
std::optional<TrainingRun> read_checkpoint(const std::filesystem::path& path,
                                           const std::string& fingerprint, size_t parameters);

// All ranks stand where rank 0 does; `best` stays its own.
void share(Ranks& ranks, TrainingRun& run);

}  // namespace moru
