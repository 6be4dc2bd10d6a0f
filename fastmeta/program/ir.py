"""The layer program: what the engine reads a module and its loss into.

A program is a short list of layers with the names of the parameters each one reads, the shape of
one row at both ends, and the loss in canonical form. It holds no tensor: parameters and data are
given to whoever runs it (the interpreter beside this file, or an executor).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Protocol

from torch import Tensor

from fastmeta.program.losses import Loss

__all__ = ["Layer", "Loss", "Node", "Params", "Program", "Saved", "Shape", "Unsupported"]

Shape = tuple[int, ...]
Params = Sequence["Tensor | None"]
"""A layer's parameters (or their tangents or gradients) in the layer's own order.

None stands for a parameter that is absent; among tangents it stands for zero.
"""
Saved = tuple[Tensor, ...]
"""What a layer keeps from a forward pass for the passes after it."""


class Unsupported(ValueError):  # noqa: N818 - reads as what it says
    """A module or loss that the layer program cannot express.

    Args:
        reason: What cannot be expressed, by name.
        where: The path of the submodule it is in, or a phrase such as "the loss"; may be empty.

    Example:
        >>> print(Unsupported("aten.lstm is not a layer of the program", "module 'rnn'"))
        aten.lstm is not a layer of the program (in module 'rnn')
    """

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason, where)
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.reason} (in {self.where})" if self.where else self.reason


class Layer(Protocol):
    """One layer type: its shape rule and its four hand-written rules, for one task.

    Write a layer as y = f(x, w). With tangents (rx, rw) of its inputs and a cotangent dy of its
    output, the rules are

    - forward: y
    - vjp: dx = (df/dx)^T dy and dw = (df/dw)^T dy
    - r_forward: ry = (df/dx) rx + (df/dw) rw, Pearlmutter's R{y}
    - r_vjp: R{dx} and R{dw}, the derivative of the vjp along (rx, rw) and rdy = R{dy}

    Reference:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994, section 2.
    """

    kind: ClassVar[str]
    """The name of the layer type; executors and `explain` know it by this."""
    param_names: ClassVar[tuple[str, ...]]
    """The layer's parameters in its own order."""

    def param_shapes(self) -> tuple[Shape, ...]:
        """The shape of each parameter, in the order of `param_names`."""
        ...

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of an output row for input rows of this shape; ValueError if it cannot be."""
        ...

    def forward(self, x: Tensor, params: Params, mask: Tensor | None) -> tuple[Tensor, Saved]:
        """The output [S, ...] for x [S, ...]; rows masked by mask [S] stay out of statistics."""
        ...

    def vjp(self, saved: Saved, params: Params, dy: Tensor) -> tuple[Tensor, Params]:
        """The cotangents of x and of each parameter."""
        ...

    def r_forward(
        self, saved: Saved, params: Params, rx: Tensor, rparams: Params
    ) -> tuple[Tensor, Saved]:
        """The tangent of the output."""
        ...

    def r_vjp(
        self,
        saved: Saved,
        rsaved: Saved,
        params: Params,
        rparams: Params,
        dy: Tensor,
        rdy: Tensor,
    ) -> tuple[Tensor, Params]:
        """The tangents of what `vjp` returns."""
        ...


@dataclass(frozen=True)
class Node:
    """One layer in its place.

    Args:
        layer: The layer, a value.
        inputs: Value numbers it reads: value 0 is the program's input, node i makes value i + 1.
        params: The program's names for the layer's parameters, in the layer's order; None: absent.
    """

    layer: Layer
    inputs: tuple[int, ...]
    params: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Program:
    """A module and its loss as a list of layers.

    Args:
        nodes: The layers in the order they run; the last one makes the output.
        params: Name to shape of every parameter, in the module's order, those no layer reads
            included (their gradient is zero).
        input_shape: The shape of one input row.
        output_shape: The shape of one output row. The last node's row is viewed in this shape:
            the numbers and their order are the same.
        loss: The loss in canonical form, or None.
        notes: What a reader of `explain` should know, such as a dropped running-statistics update.

    Raises:
        ValueError: a node reads a value or parameter that is not there, or shapes do not fit.

    Example:
        >>> from fastmeta.program import Linear, Loss, Program, ReLU
        >>> loss = Loss("mse", divisor="rows", factor=1.0, per_row=False)
        >>> program = Program.chain([Linear(1, 40), ReLU(), Linear(40, 1)], (1,), loss)
        >>> print(program)
        input [S, 1]
        1 linear 1 -> 40 (0.weight, 0.bias)
        2 relu
        3 linear 40 -> 1 (2.weight, 2.bias)
        output [S, 1]
        loss mse, mean over rows
    """

    nodes: tuple[Node, ...]
    params: Mapping[str, Shape] = field(hash=False)
    input_shape: Shape
    output_shape: Shape
    loss: Loss | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        shapes = [self.input_shape]
        for number, node in enumerate(self.nodes, start=1):
            where = f"program: node {number} ({node.layer.kind})"
            if len(node.inputs) != 1 or not 0 <= node.inputs[0] < number:
                raise ValueError(f"{where} must read one earlier value, got {node.inputs}")
            expected = node.layer.param_shapes()
            if len(node.params) != len(expected):
                raise ValueError(f"{where} must name {len(expected)} parameters, got {node.params}")
            for name, shape in zip(node.params, expected, strict=True):
                if name is not None and self.params.get(name) != shape:
                    got = self.params.get(name)
                    raise ValueError(f"{where}: {name!r} must have shape {shape}, got {got}")
            shapes.append(node.layer.output_shape(shapes[node.inputs[0]]))
        used = [name for node in self.nodes for name in node.params if name is not None]
        if len(set(used)) != len(used):
            raise ValueError(f"program: parameters must be read by one node each, got {used}")
        if prod(shapes[-1]) != prod(self.output_shape):
            raise ValueError(
                f"program: output_shape must view {shapes[-1]}, got {self.output_shape}"
            )
        if self.loss is not None:
            self.loss.check_output_shape(self.output_shape)

    @property
    def is_chain(self) -> bool:
        """Whether every node reads the value just before it."""
        return all(node.inputs == (i,) for i, node in enumerate(self.nodes))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The row shape of every value: the input's, then each node's."""
        shapes = [self.input_shape]
        for node in self.nodes:
            shapes.append(node.layer.output_shape(shapes[node.inputs[0]]))
        return tuple(shapes)

    @classmethod
    def chain(
        cls,
        layers: Iterable[Layer],
        input_shape: Shape,
        loss: Loss | None = None,
        *,
        without: Iterable[str] = (),
    ) -> Program:
        """A program whose layers follow one another, named as `nn.Sequential` names them.

        Args:
            layers: The layers in order.
            input_shape: The shape of one input row.
            loss: The loss, or None.
            without: Names of parameters that are absent, such as "0.bias".

        Returns:
            The program; layer i's parameters are "i.weight", "i.bias".
        """
        absent = frozenset(without)
        nodes: list[Node] = []
        params: dict[str, Shape] = {}
        shape = input_shape
        for i, layer in enumerate(layers):
            names: list[str | None] = []
            for short, param_shape in zip(layer.param_names, layer.param_shapes(), strict=True):
                name = f"{i}.{short}"
                if name in absent:
                    names.append(None)
                else:
                    names.append(name)
                    params[name] = param_shape
            nodes.append(Node(layer, (i,), tuple(names)))
            shape = layer.output_shape(shape)
        return cls(tuple(nodes), params, input_shape, shape, loss)

    def __str__(self) -> str:
        lines = [f"input {_rows(self.input_shape)}"]
        for number, node in enumerate(self.nodes, start=1):
            names = ", ".join(name for name in node.params if name is not None)
            source = "" if node.inputs == (number - 1,) else f" of {node.inputs[0]}"
            lines.append(f"{number} {node.layer}{source}" + (f" ({names})" if names else ""))
        lines.append(f"output {_rows(self.output_shape)}")
        lines.append(f"loss {self.loss}" if self.loss is not None else "no loss")
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def _rows(shape: Shape) -> str:
    return f"[{', '.join(['S', *map(str, shape)])}]"
