"""The report of a run: a folder that says what was done, on what, and what came out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastmeta.training import plots
from fastmeta.training.evaluation import Evaluation
from fastmeta.training.metrics import read_metrics, thin
from fastmeta.training.settings import environment


@dataclass(frozen=True)
class Target:
    """A number to stand beside ours: what to compare with, and what was asked for.

    Attributes:
        metric: ``"loss"`` or ``"accuracy"``, the mean over tasks.
        steps: after how many inner steps.
        reference: the number to compare with, published or measured elsewhere, or None.
        source: where it is from.
        at_least: the least that is asked for, or None.
        at_most: the most that is asked for, or None.
    """

    metric: Literal["loss", "accuracy"]
    steps: int
    reference: float | None = None
    source: str = ""
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, evaluation: Evaluation) -> dict[str, Any]:
        """Our number beside this one; ``met`` is None where nothing was asked for."""
        result = evaluation.after(self.steps)
        ours = result.loss if self.metric == "loss" else result.accuracy
        met: bool | None = None
        if self.at_least is not None or self.at_most is not None:
            low = -math.inf if self.at_least is None else self.at_least
            high = math.inf if self.at_most is None else self.at_most
            met = ours is not None and low <= ours.mean <= high
        return {
            "metric": self.metric,
            "steps": self.steps,
            "reference": self.reference,
            "source": self.source,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "ours": None if ours is None else ours.to_json(),
            "met": met,
        }


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    Attributes:
        name: of the experiment.
        settings: everything that decides the outcome, as plain values; the seed among them.
        iterations: iterations reached.
        planned: iterations that the settings ask for.
        stopped: why the training ended.
        seconds: time spent training.
        evaluations: evaluations by label, the one that targets speak of first.
        targets: numbers to compare with, and floors.
        notes: sentences that a reader needs.
    """

    name: str
    settings: Mapping[str, Any]
    iterations: int
    planned: int
    stopped: str
    seconds: float
    evaluations: Mapping[str, Evaluation]
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=environment)

    @property
    def judged(self) -> list[dict[str, Any]]:
        """The targets with our numbers."""
        first = next(iter(self.evaluations.values()))
        return [target.judge(first) for target in self.targets]

    @property
    def passed(self) -> bool | None:
        """Whether every floor was met; None where none was set."""
        verdicts = [item["met"] for item in self.judged if item["met"] is not None]
        return all(verdicts) if verdicts else None

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "iterations": self.iterations,
            "planned": self.planned,
            "stopped": self.stopped,
            "seconds": round(self.seconds, 1),
            "environment": dict(self.environment),
            "targets": self.judged,
            "passed": self.passed,
            "evaluations": {
                label: evaluation.to_json() for label, evaluation in self.evaluations.items()
            },
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The outcome as lines for a terminal."""
        lines = []
        for label, evaluation in self.evaluations.items():
            lines += [f"{self.name}: {label}, {self.iterations:,} iterations", evaluation.table()]
        for item in self.judged:
            lines.append(_sentence(item))
        lines += self.notes
        return "\n".join(lines)

    def markdown(self, picture: bool) -> str:
        """The outcome as a page."""
        lines = [f"# {self.name}", ""]
        lines.append(
            f"{self.iterations:,} of {self.planned:,} iterations in {self.seconds:,.0f} s "
            f"({self.stopped}), {self.environment['cpu']}, {self.environment['threads']} threads."
        )
        lines += ["", *(["![curve](curve.png)", ""] if picture else [])]
        if self.targets:
            lines += [
                "| after | compared with | asked for | ours | met |",
                "| --- | --- | --- | --- | --- |",
            ]
            for item in self.judged:
                reference = (
                    "-"
                    if item["reference"] is None
                    else (f"{_number(item, item['reference'])} ({item['source']})")
                )
                lines.append(
                    f"| {item['steps']} steps | {reference} | {_range(item)} | {_ours(item)} | "
                    f"{ {True: 'yes', False: 'NO', None: '-'}[item['met']] } |"
                )
            lines.append("")
        for label, evaluation in self.evaluations.items():
            seen = "transductive" if evaluation.transductive else "one query at a time"
            lines += [f"## {label} ({evaluation.split}, {seen})", "", "```", evaluation.table()]
            lines += ["```", ""]
        for note in self.notes:
            lines += [f"- {note}"]
        lines += ["", "## Settings", "", "```"]
        lines += [f"{name}: {value}" for name, value in self.settings.items()]
        lines += ["```", "", "## Environment", "", "```"]
        lines += [f"{name}: {value}" for name, value in self.environment.items()]
        return "\n".join([*lines, "```", ""])


def write_report(
    folder: str | os.PathLike[str],
    report: Report,
    metrics: str | os.PathLike[str] | None = None,
) -> Path:
    """Write ``report.json``, ``report.md``, ``metrics.jsonl`` (thinned) and ``curve.png``.

    Without matplotlib there is no picture, and the report says so.

    Args:
        folder: where to; made when missing.
        report: what to say.
        metrics: the run's ``metrics.jsonl``, or None.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = thin(list(read_metrics(metrics))) if metrics is not None else []
    picture = folder / "curve.png"
    content = report.to_json()
    try:
        plots.curve(picture, lines, report.evaluations, report.name)
    except plots.MissingPlots as error:
        picture.unlink(missing_ok=True)
        content["notes"].append(str(error))
    _write(folder / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    _write(folder / "report.md", report.markdown(picture.exists()))
    if metrics is not None:
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        _write(folder / "metrics.jsonl", text)
    return folder


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sentence(item: Mapping[str, Any]) -> str:
    parts = [f"{item['metric']} after {item['steps']} steps: {_ours(item)}"]
    if item["reference"] is not None:
        parts.append(f"compared with {_number(item, item['reference'])} ({item['source']})")
    if item["met"] is not None:
        parts.append(f"asked for {_range(item)}: {'met' if item['met'] else 'NOT met'}")
    return "; ".join(parts)


def _ours(item: Mapping[str, Any]) -> str:
    ours = item["ours"]
    if ours is None:
        return "none"
    if ours["mean"] is None:
        return f"{ours['diverged']} tasks diverged, median {_number(item, ours['median'])}"
    lost = f", {ours['diverged']} tasks diverged" if ours["diverged"] else ""
    return f"{_number(item, ours['mean'])} +- {_number(item, ours['interval'])}{lost}"


def _range(item: Mapping[str, Any]) -> str:
    low, high = item["at_least"], item["at_most"]
    if low is not None and high is not None:
        return f"{_number(item, low)} to {_number(item, high)}"
    if low is not None:
        return f"at least {_number(item, low)}"
    return "-" if high is None else f"at most {_number(item, high)}"


def _number(item: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2%}" if item["metric"] == "accuracy" else f"{value:.3f}"
