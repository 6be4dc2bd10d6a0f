"""``TaskBatch``: a batch of tasks, the one value everything else shares.

A batch is a pytree whose every tensor has a leading task axis, so ``torch.utils._pytree`` and
``torch.func.vmap`` take it as they take a tuple of tensors. Shape letters: T tasks, S support or
query rows, I inner steps, B rows of one inner step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, positive_int, type_error, value_error

__all__ = ["Examples", "TaskBatch"]

_OP = "TaskBatch"


@dataclass(frozen=True, eq=False)
class Examples:
    """One side, support or query, of a batch of tasks.

    Args:
        x: inputs, a tensor or a pytree of tensors, each ``[T, S, ...]``.
        y: targets, a tensor or a pytree of tensors, each ``[T, S, ...]``.
        weight: ``[T, S]`` floating, not negative, or None. A zero masks a row, so that tasks with
            unequal shots are padded to one S. The divisor of a mean is then the sum of weights.
        index: ``[T, I, B]`` int64 rows in ``[0, S)``, or None: which rows each inner step sees.

    Example:
        >>> import torch
        >>> Examples(torch.zeros(4, 10, 1), torch.zeros(4, 10, 1)).x.shape
        torch.Size([4, 10, 1])
    """

    x: Any
    y: Any
    weight: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """A batch of T tasks. Every tensor in it has a leading task axis ``[T, ...]``.

    Build one with :meth:`of`, which checks it. Building it by its constructor checks nothing (a
    pytree must be rebuilt from whatever leaves it is given); the engine then checks it at its own
    door, once for each batch.

    Args:
        support: the rows a task adapts on, ``[T, S, ...]``.
        query: the rows its adapted parameters are judged on, ``[T, Q, ...]``.
        classes: metadata about the tasks, a pytree of tensors ``[T, ...]``, or None. Which classes
            an episode drew, or which function a regression task has. No algorithm needs it.
        task_id: ``[T]`` int64, or None: the index the task was drawn with.

    Example:
        >>> import torch
        >>> x, y = torch.randn(8, 5, 1), torch.randn(8, 5, 1)
        >>> batch = TaskBatch.of((x, y, x, y))
        >>> batch.num_tasks, batch[2:4].support.x.shape
        (8, torch.Size([2, 5, 1]))

    Reference:
        Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
        Networks", section 2: a task's support (its D) and query (its D').
    """

    support: Examples
    query: Examples
    classes: Any = None
    task_id: Tensor | None = None
    # Set by `of`, lost by every pytree operation: one check serves however many calls.
    _checked: bool = field(default=False, init=False, repr=False)

    @property
    def num_tasks(self) -> int:
        """The number of tasks T, read from the first tensor of the support inputs."""
        x = self.support.x
        first = x if isinstance(x, Tensor) else pytree.tree_leaves(x)[0]
        return int(first.shape[0])

    def __len__(self) -> int:
        """The number of tasks T."""
        return self.num_tasks

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> TaskBatch:
        """The same tasks on ``device``, floating tensors as ``dtype``.

        Args:
            device: where to, or None to stay.
            dtype: the dtype of floating tensors, or None to keep it. Integer tensors keep theirs.
            non_blocking: as in ``torch.Tensor.to``.

        Example:
            >>> import torch
            >>> x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
            >>> double = TaskBatch.of((x, y, x, y)).to(dtype=torch.float64)
            >>> double.query.x.dtype, double.query.y.dtype
            (torch.float64, torch.int64)
        """

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            floating = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=floating, non_blocking=non_blocking)

        return self._derived(pytree.tree_map(move, self))

    def __getitem__(self, tasks: slice | int) -> TaskBatch:
        """Some of the tasks, as views.

        Args:
            tasks: a slice leaves a batch ``[t, ...]``; an int picks one task and drops the task
                axis, as it does for a tensor (what a function under ``vmap`` sees).

        Raises:
            TypeError: if ``tasks`` is neither.
            IndexError: if an int is outside ``[-T, T)``.
        """
        if isinstance(tasks, slice):
            part: TaskBatch = pytree.tree_map(lambda value: value[tasks], self)
            return self._derived(part) if part.num_tasks else part
        if isinstance(tasks, bool) or not hasattr(tasks, "__index__"):
            raise type_error(_OP, "the subscript", "be a slice or an int", describe(tasks))
        one: TaskBatch = pytree.tree_map(lambda value: value[tasks], self)
        return one

    def chunks(self, size: int) -> Iterator[TaskBatch]:
        """The batch in order, ``size`` tasks at a time (the last chunk may be smaller).

        Example:
            >>> import torch
            >>> x, y = torch.zeros(5, 3, 1), torch.zeros(5, 3, 1)
            >>> [chunk.num_tasks for chunk in TaskBatch.of((x, y, x, y)).chunks(2)]
            [2, 2, 1]
        """
        size = positive_int("TaskBatch.chunks", "size", size)
        return (self[first : first + size] for first in range(0, self.num_tasks, size))

    @staticmethod
    def of(value: TaskBatch | BatchLike) -> TaskBatch:
        """Check a batch of tasks, whichever of its forms it comes in.

        Accepted: a ``TaskBatch``; ``(xs, ys, xq, yq)``; ``((xs, ys), (xq, yq))``; a pair of
        ``Examples``. A ``TaskBatch`` that was checked before is returned as it is. Shapes, dtypes
        and devices are read without waiting for a device; only a weight or an index is looked into.
        Whether labels are in range is the loss's to say.

        Args:
            value: the batch; every tensor ``[T, ...]``, rows ``[T, S, ...]`` and ``[T, Q, ...]``.

        Returns:
            The checked batch.

        Raises:
            TypeError: a part is of the wrong kind or dtype.
            ValueError: no task, no row, tensors that disagree about tasks, rows or device, support
                and query of different shapes, a weight that is negative or masks all of a task,
                an index outside the rows.

        Example:
            >>> import torch
            >>> TaskBatch.of((torch.zeros(4, 5, 1), torch.zeros(3, 5, 1)) * 2)
            Traceback (most recent call last):
            ValueError: TaskBatch: support.y must have 4 tasks like support.x, got a float32 \
tensor of shape [3, 5, 1]
        """
        if isinstance(value, TaskBatch):
            if value._checked:
                return value
            batch = value
        else:
            batch = _from_tuple(value)
        if not _plainly_right(batch):
            _check(batch)
        return trusted(batch)

    def _derived(self, batch: TaskBatch) -> TaskBatch:
        if self._checked:  # moving or slicing along tasks keeps what was checked
            trusted(batch)
        return batch


# What the engine's door takes besides a TaskBatch: tuples of tensors or of Examples.
BatchLike: TypeAlias = tuple[Any, ...] | list[Any]

_FORMS = (
    "be a TaskBatch, (support_x, support_y, query_x, query_y), "
    "((support_x, support_y), (query_x, query_y)) or a pair of Examples"
)


def _from_tuple(value: Any) -> TaskBatch:
    if isinstance(value, (tuple, list)):
        if len(value) == 4:
            return TaskBatch(Examples(value[0], value[1]), Examples(value[2], value[3]))
        if len(value) == 2:
            return TaskBatch(_examples(value[0]), _examples(value[1]))
    raise type_error(_OP, "the batch", _FORMS, describe(value))


def _examples(value: Any) -> Examples:
    if isinstance(value, Examples):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return Examples(value[0], value[1])
    raise type_error(_OP, "the batch", _FORMS, f"a pair with {describe(value)} in it")


def trusted(batch: TaskBatch) -> TaskBatch:
    """Mark a batch as checked: for task sources, whose batches are right by construction."""
    object.__setattr__(batch, "_checked", True)
    return batch


def _plainly_right(batch: TaskBatch) -> bool:
    """Whether the batch is right and of the simplest kind; False says nothing.

    Four tensors handed over at each step of someone's own loop are worth a short way through:
    `_check` says the same, names what is wrong, and takes five times as long.
    """
    support, query = batch.support, batch.query
    if not (type(support) is Examples and type(query) is Examples):
        return False
    xs, ys, xq, yq = support.x, support.y, query.x, query.y
    tensors = (
        isinstance(xs, Tensor)
        and isinstance(ys, Tensor)
        and isinstance(xq, Tensor)
        and isinstance(yq, Tensor)
    )
    if not tensors or batch.classes is not None or batch.task_id is not None:
        return False
    if not (support.weight is support.index is query.weight is query.index is None):
        return False
    a, b, c, d = tuple(xs.shape), tuple(ys.shape), tuple(xq.shape), tuple(yq.shape)
    return (
        min(len(a), len(b), len(c), len(d)) >= 2
        and a[0] == b[0] == c[0] == d[0] > 0
        and a[1] == b[1] > 0
        and c[1] == d[1] > 0
        and a[2:] == c[2:]
        and b[2:] == d[2:]
        and xs.dtype is xq.dtype
        and ys.dtype is yq.dtype
        and xs.device == ys.device == xq.device == yq.device
        and xs.layout is ys.layout is xq.layout is yq.layout is torch.strided
        and not xs.is_meta
    )


def _check(batch: TaskBatch) -> None:
    sides: tuple[tuple[str, Any], ...] = (("support", batch.support), ("query", batch.query))
    for name, side in sides:
        if not isinstance(side, Examples):
            raise type_error(_OP, name, "be Examples", describe(side))
    first = next(_leaves("support.x", batch.support.x))[1]
    if first.ndim < 2:
        raise value_error(_OP, "support.x", "have shape [T, S, ...]", first)
    num_tasks, device = first.shape[0], first.device
    if num_tasks == 0:
        raise value_error(_OP, "support.x", "have at least one task", first)
    _check_side("support", batch.support, num_tasks, device)
    _check_side("query", batch.query, num_tasks, device)
    _check_agreement("x", batch.support.x, batch.query.x)
    _check_agreement("y", batch.support.y, batch.query.y)
    if batch.classes is not None:
        for name, leaf in _leaves("classes", batch.classes):
            if leaf.ndim < 1 or leaf.shape[0] != num_tasks:
                raise value_error(_OP, name, f"have {num_tasks} tasks like support.x", leaf)
    if batch.task_id is not None:
        task_id: Any = batch.task_id
        if not isinstance(task_id, Tensor) or task_id.dtype != torch.int64:
            raise type_error(_OP, "task_id", "be an int64 tensor [T]", describe(task_id))
        if task_id.shape != (num_tasks,):
            raise value_error(_OP, "task_id", f"have shape [{num_tasks}]", task_id)


def _check_side(side: str, examples: Examples, num_tasks: int, device: torch.device) -> None:
    rows = -1
    like = f"{side}.x"
    for part in ("x", "y"):
        for name, leaf in _leaves(f"{side}.{part}", getattr(examples, part)):
            if leaf.ndim < 2:
                raise value_error(_OP, name, "have shape [T, S, ...]", leaf)
            if leaf.shape[0] != num_tasks:
                raise value_error(_OP, name, f"have {num_tasks} tasks like support.x", leaf)
            if rows < 0:
                rows = leaf.shape[1]
                if rows == 0:
                    raise value_error(_OP, name, "have at least one row of each task", leaf)
            elif leaf.shape[1] != rows:
                raise value_error(_OP, name, f"have {rows} rows of each task like {like}", leaf)
            if leaf.device != device:
                raise value_error(_OP, name, f"be on {device} like support.x", leaf)
            if leaf.is_meta or leaf.layout is not torch.strided:
                found = "a meta tensor" if leaf.is_meta else f"one of layout {leaf.layout}"
                raise value_error(_OP, name, "be a dense tensor that holds values", found)
    if examples.weight is not None:
        _check_weight(f"{side}.weight", examples.weight, num_tasks, rows, device)
    if examples.index is not None:
        _check_index(f"{side}.index", examples.index, num_tasks, rows, device)


def _check_weight(name: str, weight: Any, tasks: int, rows: int, device: torch.device) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise type_error(_OP, name, "be a floating tensor [T, S]", describe(weight))
    if weight.shape != (tasks, rows):
        raise value_error(_OP, name, f"have shape [{tasks}, {rows}]", weight)
    if weight.device != device:
        raise value_error(_OP, name, f"be on {device} like support.x", weight)
    with torch.no_grad():
        low, high = torch.aminmax(weight)
        if not (low >= 0 and high < float("inf")):  # also true of NaN
            raise value_error(_OP, name, "be finite and not negative", f"values {low} to {high}")
        empty = weight.amax(1) == 0
        if empty.any():
            task = int(empty.nonzero()[0])
            raise value_error(
                _OP, name, "leave each task at least one row", f"only zeros in task {task}"
            )


def _check_index(name: str, index: Any, tasks: int, rows: int, device: torch.device) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise type_error(_OP, name, "be an int64 tensor [T, I, B]", describe(index))
    if index.ndim != 3 or index.shape[0] != tasks or index.numel() == 0:
        raise value_error(_OP, name, f"have shape [{tasks}, I, B] with I and B at least 1", index)
    if index.device != device:
        raise value_error(_OP, name, f"be on {device} like support.x", index)
    low, high = torch.aminmax(index)
    if low < 0 or high >= rows:
        must = f"be rows in [0, {rows})"
        raise value_error(_OP, name, must, f"values {int(low)} to {int(high)}")


def _check_agreement(part: str, support: Any, query: Any) -> None:
    """Support and query go through one module and one loss: rows of one shape and dtype."""
    if not (isinstance(support, Tensor) and isinstance(query, Tensor)):
        wanted, found = pytree.tree_structure(support), pytree.tree_structure(query)
        if wanted != found:
            must = f"have the structure of support.{part}, {wanted}"
            raise type_error(_OP, f"query.{part}", must, str(found))
    pairs = zip(_leaves(f"support.{part}", support), _leaves(f"query.{part}", query), strict=True)
    for (_, ours), (name, theirs) in pairs:
        if theirs.dtype != ours.dtype:
            raise type_error(_OP, name, f"be {_dtype(ours)} like the support's", describe(theirs))
        if theirs.shape[2:] != ours.shape[2:]:
            must = f"have rows of shape {list(ours.shape[2:])} like the support's"
            raise value_error(_OP, name, must, theirs)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a pytree with a name for each; TypeError for any other leaf, or for none."""
    if isinstance(tree, Tensor):
        yield name, tree
        return
    paths = pytree.tree_leaves_with_path(tree)
    if not paths:
        raise type_error(_OP, name, "hold at least one tensor", describe(tree))
    for path, leaf in paths:
        full = name + pytree.keystr(path)
        if not isinstance(leaf, Tensor):
            hint = " (torch.from_numpy makes one)" if type(leaf).__module__ == "numpy" else ""
            raise type_error(_OP, full, "be a tensor", describe(leaf) + hint)
        yield full, leaf


def _register(cls: type[Any], names: tuple[str, ...]) -> None:
    # None fields are no leaves: vmap and tree_map would otherwise meet them.
    def flatten(value: Any) -> tuple[list[Any], tuple[str, ...]]:
        present = tuple(name for name in names if getattr(value, name) is not None)
        return [getattr(value, name) for name in present], present

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        leaves, present = flatten(value)
        keys = map(pytree.GetAttrKey, present)
        return list(zip(keys, leaves, strict=True)), present

    def unflatten(leaves: Iterable[Any], present: tuple[str, ...]) -> Any:
        # pytree.Context may come back as a list when a spec was serialised
        return cls(**({name: None for name in names} | dict(zip(present, leaves, strict=True))))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(Examples, ("x", "y", "weight", "index"))
_register(TaskBatch, ("support", "query", "classes", "task_id"))
