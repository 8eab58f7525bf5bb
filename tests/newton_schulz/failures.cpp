// CpuIteration with a unit whose tasks do nothing but be counted, and may throw. Links against cpu_iteration.cpp alone.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "newton_schulz/cpu_iteration.h"

using namespace stepladder::newton_schulz;

namespace {

constexpr int kThreads = 4, kJobs = 6;
std::atomic<int> tasks{0}, entered{0}, left{0};
// The number of the first task that throws, and of those that do.
int first_failing = -1, failing = 0;

void run(const Work& work, const Step& step, int task, char*) {
  const int number = tasks.fetch_add(1);
  if (step.phase == Phase::norm) work.operands.partials[task] = 1.0;
  std::this_thread::sleep_for(std::chrono::microseconds(200));
  if (number < first_failing || number >= first_failing + failing) return;
  if (number == first_failing) throw std::bad_alloc();
  throw std::runtime_error("another");
}

const Engine engine = {"counted", 1.0, [] { ++entered; }, [] { ++left; }, run};

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s (%d tasks, %d entered, %d left)\n", what, tasks.load(), entered.load(), left.load());
  std::exit(1);
}

int expected_tasks(const Options& options, int64_t rows, int64_t cols) {
  int sum = 0;
  // A matrix of such a norm is packed along with the norm.
  for (const Step& step : Program(rows, cols, options, 1).steps) sum += step.phase == Phase::pack ? 0 : step.tasks;
  return sum;
}

}  // namespace

int main() {
  Options options;
  options.steps.assign(5, {3.4445, -4.7750, 2.0315});
  options.gram = true;
  std::vector<Job> jobs(kJobs);
  for (Job& job : jobs) {
    job.rows = 128;
    job.cols = 256;
    job.options = &options;
  }
  const int all = kJobs * expected_tasks(options, 128, 256);
  CpuIteration iteration(size_t{1} << 28);

  // One task that throws, early and late; then all of them, in every thread at once.
  for (const auto [first, count] : {std::pair{0, 1}, {all / 2, 1}, {all - 1, 1}, {10, all}}) {
    first_failing = first;
    failing = count;
    tasks = entered = left = 0;
    bool caught = false;
    try {
      iteration.run(jobs, engine, kThreads);
    } catch (const std::bad_alloc&) {
      caught = true;
    } catch (const std::runtime_error&) {
      caught = count > 1;  // whichever thread was first to throw
    }
    check(caught, "the exception reaches the caller");
    check(entered == kThreads && left == kThreads, "every thread leaves");
    // Others may be in a task, or have looked just before.
    check(tasks <= first + 1 + 2 * kThreads, "the others stop");

    failing = 0;
    tasks = 0;
    iteration.run(jobs, engine, kThreads);
    check(tasks == all, "the next call runs every task");
  }
  std::puts("ok");
}
