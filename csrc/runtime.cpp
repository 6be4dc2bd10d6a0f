#include "runtime.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "isa/isa.h"
#include "parallel.h"

namespace fastmeta {

namespace {

struct IsaEntry {
  Isa isa;
  const char* name;
  const Kernels* single;
  const Kernels* twice;
};

const IsaEntry kIsas[] = {
    {Isa::baseline, "baseline", &baseline_float, &baseline_double},
#ifdef FASTMETA_X86
    {Isa::avx2, "avx2", &avx2_float, &avx2_double},
    {Isa::avx512, "avx512", &avx512_float, &avx512_double},
#endif
};

bool cpu_runs(Isa isa) {
#ifdef FASTMETA_X86
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

const IsaEntry& entry_of(Isa isa) {
  for (const IsaEntry& entry : kIsas)
    if (entry.isa == isa && cpu_runs(isa)) return entry;
  throw std::invalid_argument("this processor does not run the instruction set asked for");
}

}  // namespace

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (const IsaEntry& entry : kIsas)
    if (cpu_runs(entry.isa)) found.push_back(entry.isa);
  return found;
}

Isa best_isa() { return supported_isas().back(); }

const char* isa_name(Isa isa) { return entry_of(isa).name; }

Isa isa_of(const std::string& name) {
  std::string known;
  for (Isa isa : supported_isas()) {
    if (name == isa_name(isa)) return isa;
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("isa must be one of " + known + ", got '" + name + "'");
}

long fma_burst(Isa isa, bool is_double, long iterations) {
  const IsaEntry& entry = entry_of(isa);
  return (is_double ? entry.twice : entry.single)->fma_burst(iterations);
}

void FreeAligned::operator()(char* p) const { std::free(p); }

Buffer zeroed(long bytes) {
  const std::size_t size = (static_cast<std::size_t>(std::max(bytes, 1L)) + 63) / 64 * 64;
  char* p = static_cast<char*>(std::aligned_alloc(64, size));
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, size);
  return Buffer(p);
}

// What the threads of one call share.
struct Team {
  int leaves;
  int wave;
  std::atomic<int> next{0};
};

namespace {

// Multiply-adds of one task: a forward and backward pass over Q rows, and over S rows at each
// inner step, where the Hessian-vector product costs two more of each.
double work_of(const Plan& plan) {
  double weights = 0;
  for (int l = 0; l < plan.layer_count; l++)
    if (plan.layers[l].op == Op::linear) weights += double(plan.layers[l].in) * plan.layers[l].out;
  const double passes = plan.reverse && plan.second_order ? 9 : 3;
  return weights * (3.0 * plan.query_rows + passes * plan.steps * plan.support_rows);
}

// Waking a thread and waiting for it costs microseconds, and much more on a busy machine: each
// has at least this many multiply-adds to do, some tens of microseconds.
std::atomic<double> work_per_thread{1e6};

}  // namespace

namespace {

// OpenMP's threads do not survive a fork, and a team in the child would wait for them forever.
std::atomic<bool> in_forked_child{false};
const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

}  // namespace

double set_work_per_thread(double multiply_adds) { return work_per_thread.exchange(multiply_adds); }

Executor::Executor(std::vector<Layer> layers, std::vector<Param> params, Plan dimensions,
                   bool is_double, Isa isa)
    : layers_(std::move(layers)), params_(std::move(params)), plan_(dimensions) {
  plan_.layers = layers_.data();
  plan_.layer_count = static_cast<int>(layers_.size());
  plan_.params = params_.data();
  plan_.param_count = static_cast<int>(params_.size());
  const IsaEntry& entry = entry_of(isa);
  kernels_ = is_double ? entry.twice : entry.single;
  element_ = is_double ? 8 : 4;
  workspace_bytes_ = kernels_->workspace_bytes(plan_);
  gradient_size_ = plan_.reverse ? kernels_->gradient_size(plan_) : 0;
  work_per_task_ = work_of(plan_);
  shared_ = zeroed(kernels_->shared_bytes(plan_));
}

// Enough leaves at a time to keep the threads busy, as long as their gradients stay small.
int Executor::leaves_in_flight(int threads) const {
  int wave = 1;
  while (wave < threads) wave *= 2;
  while (wave < 16 * threads && 2 * wave * gradient_bytes() <= (2L << 20)) wave *= 2;
  return wave;
}

void Executor::reserve(int threads, int slots) {
  while (static_cast<int>(workspaces_.size()) < threads) {
    workspaces_.push_back(zeroed(workspace_bytes_));
    kernels_->workspace_init(plan_, workspaces_.back().get());
  }
  while (static_cast<int>(gradients_.size()) < slots)
    gradients_.push_back(zeroed(gradient_bytes()));
}

void Executor::check_labels(const Call& call) const {
  if (plan_.loss.kind != LossKind::cross_entropy) return;
  const auto masked = [&](const void* weight, long i) {
    if (weight == nullptr) return false;
    return element_ == 8 ? static_cast<const double*>(weight)[i] == 0
                         : static_cast<const float*>(weight)[i] == 0;
  };
  const auto check = [&](const void* labels, const void* weight, int rows, const char* name) {
    const long long* y = static_cast<const long long*>(labels);
    for (long i = 0; i < static_cast<long>(call.tasks) * rows; i++)
      if ((y[i] < 0 || y[i] >= plan_.outputs) && !masked(weight, i))
        throw std::invalid_argument(std::string(name) + " must hold labels from 0 to " +
                                    std::to_string(plan_.outputs - 1) + ", got " +
                                    std::to_string(y[i]) + " in task " + std::to_string(i / rows));
  };
  check(call.support_y, call.support_weight, plan_.support_rows, "support.y");
  if (plan_.query_rows > 0) check(call.query_y, call.query_weight, plan_.query_rows, "query.y");
}

void Executor::run(const Call& call, int threads) {
  check_labels(call);
  Team team;
  team.leaves = (call.tasks + kLeafTasks - 1) / kLeafTasks;
  const double worth = std::max(1.0, call.tasks * work_per_task_ / work_per_thread.load());
  if (worth < threads) threads = static_cast<int>(worth);
  threads = in_forked_child ? 1 : std::max(1, std::min(threads, team.leaves));
  team.wave = leaves_in_flight(threads);
  int levels = 1;
  while ((1 << levels) <= team.leaves) levels++;
  reserve(threads, plan_.reverse ? std::min(team.wave, team.leaves) + levels : 0);
  kernels_->pack_shared(plan_, call, shared_.get());
  if (threads == 1) {
    worker(team, call, 0, 1, [] {});
  } else {
    on_team(threads, [&](int thread, int size, const auto& barrier) {
      worker(team, call, thread, size, barrier);
    });
  }
}

// Every thread runs leaves as they come; after each wave every thread adds its own slice of
// elements through the same tree, so that the sum needs neither locks nor a fixed thread count.
template <class Barrier>
void Executor::worker(Team& team, const Call& call, int thread, int threads,
                      const Barrier& barrier) {
  const int slots = std::min(team.wave, team.leaves);
  std::vector<char*> leaf, level;  // the same swaps on every thread
  if (plan_.reverse) {
    for (int i = 0; i < slots; i++) leaf.push_back(gradients_[i].get());
    for (std::size_t i = slots; i < gradients_.size(); i++) level.push_back(gradients_[i].get());
  }
  const long from = gradient_size_ * thread / threads, to = gradient_size_ * (thread + 1) / threads;
  const auto add = [&](char* into, const char* other) {
    kernels_->add(into + from * element_, other + from * element_, to - from);
  };
  for (int first = 0; first < team.leaves; first += team.wave) {
    const int last = std::min(first + team.wave, team.leaves);
    for (int i = team.next.fetch_add(1); i < last; i = team.next.fetch_add(1))
      kernels_->run_leaf(plan_, call, shared_.get(), workspaces_[thread].get(), i * kLeafTasks,
                         std::min((i + 1) * kLeafTasks, call.tasks),
                         plan_.reverse ? leaf[i - first] : nullptr);
    barrier();
    if (thread == 0) team.next.store(last);
    for (int i = first; i < last && plan_.reverse; i++) {
      int height = 0;
      for (; (i >> height) & 1; height++) add(leaf[i - first], level[height]);
      std::swap(leaf[i - first], level[height]);
    }
    barrier();
  }
  if (!plan_.reverse) return;
  char* total = nullptr;
  for (int height = 0; (team.leaves >> height) > 0; height++) {
    if (!((team.leaves >> height) & 1)) continue;
    if (total != nullptr) add(level[height], total);
    total = level[height];
  }
  barrier();
  if (thread == 0) kernels_->unpack(plan_, call, total);
}

}  // namespace fastmeta
