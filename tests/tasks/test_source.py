"""The protocol of task sources."""

from __future__ import annotations

import pytest
import torch

from fastmeta import random
from fastmeta.batch import Examples, TaskBatch
from fastmeta.tasks import TaskSource
from fastmeta.tasks.source import stream_of


class Constant(TaskSource):
    """A source of one's own: only `sample` is written."""

    def sample(self, step: int, indices: random.Index, *, split: str | None = None) -> TaskBatch:
        tasks = random.as_index(indices)
        x = random.uniform(0, step, tasks, 0, (3, 1))
        return TaskBatch.of(TaskBatch(Examples(x, x), Examples(x, x), None, tasks))


def test_a_source_of_ones_own_gets_batch() -> None:
    batch = Constant().batch(2, 3, first=5)
    assert batch.task_id is not None
    assert batch.task_id.tolist() == [5, 6, 7]
    assert batch.support.x.equal(random.uniform(0, 2, range(5, 8), 0, (3, 1)))
    with pytest.raises(ValueError, match="Constant: first must be at least 0"):
        Constant().batch(0, 1, first=-1)


def test_sample_must_be_written() -> None:
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (TaskSource,), {})()


def test_streams_of_splits_are_fixed_and_apart() -> None:
    assert stream_of("f", "train", 3) == 0x5C66E4A3 << 16 | 3
    names = ("train", "val", "test", "a", "b", "")
    assert len({stream_of("f", name, purpose) for name in names for purpose in range(3)}) == 18
    with pytest.raises(TypeError, match="f: split must be a str"):
        stream_of("f", torch.zeros(1), 0)  # type: ignore[arg-type]
