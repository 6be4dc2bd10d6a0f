"""Any labelled dataset as a source of few-shot episodes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastmeta._checks import describe, type_error, value_error
from fastmeta.tasks.few_shot import FewShot, Rotations, Splits

__all__ = ["from_dataset"]

_OP = "from_dataset"


def from_dataset(
    data: Any,
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
) -> FewShot:
    """A source of N-way K-shot episodes from labelled data of one's own.

    The examples are read once and kept in memory (bytes as bytes), so that drawing tasks is index
    arithmetic and a copy.

    Args:
        data: a pair of tensors or arrays ``(x [M, ...], y [M])``, or a torch ``Dataset`` (any
            sized or iterable collection) of pairs ``(example, label)``, whose examples have one
            shape and are tensors, arrays, PIL images (they become ``[C, H, W]`` bytes) or numbers.
        ways: classes N of an episode.
        shots: support rows K of each class.
        queries: query rows Q of each class.
        splits: classes or fractions by split name, as in :class:`FewShot`.
        split: the default split.
        split_seed: the seed of the shuffle that fractions cut.
        rotations: "none", "classes" or "drawn", as in :class:`FewShot`.
        divisor: what bytes are divided by.
        seed: which run.
        dtype: what bytes become.
        device: where examples are kept and tasks are made.

    Returns:
        The source.

    Raises:
        TypeError: data of another kind.
        ValueError: no data, examples of different shapes, or what :class:`FewShot` refuses.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.rand(60, 3, 8, 8), torch.arange(60) % 6)
        >>> from_dataset(dataset, ways=5, shots=1, queries=4).batch(0, 2).query.x.shape
        torch.Size([2, 20, 3, 8, 8])

    Reference:
        Vinyals et al. (2016), "Matching Networks for One Shot Learning", section 2.2.
    """
    x, y = _load(data)
    return FewShot(
        x,
        y,
        ways=ways,
        shots=shots,
        queries=queries,
        splits=splits,
        split=split,
        split_seed=split_seed,
        rotations=rotations,
        divisor=divisor,
        seed=seed,
        dtype=dtype,
        device=device,
    )


def _load(data: Any) -> tuple[Tensor, Tensor]:
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(map(_is_array, data)):
        return _tensor(data[0]), _tensor(data[1])
    must = "be a pair of tensors (x, y) or a dataset of pairs (example, label)"
    if isinstance(data, (Tensor, str, bytes, dict)):
        raise type_error(_OP, "data", must, describe(data))
    if isinstance(data, Sized) and hasattr(data, "__getitem__"):
        size: int | None = len(data)
        # by number: the old protocol of iteration would run past the end of many a dataset
        items: Iterable[Any] = (data[i] for i in range(len(data)))
    elif isinstance(data, Iterable):
        size, items = None, data
    else:
        raise type_error(_OP, "data", must, describe(data))
    return _stack(items, size)


def _stack(items: Iterable[Any], size: int | None) -> tuple[Tensor, Tensor]:
    rows: list[Tensor] = []
    labels: list[int] = []
    whole: Tensor | None = None
    for i, item in enumerate(items):
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise type_error(_OP, f"data[{i}]", "be a pair (example, label)", describe(item))
        row = _example(i, item[0])
        if i == 0:
            like = row
            if size is not None:  # filled in place: the data is in memory once, not twice
                whole = torch.empty((size, *row.shape), dtype=row.dtype)
        if row.shape != like.shape or row.dtype != like.dtype:
            raise value_error(_OP, f"data[{i}][0]", f"be {describe(like)} like the first", row)
        if whole is None:
            rows.append(row)
        else:
            whole[i] = row
        labels.append(_label(i, item[1]))
    if not labels:
        raise value_error(_OP, "data", "hold at least one example", "none")
    return torch.stack(rows) if whole is None else whole, torch.tensor(labels)


def _example(i: int, value: Any) -> Tensor:
    if _is_array(value):
        row = _tensor(value)
    elif hasattr(value, "getbands"):  # a PIL image, without importing PIL
        pixels = np.array(value.convert("L") if value.mode == "1" else value)
        row = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
    elif isinstance(value, (int, float)):
        row = torch.tensor([value])
    else:
        must = "be a tensor, an array, an image or a number"
        raise type_error(_OP, f"data[{i}][0]", must, describe(value))
    return row if row.ndim else row[None]


def _label(i: int, value: Any) -> int:
    label = value.tolist() if _is_array(value) else value
    if type(label) is list and len(label) == 1:
        label = label[0]
    try:
        if isinstance(label, bool):
            raise TypeError
        return operator.index(label)
    except TypeError:
        must = "be a whole number"
        raise type_error(_OP, f"data[{i}][1]", must, describe(value)) from None


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, np.generic))


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
