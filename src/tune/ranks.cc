#include "tune/ranks.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>

#include "base/error.h"
#ifdef MORU_MPI
#include <mpi.h>
#endif

namespace moru {
namespace {

// Floats that one thread adds at a time.
constexpr size_t kTile = 1 << 16;

// y += x, or y = x.
void add_to(Pool& pool, const float* x, size_t count, bool first, float* y) {
  pool.each((count + kTile - 1) / kTile, [&](size_t tile) {
    const size_t at = tile * kTile, n = std::min(kTile, count - at);
    if (first) {
      std::memcpy(y + at, x + at, n * sizeof(float));
      return;
    }
    for (size_t i = at; i < at + n; ++i) y[i] += x[i];
  });
}

// What starters of MPI programs tell a process: Open MPI and Slurm's PMIx, MPICH and Intel MPI.
constexpr std::array<const char*, 2> kSizes = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};

constexpr std::array<const char*, 2> kRanks = {"OMPI_COMM_WORLD_RANK", "PMI_RANK"};

// The first of these that is a number; `otherwise` where none is.
size_t told_by(std::span<const char* const> names, size_t otherwise) {
  for (const char* name : names) {
    const char* text = std::getenv(name);
    size_t number = 0;
    if (text != nullptr &&
        std::from_chars(text, text + std::strlen(text), number).ec == std::errc{})
      return number;
  }
  return otherwise;
}

// One of several processes that cannot work together, of which the first says so.
class Refused : public OneRank {
 public:
  explicit Refused(size_t rank) { rank_ = rank; }
  int run(const std::function<void()>&, bool (*)()) override {
    // mpirun ends all when one ends: the first is to have been heard.
    std::this_thread::sleep_for(std::chrono::seconds(2));
    return exit_code(ErrorKind::unsupported);
  }
};

std::unique_ptr<Ranks> refuse(std::string what, std::string cure) {
  const size_t rank = told_by(kRanks, 0);
  if (rank != 0) return std::make_unique<Refused>(rank);
  throw Error(ErrorKind::unsupported,
              {.where = "mpirun", .what = std::move(what), .cure = std::move(cure)});
}

}  // namespace

void OneRank::add(Pool& pool, std::span<float> gradient, const Round& round) {
  if (round.of == 1) return;
  sum_.resize(gradient.size());
  if (round.is_last())  // a + b is b + a
    add_to(pool, sum_.data(), sum_.size(), false, gradient.data());
  else
    add_to(pool, gradient.data(), gradient.size(), round.first == 0, sum_.data());
}

int OneRank::run(const std::function<void()>& work, bool (*)()) {
  work();
  return 0;
}

#ifdef MORU_MPI
namespace {

using namespace std::chrono_literals;

// Floats of each rank's gradient that travel at a time.
constexpr size_t kChunk = 1 << 20;
// Bytes that one call shares.
constexpr size_t kShare = size_t{64} << 20;
// How long a rank that threw waits for the others to have thrown, too.
constexpr auto kSameEnd = 2s;

// mpirun drops what a process has said just before its end.
constexpr auto kHeard = 200ms;
// So long before that, what was learnt so far is saved without the step that is under way.
constexpr auto kRescue = 550ms;

// What the ranks of one machine know of each other without asking.
struct Seat {
  std::atomic<pid_t> pid;
  std::atomic<size_t> rank;
  std::atomic<bool> has_ended;   // on purpose: its death is no news
  std::atomic<bool> has_spoken;  // of the end of the run
};

class MpiRanks : public Ranks {
 public:
  MpiRanks() {
    int given = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &given);
    int value = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &value);
    rank_ = static_cast<size_t>(value);
    MPI_Comm_size(MPI_COMM_WORLD, &value);
    size_ = static_cast<size_t>(value);
    MPI_Comm_dup(MPI_COMM_WORLD, &ending_);
    std::array<char, MPI_MAX_PROCESSOR_NAME> name{};
    MPI_Get_processor_name(name.data(), &value);
    machine_.assign(name.data(), static_cast<size_t>(value));
    take_seat();
  }
  ~MpiRanks() override {
    watcher_ends_ = true;
    if (watcher_.joinable()) watcher_.join();
    MPI_Win_free(&seats_window_);
    MPI_Comm_free(&machine_comm_);
    MPI_Comm_free(&ending_);
    MPI_Finalize();
  }
  MpiRanks(const MpiRanks&) = delete;
  MpiRanks& operator=(const MpiRanks&) = delete;

  void share(std::span<std::byte> bytes, size_t owner) override {
    for (size_t at = 0; at < bytes.size(); at += kShare)
      MPI_Bcast(bytes.data() + at, static_cast<int>(std::min(kShare, bytes.size() - at)), MPI_BYTE,
                static_cast<int>(owner), MPI_COMM_WORLD);
  }

  bool any(bool here) override {
    int mine = here ? 1 : 0, all = 0;
    MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_LOR, MPI_COMM_WORLD);
    return all != 0;
  }

  size_t sum_bytes(size_t parameters) const override {
    const size_t own = slice(parameters, 0).size;
    return (own + size_ * std::min(kChunk, own)) * sizeof(float);
  }

  // Every rank adds up one slice of all gradients, which come to it a chunk at a time; in the end
  // all have all slices.
  void add(Pool& pool, std::span<float> gradient, const Round& round) override {
    const Slice own = slice(gradient.size(), rank_);
    sum_.resize(own.size);
    const size_t longest = slice(gradient.size(), 0).size, chunk = std::min(kChunk, longest);
    received_.resize(round.count * chunk);
    for (size_t at = 0; at < longest; at += chunk) {
      std::vector<MPI_Request> requests;
      const size_t mine = at < own.size ? std::min(chunk, own.size - at) : 0;
      const auto arrived = [&](size_t from) { return received_.data() + from * chunk; };
      for (size_t from = 0; from < round.count && mine != 0; ++from)
        if (from != rank_)
          MPI_Irecv(arrived(from), static_cast<int>(mine), MPI_FLOAT, static_cast<int>(from), 0,
                    MPI_COMM_WORLD, &requests.emplace_back());
      for (size_t to = 0; to < size_ && rank_ < round.count; ++to) {
        const Slice other = slice(gradient.size(), to);
        if (to == rank_ || at >= other.size) continue;
        MPI_Isend(gradient.data() + other.first + at,
                  static_cast<int>(std::min(chunk, other.size - at)), MPI_FLOAT,
                  static_cast<int>(to), 0, MPI_COMM_WORLD, &requests.emplace_back());
      }
      MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
      for (size_t from = 0; from < round.count && mine != 0; ++from)
        add_to(pool, from == rank_ ? gradient.data() + own.first + at : arrived(from), mine,
               round.first == 0 && from == 0, sum_.data() + at);
    }
    if (!round.is_last()) return;
    std::memcpy(gradient.data() + own.first, sum_.data(), own.size * sizeof(float));
    for (size_t owner = 0; owner < size_; ++owner) {
      const Slice part = slice(gradient.size(), owner);
      share(std::as_writable_bytes(gradient.subspan(part.first, part.size)), owner);
    }
  }

  void set_rescue(std::function<std::string()> rescue) override {
    const std::lock_guard lock(rescue_mutex_);
    rescue_ = std::move(rescue);
  }

  int run(const std::function<void()>& work, bool (*asked)()) override {
    watcher_ = std::thread([this, asked] { watch(asked); });
    try {
      work();
      MPI_Barrier(MPI_COMM_WORLD);
      seats_[seat_].has_ended = true;
      return 0;
    } catch (const Error& error) {
      return end(exit_code(error.kind()), error.what());
    } catch (const std::bad_alloc&) {
      return end(exit_code(ErrorKind::no_space), "memory: there is not enough");
    } catch (const std::exception& error) {
      return end(70, fmt::format("internal error: {}", error.what()));
    }
  }

 private:
  struct Slice {
    size_t first, size;
  };
  Slice slice(size_t count, size_t rank) const {  // rank 0's is the longest
    const size_t each = (count + size_ - 1) / size_, first = std::min(count, rank * each);
    return {first, std::min(each, count - first)};
  }

  void take_seat() {
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, static_cast<int>(rank_),
                        MPI_INFO_NULL, &machine_comm_);
    int value = 0;
    MPI_Comm_size(machine_comm_, &value);
    on_this_machine_ = static_cast<size_t>(value);
    MPI_Comm_rank(machine_comm_, &value);
    seat_ = static_cast<size_t>(value);
    const size_t bytes = seat_ == 0 ? on_this_machine_ * sizeof(Seat) : 0;
    void* memory = nullptr;
    MPI_Win_allocate_shared(static_cast<MPI_Aint>(bytes), 1, MPI_INFO_NULL, machine_comm_, &memory,
                            &seats_window_);
    MPI_Aint size = 0;
    MPI_Win_shared_query(seats_window_, 0, &size, &value, &memory);
    seats_ = static_cast<Seat*>(memory);
    Seat* own = new (seats_ + seat_) Seat;
    own->pid = ::getpid();
    own->rank = rank_;
    own->has_ended = false;
    own->has_spoken = false;
    MPI_Barrier(machine_comm_);
  }

  // What was thrown here, if on all ranks, is rank 0's to say.
  int end(int code, const std::string& message) {
    seats_[seat_].has_ended = true;
    MPI_Request all = MPI_REQUEST_NULL;
    MPI_Ibarrier(ending_, &all);
    const auto until = std::chrono::steady_clock::now() + kSameEnd;
    int done = 0;
    while (done == 0 && std::chrono::steady_clock::now() < until) {
      MPI_Test(&all, &done, MPI_STATUS_IGNORE);
      if (done == 0) std::this_thread::sleep_for(1ms);
    }
    if (done != 0) {
      if (leads()) throw;
      return code;
    }
    say(fmt::format("rank {} on {}: {}", rank_, machine_, message));
    MPI_Abort(MPI_COMM_WORLD, code);
    std::_Exit(code);
  }

  // Ends this process where a rank of this machine has died, whatever the others wait for; and
  // where mpirun, which ends all ranks when one dies on another machine, is about to.
  void watch(bool (*asked)()) {
    std::optional<std::chrono::steady_clock::time_point> asked_at;
    for (; !watcher_ends_ && !seats_[seat_].has_ended; std::this_thread::sleep_for(20ms)) {
      for (size_t i = 0; i < on_this_machine_; ++i)
        if (is_dead(seats_[i]))
          leave(
              fmt::format("rank {} of {} was killed: the run ends (give the same command to go "
                          "on from what was saved last)",
                          seats_[i].rank.load(), size_));
      const auto now = std::chrono::steady_clock::now();
      if (asked() && !asked_at) asked_at = now;
      if (asked_at && now - *asked_at > patience() - kRescue) rescue();
      if (asked_at && now - *asked_at > patience())
        leave(
            "the run was stopped within a step, or one of its processes was (give the same command "
            "to go on from what was saved last)");
    }
  }

  // Ends this process if it could save.
  void rescue() {
    const std::lock_guard lock(rescue_mutex_);
    if (!rescue_) return;
    const std::string done = std::exchange(rescue_, nullptr)();
    if (done.empty()) return;
    seats_[seat_].has_spoken = true;
    leave(done);
  }

  static bool is_dead(const Seat& seat) {
    return !seat.has_ended && ::kill(seat.pid, 0) != 0 && errno == ESRCH;
  }

  // mpirun kills so long after it has asked.
  static std::chrono::milliseconds patience() {
    long seconds = 1;
    if (const char* text = std::getenv("OMPI_MCA_odls_base_sigkill_timeout"))
      seconds = std::clamp(std::strtol(text, nullptr, 10), 1L, 86400L);
    return std::chrono::seconds(seconds) - 300ms;
  }

  // Files are whole whenever a process ends; the first rank of a machine that lives speaks.
  [[noreturn]] void leave(const std::string& message) {
    bool speaks = true;
    for (size_t i = 0; i < on_this_machine_; ++i) {
      if (i < seat_ && !is_dead(seats_[i]) && !seats_[i].has_ended) speaks = false;
      if (i != seat_ && seats_[i].has_spoken) speaks = false;
    }
    if (speaks) say(message);
    std::this_thread::sleep_for(kHeard);
    std::_Exit(exit_code(ErrorKind::interrupted));
  }

  static void say(const std::string& message) {
    const std::string line = "moru: " + message + "\n";
    for (size_t at = 0; at < line.size();) {
      const ssize_t n = ::write(STDERR_FILENO, line.data() + at, line.size() - at);
      if (n <= 0) return;
      at += static_cast<size_t>(n);
    }
  }

  MPI_Comm ending_ = MPI_COMM_NULL, machine_comm_ = MPI_COMM_NULL;
  MPI_Win seats_window_ = MPI_WIN_NULL;
  Seat* seats_ = nullptr;  // of this machine's ranks
  size_t seat_ = 0;        // this rank's
  std::string machine_;
  std::thread watcher_;
  std::atomic<bool> watcher_ends_ = false;
  std::mutex rescue_mutex_;
  std::function<std::string()> rescue_;
  std::vector<float> sum_;  // of this rank's slice over earlier batches
  std::vector<float> received_;
};

}  // namespace
#endif

std::unique_ptr<Ranks> join_ranks() {
  const size_t wanted = told_by(kSizes, 1);
  if (wanted <= 1) return std::make_unique<OneRank>();
#ifdef MORU_MPI
  auto ranks = std::make_unique<MpiRanks>();
  if (ranks->size() == wanted) return ranks;
  ranks.reset();
  return refuse(fmt::format("has started {} processes that do not find each other", wanted),
                "start moru with the mpirun of Open MPI");
#else
  return refuse("this moru was built without MPI and cannot run in several processes",
                "install libopenmpi-dev and build it again");
#endif
}

}  // namespace moru
