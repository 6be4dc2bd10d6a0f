"""Episodes: what must be disjoint is, what must be uniform is, and a task is a function."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.batch import TaskBatch
from fastmeta.tasks import FewShot

CLASSES, EACH = 12, 20


def numbered(
    classes: int = CLASSES, each: int = EACH, shuffle: bool = True
) -> tuple[Tensor, Tensor]:
    """Examples that say which they are: x = (row, label), label = 100 + class."""
    rows = torch.arange(CLASSES * EACH)
    labels = 100 + rows // EACH
    if shuffle:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows, labels = rows[order], labels[order]
    return torch.stack((rows, labels), dim=1), labels


def source(**options: Any) -> FewShot:
    return FewShot(*numbered(), **({"ways": 5, "shots": 2, "queries": 3} | options))


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "sorted"])
def test_rows_have_their_labels_and_sides_are_disjoint(shuffle: bool) -> None:
    batch = FewShot(*numbered(shuffle=shuffle), ways=5, shots=2, queries=3).batch(0, 200)
    assert batch.support.x.shape == (200, 10, 2)
    assert batch.query.x.shape == (200, 15, 2)
    assert batch.support.y.dtype == torch.int64
    assert batch.support.y[7].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert batch.query.y[7].tolist() == [n for n in range(5) for _ in range(3)]
    classes = batch.classes["label"]
    assert (classes.sort(1).values.diff() > 0).all()
    for side in (batch.support, batch.query):
        assert side.x[..., 1].equal(classes.gather(1, side.y))
        assert ((side.x[..., 0] // EACH + 100) == side.x[..., 1]).all()
    rows = torch.cat((batch.support.x[..., 0], batch.query.x[..., 0]), dim=1)
    assert (rows.sort(1).values.diff() > 0).all()
    assert TaskBatch.of(batch) is batch


def test_checks_agree_with_the_door() -> None:
    # sources mark their batches as checked: they must be right
    batch = source(rotations="none").batch(0, 4)
    rebuilt = pytree.tree_map(lambda leaf: leaf, batch)
    assert TaskBatch.of(rebuilt) is rebuilt


def test_labels_and_examples_are_shuffled_uniformly() -> None:
    batch = source().batch(0, 3000)
    for n in range(5):  # every class stands for every label equally often
        counts = torch.bincount(batch.classes["label"][:, n] - 100, minlength=CLASSES)
        expected = 3000 / CLASSES
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    place = torch.bincount(batch.query.x[..., 0].flatten() % EACH, minlength=EACH)
    assert (place - 2250).abs().max() < 5 * math.sqrt(2250)


@pytest.mark.parametrize("rotations", ["none", "classes", "drawn"])
def test_a_task_does_not_depend_on_its_neighbours(rotations: Any) -> None:
    x = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8)
    made = FewShot(x, torch.arange(60) % 6, ways=3, shots=1, queries=2, rotations=rotations, seed=9)
    whole = made.batch(5, 40)
    order = torch.randperm(40)
    parts = [made.sample(5, range(a, b)) for a, b in ((0, 3), (3, 40))]
    batches = (whole, made.sample(5, order), *parts)
    for leaves in zip(*(pytree.tree_leaves(b) for b in batches), strict=True):
        assert leaves[1].equal(leaves[0][order])
        assert torch.cat(leaves[2:]).equal(leaves[0])
    assert not whole.support.x.equal(made.batch(6, 40).support.x)
    assert not whole.support.x.equal(made.replace(seed=8).batch(5, 40).support.x)


def test_bytes_become_floats_exactly_as_torch_divides() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 3)
    y = torch.arange(256) % 8
    for dtype in (torch.float32, torch.float64):
        batch = FewShot(x, y, ways=8, shots=16, queries=16, dtype=dtype).batch(0, 3)
        assert batch.support.x.dtype == dtype
        values = torch.cat((batch.support.x, batch.query.x), 1)[..., 0].sort(1).values
        assert values[0].equal(torch.arange(256).to(dtype) / 255)
    raw = FewShot(x, y, ways=8, shots=1, queries=1, divisor=1).batch(0, 1)
    assert raw.support.x.max() > 1


def test_other_dtypes_are_drawn_as_they_are() -> None:
    x, y = numbered()
    assert source().batch(0, 2).support.x.dtype == torch.int64
    half = FewShot(x.half(), y, ways=2, shots=1, queries=1)
    assert half.batch(0, 2).query.x.dtype == torch.float16


def test_large_batches_use_memory_again_and_never_what_is_held() -> None:
    x = torch.randint(0, 256, (100, 1000), dtype=torch.uint8)
    made = FewShot(x, torch.arange(100) % 5, ways=5, shots=1, queries=15)
    first = made.batch(0, 40).query.x
    copy, view = first.clone(), first[3:5]
    held = [made.batch(step, 40).query.x.data_ptr() for step in range(1, 6)]
    assert first.data_ptr() not in held
    assert len(set(held)) < len(held)
    assert first.equal(copy)
    del first
    for step in range(1, 6):
        made.batch(step, 40)
    assert view.equal(copy[3:5])
    assert view.data_ptr() % 4 == 0
    assert copy.equal(made.batch(0, 40).query.x)


def test_unequal_classes_draw_from_their_own_examples() -> None:
    sizes = [5, 9, 40]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    x = torch.arange(len(labels)).view(-1, 1)
    batch = FewShot(x, labels, ways=3, shots=2, queries=3).batch(0, 2000)
    rows = torch.cat((batch.support.x, batch.query.x), 1)[..., 0]
    assert (rows.sort(1).values.diff() > 0).all()
    assert labels[batch.support.x[..., 0]].equal(batch.classes["label"].gather(1, batch.support.y))
    counts = torch.bincount(rows.flatten(), minlength=len(labels)).double()
    for c, n in enumerate(sizes):
        mine = counts[labels == c]
        expected = 2000 * 5 / n
        assert (mine - expected).abs().max() <= 5 * math.sqrt(expected)


def test_splits_by_list_are_disjoint_and_complete() -> None:
    splits = {"train": range(100, 106), "val": [106, 107], "test": torch.arange(108, 112)}
    made = source(ways=2, splits=splits)
    assert made.splits == ("train", "val", "test")
    seen = {}
    for name in made.splits:
        labels = made.batch(0, 300, split=name).classes["label"]
        seen[name] = set(labels.flatten().tolist())
    assert seen == {"train": set(range(100, 106)), "val": {106, 107}, "test": set(range(108, 112))}
    assert made.batch(0, 9).support.x.equal(made.batch(0, 9, split="train").support.x)
    assert source(ways=2, splits=splits, split="val").batch(0, 5).classes["label"].min() >= 106


def test_splits_by_fraction_are_disjoint_and_depend_on_their_own_seed() -> None:
    fractions = {"train": 0.5, "val": 0.25, "test": 0.25}

    def classes(**options: Any) -> list[set[int]]:
        made = source(ways=3, splits=fractions, **options)
        return [
            set(made.batch(0, 300, split=name).classes["label"].flatten().tolist())
            for name in made.splits
        ]

    first = classes()
    assert [len(part) for part in first] == [6, 3, 3]
    assert set.union(*first) == set(range(100, 112))
    assert classes(seed=5) == first
    assert classes(split_seed=5) != first
    assert len(source(ways=3, splits={"train": 0.7, "test": 0.3})._find("train").labels) == 9
    assert len(source(ways=3, splits={"train": 0.5})._find("train").labels) == 6


def letters() -> tuple[Tensor, Tensor]:
    """Images whose turn can be read off: one pixel near a corner."""
    x = torch.zeros(40, 1, 5, 5, dtype=torch.uint8)
    x[:, 0, 0, 1] = 255
    x[:, 0, 2, 2] = torch.arange(40, dtype=torch.uint8)
    return x, torch.arange(40) // 10


def turns(images: Tensor) -> Tensor:
    """``[..., 1, 5, 5]`` to quarter turns counter-clockwise."""
    corners = [images[..., 0, i, j] for i, j in ((0, 1), (3, 0), (4, 3), (1, 4))]
    return torch.stack(corners, -1).argmax(-1)


def test_rotations_as_classes() -> None:
    made = FewShot(*letters(), ways=16, shots=1, queries=2, rotations="classes")
    assert made.num_classes() == 16
    batch = made.batch(0, 20)
    pairs = batch.classes["label"] * 4 + batch.classes["rotation"]
    assert (pairs.sort(1).values == torch.arange(16)).all()
    for side in (batch.support, batch.query):
        assert turns(side.x).equal(batch.classes["rotation"].gather(1, side.y))
        drawing = (side.x[..., 0, 2, 2] * 255).round().long()
        assert (drawing // 10).equal(batch.classes["label"].gather(1, side.y))


def test_rotations_drawn() -> None:
    made = FewShot(*letters(), ways=4, shots=1, queries=2, rotations="drawn")
    assert made.num_classes() == 4
    batch = made.batch(0, 500)
    assert (batch.classes["label"].sort(1).values == torch.arange(4)).all()
    counts = torch.bincount(batch.classes["rotation"].flatten(), minlength=4)
    assert (counts - 500).abs().max() < 5 * math.sqrt(500)
    for side in (batch.support, batch.query):
        assert turns(side.x).equal(batch.classes["rotation"].gather(1, side.y))


def test_replace_shares_the_data() -> None:
    made = source(splits={"train": 0.5, "test": 0.5})
    other = made.replace(ways=3, shots=1, queries=4, split="test")
    assert other.batch(0, 2).query.x.shape == (2, 12, 2)
    assert other._table is made._table
    assert made.batch(0, 2).query.x.shape == (2, 15, 2)
    assert other.batch(0, 9).support.x.equal(
        made.replace(ways=3, shots=1, queries=4).batch(0, 9, split="test").support.x
    )
    with pytest.raises(ValueError, match="ways must be at most the 6 classes"):
        made.replace(ways=7)


X, Y = numbered()
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ways": ({"ways": 13}, ValueError, "ways must be at most the 12 classes of split 'train', got"),
    "ways-of-a-split": (
        {"splits": {"train": 0.8, "val": 0.2}},
        ValueError,
        "ways must be at most the 2 classes of split 'val', got 5",
    ),
    "examples": (
        {"shots": 6, "queries": 15},
        ValueError,
        r"shots \+ queries must be at most the 20 examples of class 100 in split 'train', got 6",
    ),
    "ways-zero": ({"ways": 0}, ValueError, "ways must be at least 1"),
    "shots-kind": ({"shots": 1.0}, TypeError, "shots must be an int"),
    "queries": ({"queries": 0}, ValueError, "queries must be at least 1"),
    "x-kind": ({"x": [1, 2]}, TypeError, "x must be a tensor, got a list"),
    "y-floats": ({"y": Y.float()}, TypeError, "y must hold integers"),
    "y-rank": ({"y": Y.view(-1, 1)}, ValueError, "y must have shape .M."),
    "y-empty": ({"x": X[:0], "y": Y[:0]}, ValueError, "y must have shape .M. with M at least 1"),
    "rows": ({"y": Y[1:]}, ValueError, "x must have shape .239, .... like y"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype must be float32 or float64"),
    "divisor": ({"divisor": math.nan}, ValueError, "divisor must be finite"),
    "seed": ({"seed": "0"}, TypeError, "seed must be an int"),
    "rotations": ({"rotations": "some"}, ValueError, "rotations must be one of"),
    "rotations-shape": ({"rotations": "drawn"}, ValueError, "x must be square images"),
    "split": ({"split": "test"}, ValueError, r"split must be one of \['train'\], got 'test'"),
    "splits-kind": ({"splits": [1]}, TypeError, "splits must map names to classes or fractions"),
    "splits-empty": ({"splits": {}}, TypeError, "splits must map names"),
    "splits-list": ({"splits": {"train": "all"}}, TypeError, "must be a list of classes, or every"),
    "splits-mixed": (
        {"splits": {"train": range(100, 106), "test": 0.5}},
        TypeError,
        "must be a list of classes, or every",
    ),
    "splits-sum": ({"splits": {"a": 0.7, "b": 0.7}}, ValueError, "sum to at most 1, got 1.4"),
    "splits-negative": ({"splits": {"a": -0.5}}, ValueError, "must be at least 0"),
    "splits-none": ({"splits": {"a": 1.0, "b": 0.0}}, ValueError, "must hold at least one class"),
    "splits-unknown": ({"splits": {"a": [100, 5]}}, ValueError, "classes that occur in y, got 5"),
    "splits-shared": (
        {"splits": {"a": range(100, 106), "b": range(105, 112)}},
        ValueError,
        "must hold each class once, in one split, got class 105 of split 'a' again",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    changes, error, message = REFUSED[case]
    options: dict[str, Any] = {"x": X, "y": Y, "ways": 5, "shots": 2, "queries": 3} | changes
    with pytest.raises(error, match=f"FewShot: .*{message}"):
        FewShot(options.pop("x"), options.pop("y"), **options)


def test_unknown_split_is_refused_when_sampled() -> None:
    with pytest.raises(ValueError, match=r"split must be one of \['train'\], got 'tset'"):
        source().batch(0, 2, split="tset")


@pytest.mark.needs("gpu")
def test_same_bits_on_the_gpu() -> None:
    x, y = letters()
    here = FewShot(x, y, ways=4, shots=1, queries=2, rotations="classes")
    there = FewShot(x, y, ways=4, shots=1, queries=2, rotations="classes", device="cuda")
    assert there.batch(0, 2).query.x.is_cuda
    pairs = zip(
        pytree.tree_leaves(there.batch(3, 50).to("cpu")),
        pytree.tree_leaves(here.batch(3, 50)),
        strict=True,
    )
    assert all(a.equal(b) for a, b in pairs)
