"""The training loop: small, and it loses nothing."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta._checks import describe, number, positive_int, type_error, value_error, whole_number
from fastmeta.algorithms import Algorithm
from fastmeta.batch import TaskBatch
from fastmeta.tasks import TaskSource
from fastmeta.training.checkpoint import Checkpoint, CheckpointFolder
from fastmeta.training.evaluation import Evaluation
from fastmeta.training.metrics import MetricsFile
from fastmeta.training.prefetch import Prefetch
from fastmeta.training.progress import Progress
from fastmeta.training.settings import check_model, check_settings, fingerprint

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
# What the state of a training checkpoint holds, and a resume needs.
STATE = (
    "algorithm",
    "optimizer",
    "scheduler",
    "settings",
    "torch_rng",
    "seconds",
    "best",
    "window",
    "window_steps",
)


class NonFiniteLoss(ValueError):  # noqa: N818 - the name says what was found
    """A loss or a meta-gradient is not finite; the parameters were not touched by it.

    Attributes:
        step: the step it was found in.
        task_ids: the tasks whose loss is not finite, as the source's ``sample(step, task_ids)``
            takes them; all of the step's when only the gradient is not.
    """

    def __init__(self, message: str, step: int, task_ids: tuple[int, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.task_ids = task_ids


@dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended.

    Attributes:
        step: completed iterations, those before a resume included.
        seconds: time spent training, those before a resume included.
        stopped: ``"finished"``, ``"max_seconds"``, or the name of a signal.
        checkpoint: the last checkpoint, where a folder was given.
    """

    step: int
    seconds: float
    stopped: str
    checkpoint: Path | None


def train(
    algorithm: Algorithm,
    source: TaskSource,
    *,
    optimizer: torch.optim.Optimizer,
    iterations: int,
    meta_batch: int,
    chunk_size: int | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    keep: int = 2,
    validate: Callable[[Algorithm], Evaluation] | None = None,
    validate_every: int | None = None,
    max_seconds: float | None = None,
    split: str = "train",
    progress: bool = True,
) -> TrainResult:
    """Meta-train, and be able to stop at any moment without losing the run.

    Iteration n, from 1 on, draws the tasks ``(seed, n, 0 .. meta_batch - 1)`` of the source, calls
    ``algorithm.meta_gradient``, and steps the optimizer. Since a batch is a function of n, the next
    is made on a thread meanwhile and a resumed run continues with the same bits: parameters,
    optimizer state and scheduler come from the checkpoint, and so does torch's random state, for
    models that draw numbers themselves.

    A folder ``out`` gets ``checkpoints/`` (:class:`CheckpointFolder`) and ``metrics.jsonl``: a line
    every ``log_every`` iterations with the means since the line before. On a resume, lines after
    the checkpoint are dropped, so each step is in the file once.

    SIGINT and SIGTERM end the run after the current iteration with a checkpoint; a second SIGINT
    ends it at once.

    Args:
        algorithm: what is trained, such as :class:`~fastmeta.MAML`.
        source: where tasks come from.
        optimizer: any torch optimizer over ``algorithm.parameters()``.
        iterations: the iteration to stop after, counted from the start of the run. A finished run
            can be resumed with more.
        meta_batch: tasks T of an iteration.
        chunk_size: tasks to hold at once (:meth:`Algorithm.meta_gradient`).
        scheduler: stepped after each iteration.
        out: the run's folder, or None to write nothing.
        resume: continue from the newest whole checkpoint in ``out``, from the start if none is
            there. Without it a folder that has checkpoints is refused.
        settings: more settings to store, and to compare on a resume.
        log_every: iterations between two lines of metrics.
        checkpoint_every: iterations between two checkpoints; one is always written at the end.
        keep: how many of the newest checkpoints to keep, beside the best.
        validate: gives an evaluation of the algorithm; the checkpoint with the best accuracy, or
            loss where there is none, is kept as ``best.pt``.
        validate_every: iterations between two validations.
        max_seconds: end this call cleanly after about this long.
        split: the split to train on.
        progress: show progress on standard error.

    Returns:
        Where the run stands and why it stopped.

    Raises:
        NonFiniteLoss: with the step and the tasks; the parameters and the checkpoints are those
            from before.
        ValueError: a setting or the model differs from the checkpoint's; every checkpoint is
            damaged; ``out`` holds another run; an argument out of range.
        TypeError: an argument of the wrong kind.

    Example:
        >>> import torch
        >>> from fastmeta import MAML
        >>> from fastmeta.tasks import Sinusoid
        >>> maml = MAML(torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
        >>> result = train(
        ...     maml, Sinusoid(shots=5), optimizer=optimizer, iterations=3, meta_batch=4,
        ...     progress=False,
        ... )
        >>> result.step, result.stopped
        (3, 'finished')
    """
    op = "train"
    if not isinstance(algorithm, Algorithm):
        raise type_error(op, "algorithm", "be an Algorithm such as MAML", describe(algorithm))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise type_error(op, "optimizer", "be a torch.optim.Optimizer", describe(optimizer))
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise type_error(op, "scheduler", "step without a metric", "ReduceLROnPlateau")
    if resume and out is None:
        raise value_error(op, "out", "be the run's folder when resuming", "None")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise value_error(op, "out", "be a folder", f"a file, {out}")
    if (validate is None) != (validate_every is None):
        given = "validate" if validate_every is None else "validate_every"
        raise value_error(op, "validate", "be given together with validate_every", f"only {given}")
    run = _Run(
        algorithm=algorithm,
        optimizer=optimizer,
        scheduler=scheduler,
        source=source,
        split=split,
        iterations=whole_number(op, "iterations", iterations),
        meta_batch=positive_int(op, "meta_batch", meta_batch),
        chunk_size=None if chunk_size is None else positive_int(op, "chunk_size", chunk_size),
        log_every=positive_int(op, "log_every", log_every),
        checkpoint_every=positive_int(op, "checkpoint_every", checkpoint_every),
        validate=validate,
        validate_every=positive_int(op, "validate_every", validate_every or 1),
        max_seconds=math.inf
        if max_seconds is None
        else number(op, "max_seconds", max_seconds, at_least=0.0),
        settings=fingerprint(
            algorithm,
            source,
            optimizer,
            scheduler,
            {"meta_batch": meta_batch, "split": split, **(settings or {})},
        ),
        folder=None
        if out is None
        else CheckpointFolder(Path(out) / CHECKPOINTS, keep, requires=STATE),
        progress=progress,
    )
    if run.folder is not None:
        if resume:
            checkpoint = run.folder.latest()
            if checkpoint is not None:
                run.restore(checkpoint)
        elif run.folder.files():
            must = "be a folder without checkpoints, unless resuming"
            raise value_error(op, "out", must, f"{run.folder.folder}")
    return run.go()


@dataclass
class _Run:
    """One run: its parts, and where it stands."""

    algorithm: Algorithm
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    source: TaskSource
    split: str
    iterations: int
    meta_batch: int
    chunk_size: int | None
    log_every: int
    checkpoint_every: int
    validate: Callable[[Algorithm], Evaluation] | None
    validate_every: int
    max_seconds: float
    settings: dict[str, Any]
    folder: CheckpointFolder | None
    progress: bool

    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    # Sums of what the next line of metrics is the mean of, and how many steps they are over.
    window: dict[str, float] = field(default_factory=dict)
    window_steps: int = 0
    checkpoint: Path | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint stands, or say why that is another run."""
        state = checkpoint.state
        check_model(state["algorithm"], self.algorithm.state_dict())
        check_settings(state["settings"], self.settings)
        self.algorithm.load_state_dict(state["algorithm"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["torch_rng"])
        self.step = checkpoint.step
        self.seconds = state["seconds"]
        self.best = state["best"]
        self.window = dict(state["window"])
        self.window_steps = state["window_steps"]
        self.checkpoint = checkpoint.path

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of this moment."""
        if self.folder is None:
            return
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        state = {
            "algorithm": self.algorithm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler,
            "settings": self.settings,
            "torch_rng": torch.get_rng_state(),
            "seconds": self.seconds,
            "best": self.best,
            "window": self.window,
            "window_steps": self.window_steps,
        }
        self.checkpoint = self.folder.save(self.step, state, best=best)

    def go(self) -> TrainResult:
        """Run until something ends it."""
        before = self.seconds
        start = time.monotonic()
        saved_at = self.step if self.checkpoint is not None else -1
        stopped = "finished"
        progress = Progress(self.iterations, self.step, enabled=self.progress)
        with contextlib.ExitStack() as stack:
            stack.callback(progress.close)
            metrics = None
            if self.folder is not None:
                path = self.folder.folder.parent / METRICS
                metrics = stack.enter_context(MetricsFile(path, after=self.step))
            batches = stack.enter_context(
                Prefetch(
                    self.source,
                    meta_batch=self.meta_batch,
                    last=self.iterations,
                    split=self.split,
                )
            )
            interrupted = stack.enter_context(_signals())
            while self.step < self.iterations:
                self.iterate(batches.get(self.step + 1), progress)
                self.seconds = before + time.monotonic() - start
                improved = self.log(metrics)
                if improved or self.step % self.checkpoint_every == 0:
                    if metrics is not None:
                        metrics.sync()
                    self.save(best=improved)
                    saved_at = self.step
                if interrupted:
                    stopped = interrupted[0]
                    break
                if self.seconds - before >= self.max_seconds and self.step < self.iterations:
                    stopped = "max_seconds"
                    break
            if saved_at != self.step:
                self.save()
        return TrainResult(self.step, self.seconds, stopped, self.checkpoint)

    def iterate(self, batch: TaskBatch, progress: Progress) -> None:
        """One iteration: gradient, check, step."""
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.algorithm.meta_gradient(batch, self.chunk_size)
        self.check_finite(metrics["losses"], batch)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self.window_steps += 1
        for name, value in _means(metrics).items():
            self.window[name] = self.window.get(name, 0.0) + value
        if progress.due():
            speed = self.meta_batch * self.step / self.seconds if self.seconds else 0.0
            shown = {name: total / self.window_steps for name, total in self.window.items()}
            progress.show(self.step, speed, **shown)

    def log(self, metrics: MetricsFile | None) -> bool:
        """Write this step's line of metrics if it has one; whether a validation was the best."""
        validating = self.validate is not None and self.step % self.validate_every == 0
        if not validating and self.step % self.log_every:
            return False
        values: dict[str, Any] = {
            name: total / self.window_steps for name, total in self.window.items()
        }
        self.window, self.window_steps = {}, 0
        values["lr"] = float(self.optimizer.param_groups[0]["lr"])
        improved = False
        if validating and self.validate is not None:
            evaluation = self.validate(self.algorithm)
            values["validation"] = evaluation.to_json()
            last = evaluation.last
            score = last.accuracy.mean if last.accuracy is not None else -last.loss.mean
            improved = score > self.best
            self.best = max(self.best, score)
        values["seconds"] = round(self.seconds, 3)
        if metrics is not None:
            metrics.write(self.step, values)
        return improved

    def check_finite(self, losses: Tensor, batch: TaskBatch) -> None:
        """Stop before a number that is none reaches the parameters."""
        step = self.step + 1
        ids = batch.task_id
        where = f"at step {step}"
        kept = f"; the last checkpoint is {self.checkpoint}" if self.checkpoint else ""
        if not bool(losses.isfinite().all()):
            bad = (~losses.isfinite()).nonzero().flatten()
            tasks = tuple((bad if ids is None else ids[bad]).tolist())
            shown = ", ".join(map(str, tasks[:8])) + (", ..." if len(tasks) > 8 else "")
            raise NonFiniteLoss(
                f"train: the loss must be finite, got {losses[bad[0]].item()} {where} in "
                f"{len(tasks)} of {losses.numel()} tasks (task ids {shown}): look at "
                f"sample({step}, task_ids), or try a smaller inner rate{kept}",
                step,
                tasks,
            )
        gradients = [
            value.grad
            for group in self.optimizer.param_groups
            for value in group["params"]
            if value.grad is not None
        ]
        # A sum is finite only if every term is, and in float64 it does not overflow.
        sums = [gradient.sum(dtype=torch.float64) for gradient in gradients]
        if not sums or bool(torch.stack(sums).isfinite().all()):
            return
        names = [
            name
            for name, value in self.algorithm.named_parameters()
            if value.grad is not None and not bool(value.grad.isfinite().all())
        ]
        raise NonFiniteLoss(
            f"train: the meta-gradient must be finite, got values that are not {where} in "
            f"{', '.join(names)} though every loss is finite: try a smaller inner rate{kept}",
            step,
            tuple(range(losses.numel()) if ids is None else ids.tolist()),
        )


def _means(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """One number each for a line of metrics."""
    values = {"loss": metrics["loss"].item()}
    support = metrics.get("support_loss")
    if support is not None and support.numel():
        values["support_loss"] = support[:, 0].mean().item()
    if "accuracy" in metrics:
        values["accuracy"] = metrics["accuracy"].mean().item()
    return values


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that gets the name of a signal when one asks the run to end."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def handle(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
