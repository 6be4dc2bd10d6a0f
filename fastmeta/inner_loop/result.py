"""What the engine returns, and how it becomes ``.grad``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, type_error, value_error
from fastmeta.inner_loop.optimizers import InnerOptimizer, OptimizerState

__all__ = ["Grads", "MetaGrad", "accumulate_grad"]


class Grads(NamedTuple):
    """The meta-gradient, in the structures of what it is the gradient of.

    Args:
        params: by name, ``[...]``, or ``[T, ...]`` where the parameter carried the task axis. One
            entry for each trainable parameter; frozen parameters (``requires_grad=False`` in the
            module) have none.
        inner: the structure of ``inner``: a gradient in the place of each tensor that requires
            grad, None in the place of everything else.
        loss_params: likewise, or None if there were none.
    """

    params: dict[str, Tensor]
    inner: Any = None
    loss_params: Any = None


@dataclass
class MetaGrad:
    """The result of one ``meta_grad`` call. Nothing in it carries an autograd graph.

    Args:
        grads: the gradient of ``reduction`` over tasks of the outer loss. With a mean, the entry of
            a parameter that carries the task axis is 1/T of each task's own gradient, as autograd
            would give it.
        losses: ``[T]``, the outer loss of each task (for "displacement": the query loss after
            adaptation).
        metrics: "support_loss" ``[T, I]``, the loss before each inner step; "accuracy" ``[T]`` on
            the query, where y is integer ``[T, Q]`` and the output ``[Q, C]``.
        adapted: the adapted parameters by name, ``[T, ...]``.
        state: the inner optimizer's state after the last step, ``[T, ...]``.
        path: the path that ran.
    """

    grads: Grads
    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    adapted: Mapping[str, Tensor] = field(default_factory=dict)
    state: OptimizerState | None = None
    path: str = ""


def accumulate_grad(
    grad: MetaGrad | Grads,
    params: nn.Module | Mapping[str, Tensor],
    *,
    inner: InnerOptimizer | None = None,
    loss_params: Any = None,
    scale: float = 1.0,
) -> None:
    """Add a meta-gradient to ``.grad``, exactly as ``loss.backward()`` would.

    It accumulates like ``backward``: call ``optimizer.zero_grad()`` between optimizer steps, clip
    with ``torch.nn.utils.clip_grad_norm_`` afterwards, pass ``scale=scaler.get_scale()`` for a
    ``GradScaler``, and with data parallelism reduce ``.grad`` over ranks after the call (a hook of
    ``DistributedDataParallel`` sees only a real ``backward``). A tensor that is itself computed
    from others (say ``lr = raw.exp()``) passes its gradient on to them.

    Args:
        grad: the result of ``meta_grad``.
        params: the module, or the mapping that was given as ``params``: tensors ``[...]`` or
            ``[T, ...]``.
        inner: the inner optimizer, if its tensors are to receive gradients.
        loss_params: the loss parameters, if they are to receive gradients.
        scale: a factor on every gradient.

    Raises:
        TypeError: ``grad`` is no meta-gradient.
        ValueError: a gradient has no parameter of its name and shape in ``params``.

    Example:
        >>> import torch, fastmeta
        >>> net = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 1)
        >>> mse = torch.nn.functional.mse_loss
        >>> result = fastmeta.meta_grad(net, None, (x, y, x, y), inner=fastmeta.SGD(), loss=mse)
        >>> accumulate_grad(result, net)
        >>> torch.equal(net.weight.grad, result.grads.params["weight"])
        True
    """
    op = "accumulate_grad"
    grads = grad.grads if isinstance(grad, MetaGrad) else grad
    if not isinstance(grads, Grads):
        raise type_error(op, "grad", "be a MetaGrad", describe(grad))
    named: Mapping[str, Tensor]
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for name, value in grads.params.items():
        target = named.get(name)
        if target is None:
            raise value_error(op, "params", f"have a tensor {name!r}", "none of that name")
        if target.shape != value.shape:
            must = f"have shape {list(value.shape)} like its gradient"
            raise value_error(op, f"params[{name!r}]", must, target)
        if target.requires_grad:
            targets.append(target)
            values.append(value)
    for owner, tree in ((inner, grads.inner), (loss_params, grads.loss_params)):
        if owner is None or tree is None:
            continue
        leaves, there = pytree.tree_flatten(owner)
        found, here = pytree.tree_flatten(tree)
        if len(leaves) != len(found):
            raise value_error(op, "inner/loss_params", f"have the structure {here}", str(there))
        for leaf, value in zip(leaves, found, strict=True):
            if value is not None:
                targets.append(leaf)
                values.append(value)
    if scale != 1.0:
        values = [value * scale for value in values]
    for target, value in zip(targets, values, strict=True):
        if target.is_leaf and target.grad is None:
            target.grad = value.detach().clone()
        elif target.is_leaf and target.grad is not None:
            target.grad.add_(value)
    rest = [(t, v) for t, v in zip(targets, values, strict=True) if not t.is_leaf]
    if rest:
        torch.autograd.backward([t for t, _ in rest], [v for _, v in rest])
