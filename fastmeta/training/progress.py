"""A progress line for people, plain lines for files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """One line that is redrawn on a terminal; elsewhere a plain line now and then.

    Args:
        total: iterations of the whole run.
        done: iterations that a resumed run already has.
        stream: where to write; standard error when None.
        every: seconds between two lines (a terminal is redrawn ten times a second).
        enabled: write nothing when False.
        clock: the time in seconds.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        stream: TextIO | None = None,
        every: float = 10.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._first = done
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else every
        self._enabled = enabled
        self._clock = clock
        self._start = self._last = clock()
        self._width = 0

    def due(self) -> bool:
        """Whether it is time for a new line; cheap, so that a loop may ask every step."""
        return self._enabled and self._clock() - self._last >= self._every

    def show(self, step: int, tasks_per_second: float, **values: float) -> None:
        """Write where the run stands.

        Args:
            step: completed iterations.
            tasks_per_second: speed.
            values: what else to show, by name.
        """
        if not self._enabled:
            return
        self._last = self._clock()
        rate = (step - self._first) / max(self._last - self._start, 1e-9)
        left = _duration((self._total - step) / rate) if rate > 0 else "?"
        text = f"step {step}/{self._total}"
        if self._terminal:
            filled = 24 * step // max(self._total, 1)
            text = f"[{'#' * filled}{'.' * (24 - filled)}] {text}"
        for name, value in values.items():
            text += f"  {name} {value:.4g}"
        text += f"  {tasks_per_second:,.0f} tasks/s  {left} left"
        if self._terminal:
            padding = " " * max(self._width - len(text), 0)
            self._width = len(text)
            self._stream.write(f"\r{text}{padding}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, message: str) -> None:
        """Write a line of its own, without breaking the one that is redrawn."""
        if not self._enabled:
            return
        self.close()
        self._stream.write(message + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that was being redrawn."""
        if self._enabled and self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
