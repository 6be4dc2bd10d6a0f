// Transposition of padded matrices.
#pragma once

#include "vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

// out [cols, ld_out] = in [rows, ld_in] transposed. Padding of `out` beyond `rows` is not written,
// but for whole vectors of the fast version, which take zeros from the padding of `in`. Nothing is
// read beyond column ld_in: `in` may be a tensor of the caller's, without padding.
template <class R>
void transpose(int rows, int cols, const R* in, long ld_in, R* out, long ld_out) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) out[c * ld_out + r] = in[r * ld_in + c];
}

#if FASTMETA_VECTOR_BYTES >= 32
// Blocks of 8 x 8 in 256-bit registers: half rows are joined while they are loaded, so that every
// shuffle stays inside its 128-bit lane.
template <>
void transpose<float>(int rows, int cols, const float* in, long ld_in, float* out, long ld_out) {
  typedef float quad __attribute__((vector_size(16), aligned(4)));
  typedef float oct __attribute__((vector_size(32)));
  typedef float oct_unaligned __attribute__((vector_size(32), aligned(4)));
  const auto pair = [](const float* low, const float* high) {
    return __builtin_shufflevector(*reinterpret_cast<const quad*>(low),
                                   *reinterpret_cast<const quad*>(high), 0, 1, 2, 3, 4, 5, 6, 7);
  };
  for (int c = 0; c < cols; c += 8) {
    const int whole = c + 8 <= ld_in ? rows / 8 * 8 : 0;
    for (int r = 0; r < whole; r += 8) {
      const float* block = in + r * ld_in + c;
      oct t[8];
      FASTMETA_UNROLL for (int half = 0; half < 2; half++) {
        oct a[4];
        FASTMETA_UNROLL for (int i = 0; i < 4; i++) {
          a[i] = pair(block + i * ld_in + 4 * half, block + (i + 4) * ld_in + 4 * half);
        }
        const oct low01 = __builtin_shufflevector(a[0], a[1], 0, 8, 1, 9, 4, 12, 5, 13);
        const oct high01 = __builtin_shufflevector(a[0], a[1], 2, 10, 3, 11, 6, 14, 7, 15);
        const oct low23 = __builtin_shufflevector(a[2], a[3], 0, 8, 1, 9, 4, 12, 5, 13);
        const oct high23 = __builtin_shufflevector(a[2], a[3], 2, 10, 3, 11, 6, 14, 7, 15);
        t[4 * half + 0] = __builtin_shufflevector(low01, low23, 0, 1, 8, 9, 4, 5, 12, 13);
        t[4 * half + 1] = __builtin_shufflevector(low01, low23, 2, 3, 10, 11, 6, 7, 14, 15);
        t[4 * half + 2] = __builtin_shufflevector(high01, high23, 0, 1, 8, 9, 4, 5, 12, 13);
        t[4 * half + 3] = __builtin_shufflevector(high01, high23, 2, 3, 10, 11, 6, 7, 14, 15);
      }
      const int columns = cols - c < 8 ? cols - c : 8;
      for (int i = 0; i < columns; i++)
        *reinterpret_cast<oct_unaligned*>(out + (c + i) * ld_out + r) = t[i];
    }
    for (int r = whole; r < rows; r++)
      for (int i = c; i < cols && i < c + 8; i++) out[i * ld_out + r] = in[r * ld_in + i];
  }
}
#endif

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
