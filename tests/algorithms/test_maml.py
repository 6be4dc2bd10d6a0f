from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fastmeta.algorithms import FOMAML, MAML
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, meta_grad
from tests.algorithms.problems import assert_same, flat, grads_of, naive_maml, network, regression

PATHS = ["auto", "vectorized", "reference"]


def _vector_functions(model: nn.Sequential, batch: TaskBatch) -> tuple[Any, Any, Tensor]:
    """Support and query loss of the one task, as functions of the flat parameters."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def at(vector: Tensor, examples: Examples) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        params = {n: p.view(shapes[n]) for n, p in zip(shapes, parts, strict=True)}
        output = torch.func.functional_call(model, params, (examples.x[0],))
        return mse_loss(output, examples.y[0])

    theta = flat(dict(model.named_parameters())).detach()
    return (lambda v: at(v, batch.support)), (lambda v: at(v, batch.query)), theta


def _hessian(function: Any) -> Any:
    return torch.func.jacrev(torch.func.grad(function))


@pytest.mark.parametrize("path", PATHS)
def test_one_step_is_g1_minus_alpha_hessian_g1(path: Any) -> None:
    model, batch, alpha = network(), regression(T=1), 0.1
    support, query, theta = _vector_functions(model, batch)
    g1 = torch.func.grad(query)(theta - alpha * torch.func.grad(support)(theta))
    expected = g1 - alpha * _hessian(support)(theta) @ g1
    maml = MAML(model, loss=mse_loss, lr=alpha, path=path)
    maml.meta_gradient(batch)
    assert_same(flat(grads_of(model)), expected)
    fomaml = FOMAML(model, loss=mse_loss, lr=alpha, path=path)
    fomaml.meta_gradient(batch)
    assert_same(flat(grads_of(model)), g1)


def test_the_taylor_residuals_fall_as_alpha_squared() -> None:
    """Nichol, Achiam, Schulman (2018), section 5.1: MAML, first-order MAML and Reptile."""
    model, batch = network(), regression(T=1, S=5, Q=5)
    support, query, theta = _vector_functions(model, batch)
    a, b = torch.func.grad(support)(theta), torch.func.grad(query)(theta)
    A, B = _hessian(support)(theta), _hessian(query)(theta)
    # Reptile takes a step on the support and another on the query: rows of one set of ten.
    both = Examples(
        torch.cat([batch.support.x, batch.query.x], dim=1),
        torch.cat([batch.support.y, batch.query.y], dim=1),
        index=torch.arange(10).view(1, 2, 5),
    )

    def residuals(alpha: float) -> Tensor:
        found = []
        for kind in (MAML, FOMAML):
            kind(model, loss=mse_loss, lr=alpha).meta_gradient(batch)
            found.append(flat(grads_of(model)))
        moved = meta_grad(
            model,
            None,
            TaskBatch(both, batch.query),
            inner=SGD(lr=alpha, steps=2),
            loss=mse_loss,
            outer="displacement",
        )
        found.append(flat(moved.grads.params) / alpha)
        first_order = [b - alpha * (B @ a + A @ b), b - alpha * B @ a, a + b - alpha * B @ a]
        pairs = zip(found, first_order, strict=True)
        return torch.stack([(ours - series).norm() for ours, series in pairs])

    ratios = residuals(1e-2) / residuals(1e-3)
    assert torch.all((ratios > 90) & (ratios < 110)), ratios


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_is_the_naive_loop(path: Any, order: Any, steps: int) -> None:
    model, batch = network(), regression()
    expected = naive_maml(model, batch, mse_loss, lambda *_: 0.1, steps, order)
    expected.backward()
    wanted = grads_of(model)
    maml = MAML(model, loss=mse_loss, lr=0.1, steps=steps, order=order, path=path)
    metrics = maml.meta_gradient(batch)
    assert_same(grads_of(model), wanted)
    assert_same(metrics["loss"], expected.detach())
    assert metrics["losses"].shape == (5,)
    assert metrics["support_loss"].shape == (5, steps)


def test_classification_reports_accuracy() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x, y = torch.randn(2, 8, 3), torch.arange(4).repeat(2, 2)
    maml = MAML(model, loss=cross_entropy, lr=0.5, steps=2)
    metrics = maml.meta_gradient((x, y, x, y))
    output = maml.adapt((x, y))(x)
    expected = (output.argmax(-1) == y).float().mean(1)
    assert torch.equal(metrics["accuracy"], expected)


@pytest.mark.parametrize(
    "lr",
    [
        pytest.param(0.1, id="one-rate"),
        pytest.param(torch.tensor([0.1, 0.05], dtype=torch.float64), id="per-step"),
        pytest.param({"*.weight": 0.1, "*.bias": 0.2}, id="per-layer"),
    ],
)
def test_learned_rates_get_the_gradient_of_the_naive_loop(lr: Any) -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss, lr=lr, steps=2, learn_lr=True)
    tensors = list(maml.inner_tensors)
    assert all(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in tensors)

    def rate(name: str, step: int) -> Tensor:
        if len(tensors) == 2:  # the mapping, in its own order
            return tensors[int(name.endswith("bias"))]
        return tensors[0][step] if tensors[0].ndim else tensors[0]

    naive_maml(model, batch, mse_loss, rate, 2).backward()
    wanted = grads_of(maml)
    assert len(wanted) == 4 + len(tensors)
    maml.meta_gradient(batch)
    assert_same(grads_of(maml), wanted)
    maml(batch).backward()
    assert_same(grads_of(maml), wanted)


def test_learned_rates_are_trained_and_saved() -> None:
    maml = MAML(network(), loss=mse_loss, lr=0.1, learn_lr=True)
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    maml.meta_gradient(regression())
    optimizer.step()
    rate = maml.inner.lr
    assert isinstance(rate, Tensor)
    assert rate.item() != 0.1
    other = MAML(network(3), loss=mse_loss, lr=0.5, learn_lr=True)
    other.load_state_dict(maml.state_dict())
    assert torch.equal(torch.as_tensor(other.inner.lr), rate)


def test_a_constant_rate_tensor_is_saved_and_not_trained() -> None:
    maml = MAML(network(), loss=mse_loss, lr=torch.tensor(0.1, dtype=torch.float64))
    maml.meta_gradient(regression())
    assert maml.inner_tensors[0].grad is None
    assert "inner_tensors.0" in maml.state_dict()
    assert all(not name.startswith("inner") for name in maml.meta_parameters())


def test_parameters_that_do_not_adapt_are_learned_all_the_same() -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss, lr=0.1, exclude="*.bias")
    naive_maml(
        model, batch, mse_loss, lambda name, _: 0.0 if name.endswith("bias") else 0.1, 1
    ).backward()
    wanted = grads_of(model)
    maml.meta_gradient(batch)
    assert_same(grads_of(model), wanted)


def test_frozen_parameters_get_no_gradient() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    maml = MAML(model, loss=mse_loss)
    maml.meta_gradient(regression())
    assert set(grads_of(model)) == {"0.bias", "2.weight", "2.bias"}


def test_adapt_is_differentiable_and_gives_modules() -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss, lr=0.1, steps=2)
    adapted = maml.adapt(batch.support)
    mse_loss(adapted(batch.query.x), batch.query.y).backward()
    through_adapt = grads_of(model)
    maml.meta_gradient(batch)
    assert_same(grads_of(model), through_adapt)
    one = adapted[3].to_module()
    assert type(one) is type(model)
    assert_same(one(batch.query.x[3]), adapted(batch.query.x)[3])


def test_adapt_takes_other_numbers_of_steps() -> None:
    model, batch = network(), regression()
    maml = MAML(model, loss=mse_loss, lr=0.1, steps=2)
    before = maml.adapt(batch.support, steps=0)(batch.query.x)
    assert_same(before, model(batch.query.x))
    five = maml.adapt(batch.support, steps=5)(batch.query.x)
    assert not torch.allclose(five, maml.adapt(batch.support)(batch.query.x))


def test_adapt_takes_the_first_of_the_rates_per_step() -> None:
    model, batch = network(), regression()
    rates = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    maml = MAML(model, loss=mse_loss, lr=rates, steps=3)
    for steps in range(4):
        first = MAML(model, loss=mse_loss, lr=rates[:steps], steps=steps).adapt(batch.support)
        assert_same(maml.adapt(batch.support, steps=steps).params, first.params)
    with pytest.raises(ValueError, match=r"lr must have shape \[\] or \[4\]"):
        maml.adapt(batch.support, steps=4)


def test_the_inner_optimizer_can_be_given_whole() -> None:
    model, batch = network(), regression()
    MAML(model, loss=mse_loss, inner=SGD(lr=0.2, steps=3)).meta_gradient(batch)
    first = grads_of(model)
    MAML(model, loss=mse_loss, lr=0.2, steps=3).meta_gradient(batch)
    assert all(torch.equal(first[name], value) for name, value in grads_of(model).items())


def test_the_model_is_kept_and_moves_with_the_algorithm() -> None:
    model = network(dtype=torch.float32)
    maml = MAML(model, loss=mse_loss, learn_lr=True)
    assert maml.model is model
    maml.double()
    maml.meta_gradient(regression())
    assert maml.inner_tensors[0].grad.dtype == torch.float64


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "MAML: model must be a torch.nn.Module, got", {"model": 3}),
        (TypeError, "MAML: loss must be callable", {"loss": "mse"}),
        (ValueError, "SGD: lr must be at least 0, got -1.0", {"lr": -1.0}),
        (ValueError, "SGD: steps must be at least 0, got -2", {"steps": -2}),
        (TypeError, "SGD: steps must be an int", {"steps": 1.5}),
        (ValueError, "MAML: order must be 1 or 2, got 3", {"order": 3}),
        (ValueError, "MAML: inner must stand alone", {"inner": SGD(), "steps": 2}),
        (ValueError, "loss must have no parameters", {"loss": nn.Linear(1, 1)}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        MAML(**{"model": network(), "loss": mse_loss, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "adapt must match a trainable parameter", {"adapt": "head.*"}),
        (ValueError, "path must be one of", {"path": "warp"}),
        (ValueError, "backend must be one of", {"backend": "abacus"}),
        (ValueError, "batch_norm must be one of", {"batch_norm": "maybe"}),
        (ValueError, "loss must return a scalar", {"loss": lambda o, y: (o - y).expand(-1, 3)}),
        (TypeError, "loss must return a tensor", {"loss": lambda o, y: 1.0}),
    ],
)
def test_bad_options_are_named_at_the_first_call(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    maml = MAML(network(), **{"loss": mse_loss, **options})
    with pytest.raises(error, match=message):
        maml.meta_gradient(regression())


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_bad_steps_of_adapt_are_named(steps: Any) -> None:
    maml = MAML(network(), loss=mse_loss)
    with pytest.raises((TypeError, ValueError), match="adapt: steps must be"):
        maml.adapt(regression().support, steps=steps)
