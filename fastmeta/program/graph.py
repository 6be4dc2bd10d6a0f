"""A module and its loss as a plain list of ATen operations, by torch.export.

Nothing here knows about layers. The module and the loss are exported together, at a row count
that no other dimension has, so that the row axis can be told from the rest by its size.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmeta.program.ir import Shape, Unsupported

__all__ = ["Graph", "Operation", "Ref", "export"]


# What torch.export calls a region of code, and what its author wrote.
_REGIONS = {
    "torch.wrap_with_set_grad_enabled": "torch.no_grad",
    "torch.wrap_with_autocast": "torch.autocast",
}


@dataclass(frozen=True)
class Ref:
    """The result of the operation, or the input, of this name."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One ATen operation.

    Args:
        name: What `Ref` calls its result.
        op: Its name, such as "linear" or "relu_"; with its namespace unless that is ATen.
        overload: Its overload, such as "default".
        arguments: By the schema's names, defaults filled in, `Ref` for results.
        shape: The shape of the result, where it is one tensor.
        dtype: Its dtype.
        mutates: Whether the operation changes its first argument.
        part: Whether the model or the loss runs it.
        path: The path of the submodule that runs it.
    """

    name: str
    op: str
    overload: str
    arguments: Mapping[str, Any]
    shape: Shape
    dtype: torch.dtype | None
    mutates: bool
    part: Literal["model", "loss"]
    path: str

    @property
    def title(self) -> str:
        """The name as a person knows it: "aten.linear", "torch.no_grad"."""
        if self.op in _REGIONS:
            return _REGIONS[self.op]
        return self.op if "." in self.op else f"aten.{self.op}"

    @property
    def where(self) -> str:
        """The place as a person knows it: "module '0'", "the module", "the loss"."""
        if self.part == "loss":
            return "the loss"
        return f"module {self.path!r}" if self.path else "the module"

    def refuse(self, reason: str) -> Unsupported:
        """The refusal of this operation for a reason."""
        return Unsupported(reason, self.where)


@dataclass(frozen=True)
class Graph:
    """What `export` returns.

    Args:
        operations: In the order they run, the model's before the loss's.
        params: Input name to the model's parameter name.
        buffers: Input name to buffer name, of the model.
        others: Input name to what it is in words: constants, the loss's own tensors.
        x: The name of the input.
        y: The name of the target, if there is a loss.
        output: The model's output; None if the output or the loss is no single tensor.
        loss: The loss, or None.
        rows: The row count it was exported at; no other dimension has this size.
        shapes: The shape of every result.
        dtypes: The dtype of every result.
        trouble: What stands in the way besides operations, and where.
    """

    operations: tuple[Operation, ...]
    params: Mapping[str, str]
    buffers: Mapping[str, str]
    others: Mapping[str, str]
    x: str
    y: str | None
    output: Ref | None
    loss: Ref | None
    rows: int
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    trouble: tuple[str, str] | None = None


def export(model: nn.Module, loss: Callable[..., Any] | None, x: Tensor, y: Tensor | None) -> Graph:
    """Export a module and its loss together, in the mode the module is in.

    Args:
        model: The module, called with x alone.
        loss: Called with the output and y, or None.
        x: Inputs [S, ...]; only shape, dtype and device are used.
        y: Targets [S, ...], or None without a loss.

    Returns:
        The operations, in order.

    Raises:
        Unsupported: torch.export cannot trace the module or the loss.
    """
    from torch.export.graph_signature import InputKind

    rows = _free_row_count(model, x, y)
    report = _Report()
    both = _Both(model, loss, report)
    inputs = [x.new_zeros((rows, *x.shape[1:]))]
    if loss is not None and y is not None:
        inputs.append(y.new_zeros((rows, *y.shape[1:])))
    # The mode must be the plain one: no_grad or autocast around the call would be in the graph.
    with _quiet(), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        try:
            program = torch.export.export(both, tuple(inputs), strict=False)
        except _Stopped as stop:
            raise _explain(stop.__cause__ or stop, stop.part) from stop.__cause__
        except Exception as error:
            raise _explain(error, "model") from error

    params: dict[str, str] = {}
    buffers: dict[str, str] = {}
    others: dict[str, str] = {}
    users: list[str] = []
    for spec in program.graph_signature.input_specs:
        name, target = getattr(spec.arg, "name", ""), spec.target or ""
        part, _, path = target.partition(".")
        if spec.kind is InputKind.USER_INPUT:
            users.append(name)
        elif spec.kind is InputKind.PARAMETER and part == "model":
            params[name] = path
        elif spec.kind is InputKind.BUFFER and part == "model":
            buffers[name] = path
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            others[name] = f"{spec.kind.name.lower()} {path!r} of the loss"
        else:
            others[name] = "a tensor that is neither a parameter nor an argument"

    operations = []
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, torch.dtype] = {}
    results: Any = None
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shapes[node.name] = tuple(int(n) for n in value.shape)
            dtypes[node.name] = value.dtype
        if node.op == "call_function":
            operations.append(_operation(node))
        elif node.op == "output":
            results = _refs(node.args[0])
    expected = 1 if loss is None else 2
    if len(results) != expected or not all(isinstance(ref, Ref) for ref in results):
        results = None
    trouble = None
    if report.returned:
        trouble = report.trouble()
    elif results is None:
        trouble = ("it must return one tensor", "the loss")
    return Graph(
        operations=tuple(operations),
        params=params,
        buffers=buffers,
        others=others,
        x=users[0],
        y=users[1] if len(users) > 1 else None,
        output=_before_loss(results[0], operations) if results else None,
        loss=results[1] if results and loss is not None else None,
        rows=rows,
        shapes=shapes,
        dtypes=dtypes,
        trouble=trouble,
    )


class _Report:
    """What the traced module tells; torch.export undoes what is set on the module itself."""

    returned = ""  # the type of what the module returned, if it is no tensor

    def trouble(self) -> tuple[str, str]:
        return f"it returns a {self.returned} where a program has one tensor", "the module"


class _Both(nn.Module):
    """The module and the loss as one module; where the trace stops is told by `_Stopped`."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any] | None, report: _Report) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.report = report

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        with _stop("model"):
            output = self.model(x)
        if not isinstance(output, Tensor):
            self.report.returned = type(output).__name__
        if self.loss is None:
            return (output,)
        with _stop("loss"):
            return output, self.loss(output, y)


class _Stopped(Exception):  # noqa: N818 - it never leaves this file
    """An exception inside the traced code, kept from torch.export's printing of the graph."""

    def __init__(self, part: Literal["model", "loss"]) -> None:
        super().__init__(part)
        self.part = part

    # torch.export prints this attribute of any exception to stderr.
    partial_fx_graph = property(lambda self: self._absent(), lambda self, value: None)

    def _absent(self) -> None:
        raise AttributeError("partial_fx_graph")


@contextlib.contextmanager
def _stop(part: Literal["model", "loss"]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Stopped(part) from error


def _explain(error: BaseException, part: Literal["model", "loss"]) -> Unsupported:
    where = "the module" if part == "model" else "the loss"
    kind = type(error).__name__
    if kind == "GuardOnDataDependentSymNode":
        return Unsupported("control flow that depends on the data cannot be traced", where)
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return Unsupported(f"torch.export cannot trace it: {kind}: {first}", where)


def _free_row_count(model: nn.Module, x: Tensor, y: Tensor | None) -> int:
    """A prime that is no dimension of any tensor at hand."""
    taken = {*x.shape[1:], *(y.shape[1:] if y is not None else ())}
    for p in (*model.parameters(), *model.buffers()):
        taken.update(p.shape)
    candidate = 5
    while candidate in taken or any(candidate % d == 0 for d in range(2, candidate)):
        candidate += 2
    return candidate


def _operation(node: torch.fx.Node) -> Operation:
    target = node.target
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    path = path.split("@")[0]  # "0@1" is the second call of module "0"
    part: Literal["model", "loss"] = "loss"
    if path == "model" or path.startswith("model."):
        part, path = "model", path[len("model.") :]
    overload, mutates = "", False
    arguments: dict[str, Any]
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        namespace, _, op = schema.name.partition("::")
        op = op if namespace == "aten" else f"{namespace}.{op}"
        overload, mutates = schema.overload_name or "default", schema.is_mutable
        arguments = {}
        for i, argument in enumerate(schema.arguments):
            if i < len(node.args):
                arguments[argument.name] = _refs(node.args[i])
            elif argument.name in node.kwargs:
                arguments[argument.name] = _refs(node.kwargs[argument.name])
            elif argument.has_default_value():
                arguments[argument.name] = argument.default_value
    elif target is operator.getitem:
        op, arguments = "getitem", {"self": _refs(node.args[0]), "index": node.args[1]}
    else:
        op, arguments = f"torch.{getattr(target, '__name__', target)}", {}
    value = node.meta.get("val")
    return Operation(
        name=node.name,
        op=op,
        overload=overload,
        arguments=arguments,
        shape=tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else (),
        dtype=value.dtype if isinstance(value, Tensor) else None,
        mutates=mutates,
        part=part,
        path=path,
    )


def _before_loss(output: Ref, operations: list[Operation]) -> Ref:
    """The model's output as the model made it.

    Where the loss begins with an operation that hands the output on unchanged, such as the
    broadcast inside `mse_loss`, torch.export takes the result of that for the output.
    """
    by_name = {operation.name: operation for operation in operations}
    operation = by_name.get(output.name)
    while operation is not None and operation.part == "loss":
        source = operation.arguments.get("self")
        if operation.op == "getitem" and isinstance(source, Ref):
            listed = by_name[source.name].arguments.get("tensors", ())
            source = listed[operation.arguments["index"]] if listed else None
        if not isinstance(source, Ref):
            raise operation.refuse(f"{operation.title} makes the output, not the module")
        output, operation = source, by_name.get(source.name)
    return output


def _refs(argument: Any) -> Any:
    if isinstance(argument, torch.fx.Node):
        return Ref(argument.name)
    if isinstance(argument, (list, tuple)):
        return [_refs(a) for a in argument]
    return argument


class _Chatter(logging.Filter):
    """Keeps what torch.export says about code it cannot trace out of the log: we say it better."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(
            ("Unable to find user code corresponding to", "pytree.tree_leaves_with_path failed")
        )


@functools.cache
def _chatter() -> _Chatter:
    return _Chatter()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the known messages of torch.export, and nothing else."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    logger.addFilter(_chatter())
    try:
        with warnings.catch_warnings():
            # A recurrent layer assigns its list of weights; it is refused by name later.
            warnings.filterwarnings("ignore", message=r"[\s\S]*assigned during export")
            # So is a target that broadcasts; here it would be told of a row count of ours.
            warnings.filterwarnings("ignore", message=r"Using a target size")
            yield
    finally:
        logger.removeFilter(_chatter())
