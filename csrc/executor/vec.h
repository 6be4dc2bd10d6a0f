// Fixed-width vectors through the compiler's vector extension: one source for every instruction set.
#pragma once

#define FASTMETA_INLINE inline __attribute__((always_inline))
#define FASTMETA_UNROLL _Pragma("GCC unroll 16")

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

template <class R>
struct Vec {
  static constexpr int width = FASTMETA_VECTOR_BYTES / int(sizeof(R));
  typedef R type __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
  typedef R unaligned __attribute__((vector_size(FASTMETA_VECTOR_BYTES), aligned(sizeof(R))));
};

template <class R>
using V = typename Vec<R>::type;

template <class R>
FASTMETA_INLINE V<R> load(const R* p) {
  return *reinterpret_cast<const typename Vec<R>::unaligned*>(p);
}

template <class R>
FASTMETA_INLINE void store(R* p, V<R> v) {
  *reinterpret_cast<typename Vec<R>::unaligned*>(p) = v;
}

template <class R>
FASTMETA_INLINE V<R> splat(R value) {
  return value - V<R>{};  // x - 0 is x for every x, so the compiler broadcasts from memory
}

// Integers as wide as R, for masks and shuffles.
template <class R>
struct Lane;
template <>
struct Lane<float> {
  typedef int integer;
};
template <>
struct Lane<double> {
  typedef long long integer;
};
template <class R>
struct Lanes {
  typedef typename Lane<R>::integer integer;
  typedef integer type __attribute__((vector_size(FASTMETA_VECTOR_BYTES)));
};

// The sum of all lanes, as a fixed binary tree.
template <class R>
FASTMETA_INLINE R lane_sum(V<R> v) {
  constexpr int W = Vec<R>::width;
  FASTMETA_UNROLL for (int half = W / 2; half > 0; half /= 2) {
    typename Lanes<R>::type other;
    FASTMETA_UNROLL for (int i = 0; i < W; i++) other[i] = i ^ half;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}

// The sums of four vectors in 9 shuffles instead of 16: pairs are interleaved while they are added.
FASTMETA_INLINE void four_lane_sums(const V<float>* v, float* sums) {
  constexpr int W = Vec<float>::width;
  Lanes<float>::type low, high, low_pair, high_pair;
  FASTMETA_UNROLL for (int i = 0; i < W; i++) {
    const int lane = i / 4 * 4, at = i % 4;
    low[i] = lane + at / 2 + at % 2 * W;  // a0 b0 a1 b1 of every 128 bits
    high[i] = low[i] + 2;
    low_pair[i] = lane + at % 2 + at / 2 * W;  // of ab and cd: ab ab cd cd
    high_pair[i] = low_pair[i] + 2;
  }
  const V<float> ab = __builtin_shuffle(v[0], v[1], low) + __builtin_shuffle(v[0], v[1], high);
  const V<float> cd = __builtin_shuffle(v[2], v[3], low) + __builtin_shuffle(v[2], v[3], high);
  V<float> abcd =
      __builtin_shuffle(ab, cd, low_pair) + __builtin_shuffle(ab, cd, high_pair);
  FASTMETA_UNROLL for (int half = W / 2; half >= 4; half /= 2) {
    Lanes<float>::type other;
    FASTMETA_UNROLL for (int i = 0; i < W; i++) other[i] = i ^ half;
    abcd += __builtin_shuffle(abcd, other);
  }
  FASTMETA_UNROLL for (int i = 0; i < 4; i++) sums[i] = abcd[i];
}
FASTMETA_INLINE void four_lane_sums(const V<double>* v, double* sums) {
  for (int i = 0; i < 4; i++) sums[i] = lane_sum<double>(v[i]);
}

template <class R>
constexpr long round_up(long n) {
  return (n + Vec<R>::width - 1) / Vec<R>::width * Vec<R>::width;
}

// Leading dimension of a padded matrix. A stride that is a multiple of 512 bytes maps a column of
// vectors onto a few cache sets, so one vector is added.
template <class R>
constexpr long leading(long cols) {
  long ld = round_up<R>(cols);
  return ld * long(sizeof(R)) % 512 == 0 ? ld + Vec<R>::width : ld;
}

template <class R>
void fill_zero(R* p, long n) {
  __builtin_memset(p, 0, n * sizeof(R));
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
