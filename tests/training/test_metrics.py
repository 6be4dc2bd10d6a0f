from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastmeta.training.metrics import MetricsFile, read_metrics, thin


def _write(path: Path, steps: range, after: int = 0) -> None:
    with MetricsFile(path, after=after) as metrics:
        for step in steps:
            metrics.write(step, {"loss": step / 10})


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    _write(path, range(1, 4))
    assert list(read_metrics(path)) == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 0.3},
    ]


def test_a_resume_drops_later_steps_so_each_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8))
    _write(path, range(6, 10), after=5)
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 10))


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    path.write_text(path.read_text()[:-5])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    _write(path, range(3, 5), after=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(1, {"loss": math.nan, "validation": {"results": [{"mean": math.inf}]}})
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "validation": {"results": [{"mean": None}]}}


def test_a_line_is_there_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.sync()
        assert len(list(read_metrics(path))) == 1


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "none")) == []


def test_thinning_keeps_the_last_line_and_validations() -> None:
    lines: list[dict[str, object]] = [{"step": step} for step in range(1, 1001)]
    lines[122]["validation"] = {}
    thinned = thin(lines, at_most=100)
    steps = [line["step"] for line in thinned]
    assert len(thinned) == 101
    assert steps[-1] == 1000
    assert 123 in steps
    assert steps == sorted(steps)


def test_thinning_nothing_is_nothing() -> None:
    assert thin([]) == []
