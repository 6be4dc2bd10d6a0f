"""The door to the C++ core, ``fastmeta._core``: loaded lazily, and honest when it is absent.

A pure-Python install has no core. Everything then runs on the slower paths, which give the
same numbers; one warning says so at the first use, and ``fastmeta doctor`` says why.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

_HINT = "install a C++17 compiler and reinstall fastmeta; `fastmeta doctor` shows what was found"


@functools.cache
def _import_core() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and the reason why there is none."""
    try:
        core = importlib.import_module("fastmeta._core")
    except ModuleNotFoundError as error:
        if error.name != "fastmeta._core":
            raise
        return None, "fastmeta was installed without its C++ extension"
    except ImportError as error:
        return None, f"the C++ extension is installed but does not load: {error}"
    return core, ""


@functools.cache
def _warn_once(reason: str) -> None:
    message = f"{reason}; slower paths with the same results are used. To change it: {_HINT}"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def available() -> bool:
    """Whether the C++ extension is installed and loads. Never warns."""
    return _import_core()[0] is not None


def reason() -> str:
    """Why the C++ extension is not available; the empty string when it is."""
    return _import_core()[1]


def load() -> ModuleType | None:
    """The C++ extension, or None.

    Returns:
        The module ``fastmeta._core``; None when it is missing or does not load, which warns
        once in the life of the process.

    Example:
        >>> from fastmeta import _native
        >>> (_native.load() is None) == bool(_native.reason())
        True
    """
    core, why = _import_core()
    if core is None:
        _warn_once(why)
    return core


def isa() -> str:
    """The instruction set that the C++ extension is to run: FASTMETA_ISA, or the best there is.

    Raises:
        RuntimeError: the extension is missing or does not load.
        ValueError: FASTMETA_ISA names what this processor does not run.
    """
    runs: list[str] = require("isa").isas()
    forced = os.environ.get("FASTMETA_ISA")
    if forced and forced not in runs:
        raise ValueError(f"isa: FASTMETA_ISA must be one of {', '.join(runs)}, got {forced!r}")
    return forced or runs[-1]


def require(op: str) -> ModuleType:
    """The C++ extension, for a caller that cannot do without it.

    Args:
        op: who asks, as the error shall name it.

    Returns:
        The module ``fastmeta._core``.

    Raises:
        RuntimeError: the extension is missing or does not load.
    """
    core, why = _import_core()
    if core is None:
        raise RuntimeError(f"{op}: backend 'cpp' must be available, got: {why}; {_HINT}")
    return core
