"""Sinusoid tasks: the distribution of the paper, bit for bit whatever is drawn with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from fastmeta.batch import TaskBatch
from fastmeta.tasks import Sinusoid, TaskSource
from fastmeta.tasks.sinusoid import _sine


def test_distribution_is_the_papers() -> None:
    batch = Sinusoid(shots=5, queries=15, dtype=torch.float64).batch(0, 4000)
    for name, low, high in (("amplitude", 0.1, 5.0), ("phase", 0.0, math.pi)):
        values = batch.classes[name]
        assert low <= values.min() < low + 0.02
        assert high - 0.02 < values.max() < high
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * 4000)
    for side in (batch.support, batch.query):
        assert -5 <= side.x.min() < -4.98
        assert 4.98 < side.x.max() < 5
    amplitude, phase = (batch.classes[name].view(-1, 1, 1) for name in ("amplitude", "phase"))
    torch.testing.assert_close(batch.query.y, amplitude * (batch.query.x - phase).sin())
    assert not batch.support.x.equal(batch.query.x[:, :5])


def test_shapes_and_defaults() -> None:
    batch = Sinusoid(shots=7).batch(3, 4, first=10)
    assert batch.support.x.shape == batch.query.y.shape == (4, 7, 1)
    assert batch.support.x.dtype == batch.query.y.dtype == torch.float32
    assert batch.support.x.is_contiguous()
    assert batch.query.y.is_contiguous()
    assert batch.task_id is not None
    assert batch.task_id.tolist() == [10, 11, 12, 13]
    assert TaskBatch.of(batch) is batch
    assert isinstance(Sinusoid(), TaskSource)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_task_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    source = Sinusoid(shots=3, queries=9, seed=4, dtype=dtype)
    whole = source.batch(6, 50)
    order = torch.randperm(50)
    mixed = source.sample(6, order)
    parts = [source.sample(6, range(a, b)) for a, b in ((0, 1), (1, 18), (18, 50))]
    for leaves in zip(*(pytree.tree_leaves(b) for b in (whole, mixed, *parts)), strict=True):
        assert leaves[1].equal(leaves[0][order])
        assert torch.cat(leaves[2:]).equal(leaves[0])


def test_seed_step_and_split_make_other_tasks() -> None:
    base = Sinusoid(seed=1).batch(1, 4).support.x
    for other in (
        Sinusoid(seed=2).batch(1, 4),
        Sinusoid(seed=1).batch(2, 4),
        Sinusoid(seed=1).batch(1, 4, split="test"),
    ):
        assert not base.equal(other.support.x)
    assert base.equal(Sinusoid(seed=1).batch(1, 4, split="train").support.x)


def test_ranges_are_options() -> None:
    source = Sinusoid(amplitude=(2.0, 2.0), phase=(0.5, 0.5), x=(0.0, 1.0))
    batch = source.batch(0, 10)
    torch.testing.assert_close(batch.support.y, 2 * (batch.support.x - 0.5).sin())
    assert batch.support.x.min() >= 0


def test_function_draws_the_true_curve() -> None:
    batch = Sinusoid().batch(0, 3)
    again = Sinusoid.function(batch.classes, batch.query.x[..., 0])
    assert again.equal(batch.query.y[..., 0])
    assert Sinusoid.function(batch.classes, torch.linspace(-5, 5, 100)).shape == (3, 100)


def test_portable_sine() -> None:
    angles = np.concatenate([np.linspace(-12, 12, 100_001), np.linspace(-1e6, 1e6, 100_001)])
    assert np.abs(_sine(angles) - np.sin(angles)).max() < 1e-15
    single = np.array([_sine(angles[i : i + 1])[0] for i in range(0, len(angles), 5003)])
    assert (single == _sine(angles)[::5003]).all()
    assert (_sine(torch.from_numpy(angles)).numpy() == _sine(angles)).all()


@pytest.mark.needs("gpu")
def test_same_bits_on_the_gpu() -> None:
    there = Sinusoid(device="cuda").batch(2, 64).to("cpu")
    here = Sinusoid().batch(2, 64)
    for a, b in zip(pytree.tree_leaves(there), pytree.tree_leaves(here), strict=True):
        assert a.equal(b)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shots": ({"shots": 0}, ValueError, "Sinusoid: shots must be at least 1, got 0"),
    "queries": ({"queries": -1}, ValueError, "queries must be at least 1"),
    "shots-kind": ({"shots": 2.5}, TypeError, "shots must be an int, got 2.5"),
    "amplitude": ({"amplitude": (5, 0.1)}, ValueError, "amplitude must be .low, high. with"),
    "phase": ({"phase": 1.0}, TypeError, "phase must be a pair of numbers"),
    "x": ({"x": (0.0, math.inf)}, ValueError, "x must be finite"),
    "seed": ({"seed": -1}, ValueError, "seed must be at least 0"),
    "dtype": ({"dtype": torch.int64}, TypeError, "dtype must be float32 or float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        Sinusoid(**options)


def test_wrong_requests_are_refused_by_name() -> None:
    source = Sinusoid()
    with pytest.raises(ValueError, match="step must be at least 0"):
        source.sample(-1, range(2))
    with pytest.raises(ValueError, match="index must have shape"):
        source.sample(0, range(0))
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        source.batch(0, 0)
    with pytest.raises(TypeError, match="split must be a str"):
        source.sample(0, [0], split=3)  # type: ignore[arg-type]
