"""One exact second-order meta-gradient: everyone's number first, then everyone's time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.candidates import MUST_BE_RIGHT
from benchmarks.conductor import WorkerProcess, judged, measure_memory, record_of
from benchmarks.workloads import SMOKE_TASKS, WORKLOADS, Workload


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_meta_grad(
    workload: Workload,
    benchmark: Any,
    results: dict[str, Any],
    smoke_worker: WorkerProcess,
    pytestconfig: pytest.Config,
) -> None:
    if results["smoke"]:
        _measure(workload, benchmark, results, smoke_worker, pytestconfig)
    else:
        with WorkerProcess(workload.threads) as worker:
            _measure(workload, benchmark, results, worker, pytestconfig)


def _measure(
    workload: Workload,
    benchmark: Any,
    results: dict[str, Any],
    worker: WorkerProcess,
    config: pytest.Config,
) -> None:
    smoke: bool = results["smoke"]
    if "machine" not in results:
        results["machine"] = worker.do("versions")
    clock = config.getoption("clock")
    if clock == "auto":
        clock = "cpu" if workload.threads == 1 else "wall"
    statuses = worker.do("load", workload=workload.id, clock=clock, smoke=smoke)
    rounds: list[dict[str, Any]] = []
    benchmark.pedantic(
        lambda: rounds.append(worker.do("round")),
        rounds=config.getoption("rounds"),
        iterations=1,
    )
    record = record_of(workload, clock, statuses, rounds, SMOKE_TASKS if smoke else None)
    if workload.memory and not smoke and not config.getoption("no_memory"):
        measure_memory(workload, record)
    record["goals"] = judged(workload, record)
    results["workloads"].append(record)
    benchmark.extra_info.update(record)
    wrong = {
        key: record["candidates"][key]
        for key in MUST_BE_RIGHT
        if record["candidates"][key]["status"] in ("red", "failed")
    }
    assert not wrong
