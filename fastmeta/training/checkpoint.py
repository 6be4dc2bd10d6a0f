"""Checkpoints that survive the machine: atomic, checked, and never the only copy."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})\.pt")
_BEST = "best.pt"


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged and the one before it is used."""


class DamagedCheckpoint(ValueError):  # noqa: N818 - it says what was found, as NonFiniteLoss does
    """A file that is missing, cut short, changed, or no checkpoint at all."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint file held.

    Attributes:
        path: the file it came from.
        step: completed iterations.
        state: what was given to :meth:`CheckpointFolder.save`.
    """

    path: Path
    step: int
    state: dict[str, Any]


def read_checkpoint(path: str | os.PathLike[str], requires: Iterable[str] = ()) -> Checkpoint:
    """Read one checkpoint file and check it whole.

    The file is what `torch.save` writes, a zip archive, so that any program with torch can read
    it. Every record's CRC-32 is compared first, because `torch.load` does not; a file cut short
    has no directory of records and fails there too. It is loaded with ``weights_only=True``:
    tensors and plain containers, no code.

    Args:
        path: the file.
        requires: the keys that its state must have.

    Returns:
        The checkpoint; tensors are on the CPU.

    Raises:
        DamagedCheckpoint: the file is missing, cut short, damaged, lacks a required key, or is not
            written by this project.
        ValueError: it was written in a format of another version.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged!r} does not fit")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "fastmeta_checkpoint" not in content:
            raise ValueError("another program wrote it")
    except Exception as error:  # a damaged archive fails in every way a reader can fail
        why = str(error).partition("\n")[0] or type(error).__name__
        raise DamagedCheckpoint(
            f"checkpoint: path must be a whole checkpoint, got {path}: {why}"
        ) from error
    if content["fastmeta_checkpoint"] != FORMAT:
        raise ValueError(
            f"checkpoint: path must be a checkpoint of format {FORMAT}, got format "
            f"{content['fastmeta_checkpoint']} in {path}"
        )
    step: Any = content.get("step")
    state: Any = content.get("state")
    lacking = [] if isinstance(step, int) else ["step"]
    if isinstance(state, dict):
        lacking += [f"state[{key!r}]" for key in requires if key not in state]
    else:
        lacking.append("state")
    if lacking:
        raise DamagedCheckpoint(
            f"checkpoint: path must be a whole checkpoint, got {path}: it lacks "
            f"{', '.join(lacking)}"
        )
    return Checkpoint(path, step, state)


class CheckpointFolder:
    """The checkpoints of one run: the last few, and the best.

    A save writes a temporary file in the same folder, flushes it to the disk, renames it over the
    final name, and flushes the folder. A process that dies at any moment leaves either the old
    set of files or the new one, and perhaps a temporary file, which the next save removes.

    Args:
        folder: where the files lie; made on the first save.
        keep: how many of the newest checkpoints to keep. Two, so that one damaged file costs one
            interval and not the run.
        requires: the keys that a state must have to be read back; a file that lacks one counts as
            damaged.

    Raises:
        ValueError: ``keep`` is below 1.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = CheckpointFolder(folder)
        ...     _ = checkpoints.save(10, {"weight": torch.ones(2)})
        ...     checkpoints.latest().step
        10
    """

    def __init__(
        self, folder: str | os.PathLike[str], keep: int = 2, *, requires: Iterable[str] = ()
    ) -> None:
        if keep < 1:
            raise ValueError(f"CheckpointFolder: keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.requires = tuple(requires)
        self._readable = False

    def files(self) -> list[Path]:
        """The numbered checkpoints that lie there, oldest first, whether whole or not."""
        if not self.folder.is_dir():
            return []
        return sorted(entry for entry in self.folder.iterdir() if _NAME.fullmatch(entry.name))

    def save(self, step: int, state: Mapping[str, Any], *, best: bool = False) -> Path:
        """Write one checkpoint atomically, then drop the oldest beyond ``keep``.

        Args:
            step: completed iterations; it names the file.
            state: tensors and plain containers.
            best: also keep this one as the best, whatever its age.

        Returns:
            The file's path.

        Raises:
            ValueError: ``state`` holds something that could be written but not read back; no file
                is replaced.
            OSError: the disk is full or the folder read-only; earlier checkpoints are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        final = self.folder / f"step-{step:09d}.pt"
        content = {"fastmeta_checkpoint": FORMAT, "step": step, "state": dict(state)}
        # The best comes first: a numbered file that holds its score, beside an older best.pt, would
        # keep a resumed run from ever writing it again.
        if best:
            self._replace(self.folder / _BEST, content)
        self._replace(final, content)
        files = self.files()
        now = files.index(final)
        # What is newer than this one was refused as damaged, or the run would stand there.
        for stale in files[: max(now + 1 - self.keep, 0)] + files[now + 1 :]:
            stale.unlink(missing_ok=True)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole.

        Returns:
            The checkpoint, or None when none was ever written.

        Raises:
            DamagedCheckpoint: checkpoints lie there, and every one is damaged.

        Warns:
            CheckpointWarning: for each damaged file that was passed over, by name.
        """
        files = self.files()
        for file in reversed(files):
            try:
                return read_checkpoint(file, self.requires)
            except DamagedCheckpoint as error:
                message = f"{error}; it is passed over for the one before it"
                warnings.warn(message, CheckpointWarning, stacklevel=2)
        if files:
            raise DamagedCheckpoint(
                f"checkpoint: {self.folder} must hold a whole checkpoint, got {len(files)} damaged "
                f"({', '.join(file.name for file in files)})"
            )
        return None

    def best(self) -> Checkpoint | None:
        """The best checkpoint on validation, or None when no validation has run."""
        path = self.folder / _BEST
        return read_checkpoint(path, self.requires) if path.exists() else None

    def _replace(self, final: Path, content: Mapping[str, Any]) -> None:
        """Put a new file in place of ``final``, or leave everything as it was."""
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            if not self._readable:  # once a run: better now than when it is needed
                _check_readable(temporary)
                self._readable = True
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)

    def _sweep(self) -> None:
        """Remove what a process that died in the middle of a save has left."""
        for entry in self.folder.glob(".*.tmp"):
            entry.unlink(missing_ok=True)


def _check_readable(path: Path) -> None:
    try:
        read_checkpoint(path)
    except DamagedCheckpoint as error:
        raise ValueError(
            f"checkpoint: state must hold tensors and plain containers only, got {error}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
