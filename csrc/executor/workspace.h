// Where everything of one task lives while a thread works on it. A workspace is laid out once for
// a plan and serves every task after that.
//
// A linear layer's weight is kept as t [in, ld(out)] for products over its outputs, as
// n [out, ld(in)] for products over its inputs, or as both. Vectors are t [1, ld(cols)].
#pragma once

#include "../program.h"
#include "layers/activation.h"
#include "vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

// Hands out aligned pieces of one block. Without a block it only counts.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class X>
  X* take(long n) {
    char* at = block_ != nullptr ? block_ + used_ : nullptr;
    used_ += (n * long(sizeof(X)) + 63) / 64 * 64;
    return reinterpret_cast<X*>(at);
  }

  bool counting() const { return block_ == nullptr; }
  long used() const { return used_; }

 private:
  char* block_;
  long used_ = 0;
};

struct Slot {
  bool t, n;      // which layouts are kept
  long ld_t, ld_n;
  long size_t_, size_n;

  long primary_size() const { return t ? size_t_ : size_n; }
};

template <class R>
struct View {
  R* t;
  R* n;

  R* primary() const { return t != nullptr ? t : n; }
};

// What a plan means for one real type and vector width.
template <class R>
struct Geometry {
  const Plan* plan;

  long ld(int cols) const { return leading<R>(cols); }
  const Layer& layer(int l) const { return plan->layers[l]; }

  // The first layer that owns a parameter: no layer before it needs the gradient of its input.
  int first_owner() const {
    for (int l = 0; l < plan->layer_count; l++)
      if (layer(l).weight >= 0 || layer(l).bias >= 0) return l;
    return plan->layer_count;
  }
  bool needs_input_gradient(int l) const { return l > first_owner(); }

  static bool is_narrow(int out) { return 4 * out <= Vec<R>::width; }
  bool narrow_layer(int l) const { return layer(l).op == Op::linear && is_narrow(layer(l).out); }

  // Z = X W_0 is one product for all inner steps, and the per-task part of a wide first layer
  // stays a sum of outer products of rows: no per-task weights at all.
  bool low_rank(int l) const {
    const Layer& first = layer(l);
    if (l != 0 || first.op != Op::linear || is_narrow(first.out)) return false;
    const Param& w = plan->params[first.weight];
    return w.adapts && !w.per_task && !w.rate_per_element && plan->query_rows > 0 &&
           plan->reverse && first.in >= 64 && first.in >= 2 * plan->support_rows;
  }

  // A first linear layer reads x where it lies; every other kind works on a padded copy.
  bool copies_input() const { return layer(0).op != Op::linear || narrow_layer(0); }

  // An elementwise layer without f'' reuses its input's gradient buffer.
  bool gates_in_place(int l) const {
    return layer(l).op == Op::relu || layer(l).op == Op::leaky_relu;
  }
  // Elementwise layers run in place, except on a value that a gate before them reads its sign from.
  bool copies_value(int l) const {
    return l > 0 && layer(l).op != Op::linear && gates_in_place(l - 1);
  }
  // ReLU after a linear layer happens in the product's epilogue, as does its gate before one.
  bool relu_in_epilogue(int l) const {
    return l > 0 && layer(l).op == Op::relu && layer(l - 1).op == Op::linear;
  }
  bool gate_in_epilogue(int l) const {
    return l + 1 < plan->layer_count && layer(l).op == Op::relu && layer(l + 1).op == Op::linear;
  }

  Slot slot(int p) const {
    const Param& param = plan->params[p];
    Slot s{};
    if (!param.matrix) {
      s.t = true;
      s.ld_t = ld(param.cols);
      s.size_t_ = s.ld_t;
      return s;
    }
    for (int l = 0; l < plan->layer_count; l++) {
      if (layer(l).op != Op::linear || layer(l).weight != p) continue;
      const bool narrow = is_narrow(layer(l).out);
      s.t = !narrow;
      s.n = narrow || needs_input_gradient(l);
      s.ld_t = ld(param.rows);
      s.ld_n = ld(param.cols);
      s.size_t_ = s.t ? s.ld_t * param.cols : 0;
      s.size_n = s.n ? s.ld_n * param.rows : 0;
    }
    return s;
  }

  bool any_rate_gradient() const {
    for (int p = 0; p < plan->param_count; p++)
      if (plan->params[p].adapts && plan->params[p].rate_gradient) return true;
    return false;
  }

  // Elements of parameter p's part of a leaf's gradient, and of its rate's part. A rate that several
  // parameters share is summed within a task, so that its bits, too, do not depend on chunks.
  long gradient_part(int p) const { return plan->params[p].per_task ? 0 : slot(p).primary_size(); }
  long rate_part(int p) const {
    const Param& param = plan->params[p];
    if (!param.adapts || !param.rate_gradient || param.rate_owner >= 0) return 0;
    const long steps = param.rate_per_step ? plan->steps : 1;
    return steps * (param.rate_per_element ? slot(p).primary_size() : 1);
  }
  // Where the rate's part begins, after all gradients.
  long rate_begin(int p) const {
    const int owner = plan->params[p].rate_owner;
    long begin = 0;
    for (int before = 0; before < (owner >= 0 ? owner : p); before++) begin += rate_part(before);
    return begin;
  }
  long gradient_size() const {
    long size = 0;
    for (int p = 0; p < plan->param_count; p++) size += gradient_part(p) + rate_part(p);
    return size;
  }
};

// One forward and backward pass over the rows of a task, and all that later passes read of it.
// Arrays are indexed by layer; `out` and `dout` belong to the layer's output.
template <class R>
struct Pass {
  int rows;
  const R* x;
  long ld_x;
  const void* y;
  const R* weight;  // [rows]; null: ones
  R* coefficient;   // [rows]
  R* packed_x;     // [rows, features], rows of positive weight
  R* packed_y;     // [rows, outputs], or labels
  R* packed_weight;
  R* input;        // padded copy of x where the first layer needs one
  R** out;
  R** dout;
  R** keep1;  // f'(z), or xhat
  R** keep2;  // f''(z), or the inverse standard deviation
  R* probability;
  R* projected;  // low-rank first layer: X W_0 [rows, ld]
  R* gram;       // low-rank first layer: X X_s^T [rows, ld(S)]
  int gram_cols; // support rows in use
};

template <class R>
struct Workspace {
  Geometry<R> geometry;
  Slot* slots;
  View<R>** theta;   // [I + 1][param] the parameters before each inner step, and after the last
  View<R>** fresh;   // [I + 1][param] storage of those that change; null members do not
  View<R>* own;      // [param] theta_0 of this task, for parameters with a task axis
  Pass<R>* passes;   // [I + 1]; the last one is the query's
  View<R>* adjoint;  // [param]
  View<R>* tangent;  // [param]; null members mean zero
  View<R>* scaled;   // [param] storage of rate * adjoint, and of tangents' second layout
  View<R>* gradient; // [param] an inner step's gradient, where a rate's gradient needs it
  View<R>* base;     // [param] of a sink
  R* scales;         // [param] of a sink
  long* rate_begin;  // [param] where the gradient of a rate is collected
  R** rout;          // [layer] storage of the tangent of the layer's output
  const R** rx;      // [layer] tangent of the layer's input; null is zero
  R** rdin;          // [layer] storage of the tangent of the input's gradient; elementwise: in place
  R** rxhat;         // [layer] BatchNorm
  R** q;             // [layer] BatchNorm's mean(xhat rz)
  R* row_dots;       // [S, ld] scratch of the low-rank layer
  R* shift;          // [S, ld] - sum_j alpha_j D_j of the low-rank layer
  R* transposed_x;   // [features, ld(S)]
  R* adjoint_rows;   // [S, ld] the low-rank adjoint: X_q^T D_q + X_s^T adjoint_rows
};

template <class R>
void layout_pass(Arena& arena, const Geometry<R>& g, int rows, Pass<R>* pass) {
  const Plan& plan = *g.plan;
  const int layers = plan.layer_count;
  Pass<R> made{};
  made.out = arena.take<R*>(layers);
  made.dout = arena.take<R*>(layers);
  made.keep1 = arena.take<R*>(layers);
  made.keep2 = arena.take<R*>(layers);
  made.coefficient = arena.take<R>(rows);
  made.packed_x = arena.take<R>(long(rows) * plan.features);
  made.packed_y = arena.take<R>(
      plan.loss.kind == LossKind::cross_entropy ? rows * 8 / long(sizeof(R)) : long(rows) * plan.outputs);
  made.packed_weight = arena.take<R>(rows);
  if (g.copies_input()) made.input = arena.take<R>(rows * g.ld(plan.features));
  R* value = made.input;
  for (int l = 0; l < layers; l++) {
    const Layer& layer = g.layer(l);
    const long size = rows * g.ld(layer.out);
    if (layer.op == Op::linear || g.copies_value(l)) value = arena.take<R>(size);
    R* keep1 = nullptr;
    R* keep2 = nullptr;
    if (layer.op == Op::batch_norm) {
      keep1 = arena.take<R>(size);
      keep2 = arena.take<R>(g.ld(layer.out));
    } else if (is_smooth(layer.op)) {
      keep1 = arena.take<R>(size);
      keep2 = arena.take<R>(size);
    }
    if (arena.counting()) continue;
    made.out[l] = value;
    made.keep1[l] = keep1;
    made.keep2[l] = keep2;
  }
  // From the last layer down: a gate in place shares the buffer with the layer before it.
  R* gradient = nullptr;
  for (int l = layers - 1; l >= 0; l--) {
    const bool shared = l + 1 < layers && g.gates_in_place(l + 1);
    if (!shared) gradient = arena.take<R>(rows * g.ld(g.layer(l).out));
    if (!arena.counting()) made.dout[l] = gradient;
  }
  if (plan.loss.kind == LossKind::cross_entropy)
    made.probability = arena.take<R>(rows * g.ld(plan.outputs));
  if (g.low_rank(0)) {
    made.projected = arena.take<R>(rows * g.ld(g.layer(0).out));
    made.gram = arena.take<R>(rows * g.ld(plan.support_rows));
  }
  if (!arena.counting()) *pass = made;
}

template <class R>
View<R> take_view(Arena& arena, const Slot& s) {
  return {s.t ? arena.take<R>(s.size_t_) : nullptr, s.n ? arena.take<R>(s.size_n) : nullptr};
}

template <class R>
View<R> take_primary(Arena& arena, Slot s) {
  s.n = s.n && !s.t;
  return take_view<R>(arena, s);
}

template <class R>
Workspace<R>* layout_workspace(Arena& arena, const Plan& plan) {
  const Geometry<R> g{&plan};
  const int params = plan.param_count, layers = plan.layer_count, steps = plan.steps;
  const int low_rank_weight = g.low_rank(0) ? g.layer(0).weight : -1;
  Workspace<R>* ws = arena.take<Workspace<R>>(1);
  Workspace<R> w{};
  w.geometry = g;
  w.slots = arena.take<Slot>(params);
  w.theta = arena.take<View<R>*>(steps + 1);
  w.fresh = arena.take<View<R>*>(steps + 1);
  w.own = arena.take<View<R>>(params);
  w.adjoint = arena.take<View<R>>(params);
  w.tangent = arena.take<View<R>>(params);
  w.scaled = arena.take<View<R>>(params);
  w.gradient = arena.take<View<R>>(params);
  w.base = arena.take<View<R>>(params);
  w.scales = arena.take<R>(params);
  w.rate_begin = arena.take<long>(params);
  w.rout = arena.take<R*>(layers);
  w.rx = arena.take<const R*>(layers);
  w.rdin = arena.take<R*>(layers);
  w.rxhat = arena.take<R*>(layers);
  w.q = arena.take<R*>(layers);
  for (int p = 0; p < params; p++) {
    const Slot s = g.slot(p);
    if (!arena.counting()) {
      w.slots[p] = s;
      w.rate_begin[p] = g.rate_begin(p);
    }
    if (plan.params[p].per_task) {
      const View<R> view = take_view<R>(arena, s);
      if (!arena.counting()) w.own[p] = view;
    }
  }
  for (int k = 0; k <= steps; k++) {
    View<R>* theta = arena.take<View<R>>(params);
    View<R>* fresh = arena.take<View<R>>(params);
    if (!arena.counting()) {
      w.theta[k] = theta;
      w.fresh[k] = fresh;
    }
    for (int p = 0; p < params && k > 0; p++) {
      if (!plan.params[p].adapts || p == low_rank_weight) continue;
      const View<R> view = take_view<R>(arena, g.slot(p));
      if (!arena.counting()) fresh[p] = view;
    }
  }
  w.passes = arena.take<Pass<R>>(steps + 1);
  for (int k = 0; k < steps; k++) layout_pass<R>(arena, g, plan.support_rows, w.passes + k);
  if (plan.query_rows > 0) layout_pass<R>(arena, g, plan.query_rows, w.passes + steps);
  if (plan.reverse) {
    for (int p = 0; p < params; p++) {
      if (p == low_rank_weight) continue;
      const View<R> adjoint = take_primary<R>(arena, g.slot(p));
      const View<R> scaled = take_view<R>(arena, g.slot(p));
      View<R> gradient{};
      if (plan.params[p].adapts && plan.params[p].rate_gradient)
        gradient = take_primary<R>(arena, g.slot(p));
      if (arena.counting()) continue;
      w.adjoint[p] = adjoint;
      w.scaled[p] = scaled;
      w.gradient[p] = gradient;
    }
    for (int l = 0; l < layers; l++) {
      const Layer& layer = g.layer(l);
      const long size = plan.support_rows * g.ld(layer.out);
      R* rout = arena.take<R>(size);
      const bool elementwise = layer.op != Op::linear && layer.op != Op::batch_norm;
      R* rdin = elementwise ? nullptr : arena.take<R>(plan.support_rows * g.ld(layer.in));
      R* rxhat = layer.op == Op::batch_norm ? arena.take<R>(size) : nullptr;
      R* q = layer.op == Op::batch_norm ? arena.take<R>(g.ld(layer.out)) : nullptr;
      if (arena.counting()) continue;
      w.rout[l] = rout;
      w.rdin[l] = rdin;
      w.rxhat[l] = rxhat;
      w.q[l] = q;
    }
  }
  if (g.low_rank(0)) {
    const long size = plan.support_rows * g.ld(g.layer(0).out);
    w.row_dots = arena.take<R>(size);
    w.shift = arena.take<R>(size);
    w.adjoint_rows = arena.take<R>(size);
    w.transposed_x = arena.take<R>(plan.features * g.ld(plan.support_rows));
  }
  if (!arena.counting()) *ws = w;
  return ws;
}

// What all tasks share: parameters without a task axis, and rates that have an entry per element.
template <class R>
struct Shared {
  View<R>* theta;  // [param]
  R** rates;       // [param] packed per-element rates, [I or 1] each in the primary layout
};

template <class R>
Shared<R>* layout_shared(Arena& arena, const Plan& plan) {
  const Geometry<R> g{&plan};
  Shared<R>* shared = arena.take<Shared<R>>(1);
  View<R>* theta = arena.take<View<R>>(plan.param_count);
  R** rates = arena.take<R*>(plan.param_count);
  for (int p = 0; p < plan.param_count; p++) {
    const Param& param = plan.params[p];
    const Slot s = g.slot(p);
    View<R> view{};
    if (!param.per_task) view = take_view<R>(arena, s);
    R* packed = nullptr;
    if (param.adapts && param.rate_per_element)
      packed = arena.take<R>(s.primary_size() * (param.rate_per_step ? plan.steps : 1));
    if (arena.counting()) continue;
    theta[p] = view;
    rates[p] = packed;
  }
  if (!arena.counting()) *shared = {theta, rates};
  return shared;
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
