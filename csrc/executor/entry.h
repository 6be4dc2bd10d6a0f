// The functions one instruction set exports. Included by csrc/isa/*.cpp alone, which define
// FASTMETA_ISA_NAME and FASTMETA_VECTOR_BYTES.
#pragma once

#include "peak.h"
#include "task.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

template <class R>
long workspace_bytes(const Plan& plan) {
  Arena arena(nullptr);
  layout_workspace<R>(arena, plan);
  return arena.used();
}

template <class R>
void workspace_init(const Plan& plan, void* memory) {
  Arena arena(memory);
  layout_workspace<R>(arena, plan);
}

template <class R>
long shared_bytes(const Plan& plan) {
  Arena arena(nullptr);
  layout_shared<R>(arena, plan);
  return arena.used();
}

template <class R>
void pack_shared(const Plan& plan, const Call& call, void* memory) {
  Arena arena(memory);
  const Geometry<R> g{&plan};
  const Shared<R>& shared = *layout_shared<R>(arena, plan);
  for (int p = 0; p < plan.param_count; p++) {
    const Param& param = plan.params[p];
    const Slot s = g.slot(p);
    if (!param.per_task)
      pack<R>(param, s, static_cast<const R*>(call.params[p]), shared.theta[p]);
    if (shared.rates[p] == nullptr) continue;
    for (int k = 0; k < (param.rate_per_step ? plan.steps : 1); k++)
      pack_primary<R>(param, s, static_cast<const R*>(call.rates[p]) + k * tensor_size<R>(param),
                      shared.rates[p] + k * s.primary_size());
  }
}

template <class R>
long gradient_size(const Plan& plan) {
  return Geometry<R>{&plan}.gradient_size();
}

template <class R>
void run_leaf(const Plan& plan, const Call& call, const void* shared, void* workspace, int first,
              int last, void* gradient) {
  Workspace<R>& ws = *static_cast<Workspace<R>*>(workspace);
  R* sum = static_cast<R*>(gradient);
  if (sum != nullptr) fill_zero(sum, ws.geometry.gradient_size());
  for (int task = first; task < last; task++)
    run_task<R>({plan, call, *static_cast<const Shared<R>*>(shared), ws, task, sum});
}

template <class R>
void add(void* into, const void* other, long size) {
  R* a = static_cast<R*>(into);
  const R* b = static_cast<const R*>(other);
  for (long i = 0; i < size; i++) a[i] += b[i];
}

// The total, in PyTorch's layout and scaled.
template <class R>
void unpack(const Plan& plan, const Call& call, const void* gradient) {
  const Geometry<R> g{&plan};
  const R* from = static_cast<const R*>(gradient);
  const R scale = R(call.scale);
  for (int p = 0; p < plan.param_count; p++) {
    if (plan.params[p].per_task) continue;
    const Slot s = g.slot(p);
    unpack_primary<R>(plan.params[p], s, from, scale, static_cast<R*>(call.grads[p]));
    from += s.primary_size();
  }
  for (int p = 0; p < plan.param_count; p++) {
    const Param& param = plan.params[p];
    const long part = g.rate_part(p);
    if (part == 0) continue;
    R* into = static_cast<R*>(call.rate_grads[p]);
    const int steps = param.rate_per_step ? plan.steps : 1;
    for (int k = 0; k < steps; k++) {
      if (!param.rate_per_element) {
        into[k] = scale * from[k];
        continue;
      }
      const Slot s = g.slot(p);
      unpack_primary<R>(param, s, from + k * s.primary_size(), scale,
                        into + k * tensor_size<R>(param));
    }
    from += part;
  }
}

template <class R>
constexpr Kernels kernels() {
  return {workspace_bytes<R>, workspace_init<R>, shared_bytes<R>, pack_shared<R>,
          gradient_size<R>,   run_leaf<R>,       add<R>,          unpack<R>,
          fma_burst<R>};
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
