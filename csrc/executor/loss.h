// The loss of one task, L = factor / divisor * sum_n w_n l_n, its gradient with respect to the
// output, and the R-rule of that gradient.
#pragma once

#include "../program.h"
#include "math.h"
#include "vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

// c_n = factor w_n / divisor. Returns the row count as `rows` weights of one when `weight` is null.
template <class R>
void row_coefficients(const Loss& loss, const R* weight, int rows, R* coefficient) {
  R total = 0;
  for (int n = 0; n < rows; n++) total += weight != nullptr ? weight[n] : R(1);
  const R each = loss.mean_over_rows ? R(loss.factor) / total : R(loss.factor);
  for (int n = 0; n < rows; n++) coefficient[n] = weight != nullptr ? each * weight[n] : each;
}

template <class R>
struct LossArgs {
  int rows;
  const R* weight;  // [rows]; null: ones
  int cols;
  long ld;
  const R* coefficient;  // [rows]
  const R* output;       // [rows, ld]
  R* probability;        // [rows, ld], kept (cross-entropy)
  R* gradient;           // [rows, ld], kept
};

template <class R>
struct LossValue {
  R loss;
  R accuracy;
};

// l_n = sum_d (o_nd - y_nd)^2.
template <class R>
LossValue<R> mse(const LossArgs<R>& args, const R* target) {
  R loss = 0;
  for (int n = 0; n < args.rows; n++) {
    const R c = args.coefficient[n];
    const R* o = args.output + n * args.ld;
    const R* y = target + long(n) * args.cols;
    R* d = args.gradient + n * args.ld;
    R row = 0;
    for (int j = 0; j < args.cols; j++) {
      const R difference = o[j] - y[j];
      row += difference * difference;
      d[j] = 2 * c * difference;
    }
    loss += c * row;
  }
  return {loss, 0};
}

// l_n = log sum_j exp(o_nj) - o_n,y(n); d = c (p - onehot).
template <class R>
LossValue<R> cross_entropy(const LossArgs<R>& args, const long long* label) {
  constexpr int W = Vec<R>::width;
  R loss = 0, hits = 0, weights = 0;
  for (int n = 0; n < args.rows; n++) {
    const R c = args.coefficient[n];
    const R* o = args.output + n * args.ld;
    R* p = args.probability + n * args.ld;
    R* d = args.gradient + n * args.ld;
    R top = o[0];
    int best = 0;
    for (int j = 1; j < args.cols; j++) {
      if (o[j] > top) {
        top = o[j];
        best = j;
      }
    }
    R total = 0;
    for (int j = 0; j < args.cols; j += W) store(p + j, Math<R>::exp(load(o + j) - splat(top)));
    for (int j = 0; j < args.cols; j++) total += p[j];
    const R inverse = 1 / total;
    for (int j = 0; j < args.ld; j++) {
      p[j] = j < args.cols ? p[j] * inverse : R(0);
      d[j] = c * p[j];
    }
    d[label[n]] -= c;
    loss += c * (top + Math<R>::log(total) - o[label[n]]);
    const R weight = args.weight != nullptr ? args.weight[n] : R(1);
    hits += best == label[n] ? weight : R(0);
    weights += weight;
  }
  return {loss, hits / weights};
}

// R{d}: 2 c ro for the squared error, c (p ro - p (p . ro)) for cross-entropy. `ro` becomes rd.
template <class R>
void loss_r_vjp(LossKind kind, const LossArgs<R>& args, R* ro) {
  for (int n = 0; n < args.rows; n++) {
    const R c = args.coefficient[n];
    R* r = ro + n * args.ld;
    if (kind == LossKind::mse) {
      for (int j = 0; j < args.cols; j++) r[j] *= 2 * c;
      continue;
    }
    const R* p = args.probability + n * args.ld;
    R mean = 0;
    for (int j = 0; j < args.cols; j++) mean += p[j] * r[j];
    for (int j = 0; j < args.cols; j++) r[j] = c * p[j] * (r[j] - mean);
  }
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
