"""Sinusoid regression."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmeta import random
from fastmeta._checks import describe, number, positive_int, type_error, value_error, whole_number
from fastmeta.batch import Examples, TaskBatch, trusted
from fastmeta.tasks.source import TaskSource, stream_of

__all__ = ["Sinusoid"]

# pi in two parts: the first has 33 digits, so its product with a small whole number is exact
_PI_HIGH = 3.1415926534682512
_PI_LOW = 1.2154201013012384e-10
_TAYLOR = [(-1) ** n / math.factorial(2 * n + 1) for n in range(10, -1, -1)]


class Sinusoid(TaskSource):
    r"""Regression on sine curves of random amplitude and phase.

    .. math:: y = A \sin(x - \varphi), \quad A \sim U, \ \varphi \sim U, \ x \sim U

    The curve is computed in float64 from the rounded x by additions and multiplications alone, so
    a task has the same bits on every device. Every split name is accepted; each is an independent
    set of tasks from the same distribution.

    Args:
        shots: support rows K of each task.
        queries: query rows Q of each task; as many as shots if None, as in MAML's code.
        amplitude: the range of A.
        phase: the range of the phase.
        x: the range of x.
        seed: which run, in ``[0, 2**64)``.
        dtype: float32 or float64.
        device: where the tasks are made.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no rows, an empty range, a seed out of range.

    Example:
        >>> batch = Sinusoid(shots=10, queries=20).batch(step=0, num_tasks=25)
        >>> batch.support.x.shape, batch.query.y.shape
        (torch.Size([25, 10, 1]), torch.Size([25, 20, 1]))
        >>> sorted(batch.classes)
        ['amplitude', 'phase']

    Reference:
        Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
        Networks", section 5.1.
    """

    def __init__(
        self,
        shots: int = 5,
        queries: int | None = None,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.shots = positive_int("Sinusoid", "shots", shots)
        self.queries = positive_int("Sinusoid", "queries", shots if queries is None else queries)
        self.amplitude = _range("amplitude", amplitude)
        self.phase = _range("phase", phase)
        self.x = _range("x", x)
        self.seed = whole_number("Sinusoid", "seed", seed)
        if dtype not in (torch.float32, torch.float64):
            raise type_error("Sinusoid", "dtype", "be float32 or float64", describe(dtype))
        self.dtype = dtype
        self.device = torch.device("cpu" if device is None else device)

    def sample(self, step: int, indices: random.Index, *, split: str | None = None) -> TaskBatch:
        """Exactly the tasks ``(seed, step, index)`` for each index.

        Args:
            step: which meta-batch, at least 0.
            indices: ``[T]``: which tasks of it.
            split: any name; None is "train".

        Returns:
            x and y ``[T, K, 1]`` and ``[T, Q, 1]``; ``classes`` is the true function of each task,
            float64 ``{"amplitude": [T], "phase": [T]}``.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: an argument out of range.
        """
        split = "train" if split is None else split
        tasks = random.as_index(indices, device=self.device)
        # one draw for all: the curve, the support rows, the query rows
        stream = stream_of("Sinusoid", split, 0)
        count = 2 + self.shots + self.queries
        unit = random.uniform(self.seed, step, tasks, stream, count, dtype=torch.float64)
        classes = {
            "amplitude": _spread(unit[:, 0], self.amplitude),
            "phase": _spread(unit[:, 1], self.phase),
        }
        x = _spread(unit[:, 2:], self.x).to(self.dtype)
        y = self.function(classes, x)
        xs, xq = (part.contiguous().unsqueeze(-1) for part in x.tensor_split([self.shots], dim=1))
        ys, yq = (part.contiguous().unsqueeze(-1) for part in y.tensor_split([self.shots], dim=1))
        return trusted(TaskBatch(Examples(xs, ys), Examples(xq, yq), classes, tasks))

    @staticmethod
    def function(classes: dict[str, Tensor], x: Tensor) -> Tensor:
        """The true curve of each task, to draw it or to ask for more of it.

        Args:
            classes: ``batch.classes``, ``{"amplitude": [T], "phase": [T]}``.
            x: ``[T, n]``, or ``[n]`` for the same points in every task.

        Returns:
            ``[T, n]`` of the dtype of ``x``.

        Example:
            >>> import torch
            >>> curve = {"amplitude": torch.tensor([2.0]), "phase": torch.tensor([0.0])}
            >>> Sinusoid.function(curve, torch.tensor([0.0, torch.pi / 2]))
            tensor([[0., 2.]])
        """
        angle = x.double() - classes["phase"].double().unsqueeze(-1)
        if angle.device.type == "cpu":  # NumPy's calls cost a third of torch's at these sizes
            sine = torch.from_numpy(_sine(angle.numpy()))
        else:
            sine = _sine(angle)
        return (sine * classes["amplitude"].double().unsqueeze(-1)).to(x.dtype)


_Array = TypeVar("_Array", bound=Any)


def _sine(angle: _Array) -> _Array:
    """Sine to 1e-15 for |angle| below a million, with the same bits wherever it is computed.

    The libraries' own sine differs in the last bit between devices, and between the vectorised
    middle and the scalar end of one array, which would make a task depend on its neighbours.
    """
    turns = (angle * (1.0 / math.pi)).round()
    rest = (angle - turns * _PI_HIGH) - turns * _PI_LOW
    square = rest * rest
    series = square * _TAYLOR[0] + _TAYLOR[1]
    for coefficient in _TAYLOR[2:]:
        series = series * square + coefficient
    result: _Array = series * rest * (1.0 - 2.0 * (turns % 2.0))
    return result


def _spread(unit: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return unit * (high - low) + low


def _range(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise type_error("Sinusoid", name, "be a pair of numbers", describe(value))
    low, high = (number("Sinusoid", name, end) for end in value)
    if low > high:
        raise value_error("Sinusoid", name, "be (low, high) with low <= high", f"({low}, {high})")
    return low, high
