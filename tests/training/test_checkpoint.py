from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmeta.training.checkpoint import (
    CheckpointFolder,
    CheckpointWarning,
    DamagedCheckpoint,
    read_checkpoint,
)


def _state(value: float) -> dict[str, Any]:
    return {"weight": torch.full((50,), value), "nested": {"name": "a", "list": [1, 2.5, None]}}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = folder.save(7, _state(1.5))
    found = folder.latest()
    assert found is not None
    assert (found.step, found.path) == (7, path)
    assert torch.equal(found.state["weight"], _state(1.5)["weight"])
    assert found.state["nested"] == _state(0)["nested"]


def test_any_program_with_torch_reads_the_file(tmp_path: Path) -> None:
    content = torch.load(CheckpointFolder(tmp_path).save(7, _state(1.0)), weights_only=True)
    assert content["step"] == 7


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "new").latest() is None


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 6):
        folder.save(step, _state(step), best=step == 2)
    assert [file.name for file in folder.files()] == ["step-000000004.pt", "step-000000005.pt"]
    best = folder.best()
    assert best is not None
    assert best.step == 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, share: float
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, _state(1))
    newest = folder.save(2, _state(2))
    newest.write_bytes(newest.read_bytes()[: int(share * newest.stat().st_size)])
    with pytest.warns(CheckpointWarning, match="step-000000002.pt"):
        found = folder.latest()
    assert found is not None
    assert found.step == 1


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(1, _state(3.0))
    content = bytearray(path.read_bytes())
    place = bytes(content).index(torch.full((50,), 3.0).numpy().tobytes())
    content[place + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="checksum"):
        read_checkpoint(path)


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, _state(1)).write_bytes(b"")
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(DamagedCheckpoint, match=r"1 damaged \(step-000000001.pt\)"),
    ):
        folder.latest()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"none\.pt"):
        read_checkpoint(tmp_path / "none.pt")


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpoint, match="another program"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"fastmeta_checkpoint": 1, "step": 1, "state": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt"):
        read_checkpoint(tmp_path / "a.pt")


def test_another_format_is_no_damage_and_stops_the_search(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, _state(1))
    content = {"fastmeta_checkpoint": 99, "step": 2, "state": {}}
    torch.save(content, tmp_path / "step-000000002.pt")
    with pytest.raises(ValueError, match="format 99"):
        folder.latest()


def test_a_state_that_cannot_be_read_back_is_refused_when_it_is_written(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(ValueError, match="state must hold tensors and plain containers"):
        folder.save(1, {"path": Path("x")})
    assert folder.files() == []


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_dying_before_the_rename_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    folder = CheckpointFolder(tmp_path)
    old = folder.save(1, _state(1))

    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, die)
        # A killed process runs no clean-up either.
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Died):
            folder.save(2, _state(2))
    left = [entry.name for entry in tmp_path.iterdir() if entry != old]
    assert len(left) == 1
    assert left[0].endswith(".tmp")
    found = CheckpointFolder(tmp_path).latest()
    assert found is not None
    assert found.step == 1
    folder.save(3, _state(3))
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["step-000000001.pt", "step-000000003.pt"]


def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, _state(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(2, _state(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000000001.pt"]


def test_a_new_checkpoint_replaces_a_damaged_newer_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, _state(1))
    folder.save(9, _state(9)).write_bytes(b"cut")
    folder.save(5, _state(5))
    assert [file.name for file in folder.files()] == ["step-000000001.pt", "step-000000005.pt"]


@pytest.mark.parametrize("lost", ["weight", "state", "step"])
def test_a_checkpoint_that_lacks_a_part_is_damaged(tmp_path: Path, lost: str) -> None:
    folder = CheckpointFolder(tmp_path, requires=("weight",))
    folder.save(1, _state(1))
    newest = folder.save(2, _state(2))
    content = torch.load(newest, weights_only=True)
    del (content["state"] if lost == "weight" else content)[lost]
    torch.save(content, newest)
    with pytest.warns(CheckpointWarning, match=rf"{newest.name}: it lacks .*{lost}"):
        found = folder.latest()
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("dies_at", ["best.pt", "step-000000002.pt"])
def test_dying_within_a_save_never_leaves_a_best_older_than_the_newest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    """A numbered file that holds the new best score implies that best.pt is there."""
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"best": 0.5}, best=True)

    class Died(BaseException):
        pass

    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if target.name == dies_at:
            raise Died
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Died):
            folder.save(2, {"best": 0.9}, best=True)
    newest, best = folder.latest(), folder.best()
    assert newest is not None
    assert best is not None
    assert best.state["best"] >= newest.state["best"]


def test_a_state_that_cannot_be_read_back_leaves_the_best(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path).save(1, _state(1), best=True)
    again = CheckpointFolder(tmp_path)
    with pytest.raises(ValueError, match="state must hold"):
        again.save(2, {"path": Path("x")}, best=True)
    best = again.best()
    assert best is not None
    assert best.step == 1


def test_keep_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        CheckpointFolder(tmp_path, keep=0)
