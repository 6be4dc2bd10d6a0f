"""How MAML's code initialises, and the batch normalisation it uses."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from fastmeta._checks import describe, type_error

__all__ = ["batch_norm", "maml_init_"]

_Norm = TypeVar("_Norm", nn.BatchNorm1d, nn.BatchNorm2d)
_Module = TypeVar("_Module", bound=nn.Module)

_STD = 0.01


def maml_init_(module: _Module) -> _Module:
    """Initialise a network in place as MAML's code does.

    Linear weights are normal with deviation 0.01, cut off at two deviations; convolution weights
    are uniform by Glorot and Bengio; biases are zero. Normalisation layers start as they always
    do, at scale 1 and shift 0. Numbers come from torch's generator: ``torch.manual_seed``.

    Args:
        module: any module; layers of other kinds in it are left alone.

    Returns:
        The module.

    Raises:
        TypeError: not a module.

    Example:
        >>> from torch import nn
        >>> layer = maml_init_(nn.Linear(40, 40))
        >>> bool(layer.weight.abs().max() <= 0.02), bool((layer.bias == 0).all())
        (True, True)

    Reference:
        The code published with Finn et al. (2017), ``construct_fc_weights`` and
        ``construct_conv_weights``. Glorot, Bengio (2010), equation 16.
    """
    network: Any = module
    if not isinstance(network, nn.Module):
        raise type_error("maml_init_", "module", "be a module", describe(network))
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
        elif isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def batch_norm(layer: _Norm, scale: bool) -> _Norm:
    """Take the scale (gamma) out of a normalisation layer, unless it shall have one.

    TensorFlow's ``contrib.layers.batch_norm``, which MAML's code calls, learns a shift only.
    """
    if not scale:
        layer.register_parameter("weight", None)
    return layer


def normal_head_(layer: nn.Linear) -> nn.Linear:
    """The last layer of MAML's convolutional Omniglot network: standard normal, bias zero."""
    with torch.no_grad():
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer
