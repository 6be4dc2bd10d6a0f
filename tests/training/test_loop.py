from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from fastmeta.algorithms import MAML
from fastmeta.tasks import Sinusoid
from fastmeta.training import (
    CheckpointFolder,
    CheckpointWarning,
    NonFiniteLoss,
    evaluate,
    read_metrics,
    train,
)
from tests.training.runs import Poisoned, Run, learner, same


def _steps(out: Path) -> list[int]:
    return [line["step"] for line in read_metrics(out / "metrics.jsonl")]


def _without_time(out: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in read_metrics(out / "metrics.jsonl")
    ]


def test_training_lowers_the_loss() -> None:
    run = Run(width=40)
    run.scheduler = None
    held_out = Sinusoid(shots=5)
    before = evaluate(run.maml, held_out, steps=[1], tasks=100).last.loss.mean
    result = run.train(200)
    after = evaluate(run.maml, held_out, steps=[1], tasks=100).last.loss.mean
    assert (result.step, result.stopped, result.checkpoint) == (200, "finished", None)
    assert after < 0.8 * before


@pytest.mark.parametrize("cut", [10, 13])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, cut: int) -> None:
    """Parameters, optimizer state and metrics; at a checkpoint's step and between two."""
    straight, first, second = Run(), Run(), Run(seed=5)
    straight.train(20, out=tmp_path / "straight")
    first.train(cut, out=tmp_path / "cut")
    assert not same(straight, first)
    result = second.train(20, out=tmp_path / "cut", resume=True)
    assert result.step == 20
    assert same(straight, second)
    assert second.scheduler.get_last_lr() == straight.scheduler.get_last_lr()
    assert _steps(tmp_path / "cut") == [3, 6, 9, 12, 15, 18]
    assert _without_time(tmp_path / "cut") == _without_time(tmp_path / "straight")


def test_a_run_that_died_between_checkpoints_writes_each_step_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    Run().train(14, out=out, checkpoint_every=100)
    (out / "checkpoints/step-000000014.pt").unlink()
    Run().train(8, out=out, resume=True, checkpoint_every=100)
    straight = Run()
    straight.train(20)
    second = Run()
    second.train(20, out=out, resume=True)
    assert same(straight, second)
    assert _steps(out) == [3, 6, 9, 12, 15, 18]


def test_models_that_draw_numbers_resume_to_the_same_bits(tmp_path: Path) -> None:
    def dropout() -> Run:
        run = Run()
        run.maml.model.insert(1, torch.nn.Dropout(0.5))
        return run

    torch.manual_seed(3)
    straight = dropout()
    torch.manual_seed(3)
    straight.train(10)
    torch.manual_seed(3)
    dropped = dropout()
    torch.manual_seed(3)
    dropped.train(4, out=tmp_path)
    resumed = dropout()
    torch.manual_seed(99)
    resumed.train(10, out=tmp_path, resume=True)
    assert same(straight, resumed)


def test_chunks_leave_the_result(tmp_path: Path) -> None:
    whole, chunked = Run(path="vectorized"), Run(path="vectorized")
    whole.train(5)
    chunked.train(5, chunk_size=3)
    for ours, theirs in zip(whole.state(), chunked.state(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_truncated_checkpoint_is_passed_over_and_the_bits_are_the_same(tmp_path: Path) -> None:
    straight, first, second = Run(), Run(), Run()
    straight.train(20)
    first.train(15, out=tmp_path)
    newest = tmp_path / "checkpoints/step-000000015.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(CheckpointWarning, match="step-000000015"):
        second.train(20, out=tmp_path, resume=True)
    assert same(straight, second)
    assert _steps(tmp_path) == [3, 6, 9, 12, 15, 18]


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    result = Run().train(23, out=tmp_path)
    files = CheckpointFolder(tmp_path / "checkpoints").files()
    assert [file.name for file in files] == ["step-000000020.pt", "step-000000023.pt"]
    assert result.checkpoint == files[-1]


def test_a_finished_run_can_be_asked_to_go_on_from_nothing_or_further(tmp_path: Path) -> None:
    assert Run().train(5, out=tmp_path, resume=True).step == 5
    again = Run().train(5, out=tmp_path, resume=True)
    assert (again.step, again.stopped) == (5, "finished")


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    Run().train(5, out=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="out must be a folder without checkpoints"):
        Run().train(5, out=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("message", "build", "options"),
    [
        (r"meta_batch=8 \(was 4\)", {}, {"meta_batch": 8}),
        (r"source.shots=10 \(was 5\)", {}, {"source": Sinusoid(shots=10, queries=5)}),
        (r"source.seed=1 \(was 0\)", {}, {"source": Sinusoid(shots=5, seed=1)}),
        (r"inner.lr=0.02 \(was 0.01\)", {"lr": 0.02}, {}),
        (r"order=1 \(was 2\)", {"order": 1}, {}),
        (r"note='b' \(was 'a'\)", {}, {"settings": {"note": "b"}}),
    ],
)
def test_a_changed_setting_is_named(
    tmp_path: Path, message: str, build: dict[str, Any], options: dict[str, Any]
) -> None:
    Run().train(5, out=tmp_path, settings={"note": "a"})
    run = Run(**build)
    before = [value.clone() for value in run.maml.state_dict().values()]
    with pytest.raises(ValueError, match=message):
        run.train(10, out=tmp_path, resume=True, **{"settings": {"note": "a"}, **options})
    after = run.maml.state_dict().values()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_changed_optimizer_is_named(tmp_path: Path) -> None:
    Run().train(5, out=tmp_path)
    run = Run()
    run.optimizer = torch.optim.Adam(run.maml.parameters(), lr=0.5)
    run.scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, step_size=7, gamma=0.5)
    with pytest.raises(ValueError, match=r"optimizer.lr=0.5 \(was 0.01\)"):
        run.train(10, out=tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    Run().train(5, out=tmp_path)
    with pytest.raises(ValueError, match=r"'model.0.bias' is .* shape \[9\], got .* shape \[8\]"):
        Run(width=9).train(10, out=tmp_path, resume=True)


def test_a_loss_that_is_not_finite_names_step_and_tasks(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(NonFiniteLoss, match=r"got nan at step 7 .*task ids 1, 2") as caught:
        run.train(20, out=tmp_path, source=Poisoned(7), checkpoint_every=2)
    assert (caught.value.step, caught.value.task_ids) == (7, (1, 2))
    assert "step-000000006.pt" in str(caught.value)
    good = Run()
    good.train(6)
    assert same(good, run)  # what was not finite has not reached parameters or optimizer
    kept = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert kept is not None
    assert kept.step == 6


def test_a_gradient_that_is_not_finite_is_found() -> None:
    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (output - output.detach()).abs().sqrt().mean()  # 0, with an infinite derivative

    run = Run(loss=loss, steps=0)
    with pytest.raises(
        NonFiniteLoss, match=r"meta-gradient must be finite, .* in model\.0\.weight"
    ):
        run.train(3)


@pytest.mark.parametrize("lost", ["algorithm", "optimizer", "window"])
def test_a_checkpoint_without_a_part_is_passed_over(tmp_path: Path, lost: str) -> None:
    straight, second = Run(), Run()
    straight.train(20)
    Run().train(15, out=tmp_path)
    newest = tmp_path / "checkpoints/step-000000015.pt"
    content = torch.load(newest, weights_only=True)
    del content["state"][lost]
    torch.save(content, newest)
    with pytest.warns(CheckpointWarning, match=rf"step-000000015.pt: it lacks state\['{lost}'\]"):
        second.train(20, out=tmp_path, resume=True)
    assert same(straight, second)


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.touch()
    with pytest.raises(ValueError, match="train: out must be a folder, got a file"):
        Run().train(1, out=file)


def test_max_seconds_ends_cleanly_with_a_checkpoint(tmp_path: Path) -> None:
    run = Run()
    result = run.train(10**6, out=tmp_path, max_seconds=0.0)
    assert (result.step, result.stopped) == (1, "max_seconds")
    found = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert found is not None
    assert found.step == 1


def test_validation_is_logged_and_the_best_is_kept(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0])

    def validate(algorithm: Any) -> Any:
        result = evaluate(algorithm, Sinusoid(shots=5), steps=[1], tasks=10, split="val")
        mean = next(losses)
        last = result.last
        object.__setattr__(last.loss, "mean", mean)
        return result

    Run().train(
        12, out=tmp_path, validate=validate, validate_every=4, log_every=100, checkpoint_every=100
    )
    assert _steps(tmp_path) == [4, 8, 12]
    best = CheckpointFolder(tmp_path / "checkpoints").best()
    assert best is not None
    assert best.step == 8


def test_validation_does_not_change_the_bits(tmp_path: Path) -> None:
    plain, validated = Run(), Run()
    plain.train(8)
    validated.train(
        8,
        validate=lambda algorithm: evaluate(algorithm, Sinusoid(5), steps=2, tasks=10),
        validate_every=2,
    )
    assert same(plain, validated)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    class Interrupting(Sinusoid):
        def sample(self, step: int, indices: Any, *, split: str | None = None) -> Any:
            if step == 5:
                os.kill(os.getpid(), number)
            return super().sample(step, indices, split=split)

    before = signal.getsignal(number)
    run = Run()
    result = run.train(10**6, out=tmp_path, source=Interrupting(shots=5))
    assert result.stopped == number.name
    assert 4 <= result.step <= 6
    found = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert found is not None
    assert found.step == result.step
    assert signal.getsignal(number) is before


def test_it_trains_off_the_main_thread() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(Run().train(2).step))
    thread.start()
    thread.join()
    assert results == [2]


_KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
from tests.training.runs import Run

replace = os.replace
def die_in_the_third_checkpoint(source, target):
    if str(target).endswith("step-000000015.pt"):
        os._exit(137)  # as SIGKILL: between the temporary file and its rename
    replace(source, target)
os.replace = die_in_the_third_checkpoint
Run().train(20, out=sys.argv[1])
"""


def test_a_process_killed_while_it_writes_a_checkpoint_loses_nothing_else(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{':'.join(sys.path)}"}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], env=environment, timeout=120
    )
    assert done.returncode == 137
    straight, second = Run(), Run()
    straight.train(20)
    second.train(20, out=tmp_path, resume=True)
    assert same(straight, second)
    assert _steps(tmp_path) == [3, 6, 9, 12, 15, 18]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_metrics_hold_means_since_the_line_before(tmp_path: Path) -> None:
    Run().train(6, out=tmp_path / "each", log_every=1)
    Run().train(6, out=tmp_path / "third", log_every=3)
    each = [line["loss"] for line in read_metrics(tmp_path / "each/metrics.jsonl")]
    third = [line["loss"] for line in read_metrics(tmp_path / "third/metrics.jsonl")]
    assert third == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])
    line = json.loads((tmp_path / "third/metrics.jsonl").read_text().splitlines()[0])
    assert set(line) == {"step", "loss", "support_loss", "lr", "seconds"}


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "optimizer must be a torch.optim.Optimizer", {"optimizer": "adam"}),
        (ValueError, "iterations must be at least 0, got -1", {"iterations": -1}),
        (TypeError, "iterations must be an int", {"iterations": 2.5}),
        (ValueError, "meta_batch must be at least 1, got 0", {"meta_batch": 0}),
        (ValueError, "chunk_size must be at least 1, got 0", {"chunk_size": 0}),
        (ValueError, "log_every must be at least 1", {"log_every": 0}),
        (ValueError, "checkpoint_every must be at least 1", {"checkpoint_every": 0}),
        (ValueError, "max_seconds must be at least 0", {"max_seconds": -1}),
        (ValueError, "max_seconds must be finite", {"max_seconds": float("nan")}),
        (ValueError, "out must be the run's folder when resuming", {"resume": True}),
        (ValueError, "validate must be given together", {"validate_every": 3}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    maml = learner()
    given = {
        "optimizer": torch.optim.SGD(maml.parameters(), lr=0.1),
        "iterations": 1,
        "meta_batch": 2,
        **options,
    }
    with pytest.raises(error, match=f"train: {message}"):
        train(maml, Sinusoid(shots=5), progress=False, **given)


def test_an_algorithm_is_needed() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="train: algorithm must be an Algorithm such as MAML"):
        train(model, Sinusoid(5), optimizer=optimizer, iterations=1, meta_batch=1)  # type: ignore[arg-type]


def test_a_scheduler_that_wants_a_metric_is_refused() -> None:
    run = Run()
    run.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer)
    with pytest.raises(TypeError, match="scheduler must step without a metric"):
        run.train(1)


def test_an_error_of_the_task_source_reaches_the_caller() -> None:
    class Broken(Sinusoid):
        def sample(self, step: int, indices: Any, *, split: str | None = None) -> Any:
            raise FileNotFoundError("the images are gone")

    with pytest.raises(FileNotFoundError, match="the images are gone"):
        Run().train(3, source=Broken(shots=5))


def test_learned_rates_are_trained_and_resumed(tmp_path: Path) -> None:
    def run() -> Run:
        return Run(learn_lr=True)

    straight, first, second = run(), run(), run()
    straight.train(8)
    first.train(4, out=tmp_path)
    second.train(8, out=tmp_path, resume=True)
    assert torch.equal(straight.maml.inner_tensors[0], second.maml.inner_tensors[0])
    assert straight.maml.inner_tensors[0].item() != pytest.approx(0.01)


def test_a_maml_can_be_rebuilt_by_a_user_from_a_checkpoint(tmp_path: Path) -> None:
    run = Run()
    result = run.train(5, out=tmp_path)
    assert result.checkpoint is not None
    content = torch.load(result.checkpoint, weights_only=True)
    fresh = MAML(learner(seed=9).model, loss=mse_loss)
    fresh.load_state_dict(content["state"]["algorithm"])
    assert torch.equal(fresh.model[0].weight, run.maml.model[0].weight)
