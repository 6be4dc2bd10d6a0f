from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

from fastmeta.algorithms import FOMAML, MAML
from tests.algorithms.problems import grads_of, network, regression


def test_it_is_maml_of_order_one() -> None:
    model, batch = network(), regression()
    FOMAML(model, loss=mse_loss, lr=0.1, steps=3).meta_gradient(batch)
    first = grads_of(model)
    MAML(model, loss=mse_loss, lr=0.1, steps=3, order=1).meta_gradient(batch)
    assert all(torch.equal(first[name], value) for name, value in grads_of(model).items())


def test_it_is_not_second_order() -> None:
    model, batch = network(), regression()
    FOMAML(model, loss=mse_loss, lr=0.1).meta_gradient(batch)
    first = grads_of(model)
    MAML(model, loss=mse_loss, lr=0.1).meta_gradient(batch)
    assert not torch.allclose(first["0.weight"], grads_of(model)["0.weight"], rtol=1e-3)


def test_the_order_cannot_be_given() -> None:
    with pytest.raises(TypeError, match="order"):
        FOMAML(network(), loss=mse_loss, order=2)
