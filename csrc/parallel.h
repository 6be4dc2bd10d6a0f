// A team of threads with barriers: OpenMP's, so that PyTorch's thread count governs it, or plain
// threads, for compilers without OpenMP and for the thread sanitizer, which does not know libgomp.
#pragma once

#ifdef FASTMETA_STD_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace fastmeta {

#ifdef FASTMETA_STD_THREADS

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long round = round_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      round_++;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return round_ != round; });
  }

 private:
  const int size_;
  int waiting_ = 0;
  long round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

// body(thread, threads, barrier) on every thread of the team.
template <class Body>
void on_team(int threads, const Body& body) {
  Barrier barrier(threads);
  const auto wait = [&] { barrier.wait(); };
  std::vector<std::thread> team;
  for (int i = 1; i < threads; i++) team.emplace_back([&, i] { body(i, threads, wait); });
  body(0, threads, wait);
  for (std::thread& member : team) member.join();
}

#else

template <class Body>
void on_team(int threads, const Body& body) {
  if (threads == 1) {
    body(0, 1, [] {});
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    body(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
  }
}

#endif

}  // namespace fastmeta
