"""The benchmarks' own machinery: what is counted, judged, shown and refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmeta
from benchmarks import gpu
from benchmarks.candidates import CANDIDATES, distance, exact
from benchmarks.conductor import WorkerError, WorkerProcess, judged, record_of
from benchmarks.machine import fma_rate
from benchmarks.report import markdown
from benchmarks.workloads import (
    SMOKE_STEPS,
    SMOKE_TASKS,
    WORKLOADS,
    Goal,
    mlp_flops,
    tolerance,
)
from fastmeta import _native

SINUSOID = WORKLOADS["sinusoid-I1-T25"]


def rounds(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"seconds": {"fused": a, "vmap": b}, "peak": 1e12} for a, b in pairs]


def record(pairs: list[tuple[float, float]], **statuses: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {
        key: {"title": candidate.title, "status": "not installed"}
        for key, candidate in CANDIDATES.items()
    }
    known.update(
        fused={"title": "fused", "status": "ok", "error": 1e-7, "first_call": 0.1},
        vmap={"title": "vmap", "status": "ok", "error": 1e-7, "first_call": 0.1},
    )
    known.update(statuses)
    made = record_of(SINUSOID, "cpu", known, rounds(*pairs))
    made["goals"] = judged(SINUSOID, made)
    return made


def test_flops_are_those_of_the_definition() -> None:
    """One layer 3 -> 2, one row each, one step: each product counted by hand."""
    gradient = 2 * (6 + 6)  # forward and the weights' gradient; no gradient of the data
    product = 2 * (6 + 6)  # R-forward by the direction, R of the weights' gradient
    assert mlp_flops([3, 2], 1, 1, 1) == gradient + product + gradient


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that halves its speed halfway changes no ratio."""
    made = record([(1.0, 30.0)] * 4 + [(2.0, 60.0)] * 4)
    assert made["candidates"]["vmap"]["ratio"] == {"median": 30, "lower": 30, "upper": 30}
    assert made["candidates"]["fused"]["seconds"]["median"] == 1.5


@pytest.mark.parametrize(
    ("others", "met", "stretch"),
    [
        pytest.param([30.0] * 8, True, True, id="above-both"),
        pytest.param([24.0] * 8, True, False, id="above-the-goal"),
        pytest.param([20.0] * 3 + [30.0] * 5, False, False, id="median-above-quartile-below"),
    ],
)
def test_a_goal_is_met_by_the_lower_quartile(others: list[float], met: bool, stretch: bool) -> None:
    vmap = next(g for g in record([(1.0, o) for o in others])["goals"] if g["against"] == "vmap")
    assert (vmap["goal"], vmap["stretch"]) == (22, 25)
    assert (vmap["met"], vmap["stretch_met"]) == (met, stretch)


def test_too_few_rounds_meet_no_goal() -> None:
    goal = next(g for g in record([(1.0, 99.0)] * 6)["goals"] if g["against"] == "vmap")
    assert goal["met"] is None
    assert goal["why"] == "fewer than 7 rounds"


def test_a_red_candidate_has_no_ratio_and_an_absent_one_is_shown() -> None:
    red = {"title": "a red one", "status": "red", "error": 0.2}
    made = record([(1.0, 30.0)] * 8, higher=red)
    text = markdown({"smoke": False, "workloads": [made], "overhead": [], "not_yet": {}})
    assert "- a red one: red, its gradient is off by 2e-01" in text
    assert "- learn2learn: not installed" in text
    assert "ratio" not in made["candidates"]["higher"]
    against_jax = next(goal for goal in made["goals"] if goal["against"] == "jax")
    assert against_jax["met"] is None
    assert against_jax["why"] == "not installed"


@pytest.mark.parametrize("name", ["sinusoid-I1-T25", "omniglot-mlp-1-shot-I5-T32"])
def test_a_first_order_gradient_is_red(name: str) -> None:
    """The commonest wrong gradient, at the size of a smoke run, where the tolerance is widest."""
    problem = WORKLOADS[name].problem(SMOKE_TASKS, min(SMOKE_STEPS, WORKLOADS[name].steps))
    model, loss, lr, steps, batch = problem
    inner = fastmeta.SGD(lr=lr, steps=steps)
    made = fastmeta.meta_grad(
        model, None, batch, inner=inner, loss=loss, order=1, path="vectorized"
    )
    assert distance(made.grads.params, exact(problem)) > 2 * tolerance(SMOKE_TASKS)


def test_a_gradient_that_is_none_is_red() -> None:
    truth = exact(SINUSOID.problem(2))
    assert distance(truth, truth) == 0
    assert distance(dict(list(truth.items())[1:]), truth) == float("inf")
    nan = {name: torch.full_like(value, float("nan")) for name, value in truth.items()}
    assert distance(nan, truth) == float("inf")


def test_exact_in_chunks_is_exact() -> None:
    """More than 64 tasks go through vmap in float64; both definitions agree."""
    problem = SINUSOID.problem(65)
    double = problem._replace(
        model=problem.model.double(),
        batch=tuple(t.double() for t in problem.batch),  # type: ignore[arg-type]
    )
    assert distance(exact(double), CANDIDATES["loop"].prepare(double).call()) < 1e-12


def test_goals_name_what_is_measured() -> None:
    known = {*CANDIDATES, "peak", "threads", "memory"}
    goals: list[Goal] = [goal for workload in WORKLOADS.values() for goal in workload.goals]
    assert {goal.against for goal in goals} <= known
    assert len({workload.title for workload in WORKLOADS.values()}) == len(WORKLOADS)


def test_the_peak_is_a_rate() -> None:
    """More than one multiply-add a nanosecond, and no more than any core of today."""
    if _native.available():
        assert 2e9 < fma_rate(1, "cpu", seconds=0.002) < 1e12


def test_a_worker_tells_what_went_wrong() -> None:
    with WorkerProcess(1) as worker:
        with pytest.raises(WorkerError, match="KeyError: 'no-such-workload'"):
            worker.do("load", workload="no-such-workload", clock="cpu", smoke=True)
        assert "cpu" in worker.do("versions")  # and it goes on


def test_extra_memory_of_a_fresh_process() -> None:
    """vmap keeps every task's activations; 400 tasks of them are seen."""
    with WorkerProcess(1) as worker:
        found = worker.do("memory", workload="sinusoid-I5-T256", candidate="vmap", tasks=400)
    assert found["bytes"] is None or found["bytes"] > 4_000_000


def test_gpu_script_refuses_without_a_device(tmp_path: Path) -> None:
    root = str(gpu.ROOT)
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "results")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == gpu.NO_DEVICE
    assert "benchmarks.gpu: a CUDA device must be there" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_gpu_steps_force_each_backend(tmp_path: Path) -> None:
    made = {step.name: step for step in gpu.steps(tmp_path, {"triton", "cuda"})}
    assert made["tests-triton"].environment["FASTMETA_BACKEND"] == "triton"
    assert made["tests-cuda"].environment["FASTMETA_BACKEND"] == "cuda"
    assert made["tests"].environment["FASTMETA_REQUIRE"] == "cpp,gpu,triton"
    assert f"--results={tmp_path}/benchmarks.json" in made["benchmarks"].command
