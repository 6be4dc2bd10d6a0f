"""A layer program and a request as the codes that the compiled executors take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from torch import Tensor

from fastmeta.inner_loop.optimizers import Number
from fastmeta.inner_loop.request import Request
from fastmeta.ops.executor import OPS, LayerCode, ParamCode, Spec
from fastmeta.program import GELU, BatchNorm1d, Flatten, LeakyReLU, Program
from fastmeta.program.activations import ELU
from fastmeta.program.ir import Node

__all__ = ["Chain", "RateForm", "chain_of", "rate_form", "spec_of"]


@dataclass(frozen=True)
class Chain:
    """A program as layer codes.

    Args:
        layers: the codes.
        names: the parameters they read, in the order of the codes' indices.
    """

    layers: tuple[LayerCode, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class RateForm:
    """How a rate is laid out: ``[I or 1]``, or ``[I or 1, *shape]``.

    ``owner`` is the index of an earlier parameter with the same rate, to which the gradient goes.
    """

    per_step: bool = False
    per_element: bool = False
    gradient: bool = False
    owner: int = -1


@lru_cache(maxsize=256)
def chain_of(program: Program) -> Chain | str:
    """The codes of a program, or the name of what the executors cannot run."""
    if not program.is_chain:
        return "the program has branches"
    layers: list[LayerCode] = []
    names: list[str] = []
    shapes = program.shapes
    for node, before, after in zip(program.nodes, shapes, shapes[1:], strict=False):
        if isinstance(node.layer, Flatten):
            continue  # rows are contiguous: the same numbers in the same order
        code = _layer(node, before, after, names)
        if isinstance(code, str):
            return code
        layers.append(code)
    if not names:
        return "the program has no parameter"
    return Chain(tuple(layers), tuple(names))


def _layer(
    node: Node, before: tuple[int, ...], after: tuple[int, ...], names: list[str]
) -> LayerCode | str:
    layer = node.layer
    op = "gelu_tanh" if isinstance(layer, GELU) and layer.approximate == "tanh" else layer.kind
    if op not in OPS:
        return f"layer {layer.kind!r} is not compiled into the executors"
    if op == "linear" and len(before) != 1:
        return f"a linear layer over rows of shape {before}: the executors take rows of one axis"
    constant = 0.0
    if isinstance(layer, BatchNorm1d):
        constant = layer.eps
    elif isinstance(layer, LeakyReLU):
        constant = layer.slope
        if constant < 0:
            return f"leaky_relu with the negative slope {constant:g}"
    elif isinstance(layer, ELU):
        constant = layer.alpha
    places = [-1, -1]
    for i, name in enumerate(node.params):
        if name is not None:
            places[i] = len(names)
            names.append(name)
    return LayerCode(op, prod(before), prod(after), places[0], places[1], constant)


def rate_form(rate: Number, shape: tuple[int, ...]) -> RateForm:
    """The form of a resolved rate, ``[1 or I, *shape broadcast]``, for a parameter ``shape``."""
    if not isinstance(rate, Tensor):
        return RateForm()
    per_element = any(size != 1 for size in rate.shape[1:])
    return RateForm(rate.shape[0] != 1, per_element, rate.requires_grad)


def _forms(
    program: Program, chain: Chain, rates: Mapping[str, Number]
) -> tuple[RateForm | None, ...]:
    forms: list[RateForm | None] = []
    owners: dict[tuple[Any, ...], int] = {}
    bases: list[Tensor] = []  # kept, so that no other tensor gets the id of one
    for index, name in enumerate(chain.names):
        rate = rates.get(name)
        form = None if rate is None else rate_form(rate, program.params[name])
        if isinstance(rate, Tensor) and form is not None and form.gradient and not form.per_element:
            # rates are views of the tensors that were given: the same one is the same place in it
            base = rate if rate._base is None else rate._base
            bases.append(base)
            # [I or 1, 1, ...]: the axes after the first are the parameter's, not the rate's
            stride = rate.stride(0) if rate.shape[0] > 1 else 0
            place = (id(base), rate.storage_offset(), rate.shape[0], stride)
            owner = owners.setdefault(place, index)
            form = replace(form, owner=-1 if owner == index else owner)
        forms.append(form)
    return tuple(forms)


@lru_cache(maxsize=256)
def _cached_spec(
    program: Program,
    chain: Chain,
    per_task: frozenset[str],
    forms: tuple[RateForm | None, ...],
    sizes: tuple[int, int, int],
    second_order: bool,
) -> Spec:
    params = []
    for name, form in zip(chain.names, forms, strict=True):
        shape = program.params[name]
        matrix = len(shape) == 2
        rows, cols = shape if matrix else (1, shape[0])
        params.append(
            ParamCode(
                rows,
                cols,
                matrix,
                form is not None,
                name in per_task,
                form is not None and form.per_step,
                form is not None and form.per_element,
                form is not None and form.gradient,
                -1 if form is None else form.owner,
            )
        )
    loss = program.loss
    if loss is None:
        raise ValueError("spec_of: program must have a loss")
    return Spec(
        chain.layers,
        tuple(params),
        loss.kind,
        loss.divisor == "rows",
        loss.factor,
        *sizes,
        second_order,
    )


def spec_of(
    request: Request, program: Program, chain: Chain, rates: Mapping[str, Number], query_rows: int
) -> Spec:
    """The spec of a call.

    Args:
        request: the call.
        program: what was read.
        chain: its codes.
        rates: the resolved rate of each parameter that adapts.
        query_rows: Q, or 0 for adaptation alone.
    """
    forms = _forms(program, chain, rates)
    sizes = (request.batch.support.y.shape[1], query_rows, request.inner.steps)
    return _cached_spec(program, chain, request.per_task, forms, sizes, request.order == 2)
