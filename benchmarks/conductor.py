"""Starts workers, and makes a record of what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType
from typing import Any

from benchmarks import machine
from benchmarks.candidates import CANDIDATES
from benchmarks.workloads import Goal, Workload, tolerance

Record = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker ended or raised; the text is its own."""


class WorkerProcess:
    """A worker with a thread count and as many processors, from its start to its end."""

    def __init__(self, threads: int) -> None:
        root = str(Path(__file__).parent.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "JAX_PLATFORMS": "cpu",
        }
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        with machine.pinned(threads):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                text=True,
            )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def do(self, what: str, **arguments: Any) -> Any:
        """One command and its answer."""
        send, receive = self._process.stdin, self._process.stdout
        if send is None or receive is None:
            raise WorkerError("the worker has no pipes")
        send.write(json.dumps({"do": what, **arguments}) + "\n")
        send.flush()
        line = receive.readline()
        if not line:
            self._errors.seek(0)
            raise WorkerError(f"the worker ended at {what!r}:\n{self._errors.read()[-4000:]}")
        found = json.loads(line)
        if "error" in found:
            raise WorkerError(found["error"])
        return found["answer"]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "lower": values[0], "upper": values[0]}
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": lower, "upper": upper}


def record_of(
    workload: Workload,
    clock: str,
    statuses: Record,
    rounds: Sequence[Record],
    tasks: int | None = None,
) -> Record:
    """Everything known about a workload after its rounds; ratios are to the fused path.

    A ratio is taken within each round, so that what slows the machine for a while slows both.
    """
    seconds = {key: [each["seconds"][key] for each in rounds] for key in rounds[0]["seconds"]}
    peaks = [each["peak"] for each in rounds if each["peak"] is not None]
    peak = median(peaks) if peaks else None
    operations = workload.flops * workload.tasks
    candidates = {key: dict(status) for key, status in statuses.items()}
    for key, values in seconds.items():
        row = candidates[key]
        row["seconds"] = spread(values)
        if peak is not None:
            row["of_peak"] = spread([operations / value / peak for value in values])
        if key != "fused" and "fused" in seconds:
            pairs = zip(values, seconds["fused"], strict=True)
            row["ratio"] = spread([other / fused for other, fused in pairs])
    return {
        "workload": workload.id,
        "title": workload.title,
        "clock": clock,
        "rounds": len(rounds),
        "gflop": operations / 1e9,
        "peak_gflops": None if peak is None else peak / 1e9,
        "tolerance": tolerance(tasks or workload.tasks),
        "candidates": candidates,
    }


def measure_memory(workload: Workload, record: Record, tasks: int | None = None) -> None:
    """Add the extra memory of each candidate that was right, each in a process of its own."""
    for key, row in record["candidates"].items():
        in_call = key == "compile"  # its compiler runs within the call, and would be measured
        if key in CANDIDATES and row["status"] == "ok" and not in_call:
            with WorkerProcess(workload.threads) as worker:
                row["memory"] = worker.do(
                    "memory", workload=workload.id, candidate=key, tasks=tasks
                )


def judged(workload: Workload, record: Record) -> list[Record]:
    """Each goal with what was measured, and whether it is met: True, False, or None."""
    return [_judge(goal, record["candidates"], record["rounds"]) for goal in workload.goals]


ENOUGH_ROUNDS = 7


def _judge(goal: Goal, rows: Record, rounds: int) -> Record:
    fused, other = rows["fused"], rows.get(goal.against, {})
    made: Record = {"against": goal.against, "goal": goal.least, "stretch": goal.stretch}
    if fused["status"] != "ok":
        return {**made, "measured": None, "met": None, "why": f"fused: {fused['status']}"}
    if goal.against == "memory":
        used, bound = fused.get("memory", {}).get("bytes"), fused.get("memory", {}).get("bound")
        if used is None:
            return {**made, "measured": None, "met": None, "why": "not measured"}
        return {**made, "goal": bound, "measured": used, "met": used <= bound}
    if goal.against == "peak":
        found = fused.get("of_peak")
    else:
        found = rows.get("one_thread" if goal.against == "threads" else goal.against, {}).get(
            "ratio"
        )
    if found is None:
        why = other.get("why") or other.get("status") or "not measured"
        return {**made, "measured": None, "met": None, "why": why}
    measured: Record = {**made, "measured": found["lower"], "median": found["median"]}
    if rounds < ENOUGH_ROUNDS:
        return {**measured, "met": None, "why": f"fewer than {ENOUGH_ROUNDS} rounds"}
    measured["met"] = goal.least is not None and found["lower"] > goal.least
    measured["stretch_met"] = goal.stretch is not None and found["lower"] > goal.stretch
    return measured
