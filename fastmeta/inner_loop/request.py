"""One call of the engine, checked and normalised once: what every path receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, type_error, value_error
from fastmeta.batch import BatchLike, Examples, TaskBatch
from fastmeta.inner_loop.optimizers import InnerOptimizer, OptimizerState, ResolvedSGD, resolve
from fastmeta.ops.backend import current_backend
from fastmeta.program.ir import Program

__all__ = ["BatchNormOption", "Outer", "Request", "build_request"]

BatchNormOption: TypeAlias = Literal["batch", "per_step", "frozen", "track"]
Outer: TypeAlias = Literal["query", "displacement"] | tuple[float, ...]
TaskTransform: TypeAlias = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

BATCH_NORMS = ("batch", "per_step", "frozen", "track")


@dataclass(eq=False)
class Request:
    """A call of ``meta_grad`` or ``adapt`` after all checks that need no forward pass.

    Args:
        model: the module, or None if a program was given instead.
        program: the program, if one was given instead of a module.
        params: the trainable tensors by name, ``[...]`` or ``[T, ...]``. All of them receive
            meta-gradients; which adapt is in ``rates.adapted``.
        frozen: values given for parameters that are frozen in the module: constants.
        per_task: names in ``params`` and ``frozen`` whose tensor carries the task axis.
        batch: the tasks. For ``adapt`` the query is a copy of the support, and is not used.
        inner: the inner optimizer.
        rates: ``inner`` resolved for ``params``.
        loss: ``loss(output, y, **loss_params)`` of one task, a scalar or ``[S]``; None only for a
            program that has a loss of its own.
        loss_params: keyword arguments of the loss, a pytree for each.
        outer: "query"; I weights of the query loss after each step; or "displacement".
        order: 2, or 1 for gradients of the inner loop held constant.
        reduction: over tasks.
        task_transform: applied to one task's gradients before the reduction.
        state: the inner optimizer's state before the first step, ``[T, ...]`` throughout.
        batch_norm: what BatchNorm layers do.
        backend: who computes operations, after the context manager and the environment.
        op: the public function that was called, for error messages.
    """

    model: nn.Module | None
    program: Program | None
    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    per_task: frozenset[str]
    batch: TaskBatch
    inner: InnerOptimizer
    rates: ResolvedSGD
    loss: Callable[..., Tensor] | None
    loss_params: Mapping[str, Any] | None = None
    outer: Outer = "query"
    order: Literal[1, 2] = 2
    reduction: Literal["mean", "sum"] = "mean"
    task_transform: TaskTransform | None = None
    state: OptimizerState | None = None
    batch_norm: BatchNormOption = "batch"
    backend: str = "auto"
    op: str = "meta_grad"
    cache: dict[str, Any] = field(default_factory=dict)
    """What a path finds out while deciding and wants back while running (its program, say)."""

    @property
    def num_tasks(self) -> int:
        """The number of tasks T."""
        return self.batch.num_tasks

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one task's parameter, without a task axis."""
        value = self.params[name] if name in self.params else self.frozen[name]
        return tuple(value.shape[1:] if name in self.per_task else value.shape)


def build_request(
    model: nn.Module | Program,
    params: Mapping[str, Tensor] | None,
    batch: TaskBatch | BatchLike,
    *,
    inner: InnerOptimizer,
    loss: Callable[..., Tensor] | None,
    loss_params: Mapping[str, Any] | None = None,
    outer: Any = "query",
    order: int = 2,
    reduction: str = "mean",
    task_transform: TaskTransform | None = None,
    state: OptimizerState | None = None,
    batch_norm: str = "batch",
    backend: str = "auto",
    op: str = "meta_grad",
) -> Request:
    """Check the arguments of a public call, and bring each to its one normal form.

    The arguments are those of :func:`fastmeta.meta_grad`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.
    """
    if not isinstance(model, (nn.Module, Program)):
        raise type_error(op, "model", "be an nn.Module or a Program", describe(model))
    if not isinstance(inner, InnerOptimizer):
        raise type_error(op, "inner", "be SGD, Momentum or Adam", describe(inner))
    batch = TaskBatch.of(batch)
    module, program = (model, None) if isinstance(model, nn.Module) else (None, model)
    values, frozen, per_task = _params(op, model, params, batch)
    rates = resolve(inner, _task_shapes(values, per_task))
    _check_loss(op, loss, loss_params, program)
    _check_choice(op, "reduction", reduction, ("mean", "sum"))
    _check_choice(op, "batch_norm", batch_norm, BATCH_NORMS)
    if isinstance(order, bool) or order not in (1, 2):
        raise value_error(op, "order", "be 1 or 2", describe(order))
    if task_transform is not None and not callable(task_transform):
        raise type_error(op, "task_transform", "be a function", describe(task_transform))
    _check_index(op, batch, inner.steps)
    request = Request(
        module,
        program,
        values,
        frozen,
        per_task,
        batch,
        inner,
        rates,
        loss,
        loss_params,
        _outer(op, outer, inner.steps),
        1 if order == 1 else 2,
        "sum" if reduction == "sum" else "mean",
        task_transform,
        None,
        batch_norm,  # type: ignore[arg-type]
        current_backend(backend),
        op,
    )
    _check_devices(request)
    _check_displacement(request)
    request.state = _state(request, state)
    return request


def _params(
    op: str,
    model: nn.Module | Program,
    params: Mapping[str, Tensor] | None,
    batch: TaskBatch,
) -> tuple[dict[str, Tensor], dict[str, Tensor], frozenset[str]]:
    values: dict[str, Tensor]
    if isinstance(model, Program):
        shapes = {name: tuple(shape) for name, shape in model.params.items()}
        trainable = dict.fromkeys(shapes, True)
        if params is None:
            raise type_error(op, "params", "be given with a program: name -> tensor", "None")
    else:
        own: dict[str, Tensor] = dict(model.named_parameters())
        for name, value in own.items():
            if isinstance(value, nn.parameter.UninitializedParameter):
                must = "have initialised parameters (run the module once)"
                raise value_error(op, "model", must, f"a lazy parameter {name!r}")
        trainable = {name: value.requires_grad for name, value in own.items()}
        if params is None:
            values = {n: p for n, p in own.items() if p.requires_grad}
            if not values:
                raise value_error(op, "model", "have a parameter that requires grad", "none")
            return values, {}, frozenset()
        shapes = {name: tuple(value.shape) for name, value in own.items()}
    if not isinstance(params, Mapping):
        raise type_error(op, "params", "be a mapping name -> tensor, or None", describe(params))
    missing = [name for name, yes in trainable.items() if yes and name not in params]
    if missing:
        raise value_error(op, "params", f"have {missing[0]!r} like the model", "none of that name")
    values = {}
    frozen: dict[str, Tensor] = {}
    per_task: set[str] = set()
    for name, value in params.items():
        where = f"params[{name!r}]"
        if name not in shapes:
            known = ", ".join(map(repr, shapes))
            raise value_error(op, "params", f"be parameters of the model ({known})", repr(name))
        if not isinstance(value, Tensor):
            raise type_error(op, where, "be a tensor", describe(value))
        if not value.is_floating_point():
            raise type_error(op, where, "be a floating tensor", value)
        shape, found = shapes[name], tuple(value.shape)
        if found == (batch.num_tasks, *shape):
            per_task.add(name)
        elif found != shape:
            must = f"have shape {list(shape)}, or {[batch.num_tasks, *shape]} for each task"
            raise value_error(op, where, must, value)
        (values if trainable[name] else frozen)[name] = value
    if not values:
        raise value_error(op, "model", "have a parameter that requires grad", "none")
    # the model's order, whatever the caller's: sums and flat vectors then agree everywhere
    ordered = {name: values[name] for name in shapes if name in values}
    return ordered, frozen, frozenset(per_task)


def _task_shapes(
    params: Mapping[str, Tensor], per_task: frozenset[str]
) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape[1:] if n in per_task else p.shape) for n, p in params.items()}


def _check_loss(op: str, loss: Any, loss_params: Any, program: Program | None) -> None:
    if program is not None and program.loss is not None:
        if loss is not None or loss_params:
            must = "be None for a program that has a loss of its own"
            raise type_error(op, "loss", must, describe(loss if loss is not None else loss_params))
    elif not callable(loss):
        raise type_error(op, "loss", "be a function loss(output, y) of one task", describe(loss))
    if loss_params is None:
        return
    if not isinstance(loss_params, Mapping) or not all(isinstance(k, str) for k in loss_params):
        must = "be a mapping of keyword arguments, or None"
        raise type_error(op, "loss_params", must, describe(loss_params))


def _check_choice(op: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise type_error(op, argument, "be a string", describe(value))
    if value not in choices:
        raise value_error(op, argument, f"be one of {', '.join(choices)}", repr(value))


def _outer(op: str, outer: Any, steps: int) -> Outer:
    if isinstance(outer, str):
        if outer == "implicit":
            must = "be 'query', 'displacement' or I weights (implicit gradients are yet to come)"
            raise value_error(op, "outer", must, "'implicit'")
        _check_choice(op, "outer", outer, ("query", "displacement"))
        return "query" if outer == "query" else "displacement"
    if isinstance(outer, Tensor):
        if outer.ndim != 1 or outer.dtype == torch.bool or outer.is_complex():
            raise value_error(op, "outer", f"have shape [{steps}], a weight per step", outer)
        if outer.requires_grad:
            must = "be constant weights (they receive no gradient; detach them)"
            raise value_error(op, "outer", must, outer)
        outer = outer.tolist()
    if not isinstance(outer, (tuple, list)) or not all(
        isinstance(w, (int, float)) and not isinstance(w, bool) for w in outer
    ):
        must = "be 'query', 'displacement' or a weight for each step"
        raise type_error(op, "outer", must, describe(outer))
    weights = tuple(float(weight) for weight in outer)
    if len(weights) != steps or not weights:
        raise value_error(op, "outer", f"have {steps} weights, one per step", f"{len(weights)}")
    if not all(-float("inf") < weight < float("inf") for weight in weights):
        raise value_error(op, "outer", "have finite weights", str(weights))
    return weights


def _check_index(op: str, batch: TaskBatch, steps: int) -> None:
    index = batch.support.index
    if index is not None and index.shape[1] != steps:
        must = f"have rows for each of the {steps} steps, shape [T, {steps}, B]"
        raise value_error(op, "support.index", must, index)
    if batch.query.index is not None:
        must = "be None: only the support is seen in mini-batches"
        raise value_error(op, "query.index", must, batch.query.index)


def _check_devices(request: Request) -> None:
    op, first = request.op, _first(request.batch.support.x)
    device = first.device
    dtypes = set()
    for name, value in (*request.params.items(), *request.frozen.items()):
        dtypes.add(value.dtype)
        if value.device != device:
            must = f"be on {device} like the batch"
            raise value_error(op, f"params[{name!r}]", must, f"it on {value.device}")
    for argument, tree in (("inner", request.inner), ("loss_params", request.loss_params)):
        if argument == "inner" and isinstance(request.inner.lr, float):
            continue  # the common case needs no walk
        for leaf in pytree.tree_leaves(tree):
            # a number in a tensor may stay on the CPU: torch mixes it with any device
            if isinstance(leaf, Tensor) and leaf.device != device and leaf.ndim > 0:
                raise value_error(op, argument, f"be on {device} like the batch", leaf)
    if len(dtypes) == 1 and not _autocast(device):
        dtype = dtypes.pop()
        for side in ("support", "query"):
            examples: Examples = getattr(request.batch, side)
            for leaf in _leaves(examples.x):
                if leaf.is_floating_point() and leaf.dtype != dtype:
                    words = str(dtype).removeprefix("torch.")
                    raise type_error(op, f"{side}.x", f"be {words} like the parameters", leaf)


def _autocast(device: torch.device) -> bool:
    known = torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def _check_displacement(request: Request) -> None:
    if request.outer != "displacement":
        return
    for argument, tree in (("inner", request.inner), ("loss_params", request.loss_params)):
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                must = "be constants with outer='displacement', which has no gradient for them"
                raise value_error(request.op, argument, must, "a tensor that requires grad")


def _state(request: Request, state: Any) -> OptimizerState | None:
    """The state with a task axis everywhere, detached; None if none was given."""
    if state is None:
        return None
    op, tasks = request.op, request.num_tasks
    if not isinstance(state, OptimizerState):
        raise type_error(op, "state", "be an OptimizerState of an earlier call", describe(state))
    adapted = {n: torch.empty(request.shape(n), device="meta") for n in request.rates.adapted}
    wanted = request.inner.initial_state(adapted)

    def spread(where: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(value, Tensor):
            raise type_error(op, where, "be a tensor", describe(value))
        if tuple(value.shape) not in (shape, (tasks, *shape)):
            raise value_error(op, where, f"have shape {list(shape)} or {[tasks, *shape]}", value)
        return value.detach().expand(tasks, *shape)

    moments = []
    for part in ("first", "second"):
        have, want = getattr(state, part), getattr(wanted, part)
        if set(have) != set(want):
            must = f"have the parameters that adapt ({', '.join(map(repr, want)) or 'none'})"
            found = ", ".join(map(repr, have)) or "none"
            raise value_error(op, f"state.{part}", must, found)
        moments.append({n: spread(f"state.{part}[{n!r}]", have[n], request.shape(n)) for n in want})
    return OptimizerState(spread("state.step", state.step, ()), *moments)


def _leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)


def _first(tree: Any) -> Tensor:
    return _leaves(tree)[0]
