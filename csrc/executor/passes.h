// Forward, backward, R-forward and R-backward of a program over the rows of one task.
#pragma once

#include "gemm.h"
#include "layers/activation.h"
#include "layers/batch_norm.h"
#include "loss.h"
#include "transpose.h"
#include "workspace.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

template <class R>
FASTMETA_INLINE const R* vector_of(const View<R>* views, int p) {
  return p >= 0 ? views[p].t : nullptr;
}

// The value that layer l reads, and its leading dimension.
template <class R>
struct Operand {
  const R* data;
  long ld;
};

template <class R>
Operand<R> input_of(const Geometry<R>& g, const Pass<R>& pass, int l) {
  if (l > 0) return {pass.out[l - 1], g.ld(g.layer(l).in)};
  if (pass.input != nullptr) return {pass.input, g.ld(g.layer(0).in)};
  return {pass.x, pass.ld_x};
}

template <class R>
BatchNormArgs<R> batch_norm_args(const Geometry<R>& g, const Pass<R>& pass, const View<R>* theta,
                                 int l) {
  const Layer& layer = g.layer(l);
  return {pass.rows, layer.out, g.ld(layer.out), vector_of(theta, layer.weight), pass.keep1[l],
          pass.keep2[l]};
}

template <class R>
LossArgs<R> loss_args(const Geometry<R>& g, const Pass<R>& pass) {
  const int last = g.plan->layer_count - 1;
  return {pass.rows,   pass.weight,    g.plan->outputs,  g.ld(g.plan->outputs),
          pass.coefficient, pass.out[last], pass.probability, pass.dout[last]};
}

// `shift`, where given, is the low-rank part of a first layer's weight: W = W_0 + X_s^T shift.
template <class R>
void linear_forward(const Geometry<R>& g, const View<R>* theta, const R* shift, Pass<R>& pass,
                    int l) {
  const Layer& layer = g.layer(l);
  const Operand<R> x = input_of(g, pass, l);
  const long ld = g.ld(layer.out);
  const R* bias = vector_of(theta, layer.bias);
  const bool relu = l + 1 < g.plan->layer_count && g.relu_in_epilogue(l + 1);
  if (g.narrow_layer(l)) {
    const View<R>& w = theta[layer.weight];
    const Dots<R> dots{x.data, x.ld, w.n, g.ld(layer.in)};
    narrow<R>(pass.rows, layer.out, layer.in, &dots, 1, bias, pass.out[l], ld);
    if (relu) leaky_forward<R>(pass.out[l], pass.rows * ld, R(0));
    return;
  }
  const Epilogue<R> epilogue{relu ? Post::relu : Post::none};
  if (g.low_rank(l)) {
    static const R one = 1;
    const Product<R> products[2] = {{&one, 0, 0, bias, 0, bias != nullptr ? 1 : 0},
                                    plain(pass.gram, g.ld(g.plan->support_rows), shift, ld,
                                          pass.gram_cols)};
    gemm<R>(pass.rows, layer.out, products, shift != nullptr ? 2 : 1, R(1), pass.projected, ld,
            pass.out[l], ld, epilogue);
    return;
  }
  const Product<R> product = plain(x.data, x.ld, theta[layer.weight].t, ld, layer.in);
  gemm<R>(pass.rows, layer.out, &product, 1, R(1), bias, 0, pass.out[l], ld, epilogue);
}

template <class R>
void forward(const Geometry<R>& g, const View<R>* theta, const R* shift, Pass<R>& pass) {
  for (int l = 0; l < g.plan->layer_count; l++) {
    const Layer& layer = g.layer(l);
    if (layer.op == Op::linear) {
      linear_forward(g, theta, shift, pass, l);
      continue;
    }
    if (g.relu_in_epilogue(l)) continue;
    const long ld = g.ld(layer.out);
    const long size = pass.rows * ld;
    if (g.copies_value(l)) __builtin_memcpy(pass.out[l], pass.out[l - 1], size * sizeof(R));
    if (layer.op == Op::batch_norm) {
      batch_norm_forward(batch_norm_args(g, pass, theta, l), vector_of(theta, layer.bias),
                         R(layer.constant), pass.out[l]);
      continue;
    }
    activation_forward<R>(layer.op, {pass.out[l], pass.keep1[l], pass.keep2[l], size,
                                     R(layer.constant)});
    if (layer.op == Op::sigmoid)  // f(0) is not zero: the padding must stay zero
      for (int r = 0; r < pass.rows; r++)
        fill_zero(pass.out[l] + r * ld + layer.out, ld - layer.out);
  }
}

template <class R>
LossValue<R> loss_of(const Geometry<R>& g, Pass<R>& pass) {
  if (g.plan->loss.kind == LossKind::mse)
    return mse<R>(loss_args(g, pass), static_cast<const R*>(pass.y));
  return cross_entropy<R>(loss_args(g, pass), static_cast<const long long*>(pass.y));
}

// Gradients of every layer's output that a parameter before it needs, from that of the last.
template <class R>
void backward(const Geometry<R>& g, const View<R>* theta, Pass<R>& pass) {
  for (int l = g.plan->layer_count - 1; l >= 0 && g.needs_input_gradient(l); l--) {
    const Layer& layer = g.layer(l);
    const long size = pass.rows * g.ld(layer.out);
    R* const dy = pass.dout[l];
    R* const dx = pass.dout[l - 1];
    if (layer.op == Op::linear) {
      const bool gate = g.gate_in_epilogue(l - 1);
      const long ld_in = g.ld(layer.in);
      const Product<R> product =
          plain<R>(dy, g.ld(layer.out), theta[layer.weight].n, ld_in, layer.out);
      gemm<R>(pass.rows, layer.in, &product, 1, R(1), nullptr, 0, dx, ld_in,
              {gate ? Post::gate : Post::none, pass.out[l - 1], ld_in});
    } else if (layer.op == Op::batch_norm) {
      batch_norm_vjp<R>(batch_norm_args(g, pass, theta, l), dy, dx);
    } else if (is_smooth(layer.op)) {
      smooth_scale<R>(pass.keep1[l], dy, dx, size);
    } else if (!g.gate_in_epilogue(l)) {
      leaky_gate<R>(pass.out[l], dy, size, layer.op == Op::relu ? R(0) : R(layer.constant));
    }
  }
}

// Where gradients of parameters go: into = base + scale * gradient, parameter by parameter.
template <class R>
struct Sink {
  const View<R>* into;
  const View<R>* base;  // null, or null members: zero
  const R* scales;      // null: one

  const R* base_t(int p) const { return base != nullptr ? base[p].t : nullptr; }
  const R* base_n(int p) const { return base != nullptr ? base[p].n : nullptr; }
  R scale(int p) const { return scales != nullptr ? scales[p] : R(1); }
};

// A linear layer's weight: X1^T D1 + X2^T D2, the second term optional.
template <class R>
void weight_gradient(const Geometry<R>& g, int l, int rows, Operand<R> x1, const R* d1,
                     Operand<R> x2, const R* d2, const Sink<R>& sink) {
  const Layer& layer = g.layer(l);
  const int p = layer.weight;
  const long ld = g.ld(layer.out), ld_n = g.ld(layer.in);
  const int count = d2 != nullptr ? 2 : 1;
  if (g.narrow_layer(l)) {
    const Product<R> products[2] = {transposed(d1, ld, x1.data, x1.ld, rows),
                                    transposed(d2, ld, x2.data, x2.ld, rows)};
    gemm<R>(layer.out, layer.in, products, count, sink.scale(p), sink.base_n(p), ld_n, sink.into[p].n,
            ld_n);
    return;
  }
  const Product<R> products[2] = {transposed(x1.data, x1.ld, d1, ld, rows),
                                  transposed(x2.data, x2.ld, d2, ld, rows)};
  gemm<R>(layer.in, layer.out, products, count, sink.scale(p), sink.base_t(p), ld, sink.into[p].t, ld);
}

template <class R>
void vector_gradient(const Geometry<R>& g, int p, int rows, const R* d1, const R* x1, const R* d2,
                     const R* x2, const Sink<R>& sink) {
  const int cols = g.plan->params[p].cols;
  const BatchNormArgs<R> args{rows, cols, g.ld(cols), nullptr, nullptr, nullptr};
  weighted_column_sum<R>(args, d1, x1, d2, x2, sink.scale(p), sink.base_t(p), sink.into[p].t);
}

// Gradients of the parameters of layer l, from the gradients of outputs that `backward` left.
// Parameters whose view in the sink is null are skipped.
template <class R>
void parameter_gradients(const Geometry<R>& g, const Pass<R>& pass, const Sink<R>& sink) {
  for (int l = 0; l < g.plan->layer_count; l++) {
    const Layer& layer = g.layer(l);
    const R* dy = pass.dout[l];
    const int w = layer.weight, b = layer.bias;
    if (w >= 0 && sink.into[w].primary() != nullptr) {
      if (layer.op == Op::linear)
        weight_gradient<R>(g, l, pass.rows, input_of(g, pass, l), dy, {}, nullptr, sink);
      else
        vector_gradient<R>(g, w, pass.rows, dy, pass.keep1[l], nullptr, nullptr, sink);
    }
    if (b >= 0 && sink.into[b].primary() != nullptr)
      vector_gradient<R>(g, b, pass.rows, dy, nullptr, nullptr, nullptr, sink);
  }
}

// The low-rank first layer's tangent is V = rate * (X_q^T D_q + X_s^T adjoint_rows).
template <class R>
struct LowRankTangent {
  const Pass<R>* query;
  R rate;
};

template <class R>
void linear_r_forward(const Workspace<R>& ws, const View<R>* theta, const View<R>* tangent,
                      const LowRankTangent<R>& low_rank, const Pass<R>& pass, int l, R* out) {
  const Geometry<R>& g = ws.geometry;
  const Layer& layer = g.layer(l);
  const Operand<R> x = input_of(g, pass, l);
  const long ld = g.ld(layer.out);
  const R* rx = ws.rx[l];
  const R* rbias = vector_of(tangent, layer.bias);
  const bool relu = l + 1 < g.plan->layer_count && g.relu_in_epilogue(l + 1);
  const R* gate = pass.out[l];
  if (g.narrow_layer(l)) {
    const long ld_n = g.ld(layer.in);
    Dots<R> dots[2];
    int count = 0;
    if (rx != nullptr) dots[count++] = {rx, ld_n, theta[layer.weight].n, ld_n};
    if (tangent[layer.weight].n != nullptr)
      dots[count++] = {x.data, x.ld, tangent[layer.weight].n, ld_n};
    narrow<R>(pass.rows, layer.out, layer.in, dots, count, rbias, out, ld);
    if (relu) leaky_gate<R>(gate, out, pass.rows * ld, R(0));
    return;
  }
  const Epilogue<R> epilogue{relu ? Post::gate : Post::none, gate, ld};
  if (g.low_rank(l)) {
    const Product<R> products[2] = {
        // X_s X_q^T is the transpose of the query's Gram matrix.
        transposed(low_rank.query->gram, g.ld(g.plan->support_rows), low_rank.query->dout[0], ld,
                   low_rank.query->rows),
        plain<R>(pass.gram, g.ld(g.plan->support_rows), ws.adjoint_rows, ld, pass.rows)};
    gemm<R>(pass.rows, layer.out, products, 2, low_rank.rate, rbias, 0, out, ld, epilogue);
    return;
  }
  Product<R> products[2];
  int count = 0;
  if (rx != nullptr) products[count++] = plain<R>(rx, g.ld(layer.in), theta[layer.weight].t, ld, layer.in);
  if (tangent[layer.weight].t != nullptr)
    products[count++] = plain<R>(x.data, x.ld, tangent[layer.weight].t, ld, layer.in);
  gemm<R>(pass.rows, layer.out, products, count, R(1), rbias, 0, out, ld, epilogue);
}

// Tangents of all values along `tangent`. Returns the tangent of the output, or null for zero.
template <class R>
R* r_forward(const Workspace<R>& ws, const View<R>* theta, const View<R>* tangent,
             const LowRankTangent<R>& low_rank, const Pass<R>& pass) {
  const Geometry<R>& g = ws.geometry;
  R* r = nullptr;
  for (int l = 0; l < g.plan->layer_count; l++) {
    const Layer& layer = g.layer(l);
    const long size = pass.rows * g.ld(layer.out);
    ws.rx[l] = r;
    const bool moves = (layer.weight >= 0 && tangent[layer.weight].primary() != nullptr) ||
                       (layer.bias >= 0 && tangent[layer.bias].primary() != nullptr) ||
                       g.low_rank(l);
    if (layer.op == Op::linear) {
      if (r == nullptr && !moves) continue;
      linear_r_forward(ws, theta, tangent, low_rank, pass, l, ws.rout[l]);
      r = ws.rout[l];
    } else if (layer.op == Op::batch_norm) {
      if (r == nullptr && !moves) {
        fill_zero(ws.rxhat[l], size);
        fill_zero(ws.q[l], g.ld(layer.out));
        continue;
      }
      const bool has_rz = r != nullptr;
      if (!has_rz) r = ws.rout[l];
      batch_norm_r_forward<R>(batch_norm_args(g, pass, theta, l), has_rz,
                              vector_of(tangent, layer.weight), vector_of(tangent, layer.bias), r,
                              ws.rxhat[l], ws.q[l]);
    } else if (r == nullptr) {
      continue;
    } else if (is_smooth(layer.op)) {
      smooth_scale<R>(pass.keep1[l], r, ws.rout[l], size);
      r = ws.rout[l];
    } else if (!g.relu_in_epilogue(l)) {
      leaky_gate<R>(pass.out[l], r, size, layer.op == Op::relu ? R(0) : R(layer.constant));
    }
  }
  return r;
}

// R-backward of one linear layer: the tangent of its input's gradient.
template <class R>
R* linear_r_backward(const Workspace<R>& ws, const View<R>* theta, const View<R>* tangent,
                     const Pass<R>& pass, int l, const R* rd) {
  const Geometry<R>& g = ws.geometry;
  const Layer& layer = g.layer(l);
  const long ld = g.ld(layer.out), ld_in = g.ld(layer.in);
  const bool gate = g.gate_in_epilogue(l - 1);
  Product<R> products[2] = {plain<R>(rd, ld, theta[layer.weight].n, ld_in, layer.out)};
  int count = 1;
  if (tangent[layer.weight].n != nullptr)
    products[count++] = plain<R>(pass.dout[l], ld, tangent[layer.weight].n, ld_in, layer.out);
  gemm<R>(pass.rows, layer.in, products, count, R(1), nullptr, 0, ws.rdin[l], ld_in,
          {gate ? Post::gate : Post::none, pass.out[l - 1], ld_in});
  return ws.rdin[l];
}

// adjoint += scale * R{gradient}, the Hessian-vector product along `tangent`, layer by layer from
// the last. `rd` holds the tangent of the output on entry.
template <class R>
void r_backward(const Workspace<R>& ws, const View<R>* theta, const View<R>* tangent, R* rd,
                const Pass<R>& pass, const Sink<R>& sink) {
  const Geometry<R>& g = ws.geometry;
  loss_r_vjp<R>(g.plan->loss.kind, loss_args(g, pass), rd);
  for (int l = g.plan->layer_count - 1; l >= g.first_owner(); l--) {
    const Layer& layer = g.layer(l);
    const long ld = g.ld(layer.out), size = pass.rows * ld;
    const R* dy = pass.dout[l];
    const int w = layer.weight, b = layer.bias;
    if (b >= 0) vector_gradient<R>(g, b, pass.rows, rd, nullptr, nullptr, nullptr, sink);
    // The tangent may be the adjoint itself: a layer's weight is read before it is written.
    if (layer.op == Op::linear) {
      R* next = g.needs_input_gradient(l) ? linear_r_backward(ws, theta, tangent, pass, l, rd) : nullptr;
      if (g.low_rank(l)) {
        for (long i = 0; i < size; i += Vec<R>::width)
          store(ws.adjoint_rows + i, load(ws.adjoint_rows + i) + splat(sink.scale(w)) * load(rd + i));
      } else {
        const R* rx = ws.rx[l];
        weight_gradient<R>(g, l, pass.rows, input_of(g, pass, l), rd, {rx, g.ld(layer.in)},
                           rx != nullptr ? dy : nullptr, sink);
      }
      rd = next;
    } else if (layer.op == Op::batch_norm) {
      if (g.needs_input_gradient(l))
        batch_norm_r_vjp<R>(batch_norm_args(g, pass, theta, l), vector_of(tangent, w), ws.q[l],
                            ws.rxhat[l], dy, rd, ws.rdin[l]);
      if (w >= 0)
        vector_gradient<R>(g, w, pass.rows, rd, pass.keep1[l], dy, ws.rxhat[l], sink);
      rd = ws.rdin[l];
    } else if (is_smooth(layer.op)) {
      smooth_r_vjp<R>(pass.keep1[l], pass.keep2[l], ws.rx[l], dy, rd, rd, size);
    } else if (!g.gate_in_epilogue(l)) {
      leaky_gate<R>(pass.out[l], rd, size, layer.op == Op::relu ? R(0) : R(layer.constant));
    }
  }
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
