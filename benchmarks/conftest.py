"""Options of a run, and the table at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conductor import WorkerProcess
from benchmarks.report import markdown
from benchmarks.workloads import NOT_YET

RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmeta benchmarks")
    group.addoption("--results", metavar="FILE.json", help="write the results there")
    group.addoption("--rounds", type=int, default=9, help="interleaved rounds (goals need 7)")
    group.addoption(
        "--clock",
        choices=("auto", "cpu", "wall"),
        default="auto",
        help="cpu is this process's time, right for one thread on a busy machine; "
        "auto is cpu for one thread and wall for more",
    )
    group.addoption("--no-memory", action="store_true", help="do not measure extra memory")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {
        "smoke": bool(config.getoption("benchmark_disable", False)),
        "workloads": [],
        "overhead": [],
        "not_yet": NOT_YET,
    }


def pytest_benchmark_group_stats() -> list[Any]:
    """No table of rounds: a round is every candidate, and the table of candidates is ours."""
    return []


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> dict[str, Any]:
    return pytestconfig.stash[RESULTS]


@pytest.fixture(scope="session")
def smoke_worker(results: dict[str, Any]) -> Iterator[WorkerProcess | None]:
    """A smoke run times nothing, so that its workloads may share one process and one thread."""
    if results["smoke"]:
        with WorkerProcess(threads=1) as worker:
            yield worker
    else:
        yield None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results["workloads"]:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(markdown(results))
    path = config.getoption("results")
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(results, indent=1) + "\n")
        target.with_suffix(".md").write_text(markdown(results))
        terminalreporter.write_line(f"written: {target} and {target.with_suffix('.md')}")
