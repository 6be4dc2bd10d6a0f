"""Metrics as JSON lines: one line a logged step, each step once, whatever happened between."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmeta._checks import positive_int
from fastmeta.training.checkpoint import sync_folder


class MetricsFile:
    """A file with one JSON object a line, in order of ``"step"``.

    Opening it drops every line after ``after``: a run that died at step 950 and resumes from its
    checkpoint at 900 will write 901 to 950 again, and the file has each step once. A last line
    that was cut short is dropped with them.

    Args:
        path: the file; made when missing.
        after: the last step to keep; 0 starts the file anew.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "metrics.jsonl"
        ...     with MetricsFile(path) as metrics:
        ...         metrics.write(1, {"loss": 0.5})
        ...         metrics.write(2, {"loss": 0.25})
        ...     with MetricsFile(path, after=1) as metrics:
        ...         metrics.write(2, {"loss": 0.26})
        ...     [line["loss"] for line in read_metrics(path)]
        [0.5, 0.26]
    """

    def __init__(self, path: str | os.PathLike[str], after: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= after]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(map(_dump, kept)), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the line of one step; it reaches the operating system before this returns."""
        self._file.write(_dump({"step": step, **values}))
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk; before a checkpoint, so that no step is lost between the two."""
        os.fsync(self._file.fileno())
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Close the file; more calls do nothing."""
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, up to the first that was cut short; none if it is missing."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            return
        yield value


def thin(lines: list[dict[str, Any]], at_most: int = 200) -> list[dict[str, Any]]:
    """Evenly spaced lines, the last among them; those with a validation always stay.

    Args:
        lines: what :func:`read_metrics` gave.
        at_most: how many lines besides those with a validation, at least 1.

    Example:
        >>> [line["step"] for line in thin([{"step": n} for n in range(1, 11)], at_most=3)]
        [4, 8, 10]
    """
    stride = -(-len(lines) // positive_int("thin", "at_most", at_most))
    last = len(lines)
    return [
        line
        for number, line in enumerate(lines, start=1)
        if number % stride == 0 or number == last or "validation" in line
    ]


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(_plain(values), separators=(",", ":"), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has neither infinity nor NaN: None stands for both."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
