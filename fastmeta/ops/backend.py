"""Who computes an operation: one setting, read at each call.

``backend=`` at a call wins over the context manager, the context manager over the environment
variable ``FASTMETA_BACKEND``, and that over ``"auto"``. The path (how the inner loop runs) is a
different axis and no concern of this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastmeta._checks import describe, type_error, value_error

__all__ = ["BACKENDS", "backend", "current_backend"]

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")

_forced: ContextVar[str | None] = ContextVar("fastmeta_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every operation inside a ``with`` block.

    Holds for the current thread or asynchronous task; blocks nest, and the innermost wins.

    Args:
        name: "auto", "reference", "cpp", "cuda" or "triton".

    Raises:
        TypeError: ``name`` is no string.
        ValueError: ``name`` is no backend.

    Example:
        >>> with backend("reference"):
        ...     current_backend()
        'reference'
    """
    token = _forced.set(_checked(name, "backend", "name"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """What an enclosing :func:`backend` block forces, or None."""
    return _forced.get()


def current_backend(explicit: str = "auto") -> str:
    """The backend that is asked for here and now.

    Args:
        explicit: the ``backend=`` argument of the call.

    Returns:
        One of :data:`BACKENDS`; "auto" means the fastest that is right.

    Raises:
        ValueError: an unknown name, in the argument or in ``FASTMETA_BACKEND``.
    """
    if explicit != "auto":
        return _checked(explicit, "backend", "backend")
    forced = _forced.get()
    if forced is not None:
        return forced
    name = os.environ.get("FASTMETA_BACKEND")
    return _checked(name, "backend", "FASTMETA_BACKEND") if name else "auto"


def _checked(name: Any, op: str, argument: str) -> str:
    if not isinstance(name, str):
        raise type_error(op, argument, "be a string", describe(name))
    if name not in BACKENDS:
        raise value_error(op, argument, f"be one of {', '.join(BACKENDS)}", repr(name))
    return name
