"""The loss's ATen operations as a canonical loss, L = factor / divisor * sum_n w_n l_n.

The operations are followed with a few kinds of quantity, each with the number it is scaled by:
the output and the target (seen in any shape), their difference, log-probabilities, and the terms
of the loss, which sums and means then reduce. Anything else is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch

from fastmeta.program.graph import Graph, Operation, Ref
from fastmeta.program.ir import Loss, Shape, Unsupported
from fastmeta.program.reading import CASTS, VIEWS

__all__ = ["match_loss"]

What = Literal["output", "target", "difference", "terms", "log_probs", "one_hot", "row_numbers"]


@dataclass(frozen=True)
class Quantity:
    """What one result of the loss's graph is.

    Args:
        what: output, target: those numbers in their order, in any shape. difference: scale *
            (output - target). terms: scale * l, where the l_n are the sums over the rows.
            log_probs: log softmax(output). one_hot: of the target. row_numbers: 0 .. S - 1.
        shape: Its shape.
        scale: What it is multiplied by, exact.
        kind: Of terms: which loss.
        rows: Of terms: where the row axis is. "summed": nowhere any more. "mixed": lost in a view.
    """

    what: What
    shape: Shape
    scale: Fraction = Fraction(1)
    kind: Literal["mse", "cross_entropy"] = "mse"
    rows: int | Literal["summed", "mixed"] = 0


class Matched(NamedTuple):
    """The forms a loss may have, and whether they hold in the dtype of x alone (it has casts)."""

    forms: list[Loss]
    exact_dtype: bool


def match_loss(graph: Graph, output_shape: Shape) -> Matched:
    """The canonical forms that the loss may have; numbers decide between them.

    A constant divisor such as len(y) looks the same whether it is the row count or a number that
    happens to equal it, so a scalar loss has two forms. They differ at any other row count.

    Args:
        graph: The module and its loss, exported together.
        output_shape: The shape of an output row.

    Returns:
        The loss with divisor "rows" and with divisor "one"; for a loss per row the first alone.

    Raises:
        Unsupported: an operation that is no part of a known loss, by name.
    """
    match = _Match(graph, output_shape)
    result = match.run()
    if result.what != "terms":
        raise Unsupported(f"its result is {_words(result)}, not a known loss", "the loss")
    if result.shape == (graph.rows,) and result.rows == 0:
        form = Loss(result.kind, "rows", float(result.scale), per_row=True)
        return Matched([form], match.exact_dtype)
    if result.shape == ():
        by_rows = Loss(result.kind, "rows", float(result.scale * graph.rows), per_row=False)
        plain = Loss(result.kind, "one", float(result.scale), per_row=False)
        return Matched([by_rows, plain], match.exact_dtype)
    shape = ["S" if n == graph.rows else n for n in result.shape]
    raise Unsupported(f"it must return one number, or one a row [S], got shape {shape}", "the loss")


class _Match:
    def __init__(self, graph: Graph, output_shape: Shape) -> None:
        self.graph = graph
        self.rows = graph.rows
        self.exact_dtype = False
        self.output_shape = output_shape
        self.env: dict[str, Any] = {
            name: _Other(f"parameter {path!r} of the module") for name, path in graph.params.items()
        }
        self.env.update(
            {n: _Other(f"buffer {p!r} of the module") for n, p in graph.buffers.items()}
        )
        self.env.update({name: _Other(what) for name, what in graph.others.items()})
        for operation in graph.operations:
            if operation.part == "model":
                self.env[operation.name] = _Other(f"{operation.title} inside the module")
        self.env[graph.x] = _Other("the input")
        if graph.output is not None:
            self.env[graph.output.name] = Quantity("output", graph.shapes[graph.output.name])
        if graph.y is not None:
            self.env[graph.y] = Quantity("target", graph.shapes[graph.y])
        self.operation: Operation

    def run(self) -> Quantity:
        for operation in self.graph.operations:
            if operation.part == "loss":
                self.operation = operation
                self.env[operation.name] = self.step(operation)
        if self.graph.loss is None:
            raise Unsupported("it must return one tensor", "the loss")
        return self.quantity(self.env[self.graph.loss.name])

    def step(self, operation: Operation) -> Any:
        if operation.mutates:
            raise self.refuse("changes a tensor in place")
        rule = _RULES.get(operation.op)
        if rule is None:
            raise self.refuse("is not part of a loss that the program knows")
        return rule(self)

    def refuse(self, reason: str) -> Unsupported:
        return self.operation.refuse(f"{self.operation.title} {reason}")

    def get(self, name: str) -> Any:
        return self.look_up(self.operation.arguments.get(name))

    def look_up(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self.env[argument.name]
        if isinstance(argument, list):
            return [self.look_up(a) for a in argument]
        return argument

    def quantity(self, found: Any) -> Quantity:
        if isinstance(found, Quantity):
            return found
        raise Unsupported(f"it reads {_words(found)}", "the loss")

    def the(self, name: str, *whats: What) -> Quantity:
        """An argument that must be one of these quantities."""
        found = self.quantity(self.get(name))
        if found.what not in whats:
            raise self.refuse(f"of {_words(found)} is not part of a loss that the program knows")
        return found

    def constant(self, found: Any) -> Fraction | None:
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return None
        if not math.isfinite(found):
            raise self.refuse(f"by {found} is not part of a loss that the program knows")
        return Fraction(found)


@dataclass(frozen=True)
class _Other:
    """A tensor that no loss of the program reads."""

    what: str


def _words(found: Any) -> str:
    if isinstance(found, _Other):
        return found.what
    if isinstance(found, Quantity):
        return {
            "output": "the output",
            "target": "the target",
            "difference": "the output less the target",
            "terms": f"the terms of {found.kind}",
            "log_probs": "the log-probabilities",
            "one_hot": "the one-hot target",
            "row_numbers": "the row numbers",
        }[found.what]
    return repr(found)


def _subtract(match: _Match) -> Quantity:
    left, right = match.quantity(match.get("self")), match.quantity(match.get("other"))
    if {left.what, right.what} != {"output", "target"} or match.get("alpha") != 1:
        raise match.refuse(f"of {_words(left)} and {_words(right)} is no loss the program knows")
    return replace(_pair(match, left, right), what="difference")


def _pair(match: _Match, left: Quantity, right: Quantity) -> Quantity:
    """Output and target, number by number."""
    if left.shape != right.shape:
        shapes = [["S" if n == match.rows else n for n in q.shape] for q in (left, right)]
        raise match.refuse(f"broadcasts {shapes[0]} with {shapes[1]}: give both the same shape")
    target = left if left.what == "target" else right
    assert match.graph.y is not None  # noqa: S101 - a target is only there with y
    dtype = match.graph.dtypes[match.graph.y]
    if target.what == "target" and dtype != match.graph.dtypes[match.graph.x]:
        raise match.refuse(f"of a target of dtype {dtype} is no loss the program knows")
    apart = bool(left.shape) and left.shape[0] == match.rows
    return Quantity("difference", left.shape, rows=0 if apart else "mixed")


def _multiply(match: _Match) -> Quantity:
    left, right = match.get("self"), match.get("other")
    for scaled, by in ((left, right), (right, left)):
        number = match.constant(by)
        if number is not None:
            return _scale(match, match.quantity(scaled), number)
    left, right = match.quantity(left), match.quantity(right)
    if left.what == right.what == "difference" and left.shape == right.shape:
        return replace(left, what="terms", scale=left.scale * right.scale)
    if {left.what, right.what} == {"one_hot", "log_probs"} and left.shape == right.shape:
        scale = -left.scale * right.scale
        return Quantity("terms", left.shape, scale, "cross_entropy")
    raise match.refuse(f"of {_words(left)} and {_words(right)} is no loss the program knows")


def _divide(match: _Match) -> Quantity:
    number = match.constant(match.get("other"))
    if not number or match.get("rounding_mode") is not None:
        raise match.refuse("is part of a loss only by a constant number")
    return _scale(match, match.quantity(match.get("self")), 1 / number)


def _negate(match: _Match) -> Quantity:
    return _scale(match, match.quantity(match.get("self")), Fraction(-1))


def _scale(match: _Match, found: Quantity, number: Fraction) -> Quantity:
    if found.what not in ("difference", "terms", "log_probs"):
        raise match.refuse(f"scales {_words(found)}, which no loss of the program does")
    return replace(found, scale=found.scale * number)


def _power(match: _Match) -> Quantity:
    if match.get("exponent") != 2:
        raise match.refuse(f"to {match.get('exponent')} is no loss the program knows")
    return _square(match)


def _square(match: _Match) -> Quantity:
    found = match.the("self", "difference")
    return replace(found, what="terms", scale=found.scale**2)


def _sum(match: _Match) -> Quantity:
    return _reduce(match, match.the("self", "terms"), mean=False)


def _mean(match: _Match) -> Quantity:
    return _reduce(match, match.the("self", "terms"), mean=True)


def _reduce(match: _Match, terms: Quantity, *, mean: bool) -> Quantity:
    if match.get("dtype") not in (None, match.graph.dtypes[match.graph.x]):
        raise match.refuse(f"in dtype {match.get('dtype')} is no loss the program knows")
    rank = len(terms.shape)
    dims = match.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    axes = {d % rank for d in dims} if dims else set(range(rank))
    if terms.rows == "mixed" and len(axes) < rank:
        raise match.refuse("over a part of terms whose rows are lost in a view")
    count = math.prod(terms.shape[a] for a in axes)
    rows = terms.rows
    if rows == "mixed" or rows in axes:
        rows = "summed"
    elif isinstance(rows, int) and not match.get("keepdim"):
        rows -= sum(a < rows for a in axes)
    scale = terms.scale / count if mean else terms.scale
    return replace(terms, shape=match.operation.shape, scale=scale, rows=rows)


def _view(match: _Match) -> Quantity:
    found = match.quantity(match.get("self"))
    shape = match.operation.shape
    if match.operation.op == "squeeze" and match.operation.overload == "default":
        raise match.refuse("without a dim also drops the row axis of one row; name the dim")
    if math.prod(shape) != math.prod(found.shape):
        raise match.refuse(f"takes a part of {_words(found)}")
    if found.what in ("output", "target") or shape == found.shape:
        return replace(found, shape=shape)
    if found.what not in ("terms", "difference"):
        raise match.refuse(f"of {_words(found)} is no loss the program knows")
    rows = found.rows
    if rows != "summed":
        rows = 0 if rows == 0 and shape and shape[0] == match.rows else "mixed"
    return replace(found, shape=shape, rows=rows)


def _cast(match: _Match) -> Any:
    found = match.get("self")
    if isinstance(found, Quantity) and found.what == "one_hot":
        return found
    name = match.operation.arguments["self"].name
    if match.operation.dtype != match.graph.dtypes[name]:
        raise match.refuse(f"casts to {match.operation.dtype}, which the program does not")
    match.exact_dtype = True
    return found


def _detach(match: _Match) -> Any:
    found = match.get("self")
    if isinstance(found, Quantity) and found.what in ("target", "one_hot", "row_numbers"):
        return found
    raise match.refuse(f"of {_words(found)} cuts the gradient")


def _nothing(match: _Match) -> None:
    return None


def _broadcast(match: _Match) -> Any:
    return match.get("tensors")


def _getitem(match: _Match) -> Any:
    found = match.get("self")
    if not isinstance(found, list):
        raise match.refuse(f"of {_words(found)} is no loss the program knows")
    return found[match.get("index")]


def _mse_loss(match: _Match) -> Quantity:
    found = _pair(
        match, match.the("self", "output", "target"), match.the("target", "target", "output")
    )
    if match.get("self").what == match.get("target").what:
        raise match.refuse("of the output with itself is no loss")
    return _reduced(match, replace(found, what="terms"))


def _reduced(match: _Match, terms: Quantity) -> Quantity:
    """What the `reduction` of a torch loss makes of its terms: 0 none, 1 mean, 2 sum."""
    reduction = match.get("reduction")
    if reduction == 0:
        return terms
    scale = terms.scale / math.prod(terms.shape) if reduction == 1 else terms.scale
    return replace(terms, shape=(), scale=scale, rows="summed")


def _cross_entropy(match: _Match) -> Quantity:
    if match.get("label_smoothing"):
        raise match.refuse(
            f"with label_smoothing={match.get('label_smoothing'):g} is not known to the program"
        )
    _logits(match, match.the("self", "output"))
    return _classes(match, Fraction(1))


def _nll_loss(match: _Match) -> Quantity:
    return _classes(match, match.the("self", "log_probs").scale)


def _classes(match: _Match, scale: Fraction) -> Quantity:
    if match.get("weight") is not None:
        raise match.refuse("with class weights is not known to the program")
    ignored = match.get("ignore_index")
    if 0 <= ignored < match.output_shape[0]:
        raise match.refuse(f"with ignore_index={ignored} is not known to the program")
    _labels(match, match.the("target", "target"), (match.rows,))
    return _reduced(match, Quantity("terms", (match.rows,), scale, "cross_entropy"))


def _logits(match: _Match, output: Quantity) -> None:
    if len(match.output_shape) != 1 or output.shape != (match.rows, *match.output_shape):
        raise match.refuse(f"needs an output [S, N], got rows of shape {match.output_shape}")


def _labels(match: _Match, target: Quantity, shape: Shape) -> None:
    assert match.graph.y is not None  # noqa: S101 - a target is only there with y
    dtype = match.graph.dtypes[match.graph.y]
    if dtype != torch.int64 or target.shape != shape:
        size = ["S" if n == match.rows else n for n in target.shape]
        raise match.refuse(f"needs class numbers int64 [S] as target, got {dtype} {size}")


def _log_softmax(match: _Match) -> Quantity:
    found = match.the("self", "output")
    _logits(match, found)
    if match.get("dim") not in (-1, 1) or match.get("dtype") not in (
        None,
        match.graph.dtypes[match.graph.x],
    ):
        raise match.refuse("must run over the last axis in the output's dtype")
    return replace(found, what="log_probs")


def _gather(match: _Match) -> Quantity:
    found = match.the("self", "log_probs")
    if match.get("dim") not in (-1, 1):
        raise match.refuse("must pick along the last axis")
    _labels(match, match.the("index", "target"), (match.rows, 1))
    return Quantity("terms", (match.rows, 1), -found.scale, "cross_entropy")


def _index(match: _Match) -> Quantity:
    found = match.the("self", "log_probs")
    indices = match.get("indices")
    whats = [getattr(i, "what", None) for i in indices]
    if whats != ["row_numbers", "target"]:
        raise match.refuse("must pick the target's column in every row")
    _labels(match, indices[1], (match.rows,))
    return Quantity("terms", (match.rows,), -found.scale, "cross_entropy")


def _arange(match: _Match) -> Any:
    whole = (match.get("end"), match.get("start") or 0, match.get("step") or 1)
    if whole == (match.rows, 0, 1):
        return Quantity("row_numbers", (match.rows,))
    return _Other(f"the result of {match.operation.title}")


def _one_hot(match: _Match) -> Quantity:
    _labels(match, match.the("self", "target"), (match.rows,))
    return Quantity("one_hot", match.operation.shape)


Rule = Callable[[_Match], Any]
_RULES: Mapping[str, Rule] = {
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "pow": _power,
    "square": _square,
    "sum": _sum,
    "mean": _mean,
    "mse_loss": _mse_loss,
    "cross_entropy_loss": _cross_entropy,
    "log_softmax": _log_softmax,
    "nll_loss": _nll_loss,
    "nll_loss_nd": _nll_loss,
    "gather": _gather,
    "index": _index,
    "arange": _arange,
    "one_hot": _one_hot,
    "broadcast_tensors": _broadcast,
    "getitem": _getitem,
    "detach": _detach,
    "_assert_tensor_metadata": _nothing,
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(VIEWS, _view),
}
