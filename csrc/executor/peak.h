// What "percent of peak" is a percentage of: multiply-adds on registers alone.
#pragma once

#include "vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

// Enough independent chains to hide the latency of two units; with the two constants they fit into
// 16 registers. Returns the floating-point operations done, two a multiply-add.
template <class R>
long fma_burst(long iterations) {
  constexpr int chains = 12;
  volatile R opaque = R(0.5);  // x = x / 2 + 1 tends to 2: neither overflow nor denormals
  const V<R> half = splat<R>(opaque), one = half + half;
  V<R> x[chains];
  for (int c = 0; c < chains; c++) x[c] = half * R(c);
  for (long i = 0; i < iterations; i++)
    FASTMETA_UNROLL for (int c = 0; c < chains; c++) x[c] = x[c] * half + one;
  V<R> sum = x[0];
  for (int c = 1; c < chains; c++) sum += x[c];
  opaque = lane_sum<R>(sum);
  return iterations * chains * Vec<R>::width * 2;
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
