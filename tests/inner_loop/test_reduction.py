from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmeta import _native
from fastmeta.inner_loop.reduction import LEAF, TreeReducer, chunk_of


def _leaf_sums(values: Tensor) -> TreeReducer:
    reducer = TreeReducer()
    for leaf in values.split(LEAF):
        total = leaf[0]
        for value in leaf[1:]:
            total = total + value
        reducer.push([total], len(leaf))
    return reducer


@pytest.mark.parametrize("chunk", [LEAF, 2 * LEAF, 4 * LEAF, 64 * LEAF])
@pytest.mark.parametrize("T", [1, 7, 8, 9, 24, 25, 75, 128, 200, 255])
def test_chunks_of_subtrees_give_the_bits_of_the_whole(T: int, chunk: int) -> None:
    values = torch.randn(T, generator=torch.Generator().manual_seed(T))
    (whole,) = _leaf_sums(values).total()
    chunked = TreeReducer()
    for part in values.split(chunk):
        chunked.push(_leaf_sums(part).total(), len(part))
    (found,) = chunked.total()
    assert torch.equal(found, whole)
    torch.testing.assert_close(found, values.sum(), rtol=1e-4, atol=1e-4)


def test_another_tree_gives_other_bits() -> None:
    """The test above can fail: chunks that are no subtrees show in the last bits."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    (whole,) = _leaf_sums(values).total()
    found = set()
    for chunk in (3, 5, 11, 23):
        reducer = TreeReducer()
        for part in values.split(chunk):
            reducer.push(_leaf_sums(part).total(), len(part))
        found.add(reducer.total()[0].item())
    assert found != {whole.item()}


def test_chunk_sizes_are_complete_subtrees() -> None:
    assert [chunk_of(size) for size in (1, LEAF, LEAF + 1, 4 * LEAF - 1, 1000)] == [
        LEAF,
        LEAF,
        LEAF,
        2 * LEAF,
        64 * LEAF,
    ]


def test_several_sums_go_together() -> None:
    reducer = TreeReducer()
    for value in (1.0, 2.0, 3.0):
        reducer.push([torch.tensor(value), torch.full((2,), value)], 1)
    scalar, vector = reducer.total()
    assert scalar.item() == 6.0
    assert vector.tolist() == [6.0, 6.0]


def test_a_total_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be pushed before their total"):
        TreeReducer().total()


@pytest.mark.needs("cpp")
def test_the_compiled_tree_has_the_same_leaves() -> None:
    assert _native.require("test").leaf_tasks == LEAF
