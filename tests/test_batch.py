"""TaskBatch: a pytree, and a door that names what is wrong."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.batch import Examples, TaskBatch, trusted

T, S, Q = 3, 4, 6


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(T, S, 2, dtype=dtype),
        torch.randint(0, 5, (T, S)),
        torch.randn(T, Q, 2, dtype=dtype),
        torch.randint(0, 5, (T, Q)),
    )


def full() -> TaskBatch:
    xs, ys, xq, yq = tensors()
    return TaskBatch.of(
        TaskBatch(
            Examples({"a": xs, "b": [xs]}, ys, torch.ones(T, S), torch.zeros(T, 2, 3).long()),
            Examples({"a": xq, "b": [xq]}, yq),
            {"label": torch.arange(T)},
            torch.arange(T),
        )
    )


FORMS = {
    "four": lambda a, b, c, d: (a, b, c, d),
    "list": lambda a, b, c, d: [a, b, c, d],
    "two-pairs": lambda a, b, c, d: ((a, b), (c, d)),
    "two-examples": lambda a, b, c, d: (Examples(a, b), Examples(c, d)),
    "mixed": lambda a, b, c, d: (Examples(a, b), (c, d)),
    "batch": lambda a, b, c, d: TaskBatch(Examples(a, b), Examples(c, d)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_batch(form: str) -> None:
    parts = tensors()
    batch = TaskBatch.of(FORMS[form](*parts))
    found = (batch.support.x, batch.support.y, batch.query.x, batch.query.y)
    assert all(a is b for a, b in zip(found, parts, strict=True))
    assert batch.num_tasks == len(batch) == T


def test_a_checked_batch_comes_back_as_it_is() -> None:
    batch = TaskBatch.of(tensors())
    assert TaskBatch.of(batch) is batch


def test_a_rebuilt_batch_is_checked_again() -> None:
    batch = pytree.tree_map(lambda t: t[:0], TaskBatch.of(tensors()))
    with pytest.raises(ValueError, match=r"support\.x must have at least one task"):
        TaskBatch.of(batch)


def test_flatten_and_unflatten() -> None:
    batch = full()
    leaves, spec = pytree.tree_flatten(batch)
    assert len(leaves) == 2 + 1 + 2 + 2 + 1 + 2
    again = pytree.tree_unflatten(leaves, spec)
    assert again.support.index is batch.support.index
    assert again.query.weight is None
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(batch)]
    assert ".support.x['a']" in paths
    assert ".task_id" in paths


def test_vmap_sees_one_task() -> None:
    batch = full()

    def one(task: TaskBatch) -> Tensor:
        assert task.support.x["a"].shape == (S, 2)
        assert task.query.weight is None
        return task.support.x["a"].sum() + task.query.y.sum()

    expected = batch.support.x["a"].sum((1, 2)) + batch.query.y.sum(1)
    torch.testing.assert_close(torch.func.vmap(one)(batch), expected)


def test_to_moves_floating_tensors_only() -> None:
    double = full().to(dtype=torch.float64)
    assert double.support.x["b"][0].dtype == torch.float64
    assert double.support.weight is not None
    assert double.support.weight.dtype == torch.float64
    assert double.support.y.dtype == torch.int64
    assert full().to("meta").query.y.device.type == "meta"


def test_subscripts() -> None:
    batch = full()
    part = batch[1:]
    assert part.num_tasks == T - 1
    assert TaskBatch.of(part) is part
    assert part.support.y.data_ptr() == batch.support.y[1:].data_ptr()
    one = batch[-1]
    assert one.support.x["a"].shape == (S, 2)
    assert one.task_id is not None
    assert one.task_id.item() == T - 1
    with pytest.raises(IndexError):
        batch[T]
    for wrong in (True, "0", 1.0):
        with pytest.raises(TypeError, match="must be a slice or an int"):
            batch[wrong]  # type: ignore[index]


def test_chunks_are_the_batch_in_order() -> None:
    batch = full()
    chunks = list(batch.chunks(2))
    assert [chunk.num_tasks for chunk in chunks] == [2, 1]
    ids = torch.cat([chunk.task_id for chunk in chunks if chunk.task_id is not None])
    assert ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        batch.chunks(0)


def swapped(**changes: Any) -> TaskBatch:
    xs, ys, xq, yq = tensors()
    parts = {"xs": xs, "ys": ys, "xq": xq, "yq": yq} | changes
    return TaskBatch(
        Examples(parts["xs"], parts["ys"], parts.get("weight"), parts.get("index")),
        Examples(parts["xq"], parts["yq"], parts.get("query_weight")),
        parts.get("classes"),
        parts.get("task_id"),
    )


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "number": ({"xs": 3.0}, TypeError, "support.x must be a tensor, got 3.0"),
    "array": ({"xq": np.zeros((T, Q, 2))}, TypeError, "torch.from_numpy makes one"),
    "no-target": ({"ys": None}, TypeError, "support.y must be a tensor, got None"),
    "no-leaf": ({"xs": {}}, TypeError, "support.x must hold at least one tensor"),
    "rank": ({"xs": torch.zeros(T)}, ValueError, "support.x must have shape [T, S, ...]"),
    "target-rank": ({"yq": torch.zeros(T).long()}, ValueError, "query.y must have shape"),
    "no-task": (
        {"xs": torch.zeros(0, S, 2), "ys": torch.zeros(0, S).long()},
        ValueError,
        "support.x must have at least one task",
    ),
    "no-row": (
        {"xs": torch.zeros(T, 0, 2), "ys": torch.zeros(T, 0).long()},
        ValueError,
        "support.x must have at least one row of each task",
    ),
    "tasks": ({"xq": torch.zeros(T + 1, Q, 2)}, ValueError, "query.x must have 3 tasks"),
    "rows": ({"ys": torch.zeros(T, S + 1).long()}, ValueError, "support.y must have 4 rows"),
    "leaf": (
        {"xs": {"a": torch.zeros(T, S), "b": torch.zeros(T, S + 1)}},
        ValueError,
        "support.x['b'] must have 4 rows of each task like support.x",
    ),
    "device": ({"yq": torch.zeros(T, Q, device="meta").long()}, ValueError, "must be on cpu"),
    "features": ({"xq": torch.zeros(T, Q, 3)}, ValueError, "query.x must have rows of shape [2]"),
    "dtype": ({"xq": torch.zeros(T, Q, 2).double()}, TypeError, "query.x must be float32"),
    "structure": ({"xq": [torch.zeros(T, Q, 2)]}, TypeError, "query.x must have the structure"),
    "weight-kind": ({"weight": [1.0]}, TypeError, "support.weight must be a floating tensor"),
    "weight-dtype": (
        {"weight": torch.ones(T, S, dtype=torch.bool)},
        TypeError,
        "support.weight must be a floating tensor [T, S], got a bool tensor of shape [3, 4]",
    ),
    "weight-shape": ({"weight": torch.ones(T, Q)}, ValueError, "must have shape [3, 4]"),
    "weight-negative": (
        {"query_weight": -torch.ones(T, Q)},
        ValueError,
        "query.weight must be finite and not negative",
    ),
    "weight-nan": ({"weight": torch.full((T, S), torch.nan)}, ValueError, "must be finite"),
    "weight-inf": ({"weight": torch.full((T, S), torch.inf)}, ValueError, "must be finite"),
    "weight-masks-all": (
        {"weight": torch.tensor([[1.0] * S, [0.0] * S, [1.0] * S])},
        ValueError,
        "must leave each task at least one row, got only zeros in task 1",
    ),
    "index-dtype": ({"index": torch.zeros(T, 1, 1)}, TypeError, "index must be an int64 tensor"),
    "index-shape": ({"index": torch.zeros(T, 1).long()}, ValueError, "have shape [3, I, B]"),
    "index-empty": ({"index": torch.zeros(T, 0, 1).long()}, ValueError, "have shape [3, I, B]"),
    "index-high": (
        {"index": torch.full((T, 1, 2), S)},
        ValueError,
        "support.index must be rows in [0, 4), got values 4 to 4",
    ),
    "index-low": ({"index": torch.full((T, 1, 2), -1)}, ValueError, "rows in [0, 4)"),
    "classes-kind": ({"classes": ["a", "b", "c"]}, TypeError, "classes[0] must be a tensor"),
    "classes-tasks": ({"classes": torch.zeros(T - 1)}, ValueError, "classes must have 3 tasks"),
    "task-id-kind": ({"task_id": [0, 1, 2]}, TypeError, "task_id must be an int64 tensor"),
    "task-id-shape": ({"task_id": torch.zeros(T, 1).long()}, ValueError, "task_id must have"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_batches_are_refused_by_name(case: str) -> None:
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)) as caught:
        TaskBatch.of(swapped(**changes))
    assert str(caught.value).startswith("TaskBatch: ")


@pytest.mark.parametrize(
    "value",
    [None, torch.zeros(T, S), {"support": 1}, tensors()[:3], (1, 2), ((1, 2, 3), (1, 2))],
    ids=["none", "tensor", "dict", "three", "numbers", "triples"],
)
def test_other_forms_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="the batch must be a TaskBatch, "):
        TaskBatch.of(value)


def test_sides_must_be_examples() -> None:
    with pytest.raises(TypeError, match="query must be Examples"):
        TaskBatch.of(TaskBatch(Examples(*tensors()[:2]), tensors()[2:]))  # type: ignore[arg-type]


def test_weights_of_padding_and_gradients_are_accepted() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * T, requires_grad=True)
    assert TaskBatch.of(swapped(weight=weight)).support.weight is weight


def test_trusted_skips_the_check() -> None:
    broken = trusted(swapped(ys=torch.zeros(1)))
    assert TaskBatch.of(broken) is broken
