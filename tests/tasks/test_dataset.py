"""Any labelled dataset becomes a source in one call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fastmeta.tasks import FewShot, from_dataset

X = torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator())
Y = torch.arange(60) % 6


class Mapped(Dataset[tuple[Any, Any]]):
    """As most datasets are written: indexing past the end raises nothing useful."""

    def __init__(self, items: list[tuple[Any, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.items[i % len(self.items)]


class Streamed(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((x, int(y)) for x, y in zip(X, Y, strict=True))


def image(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).numpy())


FORMS: dict[str, Callable[[], Any]] = {
    "pair": lambda: (X, Y),
    "list": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "small-labels": lambda: (X, Y.to(torch.uint8)),
    "tensor-dataset": lambda: TensorDataset(X, Y),
    "tensors-and-ints": lambda: Mapped([(x, int(y)) for x, y in zip(X, Y, strict=True)]),
    "tensors-and-tensors": lambda: Mapped(list(zip(X, Y, strict=True))),
    "arrays-and-numpy-ints": lambda: Mapped(
        [(x.numpy(), np.int32(y)) for x, y in zip(X, Y, strict=True)]
    ),
    "images": lambda: Mapped([(image(x), int(y)) for x, y in zip(X, Y, strict=True)]),
    "list-of-pairs": lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "iterable": Streamed,
    "generator": lambda: iter(Streamed()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_source(form: str) -> None:
    options: dict[str, Any] = {"ways": 3, "shots": 1, "queries": 4, "seed": 2}
    expected = FewShot(X, Y, **options).batch(0, 5)
    got = from_dataset(FORMS[form](), **options).batch(0, 5)
    assert got.query.x.equal(expected.query.x)
    assert got.classes["label"].equal(expected.classes["label"])


def test_options_are_passed_on() -> None:
    source = from_dataset(
        (X, Y),
        ways=2,
        shots=1,
        queries=1,
        splits={"a": 0.5, "b": 0.5},
        split="b",
        split_seed=1,
        rotations="classes",
        divisor=1.0,
        dtype=torch.float64,
        device="cpu",
    )
    batch = source.batch(0, 2)
    assert source.split == "b"
    assert source.num_classes() == 12
    assert batch.support.x.dtype == torch.float64
    assert batch.support.x.max() > 1


def test_numbers_and_one_bit_images() -> None:
    scalars = from_dataset([(0.5 * i, i % 2) for i in range(8)], ways=2, shots=1, queries=1)
    assert scalars.batch(0, 3).support.x.shape == (3, 2, 1)
    page = Image.new("1", (4, 4), 1)
    pages = from_dataset([(page, i % 2) for i in range(8)], ways=2, shots=1, queries=1)
    assert pages.batch(0, 3).support.x.equal(torch.ones(3, 2, 1, 4, 4))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "tensor": (X, TypeError, "data must be a pair of tensors (x, y) or a dataset"),
    "none": (None, TypeError, "data must be a pair of tensors"),
    "dict": ({"x": X}, TypeError, "data must be a pair of tensors"),
    "empty": ([], ValueError, "data must hold at least one example"),
    "no-pair": ([X[0]], TypeError, "data[0] must be a pair (example, label)"),
    "example": ([("a", 0)], TypeError, "data[0][0] must be a tensor, an array, an image"),
    "label": ([(X[0], "cat")], TypeError, "data[0][1] must be a whole number, got 'cat'"),
    "label-float": ([(X[0], 1.0)], TypeError, "data[0][1] must be a whole number, got 1.0"),
    "label-vector": ([(X[0], Y)], TypeError, "data[0][1] must be a whole number"),
    "shapes": ([(X[0], 0), (X[1, :2], 1)], ValueError, "data[1][0] must be a uint8 tensor of"),
    "dtypes": ([(X[0], 0), (X[1].float(), 1)], ValueError, "data[1][0] must be a uint8 tensor"),
    "too-few": ((X, Y * 0), ValueError, "ways must be at most the 1 classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_data_is_refused_by_name(case: str) -> None:
    data, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        from_dataset(data, ways=2, shots=1, queries=1)
