"""The next meta-batch is made while this one is worked on."""

from __future__ import annotations

import contextvars
from concurrent.futures import Future, ThreadPoolExecutor

from fastmeta.batch import TaskBatch
from fastmeta.tasks import TaskSource


class Prefetch:
    """Meta-batches in the order of their steps, one of them made ahead on a thread.

    Nothing is stored and no state is carried: a batch is a function of the step, so a run that
    resumes at any step gets the same ones.

    Args:
        source: where tasks come from.
        meta_batch: tasks T of each batch; their indices are 0 to T - 1.
        last: the last step that will be asked for.
        split: which split they are drawn from.

    Example:
        >>> from fastmeta.tasks import Sinusoid
        >>> with Prefetch(Sinusoid(shots=5), meta_batch=4, last=2) as batches:
        ...     [batches.get(step).num_tasks for step in (1, 2)]
        [4, 4]
    """

    def __init__(
        self, source: TaskSource, *, meta_batch: int, last: int, split: str = "train"
    ) -> None:
        self._source = source
        self._indices = range(meta_batch)
        self._last = last
        self._split = split
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastmeta-prefetch")
        self._ahead: tuple[int, Future[TaskBatch]] | None = None

    def get(self, step: int) -> TaskBatch:
        """The meta-batch of a step; the one of the step after it is begun.

        An error of the task source is raised here, in the step that needs the batch.
        """
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            future = self._begin(step)
        batch = future.result()
        self._ahead = (step + 1, self._begin(step + 1)) if step < self._last else None
        return batch

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, step: int) -> Future[TaskBatch]:
        # A thread starts with an empty context; the choice of backend is part of the caller's.
        context = contextvars.copy_context()
        return self._pool.submit(context.run, self._make, step)

    def _make(self, step: int) -> TaskBatch:
        return TaskBatch.of(self._source.sample(step, self._indices, split=self._split))
