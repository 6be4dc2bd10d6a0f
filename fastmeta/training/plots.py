"""Pictures of a run. matplotlib is loaded when one is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmeta.training.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class MissingPlots(ImportError):  # noqa: N818 - it says what is missing
    """matplotlib is not installed."""


def curve(
    path: str | os.PathLike[str],
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Evaluation],
    title: str,
) -> Path:
    """Draw a run: training on the left, adaptation to held-out tasks on the right.

    Args:
        path: the picture to write; its ending says the format.
        metrics: lines of ``metrics.jsonl``.
        evaluations: what to draw on the right, by label.
        title: the headline.

    Returns:
        ``path``.

    Raises:
        MissingPlots: matplotlib is not installed.
    """
    figure = _figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    name = "accuracy" if any("accuracy" in line for line in metrics) else "loss"
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    left.plot([step for step, _ in points], [value for _, value in points], linewidth=1)
    left.set(xlabel="iteration", ylabel=f"query {name} after adaptation", title="meta-training")
    if name == "loss" and points and min(value for _, value in points) > 0:
        left.set_yscale("log")
    for label, evaluation in evaluations.items():
        _adaptation(right, label, evaluation)
    right.set(xlabel="inner steps", title="held-out tasks")
    right.legend(frameon=False)
    return _save(figure, path, title)


def adapted_curves(
    path: str | os.PathLike[str],
    x: Tensor,
    truth: Tensor,
    support: tuple[Tensor, Tensor],
    predictions: Mapping[int, Tensor],
    title: str,
) -> Path:
    """Draw how predictions of a one-dimensional function move with inner steps, task by task.

    Args:
        path: the picture to write.
        x: ``[n]``, where the functions are drawn.
        truth: ``[T, n]``, the true functions; a panel for each task.
        support: the support points, x and y ``[T, S]``.
        predictions: inner steps -> ``[T, n]``, the predictions after so many.
        title: the headline.

    Returns:
        ``path``.

    Raises:
        MissingPlots: matplotlib is not installed.
    """
    T = truth.shape[0]
    figure = _figure(3.6 * T, 3.4)
    panels = figure.subplots(1, T, squeeze=False)[0]
    for task, panel in enumerate(panels):
        panel.plot(
            x.numpy(), truth[task].numpy(), color="black", linewidth=2, label="true function"
        )
        for number, (steps, prediction) in enumerate(sorted(predictions.items())):
            panel.plot(
                x.numpy(),
                prediction[task].numpy(),
                linestyle="--" if steps == 0 else "-",
                color="gray" if steps == 0 else f"C{number}",
                label="before" if steps == 0 else f"after {steps} step{'s' if steps > 1 else ''}",
            )
        panel.plot(support[0][task].numpy(), support[1][task].numpy(), "k^", label="support points")
        panel.set(xlabel="x")
    panels[0].set(ylabel="y")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    return _save(figure, path, title)


def _adaptation(axes: Axes, label: str, evaluation: Evaluation) -> None:
    steps = [result.steps for result in evaluation.results]
    accuracies = [result.accuracy for result in evaluation.results]
    if all(accuracies):
        means = [item.mean for item in accuracies if item is not None]
        intervals = [item.interval for item in accuracies if item is not None]
        axes.errorbar(steps, means, intervals, marker="o", capsize=3, label=label)
        axes.set_ylabel("query accuracy")
        return
    # A task that is not finite takes the mean with it; the median goes on.
    whole = [result for result in evaluation.results if math.isfinite(result.loss.mean)]
    axes.errorbar(
        [result.steps for result in whole],
        [result.loss.mean for result in whole],
        [result.loss.interval for result in whole],
        marker="o",
        capsize=3,
        label=f"{label} mean",
    )
    medians = [result.loss.median for result in evaluation.results]
    axes.plot(steps, medians, marker=".", linestyle=":", label=f"{label} median")
    axes.set_ylabel("query loss")
    if whole and min(*medians, *(result.loss.mean for result in whole)) > 0:
        axes.set_yscale("log")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPlots(
            "plots: matplotlib must be installed to draw, got none: pip install fastmeta[plot]"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")  # no window, no global state


def _save(figure: Figure, path: str | os.PathLike[str], title: str) -> Path:
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
