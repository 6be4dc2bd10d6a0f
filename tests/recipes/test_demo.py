from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastmeta.recipes.demo import demo


def test_the_demo_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = demo(str(tmp_path), iterations=5, tasks=20)
    assert [item.steps for item in evaluation.results] == [0, 1, 5, 10]
    assert (tmp_path / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "before (0) and after inner steps" in printed
    assert "median" in printed


def test_without_matplotlib_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    demo(str(tmp_path), iterations=2, tasks=5)
    assert "pip install fastmeta[plot]" in capsys.readouterr().out
