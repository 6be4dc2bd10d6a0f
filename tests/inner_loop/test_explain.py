"""What explain says of a module that every path runs, and of those that only some do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmeta.inner_loop import SGD, Explanation, explain, meta_grad
from tests.inner_loop.naive import mse, network, regression


def last(output: Any, y: torch.Tensor) -> torch.Tensor:
    return mse(output[0][:, 0], y)


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.GRU(3, 2)).double()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.embed(x[..., None])
        return self.head(self.attention(z, z, z, need_weights=False)[0].mean(1))


def test_a_perceptron() -> None:
    found = explain(network(), regression(), inner=SGD(0.1, exclude="*.bias"), loss=mse)
    assert found.program is not None
    assert [v.path for v in found.verdicts] == ["fused", "vectorized", "reference"]
    assert all(v.why_not is None for v in found.verdicts[1:])
    assert found.adapted == ("0.weight", "2.weight")
    text = str(found)
    assert text.startswith(f"path: {found.path}\n")
    assert "adapts: 0.weight, 2.weight\n" in text
    assert "does not adapt, but is meta-learned: 0.bias, 2.bias\n" in text
    assert "  1 linear 3 -> 4 (0.weight, 0.bias)\n" in text
    assert "  loss 0.5 * mse, mean over rows" in text


def test_a_recurrent_net() -> None:
    found = explain(recurrent(), regression(), inner=SGD(0.1), loss=last)
    assert found.path == "reference"
    assert found.program is None
    assert "vectorized  no: vmap cannot run the recurrent layer 1 (GRU)" in str(found)
    assert "program: not read: " in str(found)


def test_an_attention_block() -> None:
    found = explain(Attention().double(), regression(), inner=SGD(0.1), loss=mse)
    assert found.path == "vectorized"
    assert found.verdicts[0].why_not is not None


def test_a_net_with_statistics() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    found = explain(net, regression(), inner=SGD(0.1), loss=mse, batch_norm="track")
    assert found.path == "reference"
    assert "note: batch_norm='track': as torch does it in the module's mode" in str(found)
    found = explain(net, regression(), inner=SGD(0.1), loss=mse)
    assert "note: batch_norm='batch': each call normalises by its own rows" in str(found)
    assert net[1].num_batches_tracked == 0


def test_notes_on_randomness_and_frozen_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    net[0].weight.requires_grad_(False)
    text = str(explain(net, regression(), inner=SGD(0.1), loss=mse))
    assert "note: 1 (Dropout) draws from torch's global generator" in text
    assert "note: frozen, neither adapted nor meta-learned: 0.weight" in text


@pytest.mark.parametrize("outer", ["query", "displacement", (0.5, 0.5)])
def test_it_says_what_meta_grad_does(outer: Any) -> None:
    cases: list[tuple[nn.Module, Any]] = [
        (network(), mse),
        (recurrent(), last),
        (Attention().double(), mse),
    ]
    for net, loss in cases:
        inner = SGD(0.1, 2)
        found = explain(net, regression(), inner=inner, loss=loss, outer=outer)
        result = meta_grad(net, None, regression(), inner=inner, loss=loss, outer=outer)
        assert found.path == result.path


def test_nothing_is_right() -> None:
    found = explain(network(), regression(), inner=SGD(), loss=mse, batch_norm="per_step")
    assert isinstance(found, Explanation)
    assert found.path is None
    assert str(found).startswith("path: none is right\n")
