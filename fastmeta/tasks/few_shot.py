"""N-way K-shot episodes from any labelled data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from fastmeta import random
from fastmeta._checks import (
    describe,
    number,
    positive_int,
    tensor,
    type_error,
    value_error,
    whole_number,
)
from fastmeta.batch import Examples, TaskBatch, trusted
from fastmeta.tasks._gather import gather_rows
from fastmeta.tasks.source import TaskSource, stream_of

__all__ = ["FewShot", "Rotations", "Splits"]

Rotations: TypeAlias = Literal["none", "classes", "drawn"]
Splits: TypeAlias = Mapping[str, Sequence[int] | Tensor | float]

_Source = TypeVar("_Source", bound="FewShot")
_CLASSES, _ROTATION, _ROWS = range(3)  # the purposes of the draws
_QUARTERS = 4


@dataclass(frozen=True)
class _Split:
    """The classes of one split, C of them, as ranges of the rows sorted by class."""

    labels: Tensor  # [C] int64, as the user numbers them
    first: Tensor  # [C]
    count: Tensor  # [C]
    most: int
    equal: bool  # all counts are `most`


class FewShot(TaskSource):
    """N-way K-shot Q-query classification from labelled examples.

    An episode draws N classes of its split in random order and K + Q different examples of each.
    The position in that order is the label, so labels are shuffled from task to task, and no
    example is in both support and query. Rows are class-major: row ``n * K + k`` of the support
    and row ``n * Q + q`` of the query have label n.

    Args:
        x: ``[M, ...]`` examples. Bytes (uint8) are kept as bytes and divided by ``divisor`` when
            drawn; any other dtype is drawn as it is.
        y: ``[M]`` integers, the class of each.
        ways: classes N of an episode.
        shots: support rows K of each class.
        queries: query rows Q of each class.
        splits: which classes belong to which split: for each name the list of its classes, or for
            each name a fraction of all classes (a seeded shuffle is cut; a rest of less than one
            class goes to the first). No class may be in two. None: all in one, "train".
        split: the split of :meth:`sample` when it is given none; the first if None.
        split_seed: the seed of the shuffle that fractions cut. It is not ``seed``, so that other
            tasks are never drawn from other splits of the classes.
        rotations: "classes" makes an image turned by 90, 180 and 270 degrees another class, as
            Vinyals et al. do; "drawn" draws a turn for each class of an episode, so that its N
            classes are N different originals, as MAML's code does; "none" turns nothing.
        divisor: what bytes are divided by.
        seed: which run, in ``[0, 2**64)``.
        dtype: what bytes become, float32 or float64.
        device: where examples are kept and tasks are made; None: where ``x`` is.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: x and y that disagree, too few classes for N or examples for K + Q in any
            split, a class in two splits, an unknown class or split, images that are not square.

    Example:
        >>> import torch
        >>> x, y = torch.rand(100, 8), torch.arange(100) % 10
        >>> source = FewShot(x, y, ways=5, shots=1, queries=4, splits={"train": 0.5, "test": 0.5})
        >>> batch = source.batch(step=0, num_tasks=32, split="test")
        >>> batch.support.x.shape, batch.query.y.shape
        (torch.Size([32, 5, 8]), torch.Size([32, 20]))
        >>> batch.support.y[0]
        tensor([0, 1, 2, 3, 4])

    Reference:
        Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra (2016), "Matching Networks for One
        Shot Learning", sections 2.2 and 4.1.1: episodes, and rotations as new classes.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        ways: int,
        shots: int,
        queries: int,
        splits: Splits | None = None,
        split: str | None = None,
        split_seed: int = 0,
        rotations: Rotations = "none",
        divisor: float = 255.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        op = type(self).__name__
        _check_data(op, x, y)
        if rotations not in get_args(Rotations):
            raise value_error(op, "rotations", f"be one of {get_args(Rotations)}", rotations)
        if rotations != "none" and (x.ndim < 3 or x.shape[-1] != x.shape[-2]):
            raise value_error(op, "x", "be square images [M, ..., H, H] to be rotated", x)
        if dtype not in (torch.float32, torch.float64):
            raise type_error(op, "dtype", "be float32 or float64", describe(dtype))
        self.seed = whole_number(op, "seed", seed)
        self.rotations = rotations
        self.dtype = dtype
        self.device = x.device if device is None else torch.device(device)
        self._divisor = number(op, "divisor", divisor)
        self._row_shape = tuple(x.shape[1:])
        self._table = self._prepare(x)
        order = y.to(torch.int64).argsort(stable=True)
        # Sorted data (files are read class by class) needs no second look-up.
        in_order = torch.equal(order, torch.arange(len(order), device=order.device))
        self._order = None if in_order else order.to(self.device)
        self._splits = _cut(op, y.to(torch.int64)[order].cpu(), splits, split_seed, self.device)
        self.split = next(iter(self._splits)) if split is None else split
        self._find(self.split)
        self._set_episode(ways, shots, queries)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self._splits)

    def num_classes(self, split: str | None = None) -> int:
        """How many classes an episode of a split can draw from, rotated ones included.

        Args:
            split: its name; None for the default one.
        """
        return len(self._find(split).labels) * self._class_variants

    def replace(
        self: _Source,
        *,
        ways: int | None = None,
        shots: int | None = None,
        queries: int | None = None,
        split: str | None = None,
        seed: int | None = None,
    ) -> _Source:
        """The same data with other episodes; nothing is copied.

        Args:
            ways: classes N; None keeps what it was, here and below.
            shots: support rows K of each class.
            queries: query rows Q of each class.
            split: the default split.
            seed: which run.

        Returns:
            A new source.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: too few classes or examples, or an unknown split.

        Example:
            >>> import torch
            >>> x, y = torch.rand(60, 8), torch.arange(60) % 6
            >>> source = FewShot(x, y, ways=5, shots=1, queries=4)
            >>> source.replace(shots=5, queries=5).batch(0, 2).support.x.shape
            torch.Size([2, 25, 8])
        """
        other = copy.copy(self)
        if split is not None:
            self._find(split)
            other.split = split
        if seed is not None:
            other.seed = whole_number(type(self).__name__, "seed", seed)
        other._set_episode(
            self.ways if ways is None else ways,
            self.shots if shots is None else shots,
            self.queries if queries is None else queries,
        )
        return other

    def sample(self, step: int, indices: random.Index, *, split: str | None = None) -> TaskBatch:
        """Exactly the tasks ``(seed, step, index)`` for each index.

        Args:
            step: which meta-batch, at least 0.
            indices: ``[T]``: which tasks of it.
            split: whose classes; None for the default split.

        Returns:
            x ``[T, N * K, ...]`` and ``[T, N * Q, ...]``, y int64 ``[T, N * K]`` and
            ``[T, N * Q]``; ``classes`` holds ``label`` (int64 ``[T, N]``, the class that each
            label stands for) and, with rotations, ``rotation`` (int64 ``[T, N]``, its quarter
            turns counter-clockwise).

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: an argument out of range, or an unknown split.
        """
        name = self.split if split is None else split
        part = self._find(name)
        tasks = random.as_index(indices, device=self.device)
        key = self.seed, step, tasks
        chosen, turns = self._draw_classes(key, name, part)
        per_class = self.shots + self.queries
        population = part.most if part.equal else part.count[chosen]
        rows = random.choice(
            *key,
            stream_of("FewShot", name, _ROWS),
            (self.ways, per_class),
            population,
            at_most=part.most,
        )
        rows += part.first[chosen].unsqueeze(-1)
        if self._order is not None:
            rows = self._order[rows]
        classes = {"label": part.labels[chosen]}
        if turns is not None:
            rows = rows.mul_(_QUARTERS).add_(turns.unsqueeze(-1))
            classes["rotation"] = turns
        support, query = rows.tensor_split([self.shots], dim=2)
        return trusted(TaskBatch(self._examples(support), self._examples(query), classes, tasks))

    def _draw_classes(
        self, key: tuple[int, int, Tensor], name: str, part: _Split
    ) -> tuple[Tensor, Tensor | None]:
        """``[T, N]`` positions in the split's classes and, with rotations, quarter turns."""
        total = len(part.labels) * self._class_variants
        chosen = random.choice(*key, stream_of("FewShot", name, _CLASSES), self.ways, total)
        if self.rotations == "none":
            return chosen, None
        if self.rotations == "classes":
            return chosen // _QUARTERS, chosen % _QUARTERS
        stream = stream_of("FewShot", name, _ROTATION)
        return chosen, random.integers(*key, stream, self.ways, _QUARTERS)

    def _examples(self, rows: Tensor) -> Examples:
        """``rows [T, N, n]`` to a side of n rows a class."""
        num_tasks, ways, per_class = rows.shape
        x = gather_rows(self._table, rows.flatten(1), self._divisor, self.dtype)
        y = torch.arange(ways, device=self.device).repeat_interleave(per_class)
        return Examples(x.view(num_tasks, -1, *self._row_shape), y.repeat(num_tasks, 1))

    @property
    def _class_variants(self) -> int:
        return _QUARTERS if self.rotations == "classes" else 1

    def _prepare(self, x: Tensor) -> Tensor:
        """``[M, W]``, or ``[M * 4, W]`` with the turned images: copying rows beats turning them."""
        x = x.detach().to(self.device)
        if self.rotations != "none":
            turned = [x.rot90(k, (-2, -1)) for k in range(_QUARTERS)]
            return torch.stack(turned, dim=1).reshape(len(x) * _QUARTERS, -1)
        return x.reshape(len(x), -1).contiguous()

    def _find(self, split: str | None) -> _Split:
        name = self.split if split is None else split
        found = self._splits.get(name)
        if found is None:
            op = type(self).__name__
            raise value_error(op, "split", f"be one of {list(self._splits)}", repr(name))
        return found

    def _set_episode(self, ways: int, shots: int, queries: int) -> None:
        op = type(self).__name__
        self.ways = positive_int(op, "ways", ways)
        self.shots = positive_int(op, "shots", shots)
        self.queries = positive_int(op, "queries", queries)
        for name, part in self._splits.items():
            total = len(part.labels) * self._class_variants
            if self.ways > total:
                must = f"be at most the {total} classes of split {name!r}"
                raise value_error(op, "ways", must, self.ways)
            fewest = int(part.count.argmin())
            count, label = int(part.count[fewest]), int(part.labels[fewest])
            if self.shots + self.queries > count:
                must = f"be at most the {count} examples of class {label} in split {name!r}"
                got = f"{self.shots} + {self.queries}"
                raise value_error(op, "shots + queries", must, got)


def _check_data(op: str, x: Tensor, y: Tensor) -> None:
    tensor(op, "x", x)
    tensor(op, "y", y)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise type_error(op, "y", "hold integers", describe(y))
    if y.ndim != 1 or len(y) == 0:
        raise value_error(op, "y", "have shape [M] with M at least 1", y)
    if x.ndim < 2 or len(x) != len(y):
        raise value_error(op, "x", f"have shape [{len(y)}, ...] like y", x)


def _cut(
    op: str, labels: Tensor, splits: Splits | None, seed: int, device: torch.device
) -> dict[str, _Split]:
    """The splits of ``labels [M]``, which are sorted."""
    every, counts = torch.unique_consecutive(labels, return_counts=True)
    first = counts.cumsum(0) - counts
    place = {label: i for i, label in enumerate(every.tolist())}
    if splits is None:
        parts: dict[str, Iterable[int]] = {"train": range(len(every))}
    elif not hasattr(splits, "items") or not splits:
        raise type_error(op, "splits", "map names to classes or fractions", describe(splits))
    elif all(isinstance(value, float) for value in splits.values()):
        parts = _by_fraction(op, splits, len(every), seed)
    else:
        parts = _by_list(op, splits, place)
    result = {}
    for name, members in parts.items():
        index = torch.tensor(sorted(members), dtype=torch.int64)
        if index.numel() == 0:
            raise value_error(op, f"splits[{name!r}]", "hold at least one class", "none")
        count = counts[index]
        most, least = int(count.max()), int(count.min())
        label, start = every[index].to(device), first[index].to(device)
        result[name] = _Split(label, start, count.to(device), most, most == least)
    return result


def _by_fraction(op: str, splits: Splits, total: int, seed: int) -> dict[str, Iterable[int]]:
    fractions = {
        name: number(op, f"splits[{name!r}]", value, at_least=0.0) for name, value in splits.items()
    }
    whole = sum(fractions.values())
    if whole > 1.0 + 1e-9:
        raise value_error(op, "splits", "have fractions that sum to at most 1", f"{whole:g}")
    sizes = [int(value * total + 1e-9) for value in fractions.values()]
    if whole > 1.0 - 1e-9:
        sizes[0] += total - sum(sizes)
    order = np.asarray(random.permutation(seed, 0, [0], stream_of(op, "", 0), total)[0])
    ends = np.cumsum(sizes)
    return {
        name: order[end - size : end].tolist()
        for name, size, end in zip(fractions, sizes, ends, strict=True)
    }


def _by_list(op: str, splits: Splits, place: dict[int, int]) -> dict[str, Iterable[int]]:
    owner: dict[int, str] = {}
    parts: dict[str, Iterable[int]] = {}
    for name, members in splits.items():
        argument = f"splits[{name!r}]"
        values = members.tolist() if isinstance(members, (Tensor, np.ndarray)) else members
        if isinstance(values, (str, bytes, float)) or not isinstance(values, Iterable):
            must = "be a list of classes, or every split a fraction"
            raise type_error(op, argument, must, describe(values))
        parts[name] = mine = []
        for value in values:
            label = whole_number(op, argument, value, at_least=-(1 << 63))
            if label not in place:
                raise value_error(op, argument, "hold classes that occur in y", label)
            if label in owner:
                got = f"class {label} of split {owner[label]!r} again"
                raise value_error(op, argument, "hold each class once, in one split", got)
            owner[label] = name
            mine.append(place[label])
    return parts
