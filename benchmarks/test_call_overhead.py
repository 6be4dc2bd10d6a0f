"""What the direct call costs over its kernel."""

from __future__ import annotations

import os
from statistics import median
from typing import Any

import pytest

from benchmarks.conductor import WorkerProcess, spread
from fastmeta import _native

GOAL = 5.0  # microseconds
WORKLOAD = "sinusoid-I1-T25"
TASKS = (1, 25)


@pytest.fixture(autouse=True)
def _core() -> None:
    """What ``@pytest.mark.needs("cpp")`` does in tests/, whose conftest does not reach here."""
    why = _native.reason()
    if why and "cpp" in os.environ.get("FASTMETA_REQUIRE", "").split(","):
        pytest.fail(f"FASTMETA_REQUIRE names cpp, but: {why}", pytrace=False)
    if why:
        pytest.skip(f"needs cpp: {why}")


def test_call_overhead(benchmark: Any, results: dict[str, Any], pytestconfig: Any) -> None:
    smoke: bool = results["smoke"]
    rounds: list[dict[int, dict[str, float]]] = []
    with WorkerProcess(1) as worker:

        def one_round() -> None:
            calls = 1 if smoke else 500
            rounds.append(
                {
                    tasks: worker.do("overhead", workload=WORKLOAD, tasks=tasks, calls=calls)
                    for tasks in TASKS
                }
            )

        benchmark.pedantic(one_round, rounds=pytestconfig.getoption("rounds"), iterations=1)
    for tasks in TASKS:
        found = [each[tasks] for each in rounds]
        kernel = median(each["kernel"] for each in found)
        row: dict[str, Any] = {"tasks": tasks, "kernel_us": 1e6 * kernel, "goal_us": GOAL}
        row["met"] = {}
        for what in ("call", "call_and_read"):
            row[what] = spread([1e6 * (each[what] - each["kernel"]) for each in found])
            # A time is a result, not a failure: the table says "NOT MET". A smoke run has no time.
            row["met"][what] = None if smoke else row[what]["upper"] < GOAL
        results["overhead"].append(row)
    benchmark.extra_info["overhead"] = results["overhead"]
    assert all(row["kernel_us"] > 0 for row in results["overhead"])


@pytest.mark.parametrize("tasks", TASKS)
def test_bare_call_is_the_call(tasks: int) -> None:
    """The kernel that the overhead is counted from writes what ``meta_grad`` returns."""
    with WorkerProcess(1) as worker:
        assert worker.do("bare_is_right", workload=WORKLOAD, tasks=tasks)
