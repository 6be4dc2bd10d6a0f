#include "gather_rows.h"

#include "../parallel.h"

namespace fastmeta {
namespace {

// The rows of a table larger than the cache arrive at random: ask for one while others convert.
constexpr std::int64_t kAhead = 4;
constexpr std::int64_t kLine = 64;

void prefetch(const std::uint8_t* row, std::int64_t width) {
  for (std::int64_t j = 0; j < width; j += kLine) __builtin_prefetch(row + j);
}

}  // namespace

void gather_rows(const std::uint8_t* table, std::int64_t width, const std::int64_t* rows,
                 std::int64_t n, float divisor, float* out, int threads) {
  on_team(threads, [&](int thread, int team, const auto&) {
    const std::int64_t end = n * (thread + 1) / team;
    for (std::int64_t i = n * thread / team; i < end; ++i) {
      if (i + kAhead < end) prefetch(table + rows[i + kAhead] * width, width);
      const std::uint8_t* from = table + rows[i] * width;
      float* to = out + i * width;
      // Divided, not multiplied by the reciprocal: the same bits as torch's division.
      for (std::int64_t j = 0; j < width; ++j) to[j] = static_cast<float>(from[j]) / divisor;
    }
  });
}

}  // namespace fastmeta
