"""What needs one forward pass to be checked: inputs the module takes, labels, what the loss takes.

The pass is made on one task at the first use of a module and a loss with rows of a shape; after
that only the labels are looked at.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, type_error, value_error
from fastmeta.batch import Examples
from fastmeta.inner_loop.learner import Learner, Rows, is_classification, rows_of
from fastmeta.inner_loop.request import Request
from fastmeta.inner_loop.trial import loss_key, quietly

__all__ = ["check_first_use"]

_Known = dict[Any, "tuple[int, ...] | None"]
_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def check_first_use(request: Request) -> None:
    """Check what the module and the loss are given, and integer labels ``[T, S]`` at every call.

    Labels are compared with the classes C of an output ``[S, C]``, on a CPU only: on another
    device that would mean waiting for it. A row of weight zero may carry any label.

    Raises:
        TypeError: labels that are not int64.
        ValueError: inputs the module does not take, labels out of range, or an output and targets
            that the loss does not take.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return  # a transform of torch.func has neither values nor leaves; the next call is checked
    owner = request.model if request.model is not None else request.program
    batch = request.batch
    leaves = pytree.tree_leaves((batch.support.x, batch.support.y))
    key = (
        tuple((leaf.shape[2:], leaf.dtype) for leaf in leaves),
        tuple(request.shape(name) for name in request.params),
        request.batch_norm,
        loss_key(request.loss),
    )
    known = _known.setdefault(owner, {})
    if key in known:
        _check_labels(request, known[key])
        return
    rows, output = _forward(request)
    labels = is_classification(output, rows.y) and _takes_labels(request, rows, output)
    shape = tuple(output.shape[1:]) if labels else None
    _check_labels(request, shape)
    _try_loss(request, rows, output)
    if len(known) > 64:
        known.clear()
    known[key] = shape


def _check_labels(request: Request, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        return
    for side in ("support", "query") if request.op != "adapt" else ("support",):
        examples: Examples = getattr(request.batch, side)
        y = examples.y
        if y.dtype != torch.int64:
            raise type_error(request.op, f"{side}.y", "be int64 where it holds labels", y)
        if y.device.type != "cpu":
            continue
        if examples.weight is not None:
            y = torch.where(examples.weight > 0, y, 0)
        low, high = torch.aminmax(y)
        if int(low) < 0 or int(high) >= shape[0]:
            classes = f"[0, {shape[0]}), the classes of the output (weight 0 masks a row)"
            found = f"values {int(low)} to {int(high)}"
            raise value_error(request.op, f"{side}.y", f"be labels in {classes}", found)


def _takes_labels(request: Request, rows: Rows, output: Tensor) -> bool:
    """Whether integers ``y [S]`` are classes to the loss: then it refuses one past the last.

    Counts and ratings are integers too, and of any value. Asked on the CPU, since elsewhere an
    index out of range may be reported late, and end the process.
    """
    if request.loss is None:
        return True
    try:
        with quietly(request), torch.no_grad():
            output, y, given = pytree.tree_map_only(
                Tensor,
                lambda t: t.detach().cpu(),
                (output, rows.y, dict(request.loss_params or {})),
            )
            request.loss(output, torch.full_like(y, output.shape[1]), **given)
    except Exception:  # whatever a loss raises for a class that is not there
        return True
    return False


def _forward(request: Request) -> tuple[Rows, Any]:
    """The first task's support rows, and the output for them."""
    learner = Learner(request)
    rows = rows_of(request.batch[0].support, drop=True)
    values = {**request.params, **request.frozen}
    params = {n: v[0] if n in request.per_task else v for n, v in values.items()}
    with quietly(request), learner.session(), torch.no_grad():
        try:
            return rows, learner(params, rows.x)
        except (RuntimeError, ValueError, IndexError) as error:
            kind = "the program" if request.model is None else type(request.model).__name__
            must = f"be rows that {kind} takes"
            raise value_error(request.op, "support.x", must, _words(rows.x, error)) from error


def _try_loss(request: Request, rows: Rows, output: Any) -> None:
    if request.loss is None:
        return
    # leaves in the place of all arguments: what else the value is computed from is no argument
    leaf, y, given_params = pytree.tree_map_only(
        Tensor,
        lambda t: t.detach().requires_grad_(t.is_floating_point() or t.is_complex()),
        (output, rows.y, dict(request.loss_params or {})),
    )
    with quietly(request), torch.enable_grad():
        try:
            value = request.loss(leaf, y, **given_params)
        except (RuntimeError, ValueError, IndexError) as error:
            given = f"an output ({_describe(output)}) and targets ({_describe(rows.y)})"
            words = f"{type(error).__name__}: {error}"
            raise value_error(request.op, "loss", f"take {given}", words) from error
    arguments = {id(t) for t in pytree.tree_leaves((leaf, y, given_params))}
    stray = {id(t): t for t in _leaves_of(value) if id(t) not in arguments}
    if stray:
        name = next((name for name, p in _named(request) if id(p) in stray), None)
        first = next(iter(stray.values()))
        found = describe(first) if name is None else f"the model's parameter {name!r}"
        must = (
            "reach tensors that require grad through its arguments alone (loss_params=), since the "
            "inner loop puts adapted parameters in the place of the model's only while it runs"
        )
        raise value_error(request.op, "loss", must, found)


def _named(request: Request) -> list[tuple[str, Tensor]]:
    return [] if request.model is None else list(request.model.named_parameters())


def _leaves_of(value: Any) -> list[Tensor]:
    """The tensors that require grad and that a value was computed from."""
    if not isinstance(value, Tensor) or value.grad_fn is None:
        return []
    found: list[Tensor] = []
    nodes, seen = [value.grad_fn], {value.grad_fn}
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return found


def _words(value: Any, error: Exception) -> str:
    return f"{_describe(value)}: {type(error).__name__}: {error}"


def _describe(value: Any) -> str:
    leaves = pytree.tree_leaves(value)
    return ", ".join(describe(leaf) for leaf in leaves if isinstance(leaf, Tensor)) or "no tensor"
