"""Reads a module and its loss into a layer program, or says by name why it cannot.

The way: `graph.export` turns both into a list of ATen operations; the walk below turns the
model's into layers by the table; `match_loss` turns the loss's into canonical form; `verify`
compares the program with the module on numbers. The result is cached by `cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.program import cache
from fastmeta.program.flatten import Flatten
from fastmeta.program.graph import Graph, Operation, export
from fastmeta.program.ir import Node, Program, Shape, Unsupported
from fastmeta.program.match_loss import match_loss
from fastmeta.program.reading import (
    CASTS,
    DROPOUTS,
    HELPERS,
    TRANSPOSES,
    VIEWS,
    Buffer,
    Call,
    Opaque,
    Param,
    Placed,
    Value,
    words,
)
from fastmeta.program.table import READERS
from fastmeta.program.verify import verify

__all__ = ["BATCH_NORMS", "read"]

BATCH_NORMS = ("batch", "per_step", "frozen", "track")


def read(
    model: nn.Module,
    loss: Callable[..., Any] | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    batch_norm: str = "batch",
    loss_params: Mapping[str, Any] | None = None,
) -> Program:
    """The layer program of a module and its loss, in the mode the module is in.

    Reading takes tens of milliseconds (a second or two the first time in a process), so the answer,
    a refusal too, is kept with the module: for the same loss, row shapes and dtypes, mode and
    structure. What changes unseen is listed in the folder's README.

    Args:
        model: The module, called with x alone.
        loss: Called with the output and y, returns a scalar or one number a row [S]. None: the
            program has no loss.
        x: Example inputs [S, ...] of one task, float32 or float64.
        y: Example targets [S, ...]; needed with a loss.
        batch_norm: The engine's BatchNorm option. A program has "batch" only.
        loss_params: The parameters of the loss; a program has none.

    Returns:
        The program. Its parameters are those of `model.named_parameters()`.

    Raises:
        Unsupported: what the program cannot express, by name.
        TypeError: a model that is no module, a loss that cannot be called.
        ValueError: an unknown batch_norm option, a loss without y.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> x, y = torch.randn(5, 1), torch.randn(5, 1)
        >>> print(read(model, nn.MSELoss(), x, y))
        input [S, 1]
        1 linear 1 -> 40 (0.weight, 0.bias)
        2 relu
        3 linear 40 -> 1 (2.weight, 2.bias)
        output [S, 1]
        loss mse, mean over rows
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"read: model must be a torch.nn.Module, got {type(model).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"read: loss must be callable, got {type(loss).__name__}")
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"read: batch_norm must be one of {BATCH_NORMS}, got {batch_norm!r}")
    if loss is not None and y is None:
        raise ValueError("read: y must be given with a loss, got None")
    if loss_params:
        raise Unsupported(f"loss parameters {sorted(loss_params)} have no place in it", "the loss")
    _check_tensor("x", x)
    if y is not None:
        _check_tensor("y", y)
    return cache.through(
        model, loss, x, y, batch_norm, lambda: _read(model, loss, x, y, batch_norm)
    )


def _read(
    model: nn.Module,
    loss: Callable[..., Any] | None,
    x: Tensor,
    y: Tensor | None,
    batch_norm: str,
) -> Program:
    _check(model, x, y)
    try:
        graph = export(model, loss, x, y)
    except Unsupported as error:
        if error.where == "the loss":  # it may have failed on an output that is no program's
            _read_model(model, export(model, None, x, None), batch_norm)
        raise
    program, exact_dtype = _read_model(model, graph, batch_norm)
    candidates = [program]
    if loss is not None:
        matched = match_loss(graph, program.output_shape)
        candidates = [replace(program, loss=form) for form in matched.forms]
        exact_dtype = exact_dtype or matched.exact_dtype
    return verify(model, loss, candidates, x, y, exact_dtype=exact_dtype)


def _read_model(model: nn.Module, graph: Graph, batch_norm: str) -> tuple[Program, bool]:
    """The program without its loss, and whether it holds in the dtype of x alone."""
    _name_strangers(graph)
    if graph.trouble is not None:
        raise Unsupported(*graph.trouble)
    walk = _Walk(model, graph, batch_norm)
    for operation in graph.operations:
        if operation.part == "model":
            walk.step(operation)
    return walk.finish(), walk.exact_dtype


def _check_tensor(name: str, found: object) -> None:
    if not isinstance(found, Tensor):
        kind = type(found).__name__
        raise Unsupported(f"a program has one tensor as {name}, not a {kind}")


def _check(model: nn.Module, x: Tensor, y: Tensor | None) -> None:
    """Refuse what does not show in the operations."""
    if x.dim() == 0 or (y is not None and y.dim() == 0):
        raise Unsupported("x and y must have a row axis")
    if x.dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"x must be float32 or float64, got {x.dtype}")
    if isinstance(model, torch.jit.ScriptModule):
        raise Unsupported("a TorchScript module cannot be read; give the module it was made from")
    names: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in names:
            raise Unsupported(f"tied weights: {names[id(p)]!r} and {name!r} are one parameter")
        names[id(p)] = name
        if p.dtype != x.dtype:
            raise Unsupported(f"parameter {name!r} is {p.dtype} where x is {x.dtype}")
        if p._backward_hooks:
            raise Unsupported(f"parameter {name!r} has a gradient hook")
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise Unsupported("a backward hook is not a layer", _module(path))


def _module(path: str) -> str:
    return f"module {path!r}" if path else "the module"


def _name_strangers(graph: Graph) -> None:
    """Refuse the first operation that is a layer, but none of ours."""
    known = HELPERS | VIEWS | TRANSPOSES | DROPOUTS | CASTS | READERS.keys()
    for operation in graph.operations:
        op = operation.op[:-1] if operation.mutates else operation.op
        if operation.part == "model" and op not in known and operation.op not in known:
            raise operation.refuse(f"{operation.title} is not a layer of the program")


class _Walk:
    """The model's operations, one after another, into nodes."""

    def __init__(self, model: nn.Module, graph: Graph, batch_norm: str) -> None:
        self.graph = graph
        self.batch_norm = batch_norm
        self.nodes: list[Node] = []
        self.shapes: list[Shape] = [graph.shapes[graph.x][1:]]
        self.notes: list[str] = []
        self.exact_dtype = False
        self.params = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.env: dict[str, Any] = {graph.x: Value(0, self.shapes[0])}
        if graph.y is not None:
            self.env[graph.y] = Opaque("the target")
        for name, path in graph.params.items():
            self.env[name] = Param(path, self.params[path])
        for name, path in graph.buffers.items():
            self.env[name] = Buffer(path)
        for name, what in graph.others.items():
            self.env[name] = Opaque(what)

    def step(self, operation: Operation) -> None:
        """Read one operation."""
        call = Call(operation, self.env, self.nodes, self.batch_norm)
        op = operation.op[:-1] if operation.mutates else operation.op
        if operation.mutates and self._is_counter(call):
            return
        if op in READERS:
            self.env[operation.name] = self._place(call, READERS[op](call))
            if operation.mutates:
                self._rebind(call, self.env[operation.name])
        elif op in TRANSPOSES and isinstance(call.get("self"), Param):
            found = call.get("self")
            if len(found.shape) != 2 or operation.shape != found.shape[::-1]:
                raise call.refuse(f"of {words(found)} is no transpose of a matrix")
            # `shape` stays that of the parameter.
            self.env[operation.name] = replace(found, transposed=not found.transposed)
        elif op in VIEWS or op in DROPOUTS or op in CASTS:
            self.env[operation.name] = self._same_numbers(call, op)
        elif op == "_assert_tensor_metadata":
            return
        elif _holds(call.get(a) for a in operation.arguments):
            raise call.refuse("is not a layer of the program")
        else:  # a constant: refused where a layer would read it
            self.env[operation.name] = Opaque(f"the result of {operation.title}")

    def _is_counter(self, call: Call) -> bool:
        """BatchNorm counts its batches in a buffer; no number depends on it."""
        found = call.get("self")
        if not isinstance(found, Buffer):
            return False
        if not found.name.endswith("num_batches_tracked"):
            raise call.refuse(f"changes {words(found)}, and a program changes no buffer")
        self.env[call.operation.name] = found
        return True

    def _place(self, call: Call, placed: Placed) -> Value:
        """Append the layer, with a Flatten before it if its rows are seen flat and are not."""
        number, own = placed.x.number, self.shapes[placed.x.number]
        if own != placed.x.shape and len(placed.x.shape) == 1:
            number, own = self._append(Node(Flatten(), (number,))), placed.x.shape
        try:
            shape = placed.layer.output_shape(own)
        except ValueError as error:
            raise call.refuse(f"does not fit: {error}") from error
        if placed.note:
            self.notes.append(placed.note)
        number = self._append(Node(placed.layer, (number,), placed.params))
        return Value(number, placed.x.shape if shape == own else shape)

    def _append(self, node: Node) -> int:
        self.nodes.append(node)
        self.shapes.append(node.layer.output_shape(self.shapes[node.inputs[0]]))
        return len(self.nodes)

    def _rebind(self, call: Call, new: Value) -> None:
        """An in-place operation: every name of the old value, views too, now means the new one."""
        old = call.value("self")
        if old.number == 0:
            raise call.refuse("changes the input in place, which a program does not")
        for name, found in self.env.items():
            if isinstance(found, Value) and found.number == old.number:
                self.env[name] = Value(new.number, found.shape)

    def _same_numbers(self, call: Call, op: str) -> Any:
        """Views, and what is one here: the same numbers in the same order, in another shape."""
        operation = call.operation
        if op in DROPOUTS:
            name = "input" if "input" in operation.arguments else "self"
            if call.get("train") and call.number("p") != 0.0:
                raise call.refuse(f"with p={call.number('p'):g} in train mode draws at random")
        else:
            name = "self"
        found = call.get(name)
        if isinstance(found, Opaque | Buffer):
            return Opaque(words(found))
        if isinstance(found, Param):
            if operation.shape == found.shape and not found.transposed:
                return found
            raise call.refuse(f"of {words(found)} is not a layer of the program")
        if not isinstance(found, Value):
            raise call.refuse(f"of {words(found)} is not a layer of the program")
        if op in CASTS:
            if operation.dtype != self.graph.dtypes[self.graph.x]:
                raise call.refuse(f"casts to {operation.dtype}, which a program does not")
            self.exact_dtype = True
        if op == "squeeze" and operation.overload == "default":
            raise call.refuse("without a dim also drops the row axis of one row; name the dim")
        shape = operation.shape
        if not shape or shape[0] != self.graph.rows or prod(shape[1:]) != prod(found.shape):
            raise call.refuse(f"to shape {list(shape)} does not keep the rows apart")
        return Value(found.number, shape[1:])

    def finish(self) -> Program:
        """The program up to the module's output, without what does not lead there."""
        output = None if self.graph.output is None else self.env[self.graph.output.name]
        if not isinstance(output, Value):
            raise Unsupported(f"its output is {words(output)}", "the module")
        live: list[int] = []
        number = output.number
        while number:
            live.append(number)
            number = self.nodes[number - 1].inputs[0]
        nodes = []
        for place, number in enumerate(reversed(live)):
            nodes.append(replace(self.nodes[number - 1], inputs=(place,)))
        used = [name for node in nodes for name in node.params if name is not None]
        for name in used:
            if used.count(name) > 1:
                raise Unsupported(f"parameter {name!r} is read by two layers", "the module")
        return Program(
            nodes=tuple(nodes),
            params=self.params,
            input_shape=self.shapes[0],
            output_shape=output.shape,
            notes=tuple(dict.fromkeys(self.notes)),
        )


def _holds(arguments: Iterable[Any]) -> bool:
    """Whether a value or a parameter is among the arguments, in lists too."""
    return any(
        _holds(a) if isinstance(a, list) else isinstance(a, Value | Param) for a in arguments
    )
