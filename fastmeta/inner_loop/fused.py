"""The ``fused`` path: one call of a compiled executor runs the whole batch, without a tape.

It takes what the layer program can express and the executors run; everything else it refuses by
name. The bits of its gradients depend on the number of tasks, not on threads or chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import _native
from fastmeta.batch import Examples
from fastmeta.inner_loop.encode import Chain, chain_of, spec_of
from fastmeta.inner_loop.lift import lift, wants_grad
from fastmeta.inner_loop.optimizers import SGD, Number, OptimizerState
from fastmeta.inner_loop.request import Request
from fastmeta.inner_loop.result import Grads, MetaGrad
from fastmeta.ops.executor import Rows, Spec
from fastmeta.ops.program_adapt import program_adapt
from fastmeta.ops.program_meta_grad import program_meta_grad
from fastmeta.program import Program, Unsupported
from fastmeta.program.reader import read

__all__ = ["adapt", "meta_grad", "why_not"]


def why_not(request: Request) -> str | None:
    """None if this path is right for the request, else the reason, by name."""
    return _option(request) or _data(request) or _unreadable(request)


def _option(request: Request) -> str | None:
    """What was asked for that the executors do not do."""
    if request.backend not in ("auto", "cpp"):
        return f"backend {request.backend!r} has no executor of programs"
    if _native.load() is None:  # which warns, once: no fallback that nobody can see
        return _native.reason()
    if torch.is_autocast_enabled("cpu"):
        return "the executors do not follow autocast"
    if type(request.inner) is not SGD:
        return f"the inner optimizer {type(request.inner).__name__} is not compiled, only SGD is"
    if request.outer != "query":
        return "only outer='query' is compiled"
    if request.task_transform is not None:
        return "task_transform wants each task's own gradient, which is never made"
    if request.state is not None:
        return "an inner optimizer's state is not carried"
    if request.batch_norm != "batch":
        return f"batch_norm={request.batch_norm!r} is not compiled, only 'batch' is"
    if request.loss_params:
        return "loss_params are not compiled"
    return None


def _data(request: Request) -> str | None:
    support, query = request.batch.support, request.batch.query
    if support.index is not None:
        return "support.index (mini-batches) is not compiled"
    for side, examples in (("support", support), ("query", query)):
        for name, value in (("x", examples.x), ("y", examples.y)):
            if not isinstance(value, Tensor):
                return f"{side}.{name} is not one tensor"
            if value.device.type != "cpu":
                return f"{side}.{name} is on {value.device}: the C++ executors run on the CPU"
            if value.requires_grad:
                return f"{side}.{name} requires grad, and the executors give none for data"
        if examples.weight is not None and examples.weight.requires_grad:
            return f"{side}.weight requires grad, and the executors give none for weights"
    dtype = support.x.dtype
    if dtype not in (torch.float32, torch.float64):
        return f"support.x is {dtype}: the executors take float32 and float64"
    if query.x.dtype != dtype:
        return f"query.x is {query.x.dtype} and support.x {dtype}"
    for name, value in (*request.params.items(), *request.frozen.items()):
        if value.dtype != dtype:
            return f"parameter {name!r} is {value.dtype} and x {dtype}"
    return None


def _unreadable(request: Request) -> str | None:
    try:
        program = _program(request)
    except Unsupported as refusal:
        return str(refusal)
    chain = chain_of(program)
    if isinstance(chain, str):
        return chain
    if program.loss is None:
        return "the program has no loss"
    request.cache["fused"] = (program, chain)
    return _misfit(request, program)


def _misfit(request: Request, program: Program) -> str | None:
    """What in the data does not fit the program, or None."""
    loss = program.loss
    batch_norm = any(node.layer.kind == "batch_norm" for node in program.nodes)
    sides = ("support", "query") if request.op == "meta_grad" else ("support",)
    for side in sides:
        examples: Examples = getattr(request.batch, side)
        x, y, weight = examples.x, examples.y, examples.weight
        if tuple(x.shape[2:]) != tuple(program.input_shape):
            return f"{side}.x has rows of shape {tuple(x.shape[2:])}, not {program.input_shape}"
        wanted = () if loss and loss.kind == "cross_entropy" else program.output_shape
        if tuple(y.shape[2:]) != tuple(wanted):
            return f"{side}.y has rows of shape {tuple(y.shape[2:])}, not {wanted}"
        if wanted == () and y.dtype != torch.int64 and loss and loss.kind == "cross_entropy":
            return f"{side}.y is {y.dtype}, not class numbers in int64"
        if loss and loss.kind == "mse" and y.dtype != x.dtype:
            return f"{side}.y is {y.dtype} and x {x.dtype}"
        if weight is not None and not (loss and loss.per_row):
            return "a weighted batch needs a loss that returns one number a row"
        least = x.shape[1] if weight is None else int((weight != 0).sum(1).min())
        if batch_norm and least < 2:
            return f"batch_norm needs more than one row of {side} for its statistics"
    return None


def _program(request: Request) -> Program:
    if request.program is not None:
        return request.program
    if request.model is None:
        raise Unsupported("there is neither a module nor a program")
    x, y = request.batch.support.x, request.batch.support.y
    return read(request.model, request.loss, x[0], y[0], batch_norm=request.batch_norm)


def meta_grad(request: Request) -> MetaGrad:
    """The meta-gradient of a batch of tasks in one call."""
    program, chain = _found(request)
    leaves = lift(request)
    batch, tasks = request.batch, request.num_tasks
    rates = leaves.rates.rates
    spec = spec_of(request, program, chain, rates, batch.query.y.shape[1])
    tensors = _rate_tensors(spec, chain, rates, batch.support.x.dtype)
    params = _params(request, chain)
    scale = 1.0 / tasks if request.reduction == "mean" else 1.0
    with torch.no_grad():
        out = program_meta_grad(
            spec, params, tensors, _rows(batch.support), _rows(batch.query), scale=scale
        )
    read_grads = dict(zip(chain.names, out.grads or (), strict=True))
    grads = {
        name: read_grads[name] if name in read_grads else torch.zeros_like(value)
        for name, value in request.params.items()
    }
    inner: Any = None
    if leaves.tensors:
        moved = [
            (rate, grad)
            for rate, grad in zip(tensors, out.rate_grads, strict=True)
            if rate is not None and grad is not None
        ]
        values = torch.autograd.grad(
            [rate for rate, _ in moved],
            leaves.tensors,
            [grad for _, grad in moved],
            allow_unused=True,
            materialize_grads=True,
        )
        inner, loss_params = leaves.rebuild(list(values))
    else:
        inner, loss_params = leaves.rebuild([])
    metrics = {"support_loss": out.support_losses}
    if out.accuracies is not None:
        metrics["accuracy"] = out.accuracies
    losses = out.losses if out.losses is not None else out.support_losses.new_empty(0)
    state = OptimizerState(torch.full((tasks,), spec.steps), {}, {})
    tensors_of_call = (
        *request.params.values(),
        *request.frozen.values(),
        *pytree.tree_leaves((request.inner, batch.support)),
    )
    watched = [(value, value._version) for value in tensors_of_call if isinstance(value, Tensor)]
    adapted = LazyAdapted(request.rates.adapted, watched, lambda: adapt(request))
    return MetaGrad(Grads(grads, inner, loss_params), losses, metrics, adapted, state, "fused")


def adapt(request: Request) -> dict[str, Tensor]:
    """The adapted parameters ``[T, ...]``, differentiable where grad mode and inputs ask for it."""
    program, chain = _found(request)
    rates = lift(request, detach=False).rates.rates
    spec = spec_of(request, program, chain, rates, 0)
    tensors = _rate_tensors(spec, chain, rates, request.batch.support.x.dtype)
    differentiable = torch.is_grad_enabled() and wants_grad(request)
    with torch.set_grad_enabled(differentiable):
        values, losses = program_adapt(
            spec, _params(request, chain), tensors, _rows(request.batch.support)
        )
        moved = dict(zip([n for n in chain.names if n in rates], values, strict=True))
        tasks = request.num_tasks
        adapted = {
            name: moved[name] if name in moved else _spread(request, name)
            for name in request.rates.adapted
        }
    request.cache["support_loss"] = losses
    request.cache["state"] = OptimizerState(torch.full((tasks,), spec.steps), {}, {})
    return adapted


class LazyAdapted(Mapping[str, Tensor]):
    """Adapted parameters by name, ``[T, ...]``, worked out when they are first looked at.

    A training step rarely looks, and at many tasks they are large. They are those of the call's
    parameters, rates and data: once one of these was changed in place, looking is an error. (A
    change through ``.data`` is one that torch does not count, and nobody can see.)

    Args:
        names: the parameters that adapt.
        watched: the tensors that must not change before a look, each with its version.
        run: works them out.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        watched: Iterable[tuple[Tensor, int]],
        run: Callable[[], dict[str, Tensor]],
    ) -> None:
        self._names, self._run = names, run
        self._watched = list(watched)
        self._values: dict[str, Tensor] | None = None

    def _found(self) -> dict[str, Tensor]:
        if self._values is None:
            if any(tensor._version != version for tensor, version in self._watched):
                raise RuntimeError(
                    "meta_grad: adapted must be read before the parameters or the data of the call "
                    "change, got a tensor changed in place; call fastmeta.adapt instead"
                )
            with torch.no_grad():
                self._values = self._run()
            self._watched = []
        return self._values

    def __getitem__(self, name: str) -> Tensor:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _found(request: Request) -> tuple[Program, Chain]:
    if "fused" not in request.cache:
        reason = why_not(request)
        if reason is not None:
            raise ValueError(f"{request.op}: path 'fused' must be right for the call, got {reason}")
    found: tuple[Program, Chain] = request.cache["fused"]
    return found


def _rows(examples: Examples) -> Rows:
    weight = examples.weight
    return Rows(examples.x, examples.y, None if weight is None else weight.to(examples.x.dtype))


def _params(request: Request, chain: Chain) -> list[Tensor]:
    own: dict[str, Tensor] = dict(request.model.named_parameters()) if request.model else {}
    return [
        request.params[name]
        if name in request.params
        else request.frozen[name]
        if name in request.frozen
        else own[name].detach()
        for name in chain.names
    ]


def _spread(request: Request, name: str) -> Tensor:
    """A parameter that no layer reads: it adapts by a zero gradient."""
    value = request.params[name]
    return value if name in request.per_task else value.expand(request.num_tasks, *value.shape)


def _rate_tensors(
    spec: Spec, chain: Chain, rates: Mapping[str, Number], dtype: torch.dtype
) -> list[Tensor | None]:
    made: dict[float, Tensor] = {}
    tensors: list[Tensor | None] = []
    for name, code in zip(chain.names, spec.params, strict=True):
        rate = rates.get(name)
        if rate is None:
            tensors.append(None)
        elif not isinstance(rate, Tensor):
            if rate not in made:
                made[rate] = torch.tensor([rate], dtype=dtype)
            tensors.append(made[rate])
        elif code.rate_per_element:
            tensors.append(rate.to(dtype).expand(rate.shape[0], *code.shape))
        else:
            tensors.append(rate.to(dtype).reshape(rate.shape[0]))
    return tensors
