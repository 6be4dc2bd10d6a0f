"""The tensors of ``inner`` and ``loss_params`` that a meta-gradient is taken of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.inner_loop.optimizers import InnerOptimizer, ResolvedSGD, resolve
from fastmeta.inner_loop.request import Request

__all__ = ["Leaves", "lift", "wants_grad"]


@dataclass
class Leaves:
    """``inner`` and ``loss_params`` over fresh autograd leaves, and the way back.

    Args:
        inner: the inner optimizer over the leaves.
        rates: ``inner`` resolved.
        loss_params: the loss parameters over the leaves.
        tensors: the leaves that require grad: those of ``inner``, then those of ``loss_params``.
    """

    inner: InnerOptimizer
    rates: ResolvedSGD
    loss_params: Mapping[str, Any] | None
    tensors: list[Tensor]
    _trees: tuple[Any, Any]

    def rebuild(self, grads: list[Tensor]) -> tuple[Any, Any]:
        """Gradients of ``tensors`` in the structures of ``inner`` and ``loss_params``."""
        # a displacement has no such gradients: every place is then None
        left = iter(grads)
        return (
            pytree.tree_map(lambda lifted: next(left, None) if lifted else None, self._trees[0]),
            pytree.tree_map(lambda lifted: next(left, None) if lifted else None, self._trees[1])
            if self._trees[1] is not None
            else None,
        )


def lift(request: Request, *, detach: bool = True) -> Leaves:
    """Put fresh leaves in the place of every tensor that requires grad.

    Args:
        request: the call.
        detach: False keeps the caller's own tensors, so that a graph can reach them (``adapt``).
    """
    tensors: list[Tensor] = []

    def fresh(leaf: Any) -> Any:
        if not wanted(leaf) or not detach:
            return leaf
        tensors.append(leaf.detach().requires_grad_())
        return tensors[-1]

    inner = pytree.tree_map(fresh, request.inner)
    params = request.loss_params
    loss_params = None if params is None else pytree.tree_map(fresh, dict(params))
    rates = request.rates
    if tensors or not detach:
        rates = resolve(inner, {name: request.shape(name) for name in request.params})
    trees = (
        pytree.tree_map(wanted, request.inner),
        None if params is None else pytree.tree_map(wanted, dict(params)),
    )
    return Leaves(inner, rates, loss_params, tensors, trees)


def wanted(leaf: Any) -> bool:
    """Whether a leaf of ``inner`` or ``loss_params`` is a meta-parameter."""
    return isinstance(leaf, Tensor) and leaf.requires_grad


def wants_grad(request: Request) -> bool:
    """Whether anything that adapted parameters depend on requires grad."""
    trees = (request.params, request.inner, request.loss_params, request.batch.support)
    return any(
        isinstance(leaf, Tensor) and leaf.requires_grad
        for tree in trees
        if tree is not None
        for leaf in pytree.tree_leaves(tree)
    )
