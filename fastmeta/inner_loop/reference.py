"""The ``reference`` path: a plain Python loop over tasks with autograd. The definition.

Slow on purpose, and the last resort for modules that vmap cannot run: recurrent layers, some
attention, tracked BatchNorm statistics, dropout. Tasks are summed in task order within the fixed
tree of ``reduction.py``, so neither chunks nor threads show in how they are summed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta._checks import value_error
from fastmeta.inner_loop.learner import Learner, log_once, note_dropped
from fastmeta.inner_loop.lift import Leaves, lift, wants_grad
from fastmeta.inner_loop.optimizers import OptimizerState
from fastmeta.inner_loop.reduction import LEAF, TreeReducer
from fastmeta.inner_loop.request import Request
from fastmeta.inner_loop.result import Grads, MetaGrad
from fastmeta.inner_loop.trial import no_second_derivative
from fastmeta.inner_loop.unroll import (
    Named,
    Objective,
    Plan,
    Trajectory,
    outer_loss,
    transformed,
    unroll,
)

__all__ = ["adapt", "meta_grad", "why_not"]


def why_not(request: Request) -> str | None:
    """None if this path is right for the request, else the reason, by name."""
    if request.batch_norm == "per_step":
        return "batch_norm='per_step' is not implemented yet"
    return None


def meta_grad(request: Request) -> MetaGrad:
    """The meta-gradient of a batch of tasks, one task at a time."""
    learner = Learner(request)
    _note_random(request, learner)
    leaves = lift(request)
    plan = _plan(request, learner, leaves, differentiable=request.outer != "displacement")
    reducer, leaf = _Sum(), _Sum()
    own: dict[str, list[Tensor]] = {name: [] for name in request.params if name in request.per_task}
    losses, found = [], []
    tracked = learner.fresh_buffers() if request.batch_norm == "track" else None
    with learner.session(), torch.enable_grad(), _clear_errors(request):
        for index in range(request.num_tasks):
            plan.buffers = learner.fresh_buffers() if tracked is None else tracked
            before = {name: buffer._version for name, buffer in plan.buffers.items()}
            params = {
                name: _one(request, name, value, index).detach().requires_grad_()
                for name, value in request.params.items()
            }
            given = {n: _one(request, n, value, index) for n, value in request.frozen.items()}
            state = _state_of(request.state, index)
            task = request.batch[index]
            loss, constants = outer_loss(plan, {**params, **given}, task, state)
            adapted = constants["adapted"]
            grads, rest = _task_gradient(request, loss, params, adapted, leaves.tensors)
            losses.append(loss.detach())
            found.append(constants)
            for name, values in own.items():
                values.append(grads[name])
            shared = [grads[name] for name in params if name not in own]
            leaf.add([*shared, *rest])
            if (index + 1) % LEAF == 0 or index + 1 == request.num_tasks:
                reducer.push(leaf)
            if tracked is None:
                note_dropped(request, plan.buffers, before)
    if tracked is not None:
        _write_back(learner, tracked)
    scale = 1.0 / request.num_tasks if request.reduction == "mean" else 1.0
    summed = iter([value * scale for value in reducer.total()])
    params_grad = {
        name: torch.stack(own[name]) * scale if name in own else next(summed)
        for name in request.params
    }
    inner, loss_params = leaves.rebuild(list(summed))
    constants = _stacked(found)
    metrics: Named = {n: constants[n] for n in ("support_loss", "accuracy") if n in constants}
    return MetaGrad(
        Grads(params_grad, inner, loss_params),
        torch.stack(losses),
        metrics,
        constants["adapted"],
        constants["state"],
        "reference",
    )


def adapt(request: Request) -> dict[str, Tensor]:
    """The adapted parameters ``[T, ...]``, differentiable where grad mode and inputs ask for it."""
    learner = Learner(request)
    _note_random(request, learner)
    differentiable = torch.is_grad_enabled() and wants_grad(request)
    leaves = lift(request, detach=False)
    plan = _plan(request, learner, leaves, differentiable=differentiable)
    ends: list[Trajectory] = []
    with learner.session(), torch.enable_grad(), _clear_errors(request):
        for index in range(request.num_tasks):
            plan.buffers = learner.fresh_buffers()
            values = {**request.params, **request.frozen}
            params = {name: _one(request, name, value, index) for name, value in values.items()}
            if not differentiable:
                params = {name: value.detach() for name, value in params.items()}
            end = unroll(plan, params, request.batch[index], _state_of(request.state, index))
            ends.append(end)
    names = request.rates.adapted
    request.cache["support_loss"] = torch.stack([end.support_losses for end in ends])
    request.cache["state"] = _stacked([{"state": end.state} for end in ends])["state"]
    with torch.set_grad_enabled(differentiable):
        return {name: torch.stack([end.params[name] for end in ends]) for name in names}


class _Sum:
    """A running sum of lists of tensors, in order; the tree's leaves and the tree itself."""

    def __init__(self) -> None:
        self._values: list[Tensor] | None = None
        self._tasks = 0
        self._tree = TreeReducer()

    def add(self, values: list[Tensor]) -> None:
        if self._values is None:
            self._values = values
        else:
            self._values = [a + b for a, b in zip(self._values, values, strict=True)]
        self._tasks += 1

    def push(self, leaf: _Sum) -> None:
        self._tree.push(leaf._values or [], leaf._tasks)
        leaf._values, leaf._tasks = None, 0

    def total(self) -> list[Tensor]:
        return self._tree.total()


def _plan(request: Request, learner: Learner, leaves: Leaves, *, differentiable: bool) -> Plan:
    second = differentiable and request.order == 2
    if second and "float64" not in request.cache:  # not within a trial
        reason = no_second_derivative(request)
        if reason is not None:
            raise RuntimeError(_refusal(request, reason))

    def gradient(objective: Objective, at: Named) -> tuple[Named, Tensor]:
        inputs = {n: v if v.requires_grad else v.detach().requires_grad_() for n, v in at.items()}
        value = objective(inputs)
        if not value.requires_grad:
            must = "depend on a parameter that adapts, by operations autograd knows"
            raise value_error(request.op, "loss", must, "a constant")
        grads = torch.autograd.grad(
            value,
            list(inputs.values()),
            create_graph=second,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(inputs, grads, strict=True)), value

    return Plan(
        learner,
        leaves.inner,
        leaves.rates,
        leaves.loss_params,
        differentiable,
        second,
        gradient,
        drop=True,
    )


def _task_gradient(
    request: Request,
    loss: Tensor,
    params: Named,
    adapted: Named,
    others: list[Tensor],
) -> tuple[Named, list[Tensor]]:
    """One task's gradient by parameter, transformed, and those of the inner and loss tensors."""
    if request.outer == "displacement":
        grads = {
            name: value.detach() - adapted[name] if name in adapted else torch.zeros_like(value)
            for name, value in params.items()
        }
        return transformed(request, grads), []
    if not loss.requires_grad:
        must = "depend on the parameters, by operations autograd knows"
        raise value_error(request.op, "loss", must, "a constant")
    inputs = [*params.values(), *others]
    values = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    grads = dict(zip(params, values[: len(params)], strict=True))
    return transformed(request, grads), list(values[len(params) :])


def _one(request: Request, name: str, value: Tensor, index: int) -> Tensor:
    return value[index] if name in request.per_task else value


def _state_of(state: OptimizerState | None, index: int) -> OptimizerState | None:
    if state is None:
        return None
    picked: OptimizerState = pytree.tree_map(lambda value: value[index], state)
    return picked


def _stacked(found: list[dict[str, Any]]) -> dict[str, Any]:
    stacked: dict[str, Any] = pytree.tree_map(lambda *values: torch.stack(values), *found)
    return stacked


def _note_random(request: Request, learner: Learner) -> None:
    if learner.facts.random:
        words = (
            f"{learner.facts.random[0]} draws from torch's global generator, so the numbers "
            "depend on the order and the chunks of calls, not on the task alone"
        )
        log_once(request.model, words, logging.WARNING)


def _write_back(learner: Learner, tracked: Named) -> None:
    with torch.no_grad():
        for name, buffer in learner.buffers.items():
            buffer.copy_(tracked[name])


_NO_DOUBLE_BACKWARD = re.compile(
    r"derivative for (\S+) is not implemented|once_differentiable|double backward|"
    r"(_\w*backward) is not currently supported"
)


@contextmanager
def _clear_errors(request: Request) -> Iterator[None]:
    """Turn autograd's words for a missing second derivative into the project's."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if request.order == 2 and _NO_DOUBLE_BACKWARD.search(str(error)):
            raise RuntimeError(_refusal(request, f"autograd said: {error}")) from error
        raise


def _refusal(request: Request, reason: str) -> str:
    return (
        f"{request.op}: an operation of the module or of the loss has no second derivative, which "
        "the exact meta-gradient (order=2) needs; order=1 does without, or write the operation "
        f"with differentiable ones. {reason[0].upper()}{reason[1:]}"
    )
