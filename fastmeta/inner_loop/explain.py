"""``explain``: which path a call takes, why not a better one, and what the engine read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fastmeta.batch import BatchLike, TaskBatch
from fastmeta.inner_loop.engine import PATHS, Verdict, decide, public, verdict
from fastmeta.inner_loop.first_use import check_first_use
from fastmeta.inner_loop.learner import facts
from fastmeta.inner_loop.optimizers import InnerOptimizer
from fastmeta.inner_loop.request import (
    BatchNormOption,
    Outer,
    Request,
    TaskTransform,
    build_request,
)
from fastmeta.ops.backend import backend as backend_context
from fastmeta.program.ir import Program, Unsupported

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What the engine would do, and why. ``print`` it.

    Args:
        path: the path ``auto`` takes, or None if none is right.
        verdicts: what was found out about each path, the one to be preferred first.
        program: the layer program that was read, or None.
        not_read: why no program could be read, or None.
        adapted: the parameters that adapt.
        fixed: the trainable parameters that do not.
        notes: what else one should know: BatchNorm's option, dropped updates, random layers.
    """

    path: str | None
    verdicts: tuple[Verdict, ...]
    program: Program | None
    not_read: str | None
    adapted: tuple[str, ...]
    fixed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(name) for name in PATHS)
        lines = [f"path: {self.path or 'none is right'}"]
        lines += [f"  {found.path:<{width}}  {found}" for found in self.verdicts]
        lines.append(f"adapts: {_names(self.adapted)}")
        if self.fixed:
            lines.append(f"does not adapt, but is meta-learned: {_names(self.fixed)}")
        if self.program is not None:
            lines.append("program:")
            lines += [f"  {line}" for line in str(self.program).splitlines()]
        elif self.not_read is not None:
            lines.append(f"program: not read: {self.not_read}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


@public
def explain(
    model: nn.Module | Program,
    batch: TaskBatch | BatchLike,
    *,
    inner: InnerOptimizer,
    loss: Callable[..., Tensor] | None,
    params: Mapping[str, Tensor] | None = None,
    loss_params: Mapping[str, Any] | None = None,
    outer: Outer | Tensor | list[float] = "query",
    order: Literal[1, 2] = 2,
    task_transform: TaskTransform | None = None,
    backend: str = "auto",
    batch_norm: BatchNormOption = "batch",
) -> Explanation:
    """Say which path a ``meta_grad`` call takes and what stands in the way of a better one.

    Nothing is trained or changed; a path may try a small step to find out.

    Args:
        model: the module, or a layer program.
        batch: the tasks, as for ``meta_grad``: tensors ``[T, S, ...]`` and ``[T, Q, ...]``.
        inner: the inner optimizer.
        loss: the loss of one task.
        params: name -> tensor ``[...]`` or ``[T, ...]``; None means the module's own.
        loss_params: further arguments of the loss.
        outer: the outer objective.
        order: 1 or 2.
        task_transform: what happens to one task's gradients.
        backend: who computes operations.
        batch_norm: what BatchNorm layers do.

    Returns:
        The explanation; its ``str`` is for people.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Example:
        >>> import torch, fastmeta
        >>> net = torch.nn.GRU(3, 8, batch_first=True)
        >>> x, y = torch.randn(4, 5, 6, 3), torch.randn(4, 5, 6, 8)
        >>> mse = lambda output, y: ((output[0] - y) ** 2).mean()
        >>> fastmeta.explain(net, (x, y, x, y), inner=fastmeta.SGD(), loss=mse).path
        'reference'
    """
    request = build_request(
        model,
        params,
        batch,
        inner=inner,
        loss=loss,
        loss_params=loss_params,
        outer=outer,
        order=order,
        task_transform=task_transform,
        batch_norm=batch_norm,
        backend=backend,
        op="explain",
    )
    check_first_use(request)
    with backend_context(request.backend):
        verdicts = tuple(verdict(request, name) for name in PATHS)
        program, not_read = _read(request)
    adapted = request.rates.adapted
    return Explanation(
        decide(verdicts),
        verdicts,
        program,
        not_read,
        adapted,
        tuple(name for name in request.params if name not in adapted),
        _notes(request),
    )


def _read(request: Request) -> tuple[Program | None, str | None]:
    if request.program is not None or request.model is None:
        return request.program, None
    from fastmeta.program.reader import read

    x, y = request.batch.support.x, request.batch.support.y
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None, "its inputs and targets are not one tensor each"
    try:
        program = read(
            request.model,
            request.loss,
            x[0],
            y[0],
            batch_norm=request.batch_norm,
            loss_params=request.loss_params,
        )
    except Unsupported as unsupported:
        return None, str(unsupported)
    return program, None


_BATCH_NORM = {
    "batch": "each call normalises by its own rows; the running update is dropped",
    "per_step": "statistics for each inner step",
    "frozen": "running statistics, which stay as they are",
    "track": "as torch does it in the module's mode; meta_grad updates running statistics",
}


def _notes(request: Request) -> tuple[str, ...]:
    found = facts(request.model)
    notes = []
    if found.batch_norm:
        option = request.batch_norm
        notes.append(f"batch_norm={option!r}: {_BATCH_NORM[option]}")
    if found.random:
        notes.append(
            f"{found.random[0]} draws from torch's global generator on the reference path, so its "
            "numbers depend on the order of calls (eval() switches it off)"
        )
    frozen = [n for n, p in _own(request) if not p.requires_grad]
    if frozen:
        notes.append(f"frozen, neither adapted nor meta-learned: {_names(tuple(frozen))}")
    return tuple(notes)


def _own(request: Request) -> list[tuple[str, Tensor]]:
    return [] if request.model is None else list(request.model.named_parameters())


def _names(names: tuple[str, ...], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
