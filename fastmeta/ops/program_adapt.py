"""``program_adapt``: the inner loop alone, and its exact vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmeta.ops.executor import Outputs, Rows, Spec, check, check_graph, compute, eager, library
from fastmeta.ops.program_meta_grad import (
    adapt_one,
    loop_over,
    no_double_backward,
    no_operator_backward,
    one_task,
)

__all__ = ["program_adapt", "program_adapt_reference", "program_adapt_vjp"]

_OP = "program_adapt"


@eager
def program_adapt(
    spec: Spec, params: Sequence[Tensor], rates: Sequence[Tensor | None], support: Rows
) -> tuple[list[Tensor], Tensor]:
    """Adapted parameters, differentiable once with respect to params and rates.

    Args:
        spec: the program; ``query_rows`` 0.
        params: ``[...]``, or ``[T, ...]`` where the spec says so.
        rates: ``[I or 1]`` or ``[I or 1, *shape]``; None where the parameter does not adapt.
        support: ``x [T, S, ...]``, ``y``, and weights ``[T, S]`` or None; constants.

    Returns:
        The parameters that adapt, in order, each ``[T, ...]``; and the support loss before each
        inner step ``[T, I]``, which carries no graph.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape or device, or a label out of range.
        RuntimeError: the C++ extension is missing, or on double backward.

    Example:
        >>> import torch
        >>> from fastmeta.ops.executor import LayerCode, ParamCode, Rows, Spec
        >>> spec = Spec((LayerCode("linear", 3, 1, 0, 1),),
        ...             (ParamCode(1, 3, True), ParamCode(1, 1, False)),
        ...             "mse", True, 1.0, support_rows=5, query_rows=0, steps=2)
        >>> rows = Rows(torch.randn(4, 5, 3), torch.randn(4, 5, 1))
        >>> rate = torch.tensor([0.1])
        >>> weight = torch.zeros(1, 3, requires_grad=True)
        >>> (w, b), losses = program_adapt(spec, [weight, torch.zeros(1)], [rate, rate], rows)
        >>> w.shape, losses.shape
        (torch.Size([4, 1, 3]), torch.Size([4, 2]))

    Reference:
        Finn, Abbeel, Levine (2017), algorithm 2, lines 5 to 8.
    """
    check(_OP, spec, params, rates, support, None)
    if torch.is_grad_enabled():
        check_graph(_OP, spec, rates, support, None)
    *adapted, losses = _Adapt.apply(  # type: ignore[no-untyped-call]
        replace(spec, reverse=False), len(params), *params, *rates, *support
    )
    return adapted, losses


def program_adapt_reference(
    spec: Spec, params: Sequence[Tensor], rates: Sequence[Tensor | None], support: Rows
) -> tuple[list[Tensor], Tensor]:
    """The definition, forward only; derivatives come from autograd."""
    ends, losses = [], []
    for task in range(support.x.shape[0]):
        at = [p[task] if c.per_task else p for p, c in zip(params, spec.params, strict=True)]
        end, found = adapt_one(spec, at, rates, one_task(support, task))
        ends.append([p for p, code in zip(end, spec.params, strict=True) if code.adapts])
        losses.append(found)
    return [torch.stack(column) for column in zip(*ends, strict=True)], torch.stack(losses)


def program_adapt_vjp(
    spec: Spec,
    params: Sequence[Tensor],
    rates: Sequence[Tensor | None],
    support: Rows,
    cotangents: Sequence[Tensor],
) -> Outputs:
    """Gradients of params and rates from cotangents of the adapted parameters.

    Args:
        spec: the program; ``query_rows`` 0.
        params: as for :func:`program_adapt`.
        rates: likewise.
        support: likewise.
        cotangents: one for each parameter that adapts, ``[T, ...]``.
    """
    given = iter(cotangents)
    tasks = support.x.shape[0]
    every = [
        next(given) if code.adapts else support.x.new_zeros(tasks, *code.shape)
        for code in spec.params
    ]
    return compute(replace(spec, reverse=True), params, rates, support, None, cotangents=every)


_lib = library()
_lib.define(
    "program_adapt(str spec, Tensor[] params, Tensor?[] rates, Tensor support_x, "
    "Tensor support_y, Tensor? support_weight) -> (Tensor[], Tensor)"
)


def _operator(
    spec: str,
    params: list[Tensor],
    rates: list[Tensor | None],
    support_x: Tensor,
    support_y: Tensor,
    support_weight: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    codes = replace(Spec.from_json(spec), reverse=False)
    support = Rows(support_x, support_y, support_weight)
    check(_OP, codes, params, rates, support, None)
    out = compute(codes, params, rates, support, None, adapted=True)
    return [value for value in out.adapted or () if value is not None], out.support_losses


def _fake(
    spec: str, params: list[Tensor], rates: list[Tensor | None], support_x: Tensor, *rest: Any
) -> tuple[list[Tensor], Tensor]:
    codes = Spec.from_json(spec)
    tasks = support_x.shape[0]
    adapted = [support_x.new_empty(tasks, *code.shape) for code in codes.params if code.adapts]
    return adapted, support_x.new_empty(tasks, codes.steps)


_lib.impl("program_adapt", _operator, "CPU")
torch.library.register_fake("fastmeta::program_adapt", _fake, lib=_lib)
torch.library.register_autograd("fastmeta::program_adapt", no_operator_backward(_OP, _OP), lib=_lib)


def _split(count: int, tensors: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None], Rows]:
    plain = [None if tensor is None else tensor.detach() for tensor in tensors]
    params: list[Any] = plain[:count]
    rows: list[Any] = plain[2 * count :]
    return params, plain[count : 2 * count], Rows(*rows)


class _Adapt(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        params, rates, support = _split(count, tensors)
        out = compute(spec, params, rates, support, None, adapted=True)
        return (*(v for v in out.adapted or () if v is not None), out.support_losses)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[-1])
        ctx.spec, ctx.count = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, ctx.count
        moved = _AdaptVjp.apply(ctx.spec, count, *saved, *cotangents[:-1])  # type: ignore[no-untyped-call]
        grads = iter(moved)
        params = [next(grads) for _ in range(count)]
        rates = [next(grads) if code.collects else None for code in ctx.spec.params]
        return (None, None, *params, *rates, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over(_Adapt, info.batch_size, in_dims, args)


class _AdaptVjp(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        rest = 2 * count + 3
        params, rates, support = _split(count, tensors[:rest])
        cotangents: list[Any] = [None if t is None else t.detach() for t in tensors[rest:]]
        out = program_adapt_vjp(spec, params, rates, support, cotangents)
        return (*(out.grads or ()), *(g for g in out.rate_grads if g is not None))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise no_double_backward(_OP)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over(_AdaptVjp, info.batch_size, in_dims, args)
