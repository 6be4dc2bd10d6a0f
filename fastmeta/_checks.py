"""Small checks that word every error the same way.

A message reads ``op: argument must ..., got ...``: what was called, which argument, what it must
be, what it was. Kind and dtype raise ``TypeError``; shape, device and value raise ``ValueError``.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "describe",
    "number",
    "positive_int",
    "same_device",
    "tensor",
    "type_error",
    "value_error",
    "whole_number",
]


def describe(value: Any) -> str:
    """Words for a value in an error message: a tensor by dtype, shape and place, others by kind.

    Example:
        >>> describe(torch.zeros(2, 3))
        'a float32 tensor of shape [2, 3]'
        >>> describe(None), describe(3.5), describe([1, 2])
        ('None', '3.5', 'a list of length 2')
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        article = "an" if dtype.startswith("i") else "a"
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{article} {dtype} tensor of shape {list(value.shape)}{place}"
    if value is None or isinstance(value, (bool, int, float, complex, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, (tuple, list, dict, set)):
        return f"a {type(value).__name__} of length {len(value)}"
    kind = type(value)
    if kind.__module__ in ("builtins", "__main__"):
        return f"an object of type {kind.__qualname__}"
    return f"an object of type {kind.__module__}.{kind.__qualname__}"


def _words(op: str, argument: str, must: str, got: Any) -> str:
    return f"{op}: {argument} must {must}, got {got if isinstance(got, str) else describe(got)}"


def type_error(op: str, argument: str, must: str, got: Any) -> TypeError:
    """The ``TypeError`` for a wrong kind or dtype; ``got`` is a value, or words for it."""
    return TypeError(_words(op, argument, must, got))


def value_error(op: str, argument: str, must: str, got: Any) -> ValueError:
    """The ``ValueError`` for a wrong shape, device or value; ``got`` is a value or words."""
    return ValueError(_words(op, argument, must, got))


def tensor(op: str, argument: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor, else raise ``TypeError``."""
    if not isinstance(value, Tensor):
        raise type_error(op, argument, "be a tensor", describe(value))
    return value


def whole_number(op: str, argument: str, value: Any, *, at_least: int = 0) -> int:
    """Return ``value`` as an int that is at least ``at_least``.

    Whatever has ``__index__`` is a whole number, except bool: ``steps=True`` is a mistake.

    Example:
        >>> whole_number("f", "steps", 3)
        3
        >>> whole_number("f", "steps", -1)
        Traceback (most recent call last):
        ValueError: f: steps must be at least 0, got -1
    """
    if type(value) is not int:
        if isinstance(value, bool):
            raise type_error(op, argument, "be an int", f"the bool {value}")
        try:
            value = operator.index(value)
        except TypeError:
            raise type_error(op, argument, "be an int", describe(value)) from None
    if value < at_least:
        raise value_error(op, argument, f"be at least {at_least}", value)
    return int(value)


def positive_int(op: str, argument: str, value: Any) -> int:
    """Return ``value`` as an int that is at least 1."""
    return whole_number(op, argument, value, at_least=1)


def number(op: str, argument: str, value: Any, *, at_least: float = -math.inf) -> float:
    """Return ``value`` as a finite float that is at least ``at_least``.

    Example:
        >>> number("f", "rate", 1)
        1.0
        >>> number("f", "rate", float("nan"))
        Traceback (most recent call last):
        ValueError: f: rate must be finite, got nan
    """
    if isinstance(value, (bool, str, bytes)):
        raise type_error(op, argument, "be a number", describe(value))
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise type_error(op, argument, "be a number", describe(value)) from None
    if not math.isfinite(result):
        raise value_error(op, argument, "be finite", result)
    if result < at_least:
        raise value_error(op, argument, f"be at least {at_least:g}", result)
    return result


def same_device(op: str, argument: str, value: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``value`` lies on ``device``."""
    if value.device != device:
        raise value_error(op, argument, f"be on {device} like the rest", f"{value.device}")
