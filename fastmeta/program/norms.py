"""Normalisation layers from primitive operations, for second derivatives that torch gets wrong.

On torch 2.13 autograd through a ``vmap`` of ``torch.func.grad`` of ``layer_norm``, ``batch_norm``
or ``instance_norm`` is silently wrong at second order (up to a few percent): the batching rules of
their backward treat the saved statistics as constants. Written with primitive operations they are
right, and no slower there. ``batch_norm`` without a scale has no second derivative at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PrimitiveNorms", "ScaledNorms"]


class ScaledNorms(TorchFunctionMode):
    """Inside this context ``batch_norm`` without a scale has one of ones.

    Without a scale torch has no second derivative of it; with one its own kernels run.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the one function, pass everything else on."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _scaled_batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _scaled_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    if weight is None:
        weight = input.new_ones(input.shape[1])
    return F.batch_norm(input, running_mean, running_var, weight, *rest, **named)


class PrimitiveNorms(TorchFunctionMode):
    """Inside this context the three functions are computed from primitive operations."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the three functions, pass everything else on."""
        replacement: Callable[..., Any] = _REPLACED.get(func, func)
        return replacement(*args, **(kwargs or {}))


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(input, axes, eps), weight, bias, tuple(normalized_shape))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    shape = (1, -1, *(1,) * (input.ndim - 2))
    if not training and running_mean is not None and running_var is not None:
        scale = torch.rsqrt(running_var.reshape(shape) + eps)
        return _affine((input - running_mean.reshape(shape)) * scale, weight, bias, shape)
    if running_mean is not None or input.numel() == input.shape[1]:
        # a running update, or one value for each channel: torch's own function says what is wrong
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    axes = (0, *range(2, input.ndim))
    return _affine(_normalised(input, axes, eps), weight, bias, shape)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = tuple(range(2, input.ndim))
    if running_mean is not None or not axes or input[0, 0].numel() == 1:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    shape = (1, -1, *(1,) * (input.ndim - 2))
    return _affine(_normalised(input, axes, eps), weight, bias, shape)


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
