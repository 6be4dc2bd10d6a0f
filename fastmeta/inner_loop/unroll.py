r"""The inner loop of one task: the definition that ``reference`` loops over and vmap maps.

.. math:: \theta_{k+1} = u_k(\theta_k, \nabla_\theta L_s(\theta_k)), \qquad k = 0, ..., I - 1

with the update :math:`u_k` of the inner optimizer, and then the outer loss of the last (or of
each) :math:`\theta_k` on the query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, type_error, value_error
from fastmeta.batch import TaskBatch
from fastmeta.inner_loop.learner import Learner, accuracy, rows_of
from fastmeta.inner_loop.optimizers import InnerOptimizer, OptimizerState, ResolvedSGD
from fastmeta.inner_loop.request import Request

__all__ = ["Gradient", "Plan", "Trajectory", "outer_loss", "transformed", "unroll"]

Named: TypeAlias = dict[str, Tensor]
Objective: TypeAlias = Callable[[Named], Tensor]
Gradient: TypeAlias = Callable[[Objective, Named], tuple[Named, Tensor]]
"""How a path takes the gradient of an objective: ``(grads, value)`` at given parameters."""


@dataclass
class Plan:
    """The parts of a request that one task's inner loop needs.

    Args:
        learner: outputs and losses.
        inner: the inner optimizer, its tensors the leaves that gradients are taken of.
        rates: ``inner`` resolved.
        loss_params: keyword arguments of the loss.
        differentiable: whether gradients through the inner loop will be asked for; if not, or at
            first order, each inner gradient is a constant.
        second_order: whether they pass through the inner gradients too.
        gradient: how to take an inner gradient.
        drop: whether rows of weight zero are taken out before the forward pass, as the definition
            has it (vmap cannot: it masks them).
        buffers: what stands for the module's buffers, shared by all forward passes of a task.
    """

    learner: Learner
    inner: InnerOptimizer
    rates: ResolvedSGD
    loss_params: Mapping[str, Any] | None
    differentiable: bool
    second_order: bool
    gradient: Gradient
    drop: bool
    buffers: dict[str, Tensor] | None = None


@dataclass
class Trajectory:
    """What the inner loop of one task leaves.

    Args:
        params: all parameters after the last step, adapted and not.
        steps: the parameters after each step, if they were asked for.
        support_losses: ``[I]``, before each step, constants.
        state: the optimizer's state after the last step, constants.
    """

    params: Named
    steps: list[Named]
    support_losses: Tensor
    state: OptimizerState


def unroll(
    plan: Plan,
    params: Named,
    task: TaskBatch,
    state: OptimizerState | None,
    *,
    keep_steps: bool = False,
) -> Trajectory:
    """Run the inner loop of one task.

    Args:
        plan: how.
        params: every parameter ``[...]``.
        task: one task, no task axis.
        state: the optimizer's state before the first step, or None.
        keep_steps: whether to keep the parameters after every step.
    """
    names = plan.rates.adapted
    adapted = {name: params[name] for name in names}
    fixed = {name: value for name, value in params.items() if name not in adapted}
    loss_params = plan.loss_params
    if not plan.second_order:
        fixed = {name: value.detach() for name, value in fixed.items()}
        loss_params = _detached(loss_params)
    state = plan.inner.initial_state(adapted) if state is None else state
    losses, steps = [], []
    for step in range(plan.rates.steps):
        rows = rows_of(task.support, step, drop=plan.drop)

        def objective(at: Named, rows: Any = rows) -> Tensor:
            return plan.learner.loss({**fixed, **at}, rows, loss_params, plan.buffers)[0]

        at = adapted if plan.second_order else {n: v.detach() for n, v in adapted.items()}
        grads, value = plan.gradient(objective, at)
        if not plan.second_order:
            grads = {name: grad.detach() for name, grad in grads.items()}
        losses.append(value.detach())
        adapted, state = plan.inner.update(adapted, grads, plan.rates.at(step), state)
        if not plan.differentiable:
            adapted = {name: value.detach() for name, value in adapted.items()}
            state = _constant(state)
        if keep_steps:
            steps.append({**params, **adapted})
    some = next(iter(adapted.values()))
    support = torch.stack(losses) if losses else some.new_zeros(0)
    return Trajectory({**params, **adapted}, steps, support, _constant(state))


def outer_loss(
    plan: Plan, params: Named, task: TaskBatch, state: OptimizerState | None
) -> tuple[Tensor, dict[str, Any]]:
    """One task's outer loss ``[]``, and constants: adapted parameters, metrics, state.

    The displacement has no outer loss to differentiate: its value here is the query loss after
    adaptation, and the gradient is taken from "adapted".
    """
    outer = plan.learner.request.outer
    weights = outer if isinstance(outer, tuple) else ()
    rows = rows_of(task.query, drop=plan.drop)
    path = unroll(plan, params, task, state, keep_steps=bool(weights))
    output: Any = None
    if weights:
        terms = []
        for weight, at in zip(weights, path.steps, strict=True):
            last = at is path.steps[-1]
            if weight == 0.0 and not last:
                continue  # a weight annealed to zero costs nothing
            value, output = plan.learner.loss(at, rows, plan.loss_params, plan.buffers)
            terms.append(weight * value)
        total = torch.stack(terms).sum()
    else:
        total, output = plan.learner.loss(path.params, rows, plan.loss_params, plan.buffers)
    found: dict[str, Any] = {
        "adapted": {name: path.params[name].detach() for name in plan.rates.adapted},
        "support_loss": path.support_losses,
        "state": path.state,
    }
    share = accuracy(output, rows)
    if share is not None:
        found["accuracy"] = share
    return total, found


def transformed(request: Request, grads: Named) -> Named:
    """One task's gradients after ``task_transform``, checked."""
    if request.task_transform is None:
        return grads
    with torch.no_grad():
        changed: Any = request.task_transform(dict(grads))
    if not isinstance(changed, Mapping) or set(changed) != set(grads):
        must = "return gradients of the same names"
        raise type_error(request.op, "task_transform", must, describe(changed))
    for name, value in changed.items():
        if not isinstance(value, Tensor) or value.shape != grads[name].shape:
            must = f"return a gradient of shape {list(grads[name].shape)} for {name!r}"
            raise value_error(request.op, "task_transform", must, describe(value))
    return {name: changed[name] for name in grads}


def _detached(tree: Any) -> Any:
    if tree is None:
        return None
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _constant(state: OptimizerState) -> OptimizerState:
    return OptimizerState(
        state.step.detach(),
        {name: value.detach() for name, value in state.first.items()},
        {name: value.detach() for name, value in state.second.items()},
    )
