"""What a task source is: a function from (seed, step, index) to tasks."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from typing import Protocol, runtime_checkable

from fastmeta._checks import positive_int, type_error, whole_number
from fastmeta.batch import TaskBatch
from fastmeta.random import Index

__all__ = ["TaskSource"]


@runtime_checkable
class TaskSource(Protocol):
    """Where tasks come from.

    The task ``(seed, step, index)`` is the same whatever is drawn with it, in whatever order or
    chunk, in whatever process. So nothing has to be stored to resume, to prefetch, to shard over
    ranks or to look at one task again. A source of one's own subclasses this and writes
    :meth:`sample` with the numbers of :mod:`fastmeta.random`.

    Example:
        >>> from fastmeta.tasks import Sinusoid
        >>> source = Sinusoid(shots=5, seed=1)
        >>> whole, part = source.sample(0, range(8)), source.sample(0, [6])
        >>> bool((whole[6:7].query.y == part.query.y).all())
        True
    """

    @abstractmethod
    def sample(self, step: int, indices: Index, *, split: str | None = None) -> TaskBatch:
        """Exactly the tasks ``(seed, step, index)`` for each index, in this order.

        Args:
            step: which meta-batch, at least 0.
            indices: ``[T]`` int64 tensor, a range or a sequence of ints: which tasks of it.
            split: whose tasks ("train", "val", "test", or a name of the source's own); None for
                the source's default. Different splits give different tasks at the same index.

        Returns:
            T tasks, with ``task_id`` the indices.
        """

    def batch(
        self, step: int, num_tasks: int, *, first: int = 0, split: str | None = None
    ) -> TaskBatch:
        """The tasks ``first .. first + num_tasks - 1`` of a meta-batch.

        Args:
            step: which meta-batch, at least 0.
            num_tasks: how many tasks T.
            first: the index of the first one.
            split: whose tasks, as in :meth:`sample`.

        Returns:
            T tasks.

        Example:
            >>> from fastmeta.tasks import Sinusoid
            >>> Sinusoid(shots=5).batch(0, 4).support.x.shape
            torch.Size([4, 5, 1])
        """
        op = type(self).__name__
        num_tasks = positive_int(op, "num_tasks", num_tasks)
        first = whole_number(op, "first", first)
        return self.sample(step, range(first, first + num_tasks), split=split)


def stream_of(op: str, split: str, purpose: int) -> int:
    """The stream of a purpose (below 2**16) within a split: the same in every process."""
    if not isinstance(split, str):
        raise type_error(op, "split", "be a str", split)
    return zlib.crc32(split.encode()) << 16 | purpose
