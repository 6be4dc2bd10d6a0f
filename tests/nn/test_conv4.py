"""The four-block convolutional learner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmeta.nn import conv4


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_omniglot_network_is_mamls() -> None:
    model = conv4(ways=5, filters=64)
    x = torch.rand(6, 1, 28, 28)
    shapes = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 14, 14), (64, 7, 7), (64, 4, 4), (64, 2, 2)]
    assert x.shape == (6, 5)
    # convolutions and their biases, shifts, head
    assert count(model) == (9 * 64 + 64) + 3 * (9 * 64 * 64 + 64) + 4 * 64 + (64 * 5 + 5)


def test_mini_imagenet_network_is_mamls() -> None:
    model = conv4(ways=5, channels=3, size=84, filters=32, down="max_pool")
    assert model(torch.rand(2, 3, 84, 84)).shape == (2, 5)
    assert model[-1].in_features == 5 * 5 * 32
    assert count(model) == (27 * 32 + 32) + 3 * (9 * 32 * 32 + 32) + 4 * 32 + (800 * 5 + 5)


def test_max_pool_on_omniglot() -> None:
    model = conv4(ways=5, down="max_pool", scale=True, init="torch")
    assert model[-1].in_features == 64
    assert all(m.weight is not None for m in model if isinstance(m, nn.BatchNorm2d))


def test_batch_norm_keeps_no_statistics() -> None:
    model = conv4(filters=8)
    assert not list(model.buffers())
    assert all(m.weight is None for m in model if isinstance(m, nn.BatchNorm2d))
    x = torch.rand(4, 1, 28, 28)
    assert model.eval()(x).equal(model.train()(x))


def test_init_is_the_published_code() -> None:
    torch.manual_seed(0)
    strided, pooled = conv4(ways=50), conv4(ways=50, down="max_pool")
    limit = (6 / (9 * 64 + 9 * 64)) ** 0.5
    for model in (strided, pooled):
        weight = model[3].weight if model is strided else model[4].weight
        assert 0.99 * limit < weight.abs().max() <= limit
        assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert 0.95 < strided[-1].weight.std() < 1.05
    assert pooled[-1].weight.abs().max() <= (6 / (64 + 50)) ** 0.5


def test_gradients_reach_every_parameter() -> None:
    model = conv4(filters=4)
    model(torch.rand(6, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": 0}, ValueError, "ways must be at least 1"),
        ({"filters": 2.0}, TypeError, "filters must be an int"),
        ({"down": "avg"}, ValueError, "down must be one of"),
        ({"init": "zero"}, ValueError, "init must be 'torch' or 'maml'"),
        ({"down": "max_pool", "size": 15}, ValueError, "size must be at least 16"),
    ],
    ids=["ways", "filters", "down", "init", "size"],
)
def test_wrong_arguments_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"conv4: {message}"):
        conv4(**options)
