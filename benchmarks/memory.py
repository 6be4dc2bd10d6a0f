"""How much the resident memory of a process grows while a call runs."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(call: Callable[[], Any]) -> int | None:
    """Bytes by which the peak exceeds what was resident before; None where it cannot be seen.

    Linux keeps the peak, and writing 5 to ``clear_refs`` resets it. The kernel's counters are
    exact to about a quarter of a MiB.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the kernel does not report {name}")
    return 1024 * int(found.group(1))
