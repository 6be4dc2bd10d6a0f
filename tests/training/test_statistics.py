from __future__ import annotations

import math

import pytest
import torch

from fastmeta.training.statistics import Summary, summarize


def test_mean_median_and_interval() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    summary = summarize(values)
    assert summary.mean == 4.0
    assert summary.median == 2.5
    assert summary.interval == pytest.approx(1.96 * float(values.std()) / 2)
    assert (summary.tasks, summary.diverged) == (4, 0)


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        summary = summarize(torch.rand(100, generator=generator))
        covered += abs(summary.mean - 0.5) <= summary.interval
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_task_that_diverged_is_counted_and_leaves_the_median(bad: float) -> None:
    summary = summarize(torch.tensor([1.0, 2.0, bad]))
    assert math.isinf(summary.mean)
    assert summary.median == 2.0
    assert summary.diverged == 1
    assert summary.to_json()["mean"] is None
    assert "1 diverged" in str(summary)


def test_a_task_far_off_counts_as_diverged_and_stays_in_the_mean() -> None:
    summary = summarize(torch.tensor([1.0, 1000.0, 1999.0]))
    assert (summary.mean, summary.diverged) == (1000.0, 1)


def test_one_task_has_no_interval() -> None:
    assert summarize(torch.tensor([3.0])) == Summary(3.0, 3.0, 0.0, 1)


def test_integers_and_booleans_are_numbers() -> None:
    assert summarize(torch.tensor([True, False])).mean == 0.5


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(2, 2), torch.zeros(())])
def test_a_wrong_shape_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"values must have shape \[T\]"):
        summarize(values)


def test_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="values must be a tensor"):
        summarize([1.0, 2.0])  # type: ignore[arg-type]
