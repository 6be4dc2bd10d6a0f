"""Whether a spec describes a program at all: the executors index by it without looking again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastmeta._checks import value_error

if TYPE_CHECKING:
    from fastmeta.ops.executor import LayerCode, Spec

__all__ = ["check_spec"]

_LOSSES = ("mse", "cross_entropy")
_MOST = 2**31 - 1  # the executors count in int


def check_spec(op: str, spec: Spec, known: tuple[str, ...]) -> None:
    """Check that layers fit one another and their parameters, and that indices are in range.

    Args:
        op: the operation, for messages.
        spec: what is checked.
        known: the names of the layers that are compiled.

    Raises:
        ValueError: the spec is no program.
    """
    for where, must, got in _faults(spec, known):
        raise value_error(op, f"spec.{where}", must, str(got))


def _faults(spec: Spec, known: tuple[str, ...]) -> Iterator[tuple[str, str, object]]:
    if not spec.layers:
        yield "layers", "hold at least one layer", "none"
    if spec.loss not in _LOSSES:
        yield "loss", f"be one of {', '.join(_LOSSES)}", repr(spec.loss)
    if not math.isfinite(spec.factor):
        yield "factor", "be finite", spec.factor
    for name, least in (("support_rows", 1), ("query_rows", 0), ("steps", 0)):
        if not least <= getattr(spec, name) <= _MOST:
            yield name, f"be at least {least}, and below 2**31", getattr(spec, name)
    wanted: dict[int, tuple[int, ...]] = {}
    for number, layer in enumerate(spec.layers):
        where = f"layers[{number}]"
        if layer.op not in known:
            yield where, f"be one of {', '.join(known)}", repr(layer.op)
        if not 1 <= min(layer.inputs, layer.outputs) <= max(layer.inputs, layer.outputs) <= _MOST:
            yield where, "have at least one column", f"{layer.inputs} -> {layer.outputs}"
        before = spec.layers[number - 1].outputs if number else layer.inputs
        if layer.inputs != before or (layer.op != "linear" and layer.outputs != before):
            yield where, f"fit the {before} columns it reads", f"{layer.inputs} -> {layer.outputs}"
        if layer.op == "leaky_relu" and not layer.constant >= 0:
            yield where, "have a slope of at least 0 (a gate reads the output's sign)", layer
        if layer.op == "linear" and layer.weight < 0:
            yield where, "have a weight", "none"
        for index, shape in _owned(layer):
            if not 0 <= index < len(spec.params):
                yield where, f"name one of {len(spec.params)} parameters", index
            if index in wanted:
                yield where, f"be the only layer with parameter {index} (no tied weights)", "two"
            wanted[index] = shape
    for index, code in enumerate(spec.params):
        where = f"params[{index}]"
        if wanted.get(index) != code.shape or (code.rows != 1 and not code.matrix):
            yield where, f"have the shape {wanted.get(index)} that its layer needs", code.shape
        owner = code.rate_owner
        if owner >= 0:
            theirs = spec.params[owner] if owner < index else None
            if theirs is None or not theirs.collects or theirs.rate_per_element:
                yield where, "share the rate of an earlier parameter that collects", owner
            elif code.rate_per_element or theirs.rate_per_step != code.rate_per_step:
                yield where, "have a rate of the form of its owner's", code


def _owned(layer: LayerCode) -> Iterator[tuple[int, tuple[int, ...]]]:
    if layer.weight >= 0:
        shape = (layer.outputs, layer.inputs) if layer.op == "linear" else (layer.outputs,)
        yield layer.weight, shape if layer.op in ("linear", "batch_norm") else ()
    if layer.bias >= 0:
        yield layer.bias, (layer.outputs,) if layer.op in ("linear", "batch_norm") else ()
