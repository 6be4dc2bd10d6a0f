"""What is tried on two tasks at the first use of a module, and remembered.

Some wrongs cannot be seen from outside: a batching rule that drops a term, or a backward pass that
is not itself differentiable, after which a meta-gradient of second order is silently one of first
order. (``torch.autograd.grad`` skips even the errors of ``once_differentiable``.) So they are
measured, once for each module, mode, loss and kind of batch.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop.learner import Learner, rows_of
from fastmeta.inner_loop.optimizers import resolve
from fastmeta.inner_loop.request import Request
from fastmeta.inner_loop.unroll import Named

__all__ = ["found_once", "loss_key", "no_second_derivative", "quietly", "trial"]

_verdicts: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def trial(request: Request, double: bool, noise: float = 1e-2) -> Request:
    """Two tasks of the request, their inputs moved a little off the ties of max-pooling."""
    tasks = min(2, request.num_tasks)
    generator = torch.Generator().manual_seed(0)

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if double and floating else value

    def finite(value: Tensor, spread: float) -> Tensor:
        value = cast(value[:tasks].detach())
        if not value.is_floating_point():
            return value
        moved = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
        return value.nan_to_num(0.0, 1.0, -1.0) + spread * moved

    def side(examples: Examples) -> Examples:
        x = pytree.tree_map(lambda leaf: finite(leaf, noise), examples.x)
        y = pytree.tree_map(lambda leaf: finite(leaf, 0.0), examples.y)
        weight, index = pytree.tree_map(
            lambda leaf: None if leaf is None else cast(leaf[:tasks]),
            (examples.weight, examples.index),
        )
        return Examples(x, y, weight, index)

    def named(values: Mapping[str, Tensor]) -> Named:
        each = request.per_task
        return {n: cast(v.detach()[:tasks] if n in each else v.detach()) for n, v in values.items()}

    given = {**request.params, **request.frozen}
    own = {} if request.model is None else dict(request.model.named_parameters())
    rest: Named = {name: value for name, value in own.items() if name not in given}
    inner = pytree.tree_map(cast, request.inner)
    return replace(
        request,
        batch=TaskBatch(side(request.batch.support), side(request.batch.query)),
        params=named(request.params),
        frozen=named({**request.frozen, **rest}),
        inner=inner,
        rates=resolve(inner, {name: request.shape(name) for name in request.params}),
        loss_params=pytree.tree_map(cast, request.loss_params),
        outer="displacement" if request.outer == "displacement" else "query",
        task_transform=None,
        state=None,
        batch_norm="frozen" if request.batch_norm == "frozen" else "batch",
        cache={"float64": double},
    )


@contextmanager
def quietly(request: Request) -> Iterator[None]:
    """Draw from generators of a fixed seed, and leave the caller's where they were."""
    device = pytree.tree_leaves(request.batch.support.x)[0].device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def no_second_derivative(request: Request) -> str | None:
    """Why second derivatives of the module or the loss are not to be trusted, or None.

    The Hessian of one task's support loss times a random vector, by double backward, against a
    difference of gradients, in float64. A module that insists on another dtype is searched for
    operations that are marked as differentiable once, and tried in float32 if it is of that, with
    longer steps and less exactly. Asked once for each module and loss.
    """
    if request.order == 1 or request.inner.steps == 0:
        return None

    def find() -> str | None:
        try:
            return _differences(trial(request, True))
        except Exception:  # not in float64, or an error that the real call words better
            pass
        try:
            small = trial(request, False)
            return _marked(small) or (_differences(small) if _single(small) else None)
        except Exception:
            return None

    return found_once(request, "second derivative", find)


def _gradient_of(small: Request) -> tuple[Callable[[list[Tensor]], list[Tensor]], list[Tensor]]:
    """The support gradient of the first task as a function of all parameters; and these."""
    learner = Learner(small)
    rows = rows_of(small.batch[0].support, drop=True)
    names = list(small.params)
    both = {**small.params, **small.frozen}
    start = {n: value[0] if n in small.per_task else value for n, value in both.items()}

    def gradient(at: list[Tensor]) -> list[Tensor]:
        with quietly(small), learner.session():
            params = {**start, **dict(zip(names, at, strict=True))}
            loss, _ = learner.loss(params, rows, small.loss_params, learner.fresh_buffers())
            return _grad(loss, at)

    return gradient, [start[name].detach() for name in names]


def _single(small: Request) -> bool:
    """Whether all is computed in float32: in half precision, differences are mostly rounding."""
    values = list(small.params.values())
    kind = values[0].device.type
    rounded = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return not rounded and all(value.dtype == torch.float32 for value in values)


@torch.enable_grad()
def _differences(small: Request) -> str | None:
    gradient, values = _gradient_of(small)
    if small.cache["float64"]:
        steps, tolerance, rounding = (1e-6, 1e-7, 1e-8, 1e-5), 1e-2, 1e-12
    else:
        steps, tolerance, rounding = (1e-3, 3e-4, 1e-4, 3e-3), 1e-1, 1e-5
    generator = torch.Generator().manual_seed(0)
    worst = ""
    # A difference may step over a kink, of which a network with many rows has thousands: steps are
    # short, in proportion to the parameters, and there are several tries.
    for step in steps:
        draws = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]
        along = [
            draw.to(v.device) * (v.abs().mean() + 1e-3)
            for draw, v in zip(draws, values, strict=True)
        ]
        leaves = [value.clone().requires_grad_() for value in values]
        grads = gradient(leaves)
        product = torch.stack([(g * v).sum() for g, v in zip(grads, along, strict=True)]).sum()
        exact = _flat(_grad(product, leaves))
        ends = []
        for sign in (step, -step):
            moved = [p + sign * v for p, v in zip(values, along, strict=True)]
            ends.append(_flat(gradient([p.requires_grad_() for p in moved])))
        numeric = (ends[0] - ends[1]) / (2 * step)
        error, size = (exact - numeric).norm(), torch.maximum(exact.norm(), numeric.norm())
        noise = rounding * _flat(grads).norm() / step
        if not bool(size.isfinite()) or bool(error <= tolerance * size + noise + 1e-12):
            return None
        worst = f"{float(error / size):.1g}"
    return (
        "the second derivative that autograd gives for the module or the loss is not that of its "
        f"gradient (relative difference {worst}): some backward pass is not itself differentiable"
    )


@torch.enable_grad()
def _marked(small: Request) -> str | None:
    gradient, values = _gradient_of(small)
    grads = gradient([value.clone().requires_grad_() for value in values])
    nodes = [grad.grad_fn for grad in grads if grad.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            return "the module or the loss has an operation that is marked once_differentiable"
        fresh = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= fresh
        nodes.extend(fresh)
    return None


def _grad(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    grads = torch.autograd.grad(
        value, inputs, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(grads)


def _flat(values: list[Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values])


def found_once(request: Request, what: str, find: Callable[[], str | None]) -> str | None:
    """``find()``, once for each module, mode, loss and kind of batch."""
    owner = request.model if request.model is not None else request.program
    batch = request.batch
    kinds = tuple((leaf.dtype, leaf.ndim) for leaf in pytree.tree_leaves(batch))
    modes = (
        tuple((type(module), module.training) for module in request.model.modules())
        if request.model is not None
        else ()
    )
    key = (
        what,
        loss_key(request.loss),
        request.order,
        request.batch_norm,
        request.outer == "displacement",
        type(request.inner),
        request.rates.adapted,
        request.per_task,
        tuple(value.dtype for value in request.params.values()),
        kinds,
        modes,
    )
    verdicts = _verdicts.setdefault(owner, {})
    if key not in verdicts:
        if len(verdicts) > 64:
            verdicts.clear()
        verdicts[key] = find()
    return verdicts[key]


def loss_key(loss: Any, depth: int = 4) -> Any:
    """What tells one loss from another: its code, that of the functions it has, and its switches.

    Not its identity: a lambda written inside a training loop is a new object at every call. Nor
    numbers and tensors: a counter, or a weight that is annealed, is another at every call.
    """
    if depth == 0:
        return type(loss)
    if isinstance(loss, _SWITCHES):
        return loss
    if isinstance(loss, types.MethodType):
        return (loss_key(loss.__func__, depth - 1), loss_key(loss.__self__, depth - 1))
    if isinstance(loss, functools.partial):
        args = tuple(loss_key(value, depth - 1) for value in loss.args)
        named = tuple((name, loss_key(value, depth - 1)) for name, value in loss.keywords.items())
        return (functools.partial, loss_key(loss.func, depth - 1), args, named)
    if isinstance(loss, types.FunctionType):
        cells = [_contents(cell) for cell in loss.__closure__ or ()]
        return (loss.__code__, tuple(loss_key(value, depth - 1) for value in cells))
    if callable(loss):
        # only what the object has itself: a loss may hold a whole network
        own = getattr(loss, "__dict__", {}).items()
        shallow = (*_SWITCHES, *_FUNCTIONS)
        return (
            type(loss),
            tuple(
                (name, loss_key(value, depth - 1) if isinstance(value, shallow) else type(value))
                for name, value in own
            ),
        )
    return type(loss)


_SWITCHES = (bool, str, type, types.NoneType, types.BuiltinFunctionType, torch.dtype)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
