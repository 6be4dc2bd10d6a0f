"""What a run was made with, so that a resumed run is the same run or none."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta import _native
from fastmeta._checks import describe, value_error
from fastmeta._version import __version__
from fastmeta.algorithms import Algorithm

_LONGEST = 16  # a list that is longer is data, such as the names of classes


def fingerprint(
    algorithm: Algorithm,
    source: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Every setting that decides the numbers of a run, as plain JSON values by dotted name."""
    settings: dict[str, Any] = dict(algorithm.settings())
    settings["optimizer"] = type(optimizer).__name__
    settings |= {f"optimizer.{name}": value for name, value in optimizer.defaults.items()}
    settings["scheduler"] = None if scheduler is None else type(scheduler).__name__
    settings |= {f"source.{name}": value for name, value in _source_settings(source).items()}
    settings |= more
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=_plain, allow_nan=True))
    return plain


def check_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings than it was started with.

    Args:
        stored: the fingerprint in the checkpoint.
        now: the fingerprint of this call.

    Raises:
        ValueError: naming each setting that differs, its value now and its value then.

    Example:
        >>> check_settings({"meta_batch": 25}, {"meta_batch": 32})
        Traceback (most recent call last):
        ValueError: train: the settings must be those of the checkpoint when resuming, got \
meta_batch=32 (was 25)
    """
    missing = object()
    changed = [
        f"{name}={_show(now.get(name, missing), missing)} "
        f"(was {_show(stored.get(name, missing), missing)})"
        for name in sorted({*stored, *now})
        if stored.get(name, missing) != now.get(name, missing)
    ]
    if changed:
        must = "be those of the checkpoint when resuming"
        raise value_error("train", "the settings", must, ", ".join(changed))


def check_model(stored: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model, naming the first tensor that does not fit.

    Args:
        stored: the ``state_dict`` in the checkpoint.
        now: the ``state_dict`` of the algorithm at hand.

    Raises:
        ValueError: a tensor is missing, or of another shape or dtype.
    """
    for name in sorted({*stored, *now}):
        ours, theirs = (_kind(tensors.get(name)) for tensors in (now, stored))
        if ours != theirs:
            must = f"be of this model, in which {name!r} is {ours}"
            raise value_error("train", "the checkpoint", must, theirs)


def environment() -> dict[str, Any]:
    """The machine and the versions of everything that decides numbers and times."""
    import numpy

    return {
        "fastmeta": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "core": f"C++, {_native.isa()}" if _native.available() else f"none: {_native.reason()}",
        "gpu": torch.cuda.get_device_name() if _uses_cuda() else None,
    }


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _source_settings(source: Any) -> dict[str, Any]:
    """A task source by its kind and its public attributes, as far as they are plain values."""
    values = {
        name: value
        for name, value in vars(source).items()
        if not name.startswith("_") and name != "device" and _is_plain(value)
    }
    return {"kind": type(source).__name__, **values}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= _LONGEST and all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | torch.dtype | Tensor | None)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return describe(value) if value.ndim else value.item()
    return str(value)


def _show(value: Any, missing: object) -> str:
    text = "absent" if value is missing else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Tensor | None) -> str:
    return "absent" if value is None else describe(value)
