// The one matrix product of the executor, over register tiles of compile-time size:
//
//   C[r, :] = base[r, :] + scale * sum_products sum_k a(r, k) * B[k, :]
//
// with a(r, k) = a[r * row + k * step], so that A and its transpose are the same kernel. Columns
// run in whole vectors: B, C and base are padded to the vector width. The sum over k has one order
// whatever the tiling, so that results do not depend on how rows are grouped.
#pragma once

#include "vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

template <class R>
struct Product {
  const R* a;
  long row;
  long step;
  const R* b;
  long ldb;
  int depth;
};

template <class R>
FASTMETA_INLINE Product<R> plain(const R* a, long lda, const R* b, long ldb, int depth) {
  return {a, lda, 1, b, ldb, depth};
}

template <class R>
FASTMETA_INLINE Product<R> transposed(const R* a, long lda, const R* b, long ldb, int depth) {
  return {a, 1, lda, b, ldb, depth};
}

enum class Post { none, relu, gate };

// What happens to a tile before it is stored: nothing, max(0, .), or zero where `gate` is not positive.
template <class R>
struct Epilogue {
  Post post = Post::none;
  const R* gate = nullptr;
  long ld_gate = 0;
};

#if FASTMETA_VECTOR_BYTES == 64
constexpr int kTileRows[4] = {12, 12, 8, 6};  // by vectors a row; 32 vector registers
#else
constexpr int kTileRows[4] = {8, 5, 4, 3};    // 16 vector registers
#endif
constexpr int kTileVectors = 4;
constexpr int kMaxTileRows = 12;
constexpr int kDepthBlock = 256;  // of B's rows at a time: a panel of B stays in the first cache

template <class R>
struct TileArgs {
  const Product<R>* products;
  int count;
  R scale;
  const R* base;
  long ld_base;
  R* c;
  long ldc;
  Epilogue<R> epilogue;
};

template <class R, int Rows, int Vectors>
void tile(const TileArgs<R>& args, long row0, long col0) {
  constexpr int W = Vec<R>::width;
  V<R> acc[Rows][Vectors];
  FASTMETA_UNROLL for (int r = 0; r < Rows; r++)
    FASTMETA_UNROLL for (int j = 0; j < Vectors; j++) acc[r][j] = V<R>{};
  for (int p = 0; p < args.count; p++) {
    const Product<R>& product = args.products[p];
    const long row = product.row, step = product.step, ldb = product.ldb;
    const R* a = product.a + row0 * row;
    const R* b = product.b + col0;
    for (int k = product.depth; k > 0; k--) {
      V<R> w[Vectors];
      FASTMETA_UNROLL for (int j = 0; j < Vectors; j++) w[j] = load(b + j * W);
      FASTMETA_UNROLL for (int r = 0; r < Rows; r++) {
        V<R> x = splat(a[r * row]);
        FASTMETA_UNROLL for (int j = 0; j < Vectors; j++) acc[r][j] += x * w[j];
      }
      a += step;
      b += ldb;
    }
  }
  const V<R> scale = splat(args.scale);
  R* c = args.c + row0 * args.ldc + col0;
  if (args.base != nullptr) {
    const R* base = args.base + row0 * args.ld_base + col0;
    FASTMETA_UNROLL for (int r = 0; r < Rows; r++)
      FASTMETA_UNROLL for (int j = 0; j < Vectors; j++)
        acc[r][j] = load(base + r * args.ld_base + j * W) + scale * acc[r][j];
  } else if (args.scale != R(1)) {
    FASTMETA_UNROLL for (int r = 0; r < Rows; r++)
      FASTMETA_UNROLL for (int j = 0; j < Vectors; j++) acc[r][j] *= scale;
  }
  if (args.epilogue.post == Post::relu) {
    FASTMETA_UNROLL for (int r = 0; r < Rows; r++)
      FASTMETA_UNROLL for (int j = 0; j < Vectors; j++)
        acc[r][j] = acc[r][j] < R(0) ? V<R>{} : acc[r][j];  // keeps NaN, as torch does
  } else if (args.epilogue.post == Post::gate) {
    const R* gate = args.epilogue.gate + row0 * args.epilogue.ld_gate + col0;
    FASTMETA_UNROLL for (int r = 0; r < Rows; r++)
      FASTMETA_UNROLL for (int j = 0; j < Vectors; j++)
        acc[r][j] = load(gate + r * args.epilogue.ld_gate + j * W) <= R(0) ? V<R>{} : acc[r][j];
  }
  FASTMETA_UNROLL for (int r = 0; r < Rows; r++)
    FASTMETA_UNROLL for (int j = 0; j < Vectors; j++) store(c + r * args.ldc + j * W, acc[r][j]);
}

template <class R, int Vectors>
FASTMETA_INLINE void tile_of_rows(int rows, const TileArgs<R>& args, long row0, long col0) {
  switch (rows) {
#define FASTMETA_TILE(n)                                                            \
  case n:                                                                           \
    if constexpr (n <= kTileRows[Vectors - 1]) tile<R, n, Vectors>(args, row0, col0); \
    break;
    FASTMETA_TILE(1)
    FASTMETA_TILE(2)
    FASTMETA_TILE(3)
    FASTMETA_TILE(4)
    FASTMETA_TILE(5)
    FASTMETA_TILE(6)
    FASTMETA_TILE(7)
    FASTMETA_TILE(8)
    FASTMETA_TILE(9)
    FASTMETA_TILE(10)
    FASTMETA_TILE(11)
    FASTMETA_TILE(12)
#undef FASTMETA_TILE
  }
}

// Rows are cut into tiles of nearly equal height: 10 rows are 5 + 5, not 8 + 2.
template <class R, int Vectors>
void panel(int rows, const TileArgs<R>& args, long col0) {
  const int tallest = kTileRows[Vectors - 1];
  if (rows <= tallest) {
    tile_of_rows<R, Vectors>(rows, args, 0, col0);
    return;
  }
  const int tiles = (rows + tallest - 1) / tallest;
  const int low = rows / tiles, taller = rows % tiles;
  long row0 = 0;
  for (int i = 0; i < tiles; i++) {
    const int height = low + (i < taller);
    tile_of_rows<R, Vectors>(height, args, row0, col0);
    row0 += height;
  }
}

template <class R>
void columns(int rows, int cols, const TileArgs<R>& args) {
  int vectors = int(round_up<R>(cols)) / Vec<R>::width;
  long col0 = 0;
  while (vectors > 0) {
    // 5 vectors are 3 + 2, not 4 + 1: a panel of one vector has the least reuse.
    const int take = vectors <= kTileVectors ? vectors : vectors == 5 ? 3 : kTileVectors;
    switch (take) {
      case 1: panel<R, 1>(rows, args, col0); break;
      case 2: panel<R, 2>(rows, args, col0); break;
      case 3: panel<R, 3>(rows, args, col0); break;
      default: panel<R, 4>(rows, args, col0); break;
    }
    vectors -= take;
    col0 += long(take) * Vec<R>::width;
  }
}

// The general product. `products` may hold up to `count` terms; base may be null (zero), and may
// be C itself; ld_base of zero repeats one row (a bias).
template <class R>
void gemm(int rows, int cols, const Product<R>* products, int count, R scale, const R* base,
          long ld_base, R* c, long ldc, Epilogue<R> epilogue = {}) {
  if (rows == 0 || cols == 0) return;
  bool shallow = true;
  for (int p = 0; p < count; p++) shallow = shallow && products[p].depth <= kDepthBlock;
  if (shallow) {
    columns<R>(rows, cols, {products, count, scale, base, ld_base, c, ldc, epilogue});
    return;
  }
  while (products[count - 1].depth == 0) count--;  // some product is deep
  bool first = true;
  for (int p = 0; p < count; p++) {
    for (int k = 0; k < products[p].depth; k += kDepthBlock) {
      Product<R> block = products[p];
      const int left = block.depth - k;
      block.depth = left < kDepthBlock ? left : kDepthBlock;
      block.a += k * block.step;
      block.b += k * block.ldb;
      const bool last = p == count - 1 && left <= kDepthBlock;
      columns<R>(rows, cols, {&block, 1, scale, first ? base : c, first ? ld_base : ldc, c, ldc,
                              last ? epilogue : Epilogue<R>{}});
      first = false;
    }
  }
}

// out[r, o] = bias[o] + sum_products dot(a[r, :], b[o, :]) for a few columns: both operands run
// along k, which vectors over the columns would leave mostly empty. Rows of a and b are padded with
// zeros, and so are those of c.
template <class R>
struct Dots {
  const R* a;
  long lda;
  const R* b;
  long ldb;
};

template <class R, int Rows>
FASTMETA_INLINE void narrow_rows(int row0, int o, int depth, const Dots<R>* dots, int count,
                                 const R* bias, R* c, long ldc) {
  V<R> sum[4];
  FASTMETA_UNROLL for (int r = 0; r < 4; r++) sum[r] = V<R>{};
  for (int p = 0; p < count; p++) {
    const R* a = dots[p].a + row0 * dots[p].lda;
    const R* b = dots[p].b + o * dots[p].ldb;
    for (int k = 0; k < depth; k += Vec<R>::width) {
      const V<R> w = load(b + k);
      FASTMETA_UNROLL for (int r = 0; r < Rows; r++) sum[r] += load(a + r * dots[p].lda + k) * w;
    }
  }
  R sums[4];
  four_lane_sums(sum, sums);
  const R shift = bias != nullptr ? bias[o] : R(0);
  FASTMETA_UNROLL for (int r = 0; r < Rows; r++) c[(row0 + r) * ldc + o] = sums[r] + shift;
}

template <class R>
void narrow(int rows, int cols, int depth, const Dots<R>* dots, int count, const R* bias, R* c,
            long ldc) {
  for (int r = 0; r < rows; r++) fill_zero(c + r * ldc, ldc);
  for (int o = 0; o < cols; o++) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) narrow_rows<R, 4>(r, o, depth, dots, count, bias, c, ldc);
    for (; r < rows; r++) narrow_rows<R, 1>(r, o, depth, dots, count, bias, c, ldc);
  }
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
