"""What every test stands on: NaN-filled memory, hypothesis profiles, and visible skips."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable

# cuBLAS reads it when its first handle is made, and is deterministic only with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

from fastmeta import _native

# "ci" draws the same examples every time; "soak" (make soak) draws many, and new ones each run.
hypothesis.settings.register_profile(
    "ci",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
)
hypothesis.settings.register_profile(
    "soak",
    max_examples=2000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# With deterministic algorithms torch fills the memory of torch.empty with NaN (integers with
# their largest value), so that a kernel that leaves an element unwritten is seen.
torch.use_deterministic_algorithms(True)


def _no_data() -> str | None:
    root = os.environ.get("FASTMETA_DATA")
    if not root:
        return "FASTMETA_DATA is not set"
    return None if os.path.isdir(root) else "FASTMETA_DATA names no folder"


def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


# What a test may ask for with @pytest.mark.needs("..."), and why it may be missing. There is no
# other way to skip. FASTMETA_REQUIRE="cpp,data" turns the skips of those into failures, so that
# a machine that should have something cannot lose it unseen.
_NEEDS: dict[str, Callable[[], str | None]] = {
    "cpp": lambda: _native.reason() or None,
    "data": _no_data,
    "gpu": lambda: None if torch.cuda.is_available() else "no CUDA device",
    "triton": _no_triton,
}


def pytest_configure(config: pytest.Config) -> None:
    names = ", ".join(_NEEDS)
    config.addinivalue_line("markers", f"needs(*names): skip, visibly, where missing: {names}")
    config.addinivalue_line(
        "markers",
        "native: runs C++, so it runs again under every FASTMETA_ISA and under the sanitizers; "
        'set by itself on needs("cpp")',
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the one warning of a pure-Python install: shown above
        core = _native.load()
    if core is not None:
        core.set_work_per_thread(1.0)  # tests of many threads have little work for them


def pytest_report_header() -> list[str]:
    return [
        f"fastmeta: C++ core {_native.reason() or 'loaded'}; "
        f"FASTMETA_ISA={os.environ.get('FASTMETA_ISA', '')} torch {torch.__version__}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any("cpp" in mark.args for mark in item.iter_markers("needs")):
            item.add_marker("native")


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("FASTMETA_REQUIRE", "").split(",")
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            why = _NEEDS[name]()
            if why is None:
                continue
            if name in required:
                pytest.fail(f"FASTMETA_REQUIRE names {name}, but: {why}", pytrace=False)
            pytest.skip(f"needs {name}: {why}")
