r"""``program_meta_grad``: the meta-gradient of a batch of tasks, one call of a compiled executor.

.. math:: \lambda_I = \nabla L^q(\theta_I), \qquad
    \lambda_k = \lambda_{k+1} - H_s(\theta_k) (\alpha_k \odot \lambda_{k+1})

for each task, where :math:`H_s` is the Hessian of the support loss, and summed over tasks in a
fixed tree. The derivations of every layer's rules are in ``fastmeta/program/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta._checks import describe, type_error, value_error
from fastmeta.ops.executor import (
    LayerCode,
    Outputs,
    Rows,
    Spec,
    check,
    check_graph,
    compute,
    eager,
    library,
)

__all__ = ["meta_value", "program_meta_grad", "program_meta_grad_reference"]

_OP = "program_meta_grad"


@eager
def program_meta_grad(
    spec: Spec,
    params: Sequence[Tensor],
    rates: Sequence[Tensor | None],
    support: Rows,
    query: Rows,
    *,
    scale: float = 1.0,
) -> Outputs:
    """Losses, accuracies and meta-gradients; nothing carries an autograd graph.

    Args:
        spec: the program and the sizes; ``query_rows`` above 0.
        params: ``[...]``, or ``[T, ...]`` where the spec says so.
        rates: ``[I or 1]`` or ``[I or 1, *shape]``; None where the parameter does not adapt.
        support: ``x [T, S, ...]``, ``y``, and weights ``[T, S]`` or None.
        query: ``x [T, Q, ...]``, ``y``, and weights ``[T, Q]`` or None.
        scale: a factor on every gradient: 1 for a sum over tasks, 1/T for a mean.

    Returns:
        The outputs of the call.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape or device, or a label out of range.
        RuntimeError: the C++ extension is missing.

    Example:
        >>> import torch
        >>> from fastmeta.ops.executor import LayerCode, ParamCode, Rows, Spec
        >>> spec = Spec((LayerCode("linear", 3, 1, 0, 1),),
        ...             (ParamCode(1, 3, True), ParamCode(1, 1, False)),
        ...             "mse", True, 1.0, support_rows=5, query_rows=5, steps=2)
        >>> rows = Rows(torch.randn(4, 5, 3), torch.randn(4, 5, 1))
        >>> rate = torch.tensor([0.1])
        >>> out = program_meta_grad(spec, [torch.zeros(1, 3), torch.zeros(1)], [rate, rate],
        ...                         rows, rows)
        >>> out.losses.shape, [tuple(g.shape) for g in out.grads]
        (torch.Size([4]), [(1, 3), (1,)])

    Reference:
        Finn, Abbeel, Levine (2017), equation 1; Pearlmutter (1994), section 2.
    """
    _check(spec, params, rates, support, query)
    return compute(spec, params, rates, support, query, scale=scale)


def _check(
    spec: Spec,
    params: Sequence[Tensor],
    rates: Sequence[Tensor | None],
    support: Rows,
    query: Rows,
) -> None:
    if not isinstance(query, Rows):
        raise type_error(_OP, "query", "be Rows", describe(query))
    check(_OP, spec, params, rates, support, query)


def program_meta_grad_reference(
    spec: Spec,
    params: Sequence[Tensor],
    rates: Sequence[Tensor | None],
    support: Rows,
    query: Rows,
) -> tuple[Tensor, Tensor]:
    """The definition, forward only: query losses ``[T]`` and support losses ``[T, I]``.

    Derivatives come from autograd. The arguments are those of :func:`program_meta_grad`.
    """
    losses, support_losses = [], []
    for task in range(support.x.shape[0]):
        at = [p[task] if c.per_task else p for p, c in zip(params, spec.params, strict=True)]
        at, found = adapt_one(spec, at, rates, one_task(support, task))
        losses.append(task_loss(spec, at, one_task(query, task)))
        support_losses.append(found)
    return torch.stack(losses), torch.stack(support_losses)


def adapt_one(
    spec: Spec, params: Sequence[Tensor], rates: Sequence[Tensor | None], rows: Rows
) -> tuple[list[Tensor], Tensor]:
    """The inner loop of one task, by definition: its parameters at the end, and losses ``[I]``."""
    at, losses = list(params), []
    moving = [i for i, code in enumerate(spec.params) if code.adapts]
    with torch.enable_grad():
        for step in range(spec.steps):
            at = [p if p.requires_grad else p.detach().requires_grad_() for p in at]
            loss = task_loss(spec, at, rows)
            losses.append(loss.detach())
            grads = torch.autograd.grad(
                loss,
                [at[i] for i in moving],
                create_graph=spec.second_order,
                allow_unused=True,
                materialize_grads=True,
            )
            for i, grad in zip(moving, grads, strict=True):
                rate = rates[i]
                if rate is not None:
                    at[i] = at[i] - rate[step if rate.shape[0] > 1 else 0] * grad
    return at, torch.stack(losses) if losses else rows.x.new_empty(0)


def task_loss(spec: Spec, params: Sequence[Tensor], rows: Rows) -> Tensor:
    """The loss of one task's rows, ``x [S, ...]``; rows of weight zero are dropped."""
    if rows.weight is not None:
        kept = rows.weight != 0
        rows = Rows(rows.x[kept], rows.y[kept], rows.weight[kept])
    value = rows.x.reshape(rows.x.shape[0], -1)
    for layer in spec.layers:
        value = _layer(layer, params, value)
    if spec.loss == "mse":
        each = (value - rows.y.reshape(value.shape)).square().sum(1)
    else:
        each = torch.nn.functional.cross_entropy(value, rows.y, reduction="none")
    weight = torch.ones_like(each) if rows.weight is None else rows.weight
    total = spec.factor * (weight * each).sum()
    return total / weight.sum() if spec.mean_over_rows else total


def _layer(layer: LayerCode, params: Sequence[Tensor], x: Tensor) -> Tensor:
    f = torch.nn.functional
    weight = params[layer.weight] if layer.weight >= 0 else None
    bias = params[layer.bias] if layer.bias >= 0 else None
    if layer.op == "linear" and weight is not None:
        return f.linear(x, weight, bias)
    if layer.op == "batch_norm":
        centred = x - x.mean(0)
        y = centred / (centred.square().mean(0) + layer.constant).sqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": f.relu,
        "leaky_relu": lambda z: f.leaky_relu(z, layer.constant),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "gelu": f.gelu,
        "gelu_tanh": lambda z: f.gelu(z, approximate="tanh"),
        "silu": f.silu,
        "elu": lambda z: f.elu(z, layer.constant),
    }
    return functions[layer.op](x)


def one_task(rows: Rows, task: int) -> Rows:
    weight = None if rows.weight is None else rows.weight[task]
    return Rows(rows.x[task], rows.y[task], weight)


# ---- the registered operator


_lib = library()
_lib.define(
    "program_meta_grad(str spec, Tensor[] params, Tensor?[] rates, Tensor support_x, "
    "Tensor support_y, Tensor? support_weight, Tensor query_x, Tensor query_y, "
    "Tensor? query_weight, float scale) -> (Tensor, Tensor, Tensor[], Tensor[])"
)


def _operator(
    spec: str,
    params: list[Tensor],
    rates: list[Tensor | None],
    support_x: Tensor,
    support_y: Tensor,
    support_weight: Tensor | None,
    query_x: Tensor,
    query_y: Tensor,
    query_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    support, query = (
        Rows(support_x, support_y, support_weight),
        Rows(query_x, query_y, query_weight),
    )
    out = program_meta_grad(Spec.from_json(spec), params, rates, support, query, scale=scale)
    if out.losses is None or out.grads is None:
        raise ValueError(f"{_OP}: spec must ask for a query and a gradient")
    rate_grads = [grad for grad in out.rate_grads if grad is not None]
    return out.losses, out.support_losses, out.grads, rate_grads


def _fake(
    spec: str,
    params: list[Tensor],
    rates: list[Tensor | None],
    support_x: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    codes = Spec.from_json(spec)
    tasks = support_x.shape[0]
    rate_grads = [
        torch.empty_like(rate)
        for rate, code in zip(rates, codes.params, strict=True)
        if rate is not None and code.collects
    ]
    return (
        support_x.new_empty(tasks),
        support_x.new_empty(tasks, codes.steps),
        [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params],
        rate_grads,
    )


def no_operator_backward(op: str, instead: str) -> Callable[..., Any]:
    """A backward for a registered operator that has none: torch would warn and give no gradient."""

    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(
            f"torch.ops.fastmeta.{op}: the operator has no derivative; fastmeta.ops.{instead} has"
        )

    return backward


_lib.impl("program_meta_grad", _operator, "CPU")
torch.library.register_fake("fastmeta::program_meta_grad", _fake, lib=_lib)
torch.library.register_autograd(
    "fastmeta::program_meta_grad", no_operator_backward(_OP, "meta_value"), lib=_lib
)


# ---- the autograd route


@eager
def meta_value(
    spec: Spec,
    params: Sequence[Tensor],
    rates: Sequence[Tensor | None],
    support: Rows,
    query: Rows,
) -> Tensor:
    """The sum over tasks of the query losses ``[]``, differentiable once.

    Its gradient with respect to params and rates is the exact meta-gradient, computed with the
    value. A second differentiation is refused: the Hessian of a meta-objective is no kernel's.

    Args:
        spec: the program; rates that require grad must be marked in it.
        params: ``[...]`` or ``[T, ...]``.
        rates: ``[I or 1]`` or ``[I or 1, *shape]``, or None.
        support: the support rows, constants.
        query: the query rows, constants.

    Raises:
        TypeError, ValueError: as :func:`program_meta_grad`.
        RuntimeError: on double backward.
    """
    _check(spec, params, rates, support, query)
    if not spec.reverse:
        raise value_error(_OP, "spec.reverse", "be true for a gradient", "False")
    if torch.is_grad_enabled():
        check_graph(_OP, spec, rates, support, query)
    value: Tensor = _MetaValue.apply(  # type: ignore[no-untyped-call]
        spec, len(params), *params, *rates, *support, *query
    )[0]
    return value


class _MetaValue(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        params = [_present(t).detach() for t in tensors[:count]]
        rates = [None if t is None else t.detach() for t in tensors[count : 2 * count]]
        rows = [None if t is None else t.detach() for t in tensors[2 * count :]]
        support = Rows(_present(rows[0]), _present(rows[1]), rows[2])
        query = Rows(_present(rows[3]), _present(rows[4]), rows[5])
        out = compute(spec, params, rates, support, query)
        grads = [*(out.grads or ()), *(g for g in out.rate_grads if g is not None)]
        return (_present(out.losses).sum(), *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, count = inputs[:2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *inputs[2 : 2 + count])
        ctx.set_materialize_grads(False)
        ctx.count, ctx.total = count, len(inputs) - 2
        ctx.with_rate = [code.collects for code in spec.params]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if cotangents[0] is None:
            return tuple([None] * (2 + ctx.total))
        known = len(ctx.saved_tensors) - ctx.count
        scaled: Iterator[Tensor] = iter(_Scaled.apply(cotangents[0], known, *ctx.saved_tensors))  # type: ignore[no-untyped-call]
        params = [next(scaled) for _ in range(ctx.count)]
        rates = [next(scaled) if wanted else None for wanted in ctx.with_rate]
        return (None, None, *params, *rates, *(None,) * (ctx.total - 2 * ctx.count))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over(_MetaValue, info.batch_size, in_dims, args)


class _Scaled(torch.autograd.Function):
    """Known gradients times a cotangent, tied to the parameters they are the gradients at."""

    @staticmethod
    def forward(cotangent: Tensor, known: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(cotangent * grad for grad in tensors[:known])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise no_double_backward(_OP)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over(_Scaled, info.batch_size, in_dims, args)


def no_double_backward(op: str) -> RuntimeError:
    """The refusal of a second differentiation."""
    return RuntimeError(
        f"{op}: the gradient is a kernel's, which cannot be differentiated again; "
        "path='vectorized' or 'reference' can"
    )


def loop_over(function: Any, size: int, in_dims: Any, args: Any) -> Any:
    """The vmap rule of a function without a batched kernel: one call an entry, stacked."""
    results = [
        function.apply(
            *(
                arg if dim is None else arg.select(dim, i)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError(f"{_OP}: params, x and y must be tensors, got None")
    return tensor
