"""A process of its own for a workload: its thread count, its processors, its candidates.

``python -m benchmarks.worker THREADS`` reads one JSON object a line, ``{"do": ..., ...}``, and
answers each with one. The benchmarks' conductor is ``benchmarks.conductor``.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import kernel, machine, memory
from benchmarks.candidates import CANDIDATES, OURS, Prepared, distance, exact
from benchmarks.workloads import SMOKE_STEPS, SMOKE_TASKS, WORKLOADS, Problem, tolerance
from fastmeta import _native

TURN = 0.03  # seconds that a candidate's turn in a round should last


class Worker:
    """What the process holds between commands."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.clock = "wall"
        self.turns: dict[str, tuple[Callable[[], Any], int]] = {}
        self.rounds = 0

    def versions(self) -> dict[str, Any]:
        """The machine, and the version of every candidate's package."""
        found = {c.package: c.version() for c in CANDIDATES.values()}
        return machine.describe(dict(sorted(found.items())))

    def load(self, workload: str, clock: str, smoke: bool) -> dict[str, Any]:
        """Prepare every candidate, and compare its gradient with float64.

        A smoke run takes a few tasks and steps, and leaves out what compiles for long.
        """
        torch._dynamo.reset()
        self.turns, self.rounds, self.clock = {}, 0, clock
        what = WORKLOADS[workload]
        few = (SMOKE_TASKS, min(SMOKE_STEPS, what.steps))
        problem = what.problem(*few) if smoke else what.problem()
        truth = exact(problem)
        left_out, statuses = dict(what.left_out), {}
        for key, candidate in CANDIDATES.items():
            status: dict[str, Any] = {"title": candidate.title, "status": "ok"}
            statuses[key] = status
            if candidate.version() is None:
                status.update(status="not installed")
            elif key in left_out:
                status.update(status="left out", why=left_out[key])
            elif candidate.compiles and smoke:
                status.update(status="left out", why="compilers are left out of smoke runs")
            else:
                self._prepare(key, problem, truth, status, smoke)
        self._add_one_thread(statuses, smoke)
        return statuses

    def _prepare(
        self,
        key: str,
        problem: Problem,
        truth: Any,
        status: dict[str, Any],
        smoke: bool,
    ) -> None:
        start = time.perf_counter()
        try:
            prepared = CANDIDATES[key].prepare(problem)
            result = prepared.call()
            status["first_call"] = time.perf_counter() - start
            status["error"] = distance(prepared.read(result), truth)
        except Exception as error:  # whatever a peer raises is its result here
            refusal = key in OURS and isinstance(error, ValueError)
            text = str(error).partition("\n")[0] or type(error).__name__
            text = text.rpartition(" got ")[2] if refusal else text
            status.update(status="refused" if refusal else "failed", why=text)
            return
        del result
        if not status["error"] <= tolerance(len(problem.batch[0])):
            status["status"] = "red"
            return
        self._add_turn(key, prepared.call, smoke)

    def _add_turn(self, key: str, call: Callable[[], Any], smoke: bool) -> None:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        self.turns[key] = (call, 1 if smoke else max(1, math.ceil(TURN / max(took, 1e-7))))

    def _add_one_thread(self, statuses: dict[str, Any], smoke: bool) -> None:
        """The fused path on one of the threads, for what the others are worth."""
        if self.threads == 1 or "fused" not in self.turns:
            return
        call, _ = self.turns["fused"]

        def alone() -> None:
            torch.set_num_threads(1)
            try:
                call()
            finally:
                torch.set_num_threads(self.threads)

        statuses["one_thread"] = {"title": "fastmeta, fused, 1 thread", "status": "ok"}
        self._add_turn("one_thread", alone, smoke)

    def round(self) -> dict[str, Any]:
        """Each candidate once, in an order that moves on by one every round; seconds a call."""
        keys, seconds = list(self.turns), {}
        now = machine.clock_of(self.clock)
        first = self.rounds % max(1, len(keys))
        self.rounds += 1
        for key in keys[first:] + keys[:first]:
            call, repeats = self.turns[key]
            gc.collect()
            start = now()
            for _ in range(repeats):
                call()
            seconds[key] = (now() - start) / repeats
        peak = machine.fma_rate(self.threads, self.clock) if _native.available() else None
        return {"seconds": seconds, "peak": peak}

    def memory(self, workload: str, candidate: str, tasks: int | None) -> dict[str, Any]:
        """Peak growth of this fresh process during the first call at the full number of tasks."""
        what = WORKLOADS[workload]
        # libraries load what they load; one more step, so that nothing made for it serves below
        CANDIDATES[candidate].prepare(what.problem(1, what.steps + 1)).call()
        problem = what.problem(tasks)
        prepared: Prepared = CANDIDATES[candidate].prepare(problem)
        found: dict[str, Any] = {"bytes": memory.peak_growth(prepared.call)}
        if candidate == "fused":
            found["bound"] = kernel.memory_goal(problem)
        return found

    def overhead(self, workload: str, tasks: int, calls: int) -> dict[str, float]:
        """See ``kernel.overhead``."""
        return kernel.overhead(WORKLOADS[workload].problem(tasks), calls)

    def bare_is_right(self, workload: str, tasks: int) -> bool:
        """See ``kernel.bare_is_right``."""
        return kernel.bare_is_right(WORKLOADS[workload].problem(tasks))


def main() -> None:
    """Answer commands until the input ends."""
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    warnings.simplefilter("ignore")
    worker = Worker(threads)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"answer": getattr(worker, command.pop("do"))(**command)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
