// BatchNorm over the rows of one task, with the statistics of those rows (biased variance):
//
//   xhat = (z - mean(z)) s,   s = (var(z) + eps)^(-1/2),   y = gamma xhat + beta
//
// Columns are independent, so each vector of columns is carried through all rows.
#pragma once

#include "../math.h"
#include "../vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

template <class R>
struct BatchNormArgs {
  int rows;
  int cols;
  long ld;
  const R* gamma;  // null: one
  R* xhat;         // [rows, ld], kept
  R* inverse_std;  // [ld], kept
};

template <class R>
FASTMETA_INLINE V<R> gamma_at(const R* gamma, long j) {
  return gamma != nullptr ? load(gamma + j) : splat(R(1));
}

// value: z on entry, y on return.
template <class R>
void batch_norm_forward(const BatchNormArgs<R>& args, const R* beta, R eps, R* value) {
  const R share = R(1) / args.rows;
  for (long j = 0; j < args.cols; j += Vec<R>::width) {
    V<R> mean = V<R>{}, var = V<R>{};
    for (int r = 0; r < args.rows; r++) mean += load(value + r * args.ld + j);
    mean *= share;
    for (int r = 0; r < args.rows; r++) {
      const V<R> c = load(value + r * args.ld + j) - mean;
      var += c * c;
    }
    V<R> s = var * share + eps;
    for (int i = 0; i < Vec<R>::width; i++)  // eps may be 0, and the padding must stay zero
      s[i] = j + i < args.cols ? R(1) / Math<R>::sqrt(s[i]) : R(0);
    store(args.inverse_std + j, s);
    const V<R> gamma = gamma_at(args.gamma, j);
    const V<R> shift = beta != nullptr ? load(beta + j) : V<R>{};
    for (int r = 0; r < args.rows; r++) {
      const V<R> x = (load(value + r * args.ld + j) - mean) * s;
      store(args.xhat + r * args.ld + j, x);
      store(value + r * args.ld + j, gamma * x + shift);
    }
  }
}

// dz = s (g - mean(g) - xhat mean(g xhat)) with g = gamma dy.
template <class R>
void batch_norm_vjp(const BatchNormArgs<R>& args, const R* dy, R* dz) {
  const R share = R(1) / args.rows;
  for (long j = 0; j < args.cols; j += Vec<R>::width) {
    const V<R> gamma = gamma_at(args.gamma, j), s = load(args.inverse_std + j);
    V<R> a = V<R>{}, b = V<R>{};
    for (int r = 0; r < args.rows; r++) {
      const V<R> g = gamma * load(dy + r * args.ld + j);
      a += g;
      b += g * load(args.xhat + r * args.ld + j);
    }
    a *= share;
    b *= share;
    for (int r = 0; r < args.rows; r++) {
      const V<R> g = gamma * load(dy + r * args.ld + j);
      store(dz + r * args.ld + j, s * (g - a - load(args.xhat + r * args.ld + j) * b));
    }
  }
}

// into = base + scale * sum over rows of (d1 x1 + d2 x2); x null means one, d2 null drops the term.
template <class R>
void weighted_column_sum(const BatchNormArgs<R>& args, const R* d1, const R* x1, const R* d2,
                         const R* x2, R scale, const R* base, R* into) {
  for (long j = 0; j < args.cols; j += Vec<R>::width) {
    V<R> sum = V<R>{};
    for (int r = 0; r < args.rows; r++) {
      const long at = r * args.ld + j;
      sum += x1 != nullptr ? load(d1 + at) * load(x1 + at) : load(d1 + at);
      if (d2 != nullptr) sum += load(d2 + at) * load(x2 + at);
    }
    sum *= splat(scale);
    store(into + j, base != nullptr ? load(base + j) + sum : sum);
  }
}

// rxhat = s (rz - mean(rz) - xhat q), q = mean(xhat rz); ry = rgamma xhat + gamma rxhat + rbeta.
// rz may be null (zero); `value` holds rz on entry and ry on return.
template <class R>
void batch_norm_r_forward(const BatchNormArgs<R>& args, bool has_rz, const R* rgamma,
                          const R* rbeta, R* value, R* rxhat, R* q_out) {
  const R share = R(1) / args.rows;
  for (long j = 0; j < args.cols; j += Vec<R>::width) {
    const V<R> gamma = gamma_at(args.gamma, j), s = load(args.inverse_std + j);
    V<R> mean = V<R>{}, q = V<R>{};
    if (has_rz) {
      for (int r = 0; r < args.rows; r++) {
        const V<R> rz = load(value + r * args.ld + j);
        mean += rz;
        q += rz * load(args.xhat + r * args.ld + j);
      }
      mean *= share;
      q *= share;
    }
    store(q_out + j, q);
    const V<R> rscale = rgamma != nullptr ? load(rgamma + j) : V<R>{};
    const V<R> rshift = rbeta != nullptr ? load(rbeta + j) : V<R>{};
    for (int r = 0; r < args.rows; r++) {
      const long at = r * args.ld + j;
      const V<R> x = load(args.xhat + at);
      const V<R> rx = has_rz ? s * (load(value + at) - mean - x * q) : V<R>{};
      store(rxhat + at, rx);
      store(value + at, rscale * x + gamma * rx + rshift);
    }
  }
}

// With g = gamma dy, rg = rgamma dy + gamma rdy, a = mean(g), b = mean(g xhat), as in the VJP
// dz = s (g - a - xhat b):
//   rdz = -s q dz + s (rg - mean(rg) - rxhat b - xhat mean(rg xhat + g rxhat)).
// dz is made again: the VJP's may have passed through a gate in place since.
template <class R>
void batch_norm_r_vjp(const BatchNormArgs<R>& args, const R* rgamma, const R* q_in, const R* rxhat,
                      const R* dy, const R* rdy, R* rdz) {
  const R share = R(1) / args.rows;
  for (long j = 0; j < args.cols; j += Vec<R>::width) {
    const V<R> gamma = gamma_at(args.gamma, j), s = load(args.inverse_std + j), q = load(q_in + j);
    const V<R> rscale = rgamma != nullptr ? load(rgamma + j) : V<R>{};
    V<R> a = V<R>{}, b = V<R>{}, ra = V<R>{}, rb = V<R>{};
    for (int r = 0; r < args.rows; r++) {
      const long at = r * args.ld + j;
      const V<R> d = load(dy + at), x = load(args.xhat + at);
      const V<R> g = gamma * d, rg = rscale * d + gamma * load(rdy + at);
      a += g;
      b += g * x;
      ra += rg;
      rb += rg * x + g * load(rxhat + at);
    }
    a *= share;
    b *= share;
    ra *= share;
    rb *= share;
    for (int r = 0; r < args.rows; r++) {
      const long at = r * args.ld + j;
      const V<R> x = load(args.xhat + at);
      const V<R> dz = s * (gamma * load(dy + at) - a - x * b);
      const V<R> rg = rscale * load(dy + at) + gamma * load(rdy + at);
      store(rdz + at, s * (rg - ra - load(rxhat + at) * b - x * rb - q * dz));
    }
  }
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
