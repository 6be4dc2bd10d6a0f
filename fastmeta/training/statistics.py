"""What is said about a sample of tasks: mean, median, and how sure we are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta._checks import describe, type_error, value_error

# A task whose loss is above this counts as diverged: a few such decide a mean by themselves.
DIVERGED = 1e3


@dataclass(frozen=True)
class Summary:
    """A sample of tasks in four numbers.

    Attributes:
        mean: the mean over tasks; infinite when a task is not finite.
        median: the median over tasks. A task whose value is not finite counts as infinitely bad,
            so a few that diverge move the median by a few ranks.
        interval: half the width of the 95 % interval of the mean, 1.96 sigma / sqrt(n), with the
            unbiased sigma; 0 for one task, infinite when a task is not finite.
        tasks: how many tasks, n.
        diverged: how many of them are not finite, or above 1,000.

    Example:
        >>> import torch
        >>> print(summarize(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        2.500 +- 1.265 (median 2.500, 4 tasks)

    Reference:
        Finn, Abbeel, Levine (2017), section 5: intervals over tasks; their code uses
        1.96 sigma / sqrt(600).
    """

    mean: float
    median: float
    interval: float
    tasks: int
    diverged: int = 0

    def __str__(self) -> str:
        lost = f", {self.diverged} diverged" if self.diverged else ""
        return (
            f"{self.mean:.3f} +- {self.interval:.3f} "
            f"(median {self.median:.3f}, {self.tasks} tasks{lost})"
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers for a JSON file, which has no infinity: None stands for it."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def summarize(values: Tensor) -> Summary:
    """Mean, median and 95 % interval of one number per task.

    Args:
        values: ``[T]``, one number per task, T at least 1.

    Returns:
        The summary, computed in float64.

    Raises:
        TypeError: ``values`` is no tensor of numbers.
        ValueError: it is empty or has more than one axis.

    Example:
        >>> import torch
        >>> summarize(torch.tensor([1.0, 2.0, float("nan")])).median
        2.0
    """
    given: Any = values
    if not isinstance(given, Tensor) or given.is_complex():
        raise type_error("summarize", "values", "be a tensor of numbers", describe(values))
    if values.ndim != 1 or values.numel() == 0:
        raise value_error("summarize", "values", "have shape [T] with T at least 1", values)
    sample = values.detach().to("cpu", torch.float64)
    tasks = sample.numel()
    finite = sample.isfinite()
    diverged = int((~finite | (sample > DIVERGED)).sum())
    ranked = sample.where(finite, torch.tensor(math.inf, dtype=torch.float64)).sort().values
    median = float((ranked[(tasks - 1) // 2] + ranked[tasks // 2]) / 2)
    if not bool(finite.all()):
        return Summary(math.inf, median, math.inf, tasks, diverged)
    interval = 1.96 * float(sample.std()) / math.sqrt(tasks) if tasks > 1 else 0.0
    return Summary(float(sample.mean()), median, interval, tasks, diverged)
