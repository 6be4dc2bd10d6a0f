from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastmeta.recipes import MAMLOmniglot, MAMLSinusoid, Recipe, evaluate_run, run
from fastmeta.training import Report, read_checkpoint


def small(iterations: int = 6, **settings: object) -> Recipe:
    return MAMLSinusoid.of(
        "short", iterations=iterations, meta_batch=3, evaluation_tasks=20, **settings
    )


def test_a_run_is_a_folder_that_can_be_evaluated_again(tmp_path: Path) -> None:
    report = run(small(), tmp_path, progress=False)
    assert isinstance(report, Report)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "report",
        "run.json",
    ]
    again = evaluate_run(tmp_path)
    assert again.evaluations == report.evaluations
    assert (again.iterations, again.planned) == (6, 6)
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert content["settings"]["meta_batch"] == 3
    assert "differ from the preset" in content["notes"][-1]


def test_a_run_resumes_and_may_become_longer(tmp_path: Path) -> None:
    straight = run(small(10), tmp_path / "straight", progress=False)
    run(small(6), tmp_path / "cut", progress=False)
    resumed = run(small(10), tmp_path / "cut", resume=True, progress=False)
    assert isinstance(straight, Report)
    assert isinstance(resumed, Report)
    assert resumed.evaluations == straight.evaluations
    states = [
        read_checkpoint(tmp_path / name / "checkpoints/step-000000010.pt").state
        for name in ("straight", "cut")
    ]
    torch.testing.assert_close(states[0]["algorithm"], states[1]["algorithm"], rtol=0, atol=0)
    assert evaluate_run(tmp_path / "cut").planned == 10


def test_a_changed_setting_is_named_and_the_run_left_alone(tmp_path: Path) -> None:
    run(small(), tmp_path, progress=False)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(ValueError, match=r"shots=10 \(was 5\)"):
        run(small(shots=10), tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="out must be a folder without checkpoints"):
        run(small(shots=10), tmp_path, progress=False)
    with pytest.raises(ValueError, match="hold a run of maml-omniglot, got one of maml-sinusoid"):
        run(MAMLOmniglot.of("short"), tmp_path, resume=True, progress=False)
    assert (tmp_path / "run.json").read_text() == before


def test_fewer_tasks_are_a_look_and_no_report(tmp_path: Path) -> None:
    run(small(), tmp_path, progress=False)
    before = (tmp_path / "report/report.json").read_text()
    (evaluation,) = evaluate_run(tmp_path, tasks=7).evaluations.values()
    assert evaluation.last.loss.tasks == 7
    assert (tmp_path / "report/report.json").read_text() == before


def test_max_seconds_is_reported(tmp_path: Path) -> None:
    report = run(small(10**6), tmp_path, max_seconds=0.0, progress=False)
    assert isinstance(report, Report)
    assert (report.iterations, report.stopped) == (1, "max_seconds")


@pytest.mark.parametrize("content", [None, "{", '{"recipe": "chess", "settings": {}}', "[]"])
def test_a_folder_without_a_run_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"must hold a run \(run.json"):
        evaluate_run(tmp_path)


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    run(small(), tmp_path, progress=False)
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="must hold a checkpoint, got none"):
        evaluate_run(tmp_path)
    with pytest.raises(ValueError, match="must hold a best checkpoint, got none"):
        evaluate_run(tmp_path, best=True)
