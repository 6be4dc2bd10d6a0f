"""Keeps what was read with the module it was read from, for as long as the module lives."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from fastmeta.program.ir import Program, Unsupported

__all__ = ["clear", "through"]

_KEPT = 32  # keys for one module, two for an answer; the oldest goes first

_reading = threading.RLock()  # torch.export changes what all threads share

_Answer = Program | Unsupported
_answers: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, tuple[Any, _Answer]]] = (
    weakref.WeakKeyDictionary()
)


def through(
    model: nn.Module,
    loss: Callable[..., Any] | None,
    x: Tensor,
    y: Tensor | None,
    batch_norm: str,
    read: Callable[[], Program],
) -> Program:
    """The kept answer for this module and loss, or a new one, which is kept.

    Args:
        model: The module, held weakly.
        loss: The loss, held weakly; a function without closure or defaults is known by its code,
            so that a lambda written in a loop is the same one each time round.
        x: Inputs [S, ...], of which shape, dtype and device count.
        y: Targets [S, ...], or None.
        batch_norm: The BatchNorm option.
        read: Makes the answer.

    Returns:
        The program.

    Raises:
        Unsupported: the kept or new refusal.
    """
    known = _answers.get(model)
    if known is None:
        known = _answers[model] = OrderedDict()
    loss_key, alive = _loss_key(loss)
    like = None if y is None else (y.shape, y.dtype)
    key = (_structure(model), loss_key, batch_norm, x.dtype, x.device, x.shape, like)
    found = known.get(key)
    if found is None or (alive is not None and found[0]() is not alive):
        # The program is the same at any row count: perhaps it was read at another one.
        like = None if y is None else (y.shape[1:], y.dtype)
        any_rows = (*key[:5], x.shape[1:], like, "rows")
        found = known.get(any_rows)
        if found is None or (alive is not None and found[0]() is not alive):
            try:
                with _reading:
                    answer: _Answer = read()
            except Unsupported as error:
                # A new one: this one's traceback holds the frames, and they hold the module.
                answer = Unsupported(error.reason, error.where)
            found = (None if alive is None else weakref.ref(alive), answer)
        for kept in (any_rows, key):
            known[kept] = found
            known.move_to_end(kept)
        while len(known) > _KEPT:
            known.popitem(last=False)
    answer = found[1]
    if isinstance(answer, Unsupported):
        raise Unsupported(answer.reason, answer.where)
    return answer


def clear() -> None:
    """Forget every answer."""
    _answers.clear()


_INTERNAL = frozenset(nn.Module().__dict__)  # what every module has; looked at one by one


def content(value: Any) -> Hashable:
    """What tells one value of an attribute from another.

    Plain values themselves, the content of containers and closures; of all else which object it
    is, and for a tensor its version.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value), value)
    if isinstance(value, (tuple, list, set, frozenset)):
        return (type(value), *(content(entry) for entry in value))
    if isinstance(value, dict):
        return (dict, *((content(key), content(entry)) for key, entry in value.items()))
    if isinstance(value, Tensor):
        return (id(value), value._version)
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        return (value.__code__, *(content(_held(cell)) for cell in cells))
    return id(value)


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _structure(model: nn.Module) -> Hashable:
    """What is cheap to see of a module: its submodules, their mode and hooks, its parameters."""
    seen: list[Any] = [*_global_forward_hooks, None, *_global_forward_pre_hooks]
    stack = [model]
    for module in stack:  # it grows as the submodules come in
        own = module.__dict__  # attribute by attribute this would be the most of a call's cost
        seen.append(id(module))
        seen.append(type(module))
        seen.append(own["training"])
        if len(own) > len(_INTERNAL):
            seen += [(name, content(value)) for name, value in own.items() if name not in _INTERNAL]
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            seen += ("forward", *own["_forward_hooks"], "pre", *own["_forward_pre_hooks"])
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            seen.append("backward")
        if own["_parameters"]:
            seen += own["_parameters"]
            try:
                for p in own["_parameters"].values():
                    seen.append(None if p is None else p.shape)
            except RuntimeError as error:  # a lazy one
                reason = "a lazy parameter is not initialized: run the module once"
                raise Unsupported(reason) from error
            if p is not None:
                seen.append(p.dtype)
        if own["_modules"]:
            stack += [child for child in own["_modules"].values() if child is not None]
    return tuple(seen)


def _loss_key(loss: Callable[..., Any] | None) -> tuple[Hashable, Any]:
    """A key for the loss, and the object that must still live for the key to mean it."""
    if loss is None:
        return None, None
    if isinstance(loss, types.FunctionType):
        if loss.__closure__ is None and not loss.__defaults__ and not loss.__kwdefaults__:
            return (loss.__code__, id(loss.__globals__)), None
        return (id(loss), content(loss)), loss
    if isinstance(loss, types.MethodType):
        return (id(loss.__func__), id(loss.__self__)), loss.__self__
    if isinstance(loss, functools.partial):
        plain = (*loss.args, *loss.keywords.values())
        if all(isinstance(value, (str, int, float, bool, type(None))) for value in plain):
            key, alive = _loss_key(loss.func)
            return ("partial", key, loss.args, tuple(loss.keywords.items())), alive
    if isinstance(loss, nn.Module):
        return (id(loss), _structure(loss)), loss
    return id(loss), loss
