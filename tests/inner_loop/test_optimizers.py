"""Inner optimizers: values against torch.optim, derivatives against differences, rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.inner_loop import SGD, Adam, InnerOptimizer, Momentum, adapt, meta_grad, resolve
from tests.inner_loop.naive import mse, network, regression

SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
PATHS = ["reference", "vectorized"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("inner", "optimizer"),
    [
        (SGD(0.1, 4), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Momentum(0.1, 4, momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
        (
            Momentum(0.1, 4, momentum=0.8, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
        ),
        (Adam(0.05, 4), lambda p: torch.optim.Adam(p, lr=0.05)),
        (
            Adam(0.05, 4, betas=(0.0, 0.9), eps=1e-3),
            lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.0, 0.9), eps=1e-3),
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adam-no-momentum"],
)
def test_steps_are_those_of_torch(
    inner: InnerOptimizer, optimizer: Callable[[Any], torch.optim.Optimizer], path: Any
) -> None:
    xs, ys, _, _ = regression(T=3)
    adapted = adapt(network(), None, (xs, ys), inner=inner, loss=mse, path=path)
    for task in range(3):
        net = network()
        steps = optimizer(net.parameters())
        for _ in range(4):
            steps.zero_grad()
            mse(net(xs[task]), ys[task]).backward()
            steps.step()
        for name, value in net.named_parameters():
            torch.testing.assert_close(adapted.params[name][task], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_to_the_optimizers_own_numbers(path: Any, order: Any) -> None:
    """Central differences; a derivative to beta2 of the wrong sign or size is seen here."""
    batch = regression(T=3)
    start = torch.tensor([0.05, 0.8, 0.9, 0.7], dtype=torch.float64)

    def inners(v: Tensor) -> list[InnerOptimizer]:
        return [Adam(v[0], 3, betas=(v[1], v[2])), Momentum(v[0], 3, momentum=v[3])]

    for which, numbers in ((0, (0, 1, 2)), (1, (0, 3))):
        v = start.clone().requires_grad_()
        result = meta_grad(
            network(), None, batch, inner=inners(v)[which], loss=mse, path=path, order=order
        )
        grads = [g for g in pytree.tree_leaves(result.grads.inner) if isinstance(g, Tensor)]
        for number, grad in zip(numbers, grads, strict=True):
            ends = []
            for sign in (1, -1):
                moved = start.clone()
                moved[number] += sign * 1e-6
                inner = inners(moved)[which]
                ends.append(meta_grad(network(), None, batch, inner=inner, loss=mse, path=path))
            numeric = (ends[0].losses - ends[1].losses).mean() / 2e-6
            if order == 2:  # at first order a later gradient does not know of an earlier rate
                torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)
            else:
                assert (grad - numeric).abs() > 1e-6 * numeric.abs()


@pytest.mark.parametrize("path", PATHS)
def test_adam_has_a_derivative_where_the_second_moment_is_zero(path: Any) -> None:
    net = network()
    xs, ys, xq, yq = regression()
    xs[..., 0] = 0  # the first column of the first layer gets no gradient at any step
    inner = Adam(0.05, 2, eps=1e-3)
    result = meta_grad(net, None, (xs, ys, xq, yq), inner=inner, loss=mse, path=path)
    grad = result.grads.params["0.weight"]
    assert grad.isfinite().all()
    # such an element does not move, and its meta-gradient is that of the query alone
    end = adapt(net, None, (xs, ys), inner=inner, loss=mse, path=path)
    leaf = end.params["0.weight"].detach().requires_grad_()
    hidden = torch.tanh(xq @ leaf.mT + end.params["0.bias"].detach()[:, None])
    output = hidden @ end.params["2.weight"].detach().mT + end.params["2.bias"].detach()[:, None]
    (query,) = torch.autograd.grad(mse(output, yq), leaf)
    torch.testing.assert_close(grad[:, 0], query.sum(0)[:, 0], rtol=1e-9, atol=1e-12)


def test_an_optimizer_is_a_pytree_of_its_numbers() -> None:
    lr = torch.tensor([0.1, 0.2])
    inner = Adam({"*.weight": lr, "*.bias": 0.3}, 2, exclude="2.*", betas=(0.5, 0.9))
    leaves, spec = pytree.tree_flatten(inner)
    assert leaves == [lr, 0.3, 0.5, 0.9]
    again = pytree.tree_unflatten([None] * 4, spec)
    assert type(again) is Adam
    assert again.lr == {"*.weight": None, "*.bias": None}
    assert (again.steps, again.exclude, again.eps) == (2, ("2.*",), 1e-8)


@pytest.mark.parametrize(
    ("lr", "shapes"),
    [
        (0.1, None),
        (torch.tensor(0.1), (1, 1, 1)),
        (torch.rand(5), (5, 1, 1)),
        ({"*": torch.tensor(0.1)}, (1, 1, 1)),
        ({"*.weight": torch.rand(5), "*.bias": 0.1}, (5, 1, 1)),
        ({"0.weight": torch.rand(4, 3), "[!0]*": 0.1, "0.bias": 0.2}, (1, 4, 3)),
        ({"0.weight": torch.rand(5, 4, 3), "[!0]*": 0.1, "0.bias": 0.2}, (5, 4, 3)),
        ({"0.weight": torch.rand(5, 1, 3), "[!0]*": 0.1, "0.bias": 0.2}, (5, 1, 3)),
    ],
)
def test_every_form_of_a_rate(lr: Any, shapes: tuple[int, ...] | None) -> None:
    resolved = resolve(SGD(lr, 5), SHAPES)
    assert resolved.adapted == tuple(SHAPES)
    rate = resolved.rates["0.weight"]
    assert (tuple(rate.shape) if isinstance(rate, Tensor) else None) == shapes
    for step in range(5):
        at = resolved.at(step)["0.weight"]
        assert torch.broadcast_shapes(torch.as_tensor(at).shape, (4, 3)) == (4, 3)


def test_steps_and_elements_of_one_size() -> None:
    with pytest.raises(
        ValueError, match=r"lr\['0.bias'\] must say whether .* \[4, 1\] or \[1, 4\]"
    ):
        resolve(SGD({"*.weight": 0.1, "0.bias": torch.rand(4), "2.bias": 0.1}, 4), SHAPES)
    rates = torch.rand(4)
    for shape in ((4, 1), (1, 4)):
        lr = {"*.weight": 0.1, "0.bias": rates.reshape(shape), "2.bias": 0.1}
        found = resolve(SGD(lr, 4), SHAPES).rates["0.bias"]
        assert isinstance(found, Tensor)
        assert found.shape == shape


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SGD(-0.1), ValueError, "SGD: lr must be at least 0, got -0.1"),
        (lambda: SGD(float("nan")), ValueError, "SGD: lr must be finite, got nan"),
        (lambda: SGD("fast"), TypeError, "SGD: lr must be a number or a tensor or a mapping"),
        (
            lambda: SGD(torch.tensor(1)),
            TypeError,
            "SGD: lr must be a floating tensor, got an int64",
        ),
        (lambda: SGD({}), ValueError, "SGD: lr must have at least one key"),
        (lambda: SGD({1: 0.1}), TypeError, "SGD: lr must have name patterns for keys"),
        (lambda: SGD({"a": -1.0}), ValueError, r"SGD: lr\['a'\] must be at least 0"),
        (lambda: SGD(steps=-1), ValueError, "SGD: steps must be at least 0, got -1"),
        (lambda: SGD(steps=1.5), TypeError, "SGD: steps must be an int, got 1.5"),
        (lambda: SGD(adapt=3), TypeError, "SGD: adapt must be a name pattern or a tuple"),
        (lambda: Momentum(momentum=-1.0), ValueError, "Momentum: momentum must be at least 0"),
        (lambda: Adam(betas=0.9), TypeError, "Adam: betas must be a pair"),
        (lambda: Adam(betas=(0.9, 1.0)), ValueError, "Adam: betas must be below 1"),
        (lambda: Adam(eps=-1.0), ValueError, "Adam: eps must be at least 0"),
        (
            lambda: resolve(SGD(adapt="head.*"), SHAPES),
            ValueError,
            r"SGD: adapt must match a trainable parameter \('0.weight', .*\), got 'head.\*'",
        ),
        (lambda: resolve(SGD(exclude="*"), SHAPES), ValueError, "leave at least one parameter"),
        (lambda: resolve(SGD(exclude="bais"), SHAPES), ValueError, "exclude must match"),
        (
            lambda: resolve(SGD(torch.rand(3)), SHAPES),
            ValueError,
            r"lr must have shape \[\] or \[1\]",
        ),
        (
            lambda: resolve(SGD({"*.weight": 0.1}), SHAPES),
            ValueError,
            "lr must have exactly one key that matches '0.bias', got none for it",
        ),
        (
            lambda: resolve(SGD({"*": 0.1, "0.*": 0.2}), SHAPES),
            ValueError,
            r"exactly one key that matches '0.weight', got '\*', '0.\*' for it",
        ),
        (
            lambda: resolve(SGD({"*": 0.1, "head": 0.2}), SHAPES),
            ValueError,
            "lr must have keys that match adapted parameters .* got 'head'",
        ),
        (
            lambda: resolve(SGD({"*": torch.rand(2, 2)}), SHAPES),
            ValueError,
            r"lr\['\*'\] must have shape \[\], \[1\], \[4, 3\] or \[1, 4, 3\] for '0.weight'",
        ),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
