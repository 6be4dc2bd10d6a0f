from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmeta.batch import TaskBatch
from fastmeta.cli import app as cli
from fastmeta.cli import main
from fastmeta.tasks import Sinusoid

SMALL = ["--iterations", "4", "--meta-batch", "3", "--tasks", "10", "--quiet"]


def _train(out: Path, *more: str) -> int:
    return main(["train", "maml-sinusoid", *SMALL, "--out", str(out), *more])


def test_train_evaluate_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert _train(out) == 0
    printed = capsys.readouterr().out
    assert "4 iterations" in printed
    assert "compared with 0.670 (Finn et al. 2017, table 2)" in printed
    assert (out / "report/report.md").exists()
    assert main(["evaluate", str(out), "--tasks", "5"]) == 0
    assert "4 iterations" in capsys.readouterr().out
    assert _train(out, "--resume", "--iterations", "6") == 0
    assert "6 iterations" in capsys.readouterr().out


def test_options_reach_the_recipe(tmp_path: Path) -> None:
    more = ["--shots", "3", "--inner-lr", "0.02", "--seed", "4", "--path", "reference"]
    assert _train(tmp_path, *more, "--chunk-size", "2") == 0
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["shots"] == 3
    assert settings["inner_lr"] == 0.02
    assert (settings["seed"], settings["path"]) == (4, "reference")


def test_threads_are_set(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert _train(tmp_path, "--threads", "1") == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_best_checkpoint_can_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path, "--validate-every", "2") == 0
    assert main(["evaluate", str(tmp_path), "--best", "--tasks", "5"]) == 0
    assert (tmp_path / "checkpoints/best.pt").exists()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["validation"]["split"] == "val"


def test_max_seconds_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path, "--iterations", "1000000", "--max-seconds", "0") == 0
    assert "1 iterations" in capsys.readouterr().out


def test_progress_is_plain_lines_away_from_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [word for word in SMALL if word != "--quiet"]
    assert main(["train", "maml-sinusoid", *small, "--out", str(tmp_path)]) == 0
    assert "\r" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("preset must be one of short, full", ["train", "maml-sinusoid", "--preset", "long"]),
        (
            f"seed must be at least 0 and below 2**63, got {10**23}",
            ["train", "maml-sinusoid", "--seed", str(10**23)],
        ),
        ("shots must be at least 1, got 0", ["train", "maml-sinusoid", "--shots", "0"]),
        ("got 'network'", ["train", "maml-sinusoid", "--network", "mlp"]),
        ("network must be mlp or conv", ["train", "maml-omniglot", "--network", "rnn"]),
        ("iterations must be at least 0", ["train", "maml-sinusoid", "--iterations", "-3"]),
        ("path must be one of auto", ["train", "maml-sinusoid", "--path", "warp"]),
        ("nowhere", ["train", "maml-omniglot", "--data-root", "nowhere", "--quiet"]),
        ("must hold a run", ["evaluate", "nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    message: str,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fastmeta: error: ")
    assert message in shown
    assert "Traceback" not in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chess"],
        ["train"],
        ["train", "chess"],
        ["train", "maml-sinusoid", "--shots", "many"],
        ["train", "maml-sinusoid", "--threads", "0"],
        ["evaluate"],
    ],
)
def test_words_it_does_not_know_are_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: fastmeta" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    assert _train(file) == 2
    assert f"out must be a folder, got a file, {file}" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_the_exit_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
) -> None:
    sample = Sinusoid.sample

    def interrupting(self: Sinusoid, step: int, *more: Any, **options: Any) -> TaskBatch:
        if step == 3:
            os.kill(os.getpid(), number)
        return sample(self, step, *more, **options)

    monkeypatch.setattr(Sinusoid, "sample", interrupting)
    assert _train(tmp_path, "--iterations", "1000000") == status
    assert "--resume goes on" in capsys.readouterr().err


def test_a_checkpoint_that_lacks_a_part_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path) == 0
    newest = tmp_path / "checkpoints/step-000000004.pt"
    content = torch.load(newest, weights_only=True)
    del content["state"]["algorithm"]
    torch.save(content, newest)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "it lacks state['algorithm']" in shown
    assert newest.name in shown
    assert "KeyError" not in shown


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_changed_setting_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path) == 0
    assert _train(tmp_path, "--resume", "--shots", "10") == 2
    assert "shots=10 (was 5)" in capsys.readouterr().err
    assert _train(tmp_path) == 2
    assert "without checkpoints" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_a_warning_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path) == 0
    assert _train(tmp_path, "--resume", "--iterations", "6") == 0
    newest = tmp_path / "checkpoints/step-000000006.pt"
    newest.write_bytes(newest.read_bytes()[:50])
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), "--tasks", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("fastmeta: warning: checkpoint:")
    assert "step-000000006.pt" in captured.err
    assert "4 iterations" in captured.out


def test_a_loss_that_is_not_finite_is_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path, "--inner-lr", "1e30") == 1
    shown = capsys.readouterr().err
    assert "at step" in shown
    assert "task ids" in shown
    assert "Traceback" not in shown


def test_an_error_of_our_own_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(cli, "evaluate_run", broken)
    assert main(["evaluate", "anything"]) == 1
    assert "failed: KeyError: 'inside' (--debug shows where)" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["doctor"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: fastmeta" in shown
    if command != ["doctor"]:
        assert "example" in shown


def test_doctor_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "fastmeta", "evaluate", "nowhere"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastmeta: error: ")
    assert "Traceback" not in done.stderr
