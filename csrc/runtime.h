// Plans, threads and the reduction over tasks.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace fastmeta {

enum class Isa { baseline, avx2, avx512 };

std::vector<Isa> supported_isas();
Isa best_isa();
const char* isa_name(Isa isa);
Isa isa_of(const std::string& name);  // throws std::invalid_argument

// Multiply-adds on registers alone, on this thread; returns the floating-point operations done.
long fma_burst(Isa isa, bool is_double, long iterations);

// Consecutive tasks whose gradients are added one after the other; leaves are then added as a
// binary counter carries: whenever two finished subtrees have the same size they become one. The
// tree depends on the number of tasks alone, so that the sum has the same bits at any thread
// count, and for any chunk that is a power of two of leaves.
constexpr int kLeafTasks = 8;

// The least work that is worth a thread, for tests of many threads on little work. Returns what it
// was; must be above 0.
double set_work_per_thread(double multiply_adds);

struct FreeAligned {
  void operator()(char* p) const;
};
using Buffer = std::unique_ptr<char, FreeAligned>;
Buffer zeroed(long bytes);

class Executor {
 public:
  Executor(std::vector<Layer> layers, std::vector<Param> params, Plan dimensions, bool is_double,
           Isa isa);
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Throws std::invalid_argument for a label out of range. Not reentrant: one call at a time.
  void run(const Call& call, int threads);

  const Plan& plan() const { return plan_; }
  long workspace_bytes() const { return workspace_bytes_; }
  long gradient_bytes() const { return gradient_size_ * element_; }
  int leaves_in_flight(int threads) const;

 private:
  void check_labels(const Call& call) const;
  void reserve(int threads, int slots);
  template <class Barrier>
  void worker(struct Team& team, const Call& call, int thread, int threads,
              const Barrier& barrier);

  std::vector<Layer> layers_;
  std::vector<Param> params_;
  Plan plan_;
  const Kernels* kernels_;
  long element_;
  long workspace_bytes_;
  long gradient_size_;
  double work_per_task_;
  Buffer shared_;
  std::vector<Buffer> workspaces_;  // one a thread
  std::vector<Buffer> gradients_;   // leaves in flight, then the tree's levels
};

}  // namespace fastmeta
