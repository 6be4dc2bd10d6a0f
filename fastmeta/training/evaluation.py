"""Evaluation: a fixed list of tasks, after each inner step, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, positive_int, type_error, value_error, whole_number
from fastmeta.algorithms import Algorithm
from fastmeta.batch import Examples, TaskBatch
from fastmeta.tasks import TaskSource
from fastmeta.training.statistics import DIVERGED, Summary, summarize


@dataclass(frozen=True)
class StepResult:
    """How the tasks stand after one number of inner steps.

    Attributes:
        steps: inner steps taken.
        loss: the query loss.
        accuracy: the query accuracy, where the targets are classes.
    """

    steps: int
    loss: Summary
    accuracy: Summary | None = None


@dataclass(frozen=True)
class Evaluation:
    """The outcome on a fixed list of tasks.

    Attributes:
        results: one entry per number of inner steps, in order.
        split: the split that the tasks are of.
        step: the step that they were drawn with; with the source's seed and the indices 0 to
            ``tasks - 1`` it says exactly which they are.
        transductive: whether queries of a task were seen together (see :func:`evaluate`).
    """

    results: tuple[StepResult, ...]
    split: str
    step: int
    transductive: bool

    @property
    def last(self) -> StepResult:
        """The result after the most inner steps."""
        return self.results[-1]

    def after(self, steps: int) -> StepResult:
        """The result after this many inner steps.

        Raises:
            ValueError: that number was not evaluated.
        """
        for result in self.results:
            if result.steps == steps:
                return result
        there = ", ".join(str(result.steps) for result in self.results)
        raise value_error("after", "steps", f"be one of {there}", steps)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "split": self.split,
            "step": self.step,
            "transductive": self.transductive,
            "results": [
                {
                    "steps": result.steps,
                    "loss": result.loss.to_json(),
                    **({"accuracy": result.accuracy.to_json()} if result.accuracy else {}),
                }
                for result in self.results
            ],
        }

    def table(self) -> str:
        """The results as lines of text.

        Example:
            >>> loss = Summary(mean=0.5, median=0.4, interval=0.02, tasks=600)
            >>> print(Evaluation((StepResult(1, loss),), "test", 0, True).table())
            steps         loss mean +- 95 %      median
                1          0.5000 +- 0.0200      0.4000
        """
        diverged = any(result.loss.diverged for result in self.results)
        with_accuracy = any(result.accuracy for result in self.results)
        lines = [f"{'steps':>5}  {'loss mean +- 95 %':>24}  {'median':>10}"]
        if with_accuracy:
            lines[0] += f"  {'accuracy +- 95 %':>20}"
        if diverged:
            lines[0] += f"  {'diverged':>8}"
        for result in self.results:
            loss = result.loss
            digits = ".4f" if loss.mean < DIVERGED else ".3g"
            mean = f"{loss.mean:{digits}} +- {loss.interval:{digits}}"
            if not math.isfinite(loss.mean):
                mean = "not finite"
            line = f"{result.steps:>5}  {mean:>24}  {loss.median:>10.4f}"
            if result.accuracy:
                accuracy = result.accuracy
                line += f"  {f'{accuracy.mean:.2%} +- {accuracy.interval:.2%}':>20}"
            if diverged:
                line += f"  {loss.diverged:>8}"
            lines.append(line)
        if diverged:
            lines.append(
                f"diverged: tasks of {self.last.loss.tasks} whose loss is not finite or above "
                f"{DIVERGED:,.0f}; a mean with such tasks says little, the median more"
            )
        return "\n".join(lines)


def evaluate(
    algorithm: Algorithm,
    source: TaskSource,
    *,
    steps: int | Iterable[int],
    tasks: int = 600,
    split: str = "test",
    step: int = 0,
    chunk_size: int = 100,
    transductive: bool = True,
) -> Evaluation:
    """Query loss and accuracy on held-out tasks, after each number of inner steps.

    The tasks are the fixed list ``(source's seed, step, 0 .. tasks - 1)``: every evaluation sees
    the same ones, whatever the chunk size. The meta-model is not changed: adapted parameters are
    new tensors, and batch normalisation's running statistics are left alone.

    Args:
        algorithm: whose ``adapt`` is evaluated.
        source: where tasks come from.
        steps: the most inner steps I, for 0 to I; or the numbers of steps themselves.
        tasks: how many tasks T.
        split: which split they are drawn from.
        step: the step they are drawn with.
        chunk_size: tasks to hold at once.
        transductive: whether the queries of a task go through the model together, as MAML's code
            does, so that batch normalisation normalises each with the others' statistics. False:
            one query at a time, together with the support rows (a model without batch statistics
            gives the same numbers either way).

    Returns:
        Mean, median and 95 % interval over tasks, for each number of steps.

    Raises:
        TypeError, ValueError: an argument is not what it must be.

    Example:
        >>> import torch
        >>> from fastmeta import MAML
        >>> from fastmeta.tasks import Sinusoid
        >>> maml = MAML(torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss)
        >>> result = evaluate(maml, Sinusoid(shots=5), steps=2, tasks=20)
        >>> [(r.steps, r.loss.tasks) for r in result.results]
        [(0, 20), (1, 20), (2, 20)]

    Reference:
        Finn, Abbeel, Levine (2017), section 5: 600 tasks, 95 % intervals.
    """
    op = "evaluate"
    if not isinstance(algorithm, Algorithm):
        raise type_error(op, "algorithm", "be an Algorithm such as MAML", describe(algorithm))
    if isinstance(steps, int):
        counts = list(range(whole_number(op, "steps", steps) + 1))
    else:
        counts = sorted({whole_number(op, "steps", count) for count in steps})
    if not counts:
        raise value_error(op, "steps", "name at least one number of steps", "none")
    positive_int(op, "tasks", tasks)
    positive_int(op, "chunk_size", chunk_size)
    losses: dict[int, list[Tensor]] = {count: [] for count in counts}
    hits: dict[int, list[Tensor]] = {count: [] for count in counts}
    for first in range(0, tasks, chunk_size):
        indices = range(first, min(first + chunk_size, tasks))
        whole = TaskBatch.of(source.sample(step, indices, split=split))
        for batch in _rectangles(whole):
            for count in counts:
                output = _predict(algorithm, batch, count, transductive)
                losses[count].append(_losses(algorithm, output, batch))
                accuracy = _accuracy(output, batch.query)
                if accuracy is not None:
                    hits[count].append(accuracy)
    results = tuple(
        StepResult(
            count,
            summarize(torch.cat(losses[count])),
            summarize(torch.cat(hits[count])) if hits[count] else None,
        )
        for count in counts
    )
    return Evaluation(results, split, step, transductive)


def _rectangles(batch: TaskBatch) -> Iterator[TaskBatch]:
    """The batch as it is, or with weights task by task without the rows of weight zero.

    What pads a task must reach neither batch statistics nor the loss: it may hold anything.
    """
    if batch.support.weight is None and batch.query.weight is None:
        yield batch
        return
    for task in batch.chunks(1):
        support, query = _kept(task.support), _kept(task.query)
        yield TaskBatch.of(TaskBatch(support, query, task.classes, task.task_id))


def _kept(side: Examples) -> Examples:
    """One task's rows ``[1, S, ...]`` whose weight is not zero."""
    if side.weight is None:
        return side
    kept = side.weight[0] > 0
    # An index names rows by their place, which must stay.
    if side.index is not None or bool(kept.all()):
        return side
    x, y, weight = pytree.tree_map(lambda leaf: leaf[:, kept], (side.x, side.y, side.weight))
    return Examples(x, y, weight)


@torch.no_grad()
def _predict(algorithm: Algorithm, batch: TaskBatch, steps: int, transductive: bool) -> Tensor:
    """Query outputs ``[T, Q, ...]`` after so many inner steps."""
    adapted = algorithm.adapt(batch.support, steps=steps)
    query = batch.query.x
    if transductive:
        return _tensor(adapted(query))
    if not isinstance(query, Tensor):
        must = "be True unless x is one tensor"
        raise value_error("evaluate", "transductive", must, describe(query))
    side = batch.support
    support = _kept(Examples(side.x, side.y, side.weight)).x
    one_by_one = [
        _tensor(adapted(torch.cat([support, query[:, row : row + 1]], dim=1)))[:, -1]
        for row in range(query.shape[1])
    ]
    return torch.stack(one_by_one, dim=1)


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise type_error("evaluate", "the model", "return one tensor", describe(output))
    return output


@torch.no_grad()
def _losses(algorithm: Algorithm, output: Tensor, batch: TaskBatch) -> Tensor:
    """The query loss of each task ``[T]``; the user's loss sees one task at a time."""
    values = []
    for task in range(batch.num_tasks):
        query = batch[task].query
        value = algorithm.loss(output[task], query.y)
        if value.ndim:
            weight = torch.ones_like(value) if query.weight is None else query.weight
            value = (weight * value).sum() / weight.sum()
        values.append(value)
    return torch.stack(values)


def _accuracy(output: Tensor, query: Examples) -> Tensor | None:
    """The share of queries ``[T]`` whose largest output is their class; None for other targets."""
    y = query.y
    if not isinstance(y, Tensor) or y.is_floating_point() or output.ndim != y.ndim + 1:
        return None
    right = (output.argmax(-1) == y).to(torch.float64).flatten(1)
    if query.weight is None:
        return right.mean(1)
    return (right * query.weight).sum(1) / query.weight.sum(1)
