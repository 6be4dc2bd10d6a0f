"""A meta-gradient becomes .grad as a backward pass would leave it."""

from __future__ import annotations

import pytest
import torch

from fastmeta.inner_loop import SGD, Grads, accumulate_grad, adapt, meta_grad
from tests.inner_loop.naive import TOLERANCE, mse, network, regression


def test_accumulates_like_backward_to_parameters_rates_and_what_they_come_from() -> None:
    (xs, ys, xq, yq), grads = regression(), []
    for direct in (True, False):
        net = network()
        raw = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        scale = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        net[0].weight.grad = torch.ones_like(net[0].weight)
        inner = SGD({"0.*": raw.exp(), "2.*": 0.1}, 2)

        def loss(o: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return mse(scale * o, y)

        extra = {"scale": scale}
        for _ in range(2):
            if direct:
                result = meta_grad(
                    net, None, (xs, ys, xq, yq), inner=inner, loss=loss, loss_params=extra
                )
                accumulate_grad(result, net, inner=inner, loss_params=extra)
            else:
                adapted = adapt(net, None, (xs, ys), inner=inner, loss=loss, loss_params=extra)
                loss(adapted(xq), yq, scale).backward()
            inner = SGD({"0.*": raw.exp(), "2.*": 0.1}, 2)
        grads.append([*(p.grad for p in net.parameters()), raw.grad, scale.grad])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_a_gradient_is_a_copy_and_may_be_scaled() -> None:
    net = network()
    result = meta_grad(net, None, regression(), inner=SGD(0.3), loss=mse)
    accumulate_grad(result, dict(net.named_parameters()), scale=4.0)
    name = "0.weight"
    torch.testing.assert_close(net[0].weight.grad, 4 * result.grads.params[name])
    accumulate_grad(result.grads, net)
    torch.testing.assert_close(net[0].weight.grad, 5 * result.grads.params[name])


def test_what_requires_no_grad_gets_none() -> None:
    net = network()
    result = meta_grad(net, None, regression(), inner=SGD(0.3), loss=mse)
    net[0].weight.requires_grad_(False)
    accumulate_grad(result, net)
    assert net[0].weight.grad is None
    assert net[0].bias.grad is not None


def test_refusals() -> None:
    net = network()
    grads = Grads({"0.weight": torch.zeros(3)})
    with pytest.raises(TypeError, match="accumulate_grad: grad must be a MetaGrad"):
        accumulate_grad({}, net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"params\['0.weight'\] must have shape \[3\] like its"):
        accumulate_grad(grads, net)
    with pytest.raises(ValueError, match="params must have a tensor 'x', got none"):
        accumulate_grad(Grads({"x": torch.zeros(3)}), net)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    result = meta_grad(net, None, regression(), inner=SGD(lr), loss=mse)
    with pytest.raises(ValueError, match="inner/loss_params must have the structure"):
        accumulate_grad(result, net, inner=SGD({"0.*": 0.1, "2.*": 0.1}))
