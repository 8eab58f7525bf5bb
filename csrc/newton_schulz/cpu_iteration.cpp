#include "newton_schulz/cpu_iteration.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <exception>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace stepladder::newton_schulz {

namespace {

// More of results than this goes past the caches.
constexpr double kCachedBytes = 4e6;
// Of all matrices under way; a larger matrix is worked on alone.
constexpr size_t kWorkspaceBytes = size_t{1} << 30;
constexpr int kSpins = 256;
// Below this a further thread costs more than it gains.
constexpr double kFlopsPerThread = 2e7;
// Of X where its products are scaled afterwards: squares of elements far smaller than the norm are normal numbers.
constexpr double kLeastNorm = 0x1p-40, kGreatestNorm = 0x1p40;

int64_t symmetric_bytes(const Program& p) { return int64_t{2} * p.m_blocks * p.m_blocks * kTileBytes; }
int64_t x_bytes(const Program& p) { return int64_t{2} * p.m_blocks * p.n_blocks * kTileBytes; }
int64_t row_bytes(const Program& p) { return int64_t{4} * p.m_blocks * kBlock; }

size_t workspace_bytes(const Program& p) {
  const int64_t partials = (int64_t{p.pack_rows()} * p.pack_columns() * 8 + 63) / 64 * 64;
  return static_cast<size_t>(3 * x_bytes(p) + p.symmetric * (symmetric_bytes(p) + row_bytes(p)) + row_bytes(p) +
                             partials);
}

Operands place(const Program& p, char* memory) {
  Operands o;
  const auto take = [&](int64_t bytes) {
    char* const taken = memory;
    memory += bytes;
    return taken;
  };
  o.small = reinterpret_cast<float*>(memory);
  o.left = take(x_bytes(p));
  for (char*& x : o.across) x = take(x_bytes(p));
  for (int s = 0; s < p.symmetric; ++s) {
    o.symmetric[s] = take(symmetric_bytes(p));
    o.diagonal[s] = reinterpret_cast<float*>(take(row_bytes(p)));
  }
  o.row_scale = reinterpret_cast<float*>(take(row_bytes(p)));
  o.partials = reinterpret_cast<double*>(memory);
  return o;
}

// What X is normalised by. Returns whether X is in tiles already.
//
// Packing takes two factors, as their product need not be a normal number where X's elements are near the ends of the
// range. Where it is done again they are powers of two, so that elements are rounded as they were before.
bool set_scales(Work& work) {
  const Step& norms = work.program->steps[0];
  double sum = 0.0;
  for (int task = 0; task < norms.tasks; ++task) sum += work.operands.partials[task];
  const Options& options = *work.job->options;
  const double norm = std::sqrt(sum);
  double scale = 1.0 / (std::max(norm, options.eps) * options.divisor);
  if (norm == 0.0) scale = 0.0;
  if (!std::isfinite(norm)) scale = std::nan("");
  const int exponent = scale > 0.0 ? std::ilogb(scale) : 0;
  const bool at_once = work.program->packs_at_once;
  const bool packed = at_once && norm >= kLeastNorm && norm <= kGreatestNorm;
  const double power = std::ldexp(1.0, exponent / 2), whole = std::ldexp(1.0, exponent);
  work.scales[0] = static_cast<float>(power);
  work.scales[1] = static_cast<float>((at_once ? whole : scale) / power);
  if (at_once) work.scale = static_cast<float>(packed ? scale : scale / whole);
  return packed;
}

// A place for one matrix at a time. Threads claim tasks of its current step by number; who finishes the last one
// opens the next step. The ticket says all that a claim needs: only who has claimed a task may look at the work.
struct Slot {
  Work work;
  std::atomic<uint64_t> ticket{0};  // step, its tasks, the next of them
  std::atomic<int> done{0};
  std::atomic<bool> open{false};

  static constexpr int kBits = 24;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

  void begin(size_t step) {
    const auto tasks = static_cast<uint64_t>(work.program->steps[step].tasks);
    ticket.store(static_cast<uint64_t>(step) << 2 * kBits | tasks << kBits, std::memory_order_release);
  }
  bool claim(size_t* step, int* task) {
    const auto exhausted = [](uint64_t t) { return (t & kMask) >= (t >> kBits & kMask); };
    if (exhausted(ticket.load(std::memory_order_relaxed))) return false;
    const uint64_t claimed = ticket.fetch_add(1, std::memory_order_acq_rel);
    *step = claimed >> 2 * kBits;
    *task = static_cast<int>(claimed & kMask);
    return !exhausted(claimed);
  }
};

double cost(const Job& job) {
  const double m = static_cast<double>(std::min(job.rows, job.cols));
  return m * static_cast<double>(job.rows) * static_cast<double>(job.cols) *
         static_cast<double>(job.options->steps.size());
}

}  // namespace

void CpuIteration::run(const std::vector<Job>& jobs, const Engine& engine, int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  // Large ones first, so that the last to be finished are small.
  std::vector<int> order;
  for (size_t i = 0; i < jobs.size(); ++i)
    if (jobs[i].rows > 0 && jobs[i].cols > 0) order.push_back(static_cast<int>(i));
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost(jobs[a]) > cost(jobs[b]); });

  double flops = 0.0, result_bytes = 0.0;
  for (int i : order) {
    flops += 6.0 * cost(jobs[i]);
    result_bytes += 4.0 * static_cast<double>(jobs[i].rows) * static_cast<double>(jobs[i].cols);
  }
  threads = static_cast<int>(std::max(1.0, std::min<double>(threads, flops / kFlopsPerThread)));
  const int apart = static_cast<int>(std::min<size_t>(order.size(), static_cast<size_t>(threads)));
  threads = std::max(apart, static_cast<int>(std::min<double>(threads, flops / engine.least_shared_flops)));
  const int sharing = apart == threads ? 1 : threads;

  struct Known {
    const Options* options;
    Program program;
  };
  std::deque<Known> known;
  std::vector<const Program*> programs(jobs.size());
  size_t largest = 0;
  for (int i : order) {
    const Job& job = jobs[i];
    const int m_blocks = block_count(std::min(job.rows, job.cols)),
              n_blocks = block_count(std::max(job.rows, job.cols));
    const auto same = [&](const Known& k) {
      return k.program.m_blocks == m_blocks && k.program.n_blocks == n_blocks && k.options == job.options;
    };
    auto found = std::find_if(known.begin(), known.end(), same);
    if (found == known.end()) {
      known.push_back({job.options, Program(job.rows, job.cols, *job.options, sharing)});
      found = known.end() - 1;
      largest = std::max(largest, workspace_bytes(found->program));
    }
    programs[i] = &found->program;
  }
  if (order.empty()) return;

  const size_t num_slots =
      std::min({order.size(), static_cast<size_t>(threads), std::max<size_t>(1, kWorkspaceBytes / largest)});
  while (workspaces_.size() < num_slots) workspaces_.push_back(std::make_unique<Buffer>());
  while (scratch_.size() < static_cast<size_t>(threads)) scratch_.push_back(std::make_unique<Buffer>());
  for (size_t s = 0; s < num_slots; ++s) workspaces_[s]->at_least(largest);
  for (int t = 0; t < threads; ++t) scratch_[t]->at_least(kScratchBytes);

  std::deque<Slot> slots(num_slots);
  std::atomic<size_t> next_job{0};
  std::atomic<size_t> left{order.size()};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  const auto open = [&](size_t s) {
    if (next_job.load(std::memory_order_relaxed) >= order.size()) return false;
    const size_t k = next_job.fetch_add(1);
    if (k >= order.size()) return false;
    Slot& slot = slots[s];
    Work& work = slot.work;
    const Job& job = jobs[order[k]];
    const bool tall = job.rows > job.cols;
    work = Work();
    work.job = &job;
    work.program = programs[order[k]];
    work.operands = place(*work.program, workspaces_[s]->at_least(0));
    work.m = std::min(job.rows, job.cols);
    work.n = std::max(job.rows, job.cols);
    work.in = tall ? job.in.transposed() : job.in;
    work.out = tall ? job.out.transposed() : job.out;
    work.buffer = tall ? job.muon.buffer.transposed() : job.muon.buffer;
    work.past_caches = result_bytes > kCachedBytes;
    slot.done.store(0, std::memory_order_relaxed);
    slot.open.store(true, std::memory_order_relaxed);
    slot.begin(0);
    return true;
  };

  // Whether there was a task to do.
  const auto help = [&](Slot& slot, char* scratch) {
    size_t index;
    int task;
    if (!slot.claim(&index, &task)) return false;
    const std::vector<Step>& steps = slot.work.program->steps;
    engine.run(slot.work, steps[index], task, scratch);
    if (slot.done.fetch_add(1, std::memory_order_acq_rel) + 1 < steps[index].tasks) return true;
    if (steps[index].phase == Phase::norm && set_scales(slot.work)) ++index;
    slot.done.store(0, std::memory_order_relaxed);
    if (index + 1 < steps.size()) {
      slot.begin(index + 1);
    } else {
      slot.open.store(false, std::memory_order_release);
      left.fetch_sub(1, std::memory_order_acq_rel);
    }
    return true;
  };

#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const size_t thread = omp_get_thread_num();
#else
    const size_t thread = 0;
#endif
    char* const scratch = scratch_[thread]->at_least(0);
    engine.enter();
    // An exception that left the region would end the process: the first one is kept, and the others stop.
    try {
      int idle = 0;
      while (left.load(std::memory_order_acquire) > 0 && !failed.load(std::memory_order_relaxed)) {
        if (thread < num_slots && !slots[thread].open.load(std::memory_order_acquire) && open(thread)) continue;
        bool worked = false;
        for (size_t s = 0; s < num_slots && !worked; ++s) worked = help(slots[(thread + s) % num_slots], scratch);
        idle = worked ? 0 : idle + 1;
        if (idle > kSpins) std::this_thread::yield();
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    engine.leave();
  }
  size_t kept = 0;
  for (const auto& workspace : workspaces_) {
    if (kept + workspace->bytes() > kept_bytes_) workspace->release();
    kept += workspace->bytes();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace stepladder::newton_schulz
