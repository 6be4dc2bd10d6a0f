"""Fully connected learners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmeta.nn import mlp, omniglot_mlp


def kinds(model: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in model.children()]


def test_layers_in_order() -> None:
    assert kinds(mlp([1, 40, 40, 1])) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert kinds(mlp([3, 4, 2], "tanh", batch_norm=True)) == [
        "Linear",
        "BatchNorm1d",
        "Tanh",
        "Linear",
    ]
    assert kinds(mlp([3, 2], nn.Sigmoid)) == ["Linear"]
    assert all("bias" not in name for name, _ in mlp([3, 4, 2], bias=False).named_parameters())


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "elu"])
def test_every_activation_by_name(name: str) -> None:
    out = mlp([2, 3, 1], name)(torch.randn(5, 2))
    assert out.shape == (5, 1)
    assert out.isfinite().all()


def test_batch_norm_keeps_no_statistics() -> None:
    model = mlp([3, 4, 2], batch_norm=True)
    assert not list(model.buffers())
    x = torch.randn(6, 3)
    assert model.eval()(x).equal(model.train()(x))


def test_omniglot_network_is_the_papers() -> None:
    model = omniglot_mlp(ways=5)
    sizes = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert sizes == [(784, 256), (256, 128), (128, 64), (64, 64), (64, 5)]
    norms = [m for m in model if isinstance(m, nn.BatchNorm1d)]
    assert [m.num_features for m in norms] == [256, 128, 64, 64]
    assert all(m.weight is None and m.bias is not None and m.eps == 1e-3 for m in norms)
    assert all(
        m.weight is not None for m in omniglot_mlp(scale=True) if isinstance(m, nn.BatchNorm1d)
    )
    assert omniglot_mlp(20)(torch.rand(7, 784)).shape == (7, 20)
    model(torch.rand(7, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_init() -> None:
    torch.manual_seed(3)
    first = mlp([50, 60, 1], init="maml")
    torch.manual_seed(3)
    again = mlp([50, 60, 1], init="maml")
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    weight = first[0].weight
    assert weight.abs().max() <= 0.02
    assert 0.008 < weight.std() < 0.0095  # 0.0088: a normal cut off at two deviations
    assert not first[0].bias.any()
    assert mlp([50, 60, 1])[0].bias.any()


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "sizes-kind": (5, {}, TypeError, "sizes must be a sequence of ints"),
    "sizes-short": ([5], {}, ValueError, "sizes must hold an input and an output size"),
    "sizes-zero": ([5, 0, 1], {}, ValueError, r"sizes\[1\] must be at least 1"),
    "sizes-float": ([5, 1.5], {}, TypeError, r"sizes\[1\] must be an int"),
    "activation": ([1, 1], {"activation": "rleu"}, ValueError, "activation must be one of"),
    "activation-kind": ([1, 1], {"activation": 3}, TypeError, "activation must be a name or"),
    "activation-made": ([1, 1], {"activation": nn.ReLU()}, TypeError, "activation must be"),
    "init": ([1, 1], {"init": "zero"}, ValueError, "init must be 'torch' or 'maml'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    sizes, options, error, message = REFUSED[case]
    with pytest.raises(error, match=f"mlp: {message}"):
        mlp(sizes, **options)


def test_wrong_ways_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="omniglot_mlp: ways must be at least 1"):
        omniglot_mlp(0)
