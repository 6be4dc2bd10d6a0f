"""What a layer's file needs to say how the layer is read from an ATen operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmeta.program.graph import Operation, Ref
from fastmeta.program.ir import Layer, Node, Shape, Unsupported

__all__ = [
    "CASTS",
    "DROPOUTS",
    "HELPERS",
    "TRANSPOSES",
    "VIEWS",
    "Buffer",
    "Call",
    "Opaque",
    "Param",
    "Placed",
    "ReadLayer",
    "Value",
]


# The same numbers in the same order; what is more than that is seen by its shape.
VIEWS = frozenset(
    {"view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"}
    | {"squeeze", "unsqueeze", "expand", "expand_as", "select", "slice"}
    | {"contiguous", "clone", "alias"}
)
TRANSPOSES = frozenset({"t", "numpy_T", "transpose", "permute", "mT", "swapaxes", "swapdims"})
DROPOUTS = frozenset({"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"})
CASTS = frozenset({"to", "_to_copy", "type_as"})
# Operations that only hand data on. A refusal names one of them only if nothing more telling
# stands in the way: "aten.lstm", not the zeros it starts from.
HELPERS = frozenset(
    {"add", "sub", "mul", "div", "neg", "pow", "mean", "sum", "detach", "copy", "fill", "getitem"}
    | {"unbind", "cat", "stack", "split", "chunk", "zeros", "ones", "full", "arange", "empty"}
    | {"new_zeros", "zeros_like", "ones_like", "lift_fresh_copy", "_assert_tensor_metadata"}
)


@dataclass(frozen=True)
class Value:
    """A value of the program, by its number, seen as rows of `shape`."""

    number: int
    shape: Shape


@dataclass(frozen=True)
class Param:
    """A parameter of the module, as it is or transposed."""

    name: str
    shape: Shape
    transposed: bool = False


@dataclass(frozen=True)
class Buffer:
    """A buffer of the module."""

    name: str


@dataclass(frozen=True)
class Opaque:
    """A tensor that no layer can read, and what it is in words."""

    what: str


@dataclass(frozen=True)
class Placed:
    """A layer that reads x: what reading an operation comes to."""

    layer: Layer
    x: Value
    params: tuple[str | None, ...] = ()
    note: str = ""


class Call:
    """One operation with its arguments looked up.

    Args:
        operation: The operation.
        env: What every name stands for so far.
        nodes: The program so far.
        batch_norm: The engine's BatchNorm option.
    """

    def __init__(
        self,
        operation: Operation,
        env: Mapping[str, Any],
        nodes: list[Node],
        batch_norm: str,
    ) -> None:
        self.operation = operation
        self.batch_norm = batch_norm
        self._env = env
        self._nodes = nodes

    def refuse(self, reason: str) -> Unsupported:
        """The refusal of the operation, by name."""
        return self.operation.refuse(f"{self.operation.title} {reason}")

    def get(self, name: str) -> Any:
        """An argument: a `Value`, `Param`, `Buffer`, `Opaque`, a list of them, or a constant."""
        return self._look_up(self.operation.arguments.get(name))

    def _look_up(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self._env[argument.name]
        if isinstance(argument, list):
            return [self._look_up(a) for a in argument]
        return argument

    def value(self, name: str) -> Value:
        """An argument that must be a value of the program."""
        found = self.get(name)
        if not isinstance(found, Value):
            raise self.refuse(
                f"is a layer of the program only on its values, not on {words(found)}"
            )
        return found

    def param(self, name: str) -> Param | None:
        """An argument that must be a parameter of the module, or absent."""
        found = self.get(name)
        if found is not None and not isinstance(found, Param):
            raise self.refuse(f"must take a parameter as {name}, not {words(found)}")
        return found

    def number(self, name: str) -> float:
        """An argument that must be a constant number."""
        found = self.get(name)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self.refuse(f"must take a constant number as {name}, not {words(found)}")
        return float(found)

    def maker(self, value: Value) -> Node | None:
        """The node that made a value, None for the program's input."""
        return self._nodes[value.number - 1] if value.number else None


ReadLayer = Callable[[Call], Placed]
"""How a layer's file reads an operation; it raises `Unsupported` where it cannot."""


def words(found: Any) -> str:
    """What an argument is, for a refusal."""
    if isinstance(found, Value):
        return "a value computed from the input"
    if isinstance(found, Param):
        return f"parameter {found.name!r}" + (" transposed" if found.transposed else "")
    if isinstance(found, Buffer):
        return f"buffer {found.name!r}"
    if isinstance(found, Opaque):
        return found.what
    return repr(found)
