from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastmeta.training import Evaluation, MetricsFile, Report, StepResult, Summary, Target
from fastmeta.training.report import write_report


def _evaluation(mean: float = 0.66) -> Evaluation:
    results = tuple(
        StepResult(steps, Summary(mean / (steps + 1), 0.4, 0.03, 600)) for steps in range(3)
    )
    return Evaluation(results, "test", 0, True)


def _report(*targets: Target) -> Report:
    return Report(
        name="an-experiment",
        settings={"seed": 0, "shots": 5},
        iterations=900,
        planned=1000,
        stopped="max_seconds",
        seconds=12.34,
        evaluations={"5-shot": _evaluation()},
        targets=targets,
        notes=["A note."],
    )


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in range(1, 501):
            file.write(step, {"loss": 1 / step})
    return path


def test_a_report_is_a_folder(tmp_path: Path, metrics: Path) -> None:
    folder = write_report(tmp_path / "report", _report(), metrics)
    names = sorted(entry.name for entry in folder.iterdir())
    assert names == ["curve.png", "metrics.jsonl", "report.json", "report.md"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) <= 200
    content = json.loads((folder / "report.json").read_text())
    assert content["settings"] == {"seed": 0, "shots": 5}
    assert (content["iterations"], content["planned"]) == (900, 1000)
    assert content["environment"]["torch"]
    assert content["evaluations"]["5-shot"]["results"][1]["loss"]["mean"] == pytest.approx(0.33)
    page = (folder / "report.md").read_text()
    for words in ("# an-experiment", "900 of 1,000", "A note.", "seed: 0", "curve.png", "torch: "):
        assert words in page


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("loss", 1, 0.3, "a paper", at_least=0.3, at_most=0.35), True),
        (Target("loss", 1, at_most=0.3), False),
        (Target("loss", 1, at_least=0.5), False),
        (Target("loss", 1, 0.3, "a paper"), None),
        (Target("accuracy", 1, at_least=0.5), False),  # there is none
    ],
)
def test_targets_are_judged(target: Target, met: bool | None) -> None:
    report = _report(target)
    assert report.judged[0]["met"] is met
    assert report.passed is met
    assert ("NOT met" in report.text()) is (met is False)
    assert "| NO |" in report.markdown(False) or met is not False


def test_one_missed_floor_is_enough() -> None:
    assert _report(Target("loss", 1, at_most=9), Target("loss", 2, at_most=0)).passed is False


def test_a_target_after_steps_that_were_not_evaluated_is_an_error() -> None:
    with pytest.raises(ValueError, match="steps must be one of 0, 1, 2, got 10"):
        _ = _report(Target("loss", 10, at_most=1)).judged


def test_without_matplotlib_the_report_says_so(
    tmp_path: Path, metrics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write_report(tmp_path / "report", _report(), metrics)
    assert not (folder / "curve.png").exists()
    content = json.loads((folder / "report.json").read_text())
    assert "pip install fastmeta[plot]" in content["notes"][-1]
    assert "curve.png" not in (folder / "report.md").read_text()


def test_tasks_that_diverge_are_counted_where_the_mean_is_finite() -> None:
    lost = Summary(2.0e4, 0.5, 3.0e4, 600, 2)
    evaluation = Evaluation((StepResult(1, lost),), "test", 0, True)
    report = Report("x", {}, 1, 1, "finished", 1.0, {"a": evaluation}, [Target("loss", 1, 0.6)])
    for shown in (report.text(), report.markdown(False)):
        assert "2 tasks diverged" in shown
        assert "tasks of 600 whose loss is not finite or above 1,000" in shown
    assert "compared with" in report.markdown(False)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    lost = Summary(float("inf"), 0.5, float("inf"), 600, 3)
    evaluation = Evaluation((StepResult(1, lost),), "test", 0, True)
    report = Report("x", {}, 1, 1, "finished", 1.0, {"a": evaluation}, [Target("loss", 1, 0.6)])
    folder = write_report(tmp_path, report)
    text = (folder / "report.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["targets"][0]["ours"]["mean"] is None
    assert "3 tasks diverged" in report.text()
