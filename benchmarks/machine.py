"""Where a measurement was taken, and the rate its processor could reach."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastmeta import _native


def cpu_model() -> str:
    """The processor's name."""
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def commit() -> str | None:
    """The commit of the sources, with a plus if they differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = ["git", "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(head, cwd=here, capture_output=True, text=True, check=True)
        changed = ["git", "status", "--porcelain", "--untracked-files=no"]
        dirty = subprocess.run(changed, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def describe(versions: dict[str, str | None]) -> dict[str, Any]:
    """Machine, versions and date, for a file of results."""
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": _native.isa() if _native.available() else "no C++ core",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def fma_rate(threads: int, clock: str, seconds: float = 0.02) -> float:
    """Float32 multiply-adds on registers alone, in FLOP/s: the peak that a share refers to."""
    core, isa = _native.require("fma_rate"), _native.isa()
    now = clock_of(clock)

    def burst(iterations: int) -> float:
        return float(core.fma_burst(isa, False, iterations))

    iterations = 100_000
    start = now()
    burst(iterations)
    iterations = max(1, round(iterations * seconds / max(now() - start, 1e-6)))
    if threads == 1:
        start = now()
        return burst(iterations) / float(now() - start)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(burst, [1] * threads))  # so that the threads are there
        start = now()
        done = sum(pool.map(burst, [iterations] * threads))
        return done / float(now() - start)


def clock_of(name: str) -> Any:
    """The clock "cpu" (of this process, all its threads) or "wall"."""
    return time.process_time if name == "cpu" else time.perf_counter


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Processes started in here see as many processors as threads, so that nobody uses more.

    Some libraries have no other way to be told how many threads to make.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
