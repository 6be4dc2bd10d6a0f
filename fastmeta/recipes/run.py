"""Run a recipe: train it into a folder, evaluate it, report it."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from fastmeta._checks import positive_int, value_error
from fastmeta.recipes.base import Recipe
from fastmeta.recipes.maml_omniglot import MAMLOmniglot
from fastmeta.recipes.maml_sinusoid import MAMLSinusoid
from fastmeta.training.checkpoint import Checkpoint, CheckpointFolder, sync_folder
from fastmeta.training.loop import CHECKPOINTS, METRICS, STATE, train
from fastmeta.training.report import Report, write_report
from fastmeta.training.settings import check_model, check_settings

RECIPES: dict[str, type[Recipe]] = {kind.name: kind for kind in (MAMLSinusoid, MAMLOmniglot)}
REPORT = "report"
_RUN = "run.json"
# A finished run may go on for longer; everything else must stay as it was.
_MAY_CHANGE = ("iterations",)


def run(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    resume: bool = False,
    chunk_size: int | None = None,
    max_seconds: float | None = None,
    validate_every: int | None = None,
    progress: bool = True,
) -> Report | signal.Signals:
    """Train a recipe in a folder, evaluate it on held-out tasks, and write its report.

    The folder gets ``run.json`` (the settings), ``metrics.jsonl``, ``checkpoints/`` and
    ``report/``.

    Args:
        recipe: what to run.
        out: the folder.
        data_root: where the data lie, for recipes that need any.
        resume: go on from the newest whole checkpoint there.
        chunk_size: tasks to hold at once.
        max_seconds: end the training after about this long; it is evaluated all the same.
        validate_every: iterations between two validations; the best checkpoint is kept then.
        progress: show progress on standard error.

    Returns:
        The report, or the signal that ended the training (a checkpoint is written then).

    Raises:
        ValueError: the folder holds another run; settings that changed; data that are not there.
        NonFiniteLoss: a loss is not finite.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise value_error("run", "out", "be a folder", f"a file, {out}")
    checkpoints = CheckpointFolder(out / CHECKPOINTS, requires=STATE)
    if checkpoints.files():
        if not resume:
            must = "be a folder without checkpoints, unless resuming"
            raise value_error("run", "out", must, str(out))
        stored = _stored(out)
        if type(stored) is not type(recipe):
            must = f"hold a run of {recipe.name}"
            raise value_error("run", "out", must, f"one of {stored.name}")
        check_settings(_fixed(stored), _fixed(recipe))
    learner = recipe.learner()
    source = recipe.source(data_root)
    _store(out, recipe)
    result = train(
        learner,
        source,
        optimizer=recipe.optimizer(learner),
        iterations=recipe.iterations,
        meta_batch=recipe.meta_batch,
        chunk_size=chunk_size,
        out=out,
        resume=resume,
        settings={f"recipe.{name}": value for name, value in _fixed(recipe).items()},
        max_seconds=max_seconds,
        validate=None if validate_every is None else partial(recipe.validate, data_root=data_root),
        validate_every=validate_every,
        progress=progress,
    )
    if result.stopped not in ("finished", "max_seconds"):
        return signal.Signals[result.stopped]
    report = _report(recipe, learner, data_root, result.step, result.seconds, result.stopped)
    write_report(out / REPORT, report, out / METRICS)
    return report


def evaluate_run(
    out: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    best: bool = False,
    tasks: int | None = None,
) -> Report:
    """Evaluate the newest checkpoint of a run, and write its report anew.

    Args:
        out: the run's folder.
        data_root: where the data lie, for recipes that need any.
        best: the best checkpoint on validation in place of the newest.
        tasks: held-out tasks in place of the recipe's number; then no report is written.

    Returns:
        The report.

    Raises:
        ValueError: the folder holds no run, or no whole checkpoint.
    """
    out = Path(out)
    recipe = _stored(out)
    folder = CheckpointFolder(out / CHECKPOINTS, requires=STATE)
    checkpoint = folder.best() if best else folder.latest()
    if checkpoint is None:
        must = f"hold a {'best ' if best else ''}checkpoint"
        raise value_error("evaluate", "the run folder", must, f"none in {folder.folder}")
    learner = recipe.learner()
    check_model(checkpoint.state["algorithm"], learner.state_dict())
    learner.load_state_dict(checkpoint.state["algorithm"])
    shown = recipe
    if tasks is not None:
        shown = _with_tasks(recipe, positive_int("evaluate", "tasks", tasks))
    report = _report(shown, learner, data_root, *_where(checkpoint))
    if tasks is None:
        write_report(out / REPORT, report, out / METRICS)
    return report


def _report(
    recipe: Recipe,
    learner: Any,
    data_root: str | os.PathLike[str] | None,
    step: int,
    seconds: float,
    stopped: str,
) -> Report:
    notes = list(recipe.notes())
    if not recipe.as_preset:
        notes.append(f"Settings differ from the preset {recipe.preset!r}: no floors apply.")
    return Report(
        name=recipe.name,
        settings=recipe.settings(),
        iterations=step,
        planned=recipe.iterations,
        stopped=stopped,
        seconds=seconds,
        evaluations=recipe.evaluate(learner, data_root),
        targets=recipe.targets(),
        notes=notes,
    )


def _where(checkpoint: Checkpoint) -> tuple[int, float, str]:
    return checkpoint.step, float(checkpoint.state["seconds"]), f"from {checkpoint.path.name}"


def _with_tasks(recipe: Recipe, tasks: int) -> Recipe:
    return type(recipe)(**{**recipe.settings(), "evaluation_tasks": tasks})


def _fixed(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in recipe.settings().items() if name not in _MAY_CHANGE}


def _store(out: Path, recipe: Recipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"recipe": recipe.name, "settings": recipe.settings()}, indent=2)
    temporary = out / f".{_RUN}.tmp"
    temporary.write_text(content + "\n", encoding="utf-8")
    os.replace(temporary, out / _RUN)
    sync_folder(out)


def _stored(out: Path) -> Recipe:
    path = out / _RUN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, settings = RECIPES[content["recipe"]], content["settings"]
        return kind(**settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = "none" if isinstance(error, FileNotFoundError) else str(error)
        must = f"hold a run ({_RUN} of a recipe of this version)"
        raise value_error("run", f"the folder {out}", must, why) from error
