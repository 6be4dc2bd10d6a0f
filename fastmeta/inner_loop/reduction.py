"""The fixed tree in which tasks are summed, so that chunks do not show in the bits.

Floating-point addition is not associative: a sum is a number only once its tree is fixed. Here
LEAF consecutive tasks are summed into a leaf, and leaves are combined in pairs, like the digits of
a binary counter: two neighbours of equal size become one of twice the size. What is left at the
end is folded from the smallest subtree to the largest. The tree depends on T alone, and a chunk of
LEAF 2^k tasks is exactly one of its subtrees.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmeta._checks import positive_int, value_error

LEAF = 8


def chunk_of(size: int) -> int:
    """The largest complete subtree of at most ``size`` tasks, and never less than one leaf.

    Example:
        >>> [chunk_of(size) for size in (1, 8, 31, 64)]
        [8, 8, 16, 64]
    """
    leaves = positive_int("chunk_of", "size", size) // LEAF
    return LEAF << max(leaves.bit_length() - 1, 0)


class TreeReducer:
    """Sums what chunks of tasks give, in the tree of the whole batch.

    Chunks are pushed in order. All but the last have one size, and for the bits of an unchunked
    sum that size is a :func:`chunk_of`.

    Example:
        >>> import torch
        >>> reducer = TreeReducer()
        >>> for chunk in torch.arange(20.0).split(8):
        ...     reducer.push([chunk.sum()], tasks=len(chunk))
        >>> reducer.total()
        [tensor(190.)]
    """

    def __init__(self) -> None:
        self._stack: list[tuple[int, list[Tensor]]] = []

    def push(self, sums: Sequence[Tensor], tasks: int) -> None:
        """Add the sums over the next ``tasks`` tasks, one tensor for each quantity."""
        value = list(sums)
        while self._stack and self._stack[-1][0] == tasks:
            tasks *= 2
            value = _add(self._stack.pop()[1], value)
        self._stack.append((tasks, value))

    def total(self) -> list[Tensor]:
        """The sums over all tasks that were pushed; the reducer is empty afterwards."""
        if not self._stack:
            raise value_error("TreeReducer", "the sums", "be pushed before their total", "none")
        value = self._stack.pop()[1]
        while self._stack:
            value = _add(self._stack.pop()[1], value)
        return value


def _add(older: list[Tensor], newer: list[Tensor]) -> list[Tensor]:
    return [left + right for left, right in zip(older, newer, strict=True)]
