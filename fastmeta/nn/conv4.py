"""The four-block convolutional network of few-shot learning."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from fastmeta._checks import positive_int, value_error
from fastmeta.nn.init import batch_norm, maml_init_, normal_head_

__all__ = ["conv4"]

Down = Literal["stride", "max_pool"]

_BLOCKS = 4
_TF_EPSILON = 1e-3


def conv4(
    ways: int = 5,
    *,
    channels: int = 1,
    size: int = 28,
    filters: int = 64,
    down: Down = "stride",
    scale: bool = False,
    init: str = "maml",
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch normalisation and ReLU, and a linear layer.

    Batch normalisation uses the statistics of the batch and keeps none; as in MAML's code it
    learns a shift and no scale, with epsilon 0.001. Convolutions are padded by one pixel all
    around; where the size is even, TensorFlow pads the far side only, a shift by one pixel.

    - ``conv4(ways, filters=64)`` is MAML's Omniglot network: stride 2 and the mean over space.
    - ``conv4(ways, channels=3, size=84, filters=32, down="max_pool")`` is its mini-ImageNet
      network: 2x2 max-pooling after ReLU, and 5 * 5 * 32 features.

    Args:
        ways: classes N.
        channels: C of the images.
        size: height and width H of the images.
        filters: channels of every block.
        down: what halves the size in each block: "stride" (the head then sees the mean over
            space) or "max_pool" (the head then sees all positions).
        scale: whether batch normalisation learns a scale too.
        init: "maml" (Glorot's uniform convolutions, zero biases, and the published code's head:
            standard normal for "stride", Glorot's uniform for "max_pool") or "torch".

    Returns:
        A module from ``[S, C, H, H]`` to ``[S, N]``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or images too small for four halvings.

    Example:
        >>> import torch
        >>> conv4(ways=5)(torch.rand(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference:
        Vinyals et al. (2016), section 4.1. Finn et al. (2017), section 5.2 and appendix A.1.
    """
    ways = positive_int("conv4", "ways", ways)
    channels = positive_int("conv4", "channels", channels)
    size = positive_int("conv4", "size", size)
    filters = positive_int("conv4", "filters", filters)
    if down not in get_args(Down):
        raise value_error("conv4", "down", f"be one of {get_args(Down)}", repr(down))
    if init not in ("torch", "maml"):
        raise value_error("conv4", "init", "be 'torch' or 'maml'", repr(init))
    if down == "max_pool" and size < 1 << _BLOCKS:
        raise value_error("conv4", "size", f"be at least {1 << _BLOCKS} to be halved 4 times", size)
    stride = 2 if down == "stride" else 1
    layers: list[nn.Module] = []
    for i in range(_BLOCKS):
        inputs = channels if i == 0 else filters
        norm = nn.BatchNorm2d(filters, eps=_TF_EPSILON, track_running_stats=False)
        layers += [
            nn.Conv2d(inputs, filters, 3, stride=stride, padding=1),
            batch_norm(norm, scale),
            nn.ReLU(),
        ]
        if down == "max_pool":
            layers.append(nn.MaxPool2d(2))
    side = 1
    if down == "stride":
        layers.append(nn.AdaptiveAvgPool2d(1))
    else:
        side = size >> _BLOCKS
    head = nn.Linear(filters * side * side, ways)
    model = nn.Sequential(*layers, nn.Flatten(), head)
    if init == "maml":
        maml_init_(model)
        if down == "stride":
            normal_head_(head)
        else:
            nn.init.xavier_uniform_(head.weight)
    return model
