"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastmeta._checks import describe, positive_int, type_error, value_error
from fastmeta.nn.init import batch_norm as _batch_norm
from fastmeta.nn.init import maml_init_

__all__ = ["mlp", "omniglot_mlp"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}

_TF_EPSILON = 1e-3  # of TensorFlow's batch_norm, which MAML's code leaves as it is


def mlp(
    sizes: Sequence[int],
    activation: str | Callable[[], nn.Module] = "relu",
    *,
    bias: bool = True,
    batch_norm: bool = False,
    scale: bool = True,
    eps: float = 1e-5,
    init: str = "torch",
) -> nn.Sequential:
    """Linear layers with an activation between them, and none after the last.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
        activation: "relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "elu", or what makes
            the module, such as ``torch.nn.ReLU``.
        bias: whether linear layers have one.
        batch_norm: whether ``BatchNorm1d`` stands between each hidden layer and its activation. It
            always normalises by the statistics of the batch and keeps none.
        scale: whether batch normalisation learns its scale (gamma); it always learns its shift.
        eps: the epsilon of batch normalisation.
        init: "torch" for the layers' own, "maml" for :func:`maml_init_`.

    Returns:
        A module from ``[S, D]`` to ``[S, sizes[-1]]``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: fewer than two sizes, a size below 1, an unknown activation or init.

    Example:
        >>> model = mlp([1, 40, 40, 1])
        >>> sum(p.numel() for p in model.parameters())
        1761

    Reference:
        Finn et al. (2017), section 5.1: two hidden layers of 40 and ReLU, for sinusoids.
    """
    if not isinstance(sizes, (tuple, list)):
        raise type_error("mlp", "sizes", "be a sequence of ints", describe(sizes))
    widths = [positive_int("mlp", f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    if len(widths) < 2:
        raise value_error("mlp", "sizes", "hold an input and an output size", sizes)
    make: Any = _ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    if make is None:
        must = f"be one of {list(_ACTIVATIONS)} or make a module"
        raise value_error("mlp", "activation", must, repr(activation))
    if not callable(make) or isinstance(make, nn.Module):
        raise type_error("mlp", "activation", "be a name or make a module", describe(activation))
    if init not in ("torch", "maml"):
        raise value_error("mlp", "init", "be 'torch' or 'maml'", repr(init))
    layers: list[nn.Module] = []
    for i in range(len(widths) - 2):
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias))
        if batch_norm:
            norm = nn.BatchNorm1d(widths[i + 1], eps=eps, track_running_stats=False)
            layers.append(_batch_norm(norm, scale))
        layers.append(make())
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))
    model = nn.Sequential(*layers)
    return maml_init_(model) if init == "maml" else model


def omniglot_mlp(ways: int = 5, *, scale: bool = False, init: str = "maml") -> nn.Sequential:
    """MAML's non-convolutional Omniglot network: 256, 128, 64, 64, each with batch normalisation.

    As in the published code, batch normalisation learns a shift and no scale, with epsilon 0.001.

    Args:
        ways: classes N.
        scale: whether batch normalisation learns a scale too.
        init: "maml" or "torch".

    Returns:
        A module from images ``[S, 1, 28, 28]`` (or rows ``[S, 784]``) to ``[S, N]``.

    Raises:
        TypeError: ``ways`` is no int.
        ValueError: ``ways`` below 1, or an unknown init.

    Example:
        >>> import torch
        >>> omniglot_mlp(ways=5)(torch.rand(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference:
        Finn et al. (2017), section 5.2 and appendix A.1.
    """
    ways = positive_int("omniglot_mlp", "ways", ways)
    sizes = [28 * 28, 256, 128, 64, 64, ways]
    body = mlp(sizes, batch_norm=True, scale=scale, eps=_TF_EPSILON, init=init)
    return nn.Sequential(nn.Flatten(), *body)
