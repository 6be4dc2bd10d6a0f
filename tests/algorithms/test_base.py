from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from fastmeta.algorithms import MAML
from tests.algorithms.problems import assert_same, grads_of, network, regression


def _relu_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 1))


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("chunk_size", [1, 8, 16, 20, 37, 64, 1000])
def test_a_chunk_size_does_not_change_a_bit_on_the_fused_path(chunk_size: int) -> None:
    model = _relu_network()
    batch = regression(T=75, dtype=torch.float32)
    maml = MAML(model, loss=mse_loss, steps=2, path="fused", learn_lr=True)
    whole = maml.meta_gradient(batch)
    wanted = grads_of(maml)
    chunked = maml.meta_gradient(batch, chunk_size=chunk_size)
    found = grads_of(maml)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert all(torch.equal(chunked[name], value) for name, value in whole.items())


@pytest.mark.parametrize("path", ["vectorized", "reference"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_a_mean_is_over_all_tasks_whatever_the_chunks(path: Any, chunk_size: int) -> None:
    model, batch = network(), regression(T=7)
    maml = MAML(model, loss=mse_loss, path=path)
    whole = maml.meta_gradient(batch)
    wanted = grads_of(model)
    chunked = maml.meta_gradient(batch, chunk_size=chunk_size)
    assert_same(grads_of(model), wanted)
    assert_same(chunked, whole)


def test_it_adds_to_grad_as_backward_does() -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss)
    maml.meta_gradient(batch)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    maml.meta_gradient(batch)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("path", ["auto", "vectorized", "reference"])
def test_the_autograd_route_gives_the_same_bits(path: Any) -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss, steps=2, path=path)
    metrics = maml.meta_gradient(batch)
    wanted = grads_of(model)
    loss = maml(batch)
    assert torch.equal(loss.detach(), metrics["loss"])
    loss.backward()
    assert all(torch.equal(value, wanted[name]) for name, value in grads_of(model).items())


def test_the_objective_combines_with_other_numbers() -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss)
    maml.meta_gradient(batch)
    wanted = grads_of(model)
    (3 * maml(batch) + model[0].weight.sum()).backward()
    found = grads_of(model)
    assert_same(found["0.weight"], 3 * wanted["0.weight"] + 1)
    assert_same(found["2.bias"], 3 * wanted["2.bias"])


def test_the_objective_works_with_functional_parameters() -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss)
    maml.meta_gradient(batch)
    wanted = grads_of(maml)
    params = {name: p.detach() for name, p in maml.named_parameters()}
    found = torch.func.grad(lambda at: torch.func.functional_call(maml, at, (batch,)))(params)
    assert_same(found, wanted)


def test_a_second_derivative_of_the_objective_is_refused() -> None:
    model, batch = network(), regression()
    loss = MAML(model, loss=mse_loss)(batch)
    (gradient,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="must be differentiated once"):
        gradient.square().sum().backward()


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    maml = MAML(network(), loss=mse_loss)
    with torch.no_grad():
        loss = maml(regression())
    assert not loss.requires_grad
    assert all(not value.requires_grad for value in maml.meta_gradient(regression()).values())


@pytest.mark.parametrize(
    ("error", "message", "batch"),
    [
        (TypeError, "the batch must be a TaskBatch", 3),
        (ValueError, "support.x must have at least one task", [torch.zeros(0, 3, 2)] * 4),
        (
            ValueError,
            "support.y must have 4 tasks",
            [torch.zeros(4, 3, 2), torch.zeros(3, 3, 1), torch.zeros(4, 3, 2), torch.zeros(4, 3)],
        ),
    ],
)
def test_a_bad_batch_is_named(error: type[Exception], message: str, batch: Any) -> None:
    maml = MAML(network(), loss=mse_loss)
    for verb in (maml.meta_gradient, maml):
        with pytest.raises(error, match=message):
            verb(batch)


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5])
def test_a_bad_chunk_size_is_named(chunk_size: Any) -> None:
    maml = MAML(network(), loss=mse_loss)
    with pytest.raises((TypeError, ValueError), match="meta_gradient: chunk_size must be"):
        maml.meta_gradient(regression(), chunk_size=chunk_size)
