from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fastmeta.batch import TaskBatch
from fastmeta.ops.backend import backend, current_backend
from fastmeta.tasks import Sinusoid
from fastmeta.training.prefetch import Prefetch


class Watched(Sinusoid):
    """Remembers which steps were made, where, and under which backend."""

    def __init__(self) -> None:
        super().__init__(shots=5)
        self.made: list[int] = []
        self.threads: set[int] = set()
        self.backends: set[str] = set()

    def sample(self, step: int, indices: Any, *, split: str | None = None) -> TaskBatch:
        self.made.append(step)
        self.threads.add(threading.get_ident())
        self.backends.add(current_backend())
        return super().sample(step, indices, split=split)


def test_batches_are_those_of_their_steps() -> None:
    source = Sinusoid(shots=5)
    with Prefetch(source, meta_batch=3, last=9) as batches:
        for step in (4, 5, 6, 9, 2, 3):  # a jump is only slower
            expected = source.batch(step, 3, split="train").query.y
            assert torch.equal(batches.get(step).query.y, expected)


def test_one_batch_is_made_ahead_on_a_thread() -> None:
    source = Watched()
    with Prefetch(source, meta_batch=3, last=3) as batches:
        batches.get(1)
        batches.get(2)
        batches.get(3)
    assert source.made == [1, 2, 3]
    assert threading.get_ident() not in source.threads


def test_the_choice_of_backend_reaches_the_thread() -> None:
    source = Watched()
    with backend("reference"), Prefetch(source, meta_batch=3, last=1) as batches:
        batches.get(1)
    assert source.backends == {"reference"}


def test_an_error_comes_out_in_the_step_that_needs_the_batch() -> None:
    class Broken(Sinusoid):
        def sample(self, step: int, indices: Any, *, split: str | None = None) -> TaskBatch:
            if step == 2:
                raise OSError("gone")
            return super().sample(step, indices, split=split)

    with Prefetch(Broken(shots=5), meta_batch=3, last=3) as batches:
        batches.get(1)
        with pytest.raises(OSError, match="gone"):
            batches.get(2)


def test_a_batch_that_is_none_is_refused() -> None:
    class Wrong(Sinusoid):
        def sample(self, step: int, indices: Any, *, split: str | None = None) -> Any:
            return 3

    with (
        Prefetch(Wrong(shots=5), meta_batch=3, last=3) as batches,
        pytest.raises(TypeError, match="the batch must be a TaskBatch"),
    ):
        batches.get(1)
