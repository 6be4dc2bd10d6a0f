// One task from its rows to its meta-gradient: the inner loop forward, then the reverse recursion
//
//   lambda_I = dL_q/dtheta (theta_I)          (or a given cotangent)
//   lambda_k = lambda_(k+1) - H_s(theta_k) (alpha_k lambda_(k+1))
//
// which leaves the exact second-order meta-gradient in lambda_0 (Finn et al. 2017, eq. 1, with the
// Hessian-vector product of Pearlmutter 1994). No tape: theta_k and the activations of step k are
// kept, everything else is recomputed in registers.
#pragma once

#include "passes.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

// ---- between PyTorch's layout and the workspace's

template <class R>
void pack_primary(const Param& param, const Slot& s, const R* from, R* into) {
  fill_zero(into, s.primary_size());
  if (s.t && param.matrix) {
    transpose<R>(param.rows, param.cols, from, param.cols, into, s.ld_t);
  } else {
    const long ld = s.t ? s.ld_t : s.ld_n;
    for (int r = 0; r < param.rows; r++)
      __builtin_memcpy(into + r * ld, from + long(r) * param.cols, param.cols * sizeof(R));
  }
}

template <class R>
void second_layout(const Param& param, const Slot& s, const View<R>& view) {
  if (s.t && s.n) transpose<R>(param.cols, param.rows, view.t, s.ld_t, view.n, s.ld_n);
}

template <class R>
void pack(const Param& param, const Slot& s, const R* from, const View<R>& into) {
  if (s.n && s.t) fill_zero(into.n, s.size_n);
  pack_primary<R>(param, s, from, into.primary());
  second_layout<R>(param, s, into);
}

// into = scale * the packed `from`, or += where the caller accumulates.
template <class R>
void unpack_primary(const Param& param, const Slot& s, const R* from, R scale, R* into) {
  const bool flipped = s.t && param.matrix;
  const long ld = s.t ? s.ld_t : s.ld_n;
  for (int r = 0; r < param.rows; r++)
    for (int c = 0; c < param.cols; c++)
      into[long(r) * param.cols + c] = scale * (flipped ? from[c * ld + r] : from[r * ld + c]);
}

template <class R>
long tensor_size(const Param& param) {
  return long(param.rows) * param.cols;
}

// ---- rates

template <class R>
R scalar_rate(const Plan& plan, const Call& call, int p, int k) {
  const Param& param = plan.params[p];
  if (!param.adapts || param.rate_per_element) return 0;
  return static_cast<const R*>(call.rates[p])[param.rate_per_step ? k : 0];
}

template <class R>
const R* element_rate(const Plan& plan, const Shared<R>& shared, const Slot* slots, int p, int k) {
  const Param& param = plan.params[p];
  return shared.rates[p] + (param.rate_per_step ? k : 0) * slots[p].primary_size();
}

// ---- rows of a task

// Rows of positive weight, packed; or all rows, where they lie.
template <class R>
void load_rows(const Geometry<R>& g, const void* x, const void* y, const void* weight, int task,
               int rows, Pass<R>* pass) {
  const Plan& plan = *g.plan;
  const bool labels = plan.loss.kind == LossKind::cross_entropy;
  const long features = plan.features, outputs = plan.outputs;
  const R* task_x = static_cast<const R*>(x) + long(task) * rows * features;
  const long y_bytes = labels ? 8 : outputs * long(sizeof(R));
  const char* task_y = static_cast<const char*>(y) + long(task) * rows * y_bytes;
  pass->rows = rows;
  pass->x = task_x;
  pass->ld_x = features;
  pass->y = task_y;
  const R* kept_weight = nullptr;
  if (weight != nullptr) {
    const R* task_weight = static_cast<const R*>(weight) + long(task) * rows;
    int kept = 0;
    for (int r = 0; r < rows; r++) {
      if (!(task_weight[r] != R(0))) continue;
      __builtin_memcpy(pass->packed_x + kept * features, task_x + r * features, features * sizeof(R));
      __builtin_memcpy(reinterpret_cast<char*>(pass->packed_y) + kept * y_bytes,
                       task_y + r * y_bytes, y_bytes);
      pass->packed_weight[kept++] = task_weight[r];
    }
    pass->rows = kept;
    pass->x = pass->packed_x;
    pass->y = pass->packed_y;
    kept_weight = pass->packed_weight;
  }
  pass->weight = kept_weight;
  row_coefficients<R>(plan.loss, kept_weight, pass->rows, pass->coefficient);
  if (pass->input != nullptr) {
    const long ld = g.ld(plan.features);
    for (int r = 0; r < pass->rows; r++) {
      __builtin_memcpy(pass->input + r * ld, pass->x + r * features, features * sizeof(R));
      // a layer that ran in place on a task with NaN may have left some in the padding
      fill_zero(pass->input + r * ld + features, ld - features);
    }
  }
}

template <class R>
void project_rows(const Workspace<R>& ws, const View<R>& weight, int support_rows, Pass<R>* pass) {
  const Geometry<R>& g = ws.geometry;
  const long ld = g.ld(g.layer(0).out), ld_gram = g.ld(g.plan->support_rows);
  const int features = g.plan->features;
  const Product<R> projection = plain<R>(pass->x, features, weight.t, ld, features);
  gemm<R>(pass->rows, g.layer(0).out, &projection, 1, R(1), nullptr, 0, pass->projected, ld);
  const Product<R> gram = plain<R>(pass->x, features, ws.transposed_x, ld_gram, features);
  gemm<R>(pass->rows, support_rows, &gram, 1, R(1), nullptr, 0, pass->gram, ld_gram);
  pass->gram_cols = support_rows;
}

// ---- the inner loop

template <class R>
struct TaskContext {
  const Plan& plan;
  const Call& call;
  const Shared<R>& shared;
  Workspace<R>& ws;
  int task;
  R* gradient;  // of the leaf; null where no gradient is wanted
};

template <class R>
void start_parameters(const TaskContext<R>& c) {
  for (int p = 0; p < c.plan.param_count; p++) {
    const Param& param = c.plan.params[p];
    View<R> view = c.shared.theta[p];
    if (param.per_task) {
      view = c.ws.own[p];
      const R* from = static_cast<const R*>(c.call.params[p]) + c.task * tensor_size<R>(param);
      pack<R>(param, c.ws.slots[p], from, view);
    }
    c.ws.theta[0][p] = view;
  }
  for (int k = 1; k <= c.plan.steps; k++)
    for (int p = 0; p < c.plan.param_count; p++) {
      const View<R>& fresh = c.ws.fresh[k][p];
      c.ws.theta[k][p] = fresh.primary() != nullptr ? fresh : c.ws.theta[k - 1][p];
    }
}

// theta_(k+1) = theta_k - alpha_k * gradient.
template <class R>
void update(const TaskContext<R>& c, int k, const Pass<R>& pass) {
  Workspace<R>& ws = c.ws;
  const View<R>* fresh = ws.fresh[k + 1];
  for (int p = 0; p < c.plan.param_count; p++) {
    const bool by_element = c.plan.params[p].rate_per_element;
    ws.scales[p] = by_element ? R(1) : -scalar_rate<R>(c.plan, c.call, p, k);
    ws.base[p] = by_element ? View<R>{} : ws.theta[k][p];
  }
  parameter_gradients<R>(ws.geometry, pass, {fresh, ws.base, ws.scales});
  for (int p = 0; p < c.plan.param_count; p++) {
    const Param& param = c.plan.params[p];
    R* into = fresh[p].primary();
    if (into == nullptr) continue;
    if (param.rate_per_element) {
      const R* before = ws.theta[k][p].primary();
      const R* rate = element_rate<R>(c.plan, c.shared, ws.slots, p, k);
      for (long i = 0; i < ws.slots[p].primary_size(); i += Vec<R>::width)
        store(into + i, load(before + i) - load(rate + i) * load(into + i));
    }
    second_layout<R>(param, ws.slots[p], fresh[p]);
  }
}

template <class R>
void inner_loop(const TaskContext<R>& c) {
  Workspace<R>& ws = c.ws;
  const Geometry<R>& g = ws.geometry;
  const bool low_rank = g.low_rank(0);
  R* support_losses = static_cast<R*>(c.call.support_losses);
  for (int k = 0; k < c.plan.steps; k++) {
    Pass<R>& pass = ws.passes[k];
    load_rows<R>(g, c.call.support_x, c.call.support_y, c.call.support_weight, c.task,
                 c.plan.support_rows, &pass);
    if (low_rank && k == 0) {
      transpose<R>(pass.rows, c.plan.features, pass.x, c.plan.features, ws.transposed_x,
                   g.ld(c.plan.support_rows));
      project_rows<R>(ws, ws.theta[0][g.layer(0).weight], pass.rows, &pass);
    } else if (low_rank) {
      pass.projected = ws.passes[0].projected;
      pass.gram = ws.passes[0].gram;
      pass.gram_cols = ws.passes[0].gram_cols;
    }
    forward<R>(g, ws.theta[k], k > 0 ? ws.shift : nullptr, pass);
    const LossValue<R> value = loss_of<R>(g, pass);
    if (support_losses != nullptr) support_losses[long(c.task) * c.plan.steps + k] = value.loss;
    backward<R>(g, ws.theta[k], pass);
    update<R>(c, k, pass);
    if (low_rank) {
      const long size = pass.rows * g.ld(g.layer(0).out);
      const V<R> rate = splat(scalar_rate<R>(c.plan, c.call, g.layer(0).weight, k));
      for (long i = 0; i < size; i += Vec<R>::width) {
        const V<R> before = k > 0 ? load(ws.shift + i) : V<R>{};
        store(ws.shift + i, before - rate * load(pass.dout[0] + i));
      }
    }
  }
}

// ---- the reverse recursion

template <class R>
R dot(const R* a, const R* b, long size) {
  V<R> sum = V<R>{};
  for (long i = 0; i < size; i += Vec<R>::width) sum += load(a + i) * load(b + i);
  return lane_sum<R>(sum);
}

// d/d alpha_k = -<lambda_(k+1), g_k>, entry by entry where the rate is.
template <class R>
void rate_gradients(const TaskContext<R>& c, int k, const Pass<R>& query, R* rate_parts) {
  Workspace<R>& ws = c.ws;
  const Geometry<R>& g = ws.geometry;
  const Pass<R>& pass = ws.passes[k];
  parameter_gradients<R>(g, pass, {ws.gradient, nullptr, nullptr});
  for (int p = 0; p < c.plan.param_count; p++) {
    const Param& param = c.plan.params[p];
    if (!param.adapts || !param.rate_gradient) continue;
    R* rate_part = rate_parts + ws.rate_begin[p];
    const long size = ws.slots[p].primary_size();
    const int step = param.rate_per_step ? k : 0;
    if (g.low_rank(0) && p == g.layer(0).weight) {
      const long ld = g.ld(g.layer(0).out), ld_gram = g.ld(c.plan.support_rows);
      const Product<R> products[2] = {transposed(query.gram, ld_gram, query.dout[0], ld, query.rows),
                                      plain<R>(pass.gram, ld_gram, ws.adjoint_rows, ld, pass.rows)};
      gemm<R>(pass.rows, g.layer(0).out, products, 2, R(1), nullptr, 0, ws.row_dots, ld);
      rate_part[step] -= dot<R>(pass.dout[0], ws.row_dots, pass.rows * ld);
    } else if (param.rate_per_element) {
      R* into = rate_part + step * size;
      const R* adjoint = ws.adjoint[p].primary();
      const R* gradient = ws.gradient[p].primary();
      for (long i = 0; i < size; i += Vec<R>::width)
        store(into + i, load(into + i) - load(adjoint + i) * load(gradient + i));
    } else {
      rate_part[step] -= dot<R>(ws.adjoint[p].primary(), ws.gradient[p].primary(), size);
    }
  }
}

// The tangent alpha_k * lambda. Where one number is the rate of all that adapts, the tangent is
// lambda itself and the number scales the result instead.
template <class R>
struct Tangent {
  R scale;           // of the Hessian-vector product
  R low_rank_rate;
};

template <class R>
Tangent<R> make_tangent(const TaskContext<R>& c, int k) {
  Workspace<R>& ws = c.ws;
  const Geometry<R>& g = ws.geometry;
  bool uniform = true, first = true;
  R rate = 0;
  for (int p = 0; p < c.plan.param_count; p++) {
    if (!c.plan.params[p].adapts) continue;
    const R each = scalar_rate<R>(c.plan, c.call, p, k);
    uniform = uniform && !c.plan.params[p].rate_per_element && (first || each == rate);
    rate = each;
    first = false;
  }
  for (int p = 0; p < c.plan.param_count; p++) {
    const Param& param = c.plan.params[p];
    const Slot& s = ws.slots[p];
    View<R>& tangent = ws.tangent[p];
    tangent = View<R>{};
    if (!param.adapts || ws.adjoint[p].primary() == nullptr) continue;
    tangent = uniform ? ws.adjoint[p] : ws.scaled[p];
    if (s.t && s.n) tangent.n = ws.scaled[p].n;
    if (!uniform) {
      const R* adjoint = ws.adjoint[p].primary();
      R* into = ws.scaled[p].primary();
      const R* rates =
          param.rate_per_element ? element_rate<R>(c.plan, c.shared, ws.slots, p, k) : nullptr;
      const V<R> one_rate = splat(scalar_rate<R>(c.plan, c.call, p, k));
      for (long i = 0; i < s.primary_size(); i += Vec<R>::width)
        store(into + i, load(adjoint + i) * (rates != nullptr ? load(rates + i) : one_rate));
    }
    second_layout<R>(param, s, tangent);
  }
  const R low_rank_rate =
      uniform || !g.low_rank(0) ? R(1) : scalar_rate<R>(c.plan, c.call, g.layer(0).weight, k);
  return {uniform ? -rate : R(-1), low_rank_rate};
}

template <class R>
void start_adjoint(const TaskContext<R>& c) {
  Workspace<R>& ws = c.ws;
  if (c.plan.query_rows > 0) {
    parameter_gradients<R>(ws.geometry, ws.passes[c.plan.steps], {ws.adjoint, nullptr, nullptr});
    return;
  }
  for (int p = 0; p < c.plan.param_count; p++) {
    const Param& param = c.plan.params[p];
    const R* from = static_cast<const R*>(c.call.cotangents[p]) + c.task * tensor_size<R>(param);
    pack_primary<R>(param, ws.slots[p], from, ws.adjoint[p].primary());
  }
}

template <class R>
void reverse(const TaskContext<R>& c) {
  Workspace<R>& ws = c.ws;
  const Geometry<R>& g = ws.geometry;
  const Pass<R>& query = ws.passes[c.plan.steps];
  R* rate_parts = c.gradient;
  for (int p = 0; p < c.plan.param_count; p++) rate_parts += g.gradient_part(p);
  const bool rates = g.any_rate_gradient();
  start_adjoint(c);
  if (g.low_rank(0)) fill_zero(ws.adjoint_rows, c.plan.support_rows * g.ld(g.layer(0).out));
  for (int k = c.plan.steps - 1; k >= 0; k--) {
    if (rates) rate_gradients<R>(c, k, query, rate_parts);
    if (!c.plan.second_order) continue;
    const Tangent<R> tangent = make_tangent(c, k);
    R* output = r_forward<R>(ws, ws.theta[k], ws.tangent, {&query, tangent.low_rank_rate},
                             ws.passes[k]);
    if (output == nullptr) continue;
    for (int p = 0; p < c.plan.param_count; p++) ws.scales[p] = tangent.scale;
    r_backward<R>(ws, ws.theta[k], ws.tangent, output, ws.passes[k],
                  {ws.adjoint, ws.adjoint, ws.scales});
  }
}

// The task's gradient joins its leaf's, or goes to its own row where the parameter is per task.
template <class R>
void collect(const TaskContext<R>& c) {
  const Workspace<R>& ws = c.ws;
  const Geometry<R>& g = ws.geometry;
  R* into = c.gradient;
  for (int p = 0; p < c.plan.param_count; p++) {
    const Param& param = c.plan.params[p];
    const Slot& s = ws.slots[p];
    const R* adjoint = ws.adjoint[p].primary();
    if (param.per_task) {
      R* own = static_cast<R*>(c.call.grads[p]) + c.task * tensor_size<R>(param);
      unpack_primary<R>(param, s, adjoint, R(c.call.scale), own);
    } else if (adjoint == nullptr) {  // the low-rank layer: one product, whatever I is
      const Pass<R>& query = ws.passes[c.plan.steps];
      const long ld = g.ld(g.layer(0).out);
      const bool moved = c.plan.steps > 0;
      const Pass<R>& support = ws.passes[0];
      const Product<R> products[2] = {
          transposed(query.x, query.ld_x, query.dout[0], ld, query.rows),
          transposed(support.x, support.ld_x, ws.adjoint_rows, ld, moved ? support.rows : 0)};
      gemm<R>(c.plan.features, g.layer(0).out, products, moved ? 2 : 1, R(1), into, ld, into, ld);
    } else {
      for (long i = 0; i < s.primary_size(); i += Vec<R>::width)
        store(into + i, load(into + i) + load(adjoint + i));
    }
    into += g.gradient_part(p);
  }
}

template <class R>
void run_task(const TaskContext<R>& c) {
  Workspace<R>& ws = c.ws;
  const Geometry<R>& g = ws.geometry;
  start_parameters(c);
  inner_loop(c);
  if (c.call.adapted != nullptr) {
    for (int p = 0; p < c.plan.param_count; p++) {
      const Param& param = c.plan.params[p];
      if (c.call.adapted[p] == nullptr) continue;
      unpack_primary<R>(param, ws.slots[p], ws.theta[c.plan.steps][p].primary(), R(1),
                        static_cast<R*>(c.call.adapted[p]) + c.task * tensor_size<R>(param));
    }
  }
  if (c.plan.query_rows > 0) {
    Pass<R>& query = ws.passes[c.plan.steps];
    load_rows<R>(g, c.call.query_x, c.call.query_y, c.call.query_weight, c.task, c.plan.query_rows,
                 &query);
    if (g.low_rank(0)) {
      const int support_rows = c.plan.steps > 0 ? ws.passes[0].rows : 0;
      project_rows<R>(ws, ws.theta[0][g.layer(0).weight], support_rows, &query);
    }
    forward<R>(g, ws.theta[c.plan.steps], c.plan.steps > 0 ? ws.shift : nullptr, query);
    const LossValue<R> value = loss_of<R>(g, query);
    static_cast<R*>(c.call.losses)[c.task] = value.loss;
    if (c.call.accuracies != nullptr) static_cast<R*>(c.call.accuracies)[c.task] = value.accuracy;
    if (!c.plan.reverse) return;
    backward<R>(g, ws.theta[c.plan.steps], query);
  }
  if (!c.plan.reverse) return;
  reverse(c);
  collect(c);
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
