"""Programs as the C++ executors take them: plain codes, compiled executors, addresses.

The operations beside this file (``program_meta_grad``, ``program_adapt``) share it. It knows
tensors and codes, not modules: whoever calls has already turned a module into codes.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastmeta import _native
from fastmeta._checks import describe, type_error, value_error
from fastmeta.ops.spec_check import check_spec

__all__ = ["OPS", "LayerCode", "ParamCode", "Rows", "Spec", "check", "compute", "library", "run"]

OPS = (
    "linear",
    "batch_norm",
    "relu",
    "leaky_relu",
    "tanh",
    "sigmoid",
    "gelu",
    "gelu_tanh",
    "silu",
    "elu",
)
"""The layers that the executors run, by code."""


_F = TypeVar("_F", bound=Callable[..., Any])


def eager(function: _F) -> _F:
    """Make a call a graph break under ``torch.compile``: it runs as it stands, with its kernels.

    Set by attribute, because ``torch.compiler.disable`` would import the compiler.
    """
    values = vars(function)
    values["_torchdynamo_disable"] = True
    values["_torchdynamo_disable_msg"] = f"{function.__name__} runs its own kernels"
    return function


def library() -> Any:
    """A handle on the ``fastmeta`` namespace of registered operators, to be kept."""
    return torch.library.Library("fastmeta", "FRAGMENT")  # type: ignore[no-untyped-call]


class LayerCode(NamedTuple):
    """One layer of a chain.

    Args:
        op: one of :data:`OPS`.
        inputs: columns of its input.
        outputs: columns of its output.
        weight: index of a parameter (BatchNorm: the scale), or -1.
        bias: index of a parameter, or -1.
        constant: the negative slope, alpha, or eps.
    """

    op: str
    inputs: int
    outputs: int
    weight: int = -1
    bias: int = -1
    constant: float = 0.0


class ParamCode(NamedTuple):
    """One parameter, a matrix ``[rows, cols]`` or a vector ``[cols]`` (rows is then 1).

    Args:
        rows: rows.
        cols: columns.
        matrix: whether it is a matrix.
        adapts: whether the inner loop changes it.
        per_task: whether its tensor has a leading task axis.
        rate_per_step: whether its rate has I entries along its first axis, or one.
        rate_per_element: whether its rate has the parameter's shape after that, or is a number.
        rate_gradient: whether its rate receives a gradient.
        rate_owner: index of the first parameter whose rate is this same number for each step or
            for all. That rate receives the gradient of both, added within a task. -1: its own.
    """

    rows: int
    cols: int
    matrix: bool
    adapts: bool = True
    per_task: bool = False
    rate_per_step: bool = False
    rate_per_element: bool = False
    rate_gradient: bool = False
    rate_owner: int = -1

    @property
    def collects(self) -> bool:
        """Whether the gradient of a rate comes out at this parameter."""
        return self.rate_gradient and self.rate_owner < 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one task's parameter."""
        return (self.rows, self.cols) if self.matrix else (self.cols,)


@dataclass(frozen=True)
class Spec:
    """A program, what adapts in it, and the sizes of a call.

    Args:
        layers: the chain.
        params: its parameters.
        loss: "mse" (``sum_d (o_nd - y_nd)^2`` per row) or "cross_entropy".
        mean_over_rows: whether the sum over rows is divided by their number, or by their weight.
        factor: what the loss is multiplied by.
        support_rows: S.
        query_rows: Q; 0 for adaptation alone.
        steps: I.
        second_order: whether the inner gradient is differentiated.
        reverse: whether a gradient is wanted.
    """

    layers: tuple[LayerCode, ...]
    params: tuple[ParamCode, ...]
    loss: str
    mean_over_rows: bool
    factor: float
    support_rows: int
    query_rows: int
    steps: int
    second_order: bool = True
    reverse: bool = True

    @property
    def features(self) -> int:
        """Columns of x."""
        return self.layers[0].inputs

    @property
    def outputs(self) -> int:
        """Columns of the output."""
        return self.layers[-1].outputs

    def to_json(self) -> str:
        """The spec as the registered operators carry it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The inverse of :meth:`to_json`."""
        return _parsed(text)


@lru_cache(maxsize=256)
def _parsed(text: str) -> Spec:
    values = json.loads(text)
    values["layers"] = tuple(LayerCode(*layer) for layer in values["layers"])
    values["params"] = tuple(ParamCode(*param) for param in values["params"])
    return Spec(**values)


class Rows(NamedTuple):
    """Rows of T tasks: ``x [T, S, ...]`` with D numbers a row, ``y``, and ``weight [T, S]``.

    Rows of weight zero are left out, whatever stands in them.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None


class _Cache(threading.local):
    """Executors of this thread: one runs one call at a time, and keeps its workspaces."""

    def __init__(self) -> None:
        self.executors: OrderedDict[tuple[Spec, torch.dtype, str], Any] = OrderedDict()


_cache = _Cache()
_MOST_EXECUTORS = 32


def executor_of(spec: Spec, dtype: torch.dtype) -> Any:
    """The compiled executor of a spec for this thread and the instruction set in force."""
    key = (spec, dtype, _native.isa())
    found = _cache.executors.get(key)
    if found is None:
        core = _native.require("program_meta_grad")
        check_spec("program", spec, OPS)
        found = core.Executor(
            layers=[tuple(layer) for layer in spec.layers],
            params=[tuple(param) for param in spec.params],
            loss=spec.loss,
            mean_over_rows=spec.mean_over_rows,
            factor=spec.factor,
            support_rows=spec.support_rows,
            query_rows=spec.query_rows,
            steps=spec.steps,
            second_order=spec.second_order,
            reverse=spec.reverse,
            is_double=dtype == torch.float64,
            isa=key[2],
        )
        _cache.executors[key] = found
        if len(_cache.executors) > _MOST_EXECUTORS:
            _cache.executors.popitem(last=False)
    else:
        _cache.executors.move_to_end(key)
    return found


def check(
    op: str,
    spec: Spec,
    params: Sequence[Tensor],
    rates: Sequence[Tensor | None],
    support: Rows,
    query: Rows | None,
) -> None:
    """Check kinds, dtypes, shapes and devices of a call against its spec.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong number, shape or device.
    """
    if not isinstance(spec, Spec):
        raise type_error(op, "spec", "be a Spec", describe(spec))
    if not isinstance(params, (tuple, list)) or not isinstance(rates, (tuple, list)):
        got = f"{describe(params)} and {describe(rates)}"
        raise type_error(op, "params and rates", "be sequences of tensors", got)
    for side, rows in (("support", support), ("query", query)):
        if rows is not None and not isinstance(rows, Rows):
            raise type_error(op, side, "be Rows", describe(rows))
    if (query is None) != (spec.query_rows == 0):
        must = "be 0 without a query, and the query's rows with one"
        raise value_error(op, "spec.query_rows", must, str(spec.query_rows))
    if len(params) != len(spec.params) or len(rates) != len(spec.params):
        must = f"be {len(spec.params)} tensors, as the spec has parameters"
        raise value_error(op, "params and rates", must, f"{len(params)} and {len(rates)}")
    if not isinstance(support.x, Tensor):
        raise type_error(op, "support.x", "be a tensor", describe(support.x))
    dtype, tasks = support.x.dtype, len(support.x) if support.x.ndim else 0
    if dtype not in (torch.float32, torch.float64):
        raise type_error(op, "support.x", "be float32 or float64", support.x)
    for i, (tensor, code) in enumerate(zip(params, spec.params, strict=True)):
        shape = (tasks, *code.shape) if code.per_task else code.shape
        _check_tensor(op, f"params[{i}]", tensor, shape, dtype)
    for i, (rate, code) in enumerate(zip(rates, spec.params, strict=True)):
        if (rate is None) == code.adapts:
            must = "be given for a parameter that adapts, and None for any other"
            raise value_error(op, f"rates[{i}]", must, describe(rate))
        if rate is not None:
            steps = spec.steps if code.rate_per_step else 1
            shape = (steps, *(code.shape if code.rate_per_element else ()))
            _check_tensor(op, f"rates[{i}]", rate, shape, dtype)
    _check_rows(op, "support", support, tasks, spec.support_rows, spec, dtype)
    if query is not None:
        _check_rows(op, "query", query, tasks, spec.query_rows, spec, dtype)


def _check_rows(
    op: str, side: str, rows: Rows, tasks: int, count: int, spec: Spec, dtype: torch.dtype
) -> None:
    x, y, weight = rows
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise type_error(op, f"{side}.{name}", "be a tensor", describe(value))
    if tasks == 0 or count == 0:
        raise value_error(op, f"{side}.x", "hold at least one task and one row", x)
    if x.dtype != dtype:
        raise type_error(op, f"{side}.x", f"be {dtype}", x)
    if tuple(x.shape[:2]) != (tasks, count) or x.numel() != tasks * count * spec.features:
        raise value_error(op, f"{side}.x", f"have shape {[tasks, count, spec.features]}", x)
    for name, value in (("x", x), ("y", y)):
        if value.device.type != "cpu":
            raise value_error(op, f"{side}.{name}", "be on the CPU", f"it on {value.device}")
        if value.layout != torch.strided:
            got = f"a tensor of layout {value.layout}"
            raise type_error(op, f"{side}.{name}", "be strided", got)
    if spec.loss == "cross_entropy":
        _check_tensor(op, f"{side}.y", y, (tasks, count), torch.int64)
    elif y.dtype != dtype:
        raise type_error(op, f"{side}.y", f"be {dtype}", y)
    elif tuple(y.shape[:2]) != (tasks, count) or y.numel() != tasks * count * spec.outputs:
        raise value_error(op, f"{side}.y", f"have shape {[tasks, count, spec.outputs]}", y)
    if weight is not None:
        _check_tensor(op, f"{side}.weight", weight, (tasks, count), dtype)
        if not bool((weight != 0).any(1).all()):
            raise value_error(op, f"{side}.weight", "leave a row to every task", "one of zeros")


def _check_tensor(
    op: str, argument: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if not isinstance(value, Tensor):
        raise type_error(op, argument, "be a tensor", describe(value))
    if value.dtype != dtype:
        raise type_error(op, argument, f"be {dtype}", value)
    if value.layout != torch.strided:
        raise type_error(op, argument, "be strided", f"a tensor of layout {value.layout}")
    if tuple(value.shape) != shape:
        raise value_error(op, argument, f"have shape {list(shape)}", value)
    if value.device.type != "cpu":
        raise value_error(op, argument, "be on the CPU", f"it on {value.device}")


def check_graph(
    op: str, spec: Spec, rates: Sequence[Tensor | None], support: Rows, query: Rows | None
) -> None:
    """Refuse a graph through what receives no gradient, which would end here without a word.

    Raises:
        ValueError: rows that require grad, or such a rate that the spec gives no gradient.
    """
    for side, rows in (("support", support), ("query", query)):
        for name, value in zip(Rows._fields, rows or (), strict=False):
            if isinstance(value, Tensor) and value.requires_grad:
                must = "not require grad: rows are constants of this operation"
                raise value_error(op, f"{side}.{name}", must, value)
    for i, (rate, code) in enumerate(zip(rates, spec.params, strict=False)):
        if isinstance(rate, Tensor) and rate.requires_grad and not code.rate_gradient:
            raise value_error(op, f"rates[{i}]", "not require grad unless the spec says so", rate)


class Outputs(NamedTuple):
    """What one call leaves; None where it was not asked for.

    Args:
        losses: ``[T]`` query losses.
        support_losses: ``[T, I]``, the support loss before each inner step.
        accuracies: ``[T]`` on the query (cross-entropy).
        grads: one for each parameter.
        rate_grads: one for each rate with a gradient, None for the others.
        adapted: ``[T, ...]`` for each parameter that adapts, None for the others.
    """

    losses: Tensor | None
    support_losses: Tensor
    accuracies: Tensor | None
    grads: list[Tensor] | None
    rate_grads: list[Tensor | None]
    adapted: list[Tensor | None] | None


def compute(
    spec: Spec,
    params: Sequence[Tensor],
    rates: Sequence[Tensor | None],
    support: Rows,
    query: Rows | None,
    *,
    cotangents: Sequence[Tensor] | None = None,
    adapted: bool = False,
    scale: float = 1.0,
) -> Outputs:
    """One call of a compiled executor on checked arguments; tensors are made contiguous.

    Args:
        spec: what to run.
        params: each ``[...]``, or ``[T, ...]`` where the spec says so.
        rates: each ``[I or 1]`` or ``[I or 1, *shape]``; None where the parameter does not adapt.
        support: the support rows.
        query: the query rows, or None.
        cotangents: each ``[T, ...]``, the adjoint of the adapted parameters, instead of a query.
        adapted: whether the adapted parameters are wanted.
        scale: a factor on every gradient.

    Raises:
        ValueError: a label out of range.
    """
    if spec.reverse and query is None and cotangents is None:
        raise value_error("program", "query", "be given for a gradient, or cotangents", "neither")
    tasks, new = support.x.shape[0], support.x.new_empty
    out = Outputs(
        new(tasks) if query is not None else None,
        new(tasks, spec.steps),
        new(tasks) if query is not None and spec.loss == "cross_entropy" else None,
        [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params]
        if spec.reverse
        else None,
        [
            torch.empty_like(rate, memory_format=torch.contiguous_format)
            if rate is not None and code.collects and spec.reverse
            else None
            for rate, code in zip(rates, spec.params, strict=True)
        ],
        [new(tasks, *code.shape) if code.adapts else None for code in spec.params]
        if adapted
        else None,
    )
    none: list[Tensor | None] = [None] * len(params)
    rows = (*support, *(query if query is not None else (None, None, None)))
    inputs = [
        None if tensor is None else tensor.resolve_neg().contiguous()
        for tensor in (*params, *rates, *(cotangents if cotangents is not None else none), *rows)
    ]
    count = len(params)
    tensors = (
        *inputs[: 3 * count],
        *(out.grads if out.grads is not None else none),
        *out.rate_grads,
        *(out.adapted if out.adapted is not None else none),
        *inputs[3 * count :],
        out.losses,
        out.support_losses,
        out.accuracies,
    )
    executor = executor_of(spec, support.x.dtype)
    try:
        run(executor, tasks, tensors, scale)
    except RuntimeError as error:
        if "data pointer" not in str(error):
            raise
        must = "program_meta_grad: tensors must have memory, got some of a torch.func transform"
        raise RuntimeError(f"{must}; meta_value and program_adapt take part in those") from error
    return out


def run(executor: Any, tasks: int, tensors: Sequence[Tensor | None], scale: float) -> None:
    """The call itself: addresses in the order that ``csrc/module.cpp`` states."""
    addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    executor.run(tasks, addresses, scale, torch.get_num_threads())
