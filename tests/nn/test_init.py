"""MAML's initialisation on any module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmeta.nn import maml_init_


def test_other_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.LayerNorm(4), nn.Linear(4, 4))
    before = model[1].weight.clone()
    assert maml_init_(model) is model
    assert model[1].weight.equal(before)
    assert model[2].weight.abs().max() <= 0.02
    assert not model[2].bias.any()


def test_a_module_is_asked_for() -> None:
    with pytest.raises(TypeError, match="maml_init_: module must be a module, got a float32"):
        maml_init_(torch.zeros(1))  # type: ignore[type-var]
