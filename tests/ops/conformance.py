"""What every operation must do, as functions of a case. A new operation adds one case.

An operation here is a function of named tensors (and of settings that are no tensors) with a
reference: the plain definition, whose derivatives come from autograd. The table of cases is at the
end. `gather_rows` in `fastmeta/tasks` is not among them: it is no registered operation but a copy
of bytes without derivative, which `tests/tasks/test_gather.py` holds to torch's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmeta.ops.executor import LayerCode, ParamCode, Rows, Spec
from fastmeta.ops.program_adapt import program_adapt, program_adapt_reference
from fastmeta.ops.program_meta_grad import (
    meta_value,
    program_meta_grad,
    program_meta_grad_reference,
)

Tensors = dict[str, Tensor]
Call = Callable[[Any, Mapping[str, Tensor]], Tensors]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a sample."""

    width: int = 5
    tasks: int = 3
    rows: int = 4
    queries: int = 6
    steps: int = 2
    labels: bool = False


@dataclass(frozen=True)
class Case:
    """One operation.

    Args:
        name: of the operation.
        sample: settings and tensors of given sizes, by the names that errors use.
        call: the public function, its outputs by name.
        reference: the definition, likewise, differentiable.
        inputs: the tensors with a gradient; none for an operation that gives gradients itself.
        batched: an input that vmap maps over; empty where that is refused.
        operator: the registered operator and its arguments, for opcheck.
    """

    name: str
    sample: Callable[[Sizes, torch.dtype], tuple[Any, Tensors]]
    call: Call
    reference: Call
    inputs: tuple[str, ...]
    batched: str
    operator: Callable[[Any, Mapping[str, Tensor]], tuple[Any, tuple[Any, ...]]]


# ---- the operations on layer programs


def _spec(sizes: Sizes) -> Spec:
    width, classes = sizes.width, 3
    return Spec(
        (
            LayerCode("linear", 4, width, 0, 1),
            LayerCode("tanh", width, width),
            LayerCode("batch_norm", width, width, 2, 3, 1e-3),
            LayerCode("silu", width, width),
            LayerCode("linear", width, classes, 4, 5),
        ),
        (
            ParamCode(width, 4, True, rate_per_step=True, rate_gradient=True),
            ParamCode(1, width, False, rate_per_step=True, rate_gradient=True, rate_owner=0),
            ParamCode(1, width, False, rate_per_element=True, rate_gradient=True),
            ParamCode(1, width, False, adapts=False),
            ParamCode(classes, width, True, per_task=True),
            ParamCode(1, classes, False, rate_per_element=True, rate_per_step=True),
        ),
        "cross_entropy" if sizes.labels else "mse",
        mean_over_rows=True,
        factor=0.5,
        support_rows=sizes.rows,
        query_rows=sizes.queries,
        steps=sizes.steps,
    )


def _program(sizes: Sizes, dtype: torch.dtype) -> tuple[Spec, Tensors]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    spec, tensors = _spec(sizes), Tensors()
    for i, code in enumerate(spec.params):
        tensors[f"params[{i}]"] = draw(*((sizes.tasks,) if code.per_task else ()), *code.shape)
    tensors["params[2]"] = 1 + tensors["params[2]"] / 4
    for i, code in enumerate(spec.params):
        if code.adapts:
            steps = spec.steps if code.rate_per_step else 1
            shape = (steps, *(code.shape if code.rate_per_element else ()))
            tensors[f"rates[{i}]"] = 0.1 + 0.02 * draw(*shape)
    tensors["rates[1]"] = tensors["rates[0]"]
    for side, rows in (("support", sizes.rows), ("query", sizes.queries)):
        tensors[f"{side}.x"] = draw(sizes.tasks, rows, 4)
        target = draw(sizes.tasks, rows, 3)
        tensors[f"{side}.y"] = target.argmax(2) if sizes.labels else target
    weight = 1 + draw(sizes.tasks, sizes.queries).abs()
    weight[:, 1] = 0
    tensors["query.weight"] = weight
    return spec, tensors


def _adapting(sizes: Sizes, dtype: torch.dtype) -> tuple[Spec, Tensors]:
    spec, tensors = _program(sizes, dtype)
    kept = {name: value for name, value in tensors.items() if not name.startswith("query")}
    return replace(spec, query_rows=0), kept


def _parts(
    spec: Spec, tensors: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor | None], Rows, Rows | None]:
    params = [tensors[f"params[{i}]"] for i in range(len(spec.params))]
    rates = [
        # one rate of two parameters is one tensor
        tensors.get(f"rates[{i if code.rate_owner < 0 else code.rate_owner}]")
        for i, code in enumerate(spec.params)
    ]
    sides = [
        Rows(tensors[f"{side}.x"], tensors[f"{side}.y"], tensors.get(f"{side}.weight"))
        for side in ("support", "query")
        if f"{side}.x" in tensors
    ]
    return params, rates, sides[0], sides[1] if len(sides) > 1 else None


def _losses(losses: Tensor, support_losses: Tensor) -> Tensors:
    return {"losses": losses, "support losses": support_losses}


def _meta_grad(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensors:
    out = program_meta_grad(spec, *_parts(spec, tensors), scale=0.5)  # type: ignore[arg-type]
    assert out.losses is not None
    assert out.grads is not None
    found = _losses(out.losses, out.support_losses)
    found |= {f"params[{i}]": grad for i, grad in enumerate(out.grads)}
    return found | {f"rates[{i}]": g for i, g in enumerate(out.rate_grads) if g is not None}


def _meta_grad_reference(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensors:
    names = [n for n in tensors if n in PROGRAM_INPUTS]
    leaves = {n: tensors[n].detach().requires_grad_() for n in names}
    parts = _parts(spec, {**tensors, **leaves})
    losses, support_losses = program_meta_grad_reference(spec, *parts)  # type: ignore[arg-type]
    grads = torch.autograd.grad(0.5 * losses.sum(), list(leaves.values()), materialize_grads=True)
    return _losses(losses.detach(), support_losses) | dict(zip(leaves, grads, strict=True))


def _meta_value(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensors:
    return {"value": meta_value(spec, *_parts(spec, tensors))}  # type: ignore[arg-type]


def _meta_value_reference(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensors:
    losses, _ = program_meta_grad_reference(spec, *_parts(spec, tensors))  # type: ignore[arg-type]
    return {"value": losses.sum()}


def _adapt(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensors:
    adapted, losses = program_adapt(spec, *_parts(spec, tensors)[:3])
    return {f"adapted {i}": value for i, value in enumerate(adapted)} | {"losses": losses}


def _adapt_reference(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensors:
    adapted, losses = program_adapt_reference(spec, *_parts(spec, tensors)[:3])
    return {f"adapted {i}": value for i, value in enumerate(adapted)} | {"losses": losses}


def _meta_grad_operator(spec: Spec, tensors: Mapping[str, Tensor]) -> tuple[Any, tuple[Any, ...]]:
    params, rates, support, query = _parts(spec, tensors)
    assert query is not None
    operator = torch.ops.fastmeta.program_meta_grad.default
    return operator, (spec.to_json(), params, rates, *support, *query, 0.5)


def _adapt_operator(spec: Spec, tensors: Mapping[str, Tensor]) -> tuple[Any, tuple[Any, ...]]:
    params, rates, support, _ = _parts(spec, tensors)
    return torch.ops.fastmeta.program_adapt.default, (spec.to_json(), params, rates, *support)


PROGRAM_INPUTS = (*(f"params[{i}]" for i in range(6)), "rates[0]", "rates[2]")

CASES = (
    Case(
        "program_meta_grad", _program, _meta_grad, _meta_grad_reference, (), "", _meta_grad_operator
    ),
    Case(
        "meta_value",
        _program,
        _meta_value,
        _meta_value_reference,
        PROGRAM_INPUTS,
        "params[0]",
        _meta_grad_operator,
    ),
    Case(
        "program_adapt",
        _adapting,
        _adapt,
        _adapt_reference,
        PROGRAM_INPUTS,
        "params[0]",
        _adapt_operator,
    ),
)
