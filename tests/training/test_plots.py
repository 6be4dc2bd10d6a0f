from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmeta.training import Evaluation, StepResult, Summary, plots


def test_adapted_curves_are_drawn(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 20)
    truth = torch.stack([x, -x])
    path = plots.adapted_curves(
        tmp_path / "deep" / "a.png",
        x,
        truth,
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        {0: truth * 0, 1: truth * 0.5, 10: truth * 0.9},
        "a title",
    )
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("accuracy", [None, Summary(0.9, 0.9, 0.01, 600)])
def test_curves_are_drawn_with_and_without_accuracy(
    tmp_path: Path, accuracy: Summary | None
) -> None:
    lost = Summary(float("inf"), 0.5, float("inf"), 600, 3)
    results = (StepResult(0, Summary(1.0, 0.9, 0.1, 600), accuracy), StepResult(1, lost, accuracy))
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}]
    if accuracy:
        lines[0]["accuracy"] = 0.3
    path = tmp_path / "curve.png"
    plots.curve(path, lines, {"a": Evaluation(results, "test", 0, True)}, "a title")
    assert path.stat().st_size > 1000


def test_a_run_without_metrics_can_be_drawn(tmp_path: Path) -> None:
    results = (StepResult(0, Summary(1.0, 0.9, 0.1, 600)),)
    plots.curve(tmp_path / "a.png", [], {"a": Evaluation(results, "test", 0, True)}, "none")


def test_importing_draws_nothing() -> None:
    code = "import sys, fastmeta.training, fastmeta.recipes; assert 'matplotlib' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
