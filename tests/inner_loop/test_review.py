"""Calls at the edge of the contract: odd targets, odd losses, modules of one dtype, odd tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmeta.batch import TaskBatch
from fastmeta.inner_loop import SGD, adapt, meta_grad
from fastmeta.inner_loop.trial import loss_key

PATHS = ("auto", "vectorized", "reference")


def network(outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def inputs() -> Tensor:
    return torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))


def integers(high: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, high, (4, 6), generator=torch.Generator().manual_seed(2)).to(dtype)


def counts(output: Tensor, target: Tensor) -> Tensor:
    return ((output[:, 0] - target) ** 2).mean()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_integers_that_are_no_labels_are_targets(path: Any, dtype: torch.dtype) -> None:
    x, y = inputs(), integers(50, dtype)
    found = meta_grad(network(), None, (x, y, x, y), inner=SGD(0.01), loss=counts, path=path)
    want = meta_grad(
        network(), None, (x, y.float(), x, y.float()), inner=SGD(0.01), loss=counts, path=path
    )
    torch.testing.assert_close(found.losses, want.losses)
    torch.testing.assert_close(found.grads.params, want.grads.params)


def gathered(output: Tensor, target: Tensor) -> Tensor:
    return -output.log_softmax(1).gather(1, target[:, None]).mean()


def encoded(output: Tensor, target: Tensor) -> Tensor:
    return ((output - nn.functional.one_hot(target, 2)) ** 2).mean()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, gathered, encoded])
def test_labels_out_of_range_are_refused(path: Any, loss: Callable[..., Tensor]) -> None:
    x, y = inputs(), integers(50)
    with pytest.raises(ValueError, match=r"support\.y must be labels in \[0, 2\)"):
        meta_grad(network(), None, (x, y, x, y), inner=SGD(0.01), loss=loss, path=path)
    with pytest.raises(TypeError, match=r"support\.y must be int64 where it holds labels"):
        meta_grad(
            network(), None, (x, y.int() % 2, x, y.int() % 2), inner=SGD(0.01), loss=loss, path=path
        )


@pytest.mark.parametrize("path", PATHS)
def test_a_module_loss_with_parameters_is_refused(path: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return self.scale * ((output - target) ** 2).mean()

    x, y = inputs(), torch.randn(4, 6, 2)
    with pytest.raises(ValueError, match=r"loss must reach tensors .* arguments alone"):
        meta_grad(network(), None, (x, y, x, y), inner=SGD(), loss=Scaled(), path=path)
    frozen = Scaled().requires_grad_(False)
    assert meta_grad(network(), None, (x, y, x, y), inner=SGD(), loss=frozen, path=path).losses[0]


@pytest.mark.parametrize("path", PATHS)
def test_a_loss_of_structured_output_that_reads_the_model_is_refused(path: Any) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            output = self.body(x)
            return {"mean": output[:, 0], "rows": torch.arange(len(x))}

    model = Pair()

    def decayed(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return ((output["mean"] - target) ** 2).mean() + model.body.weight.square().sum()

    x, y = inputs(), torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"model's parameter 'body\.weight'"):
        meta_grad(model, None, (x, y, x, y), inner=SGD(), loss=decayed, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_a_computed_loss_parameter_is_an_argument(path: Any) -> None:
    def weighted(output: Tensor, target: Tensor, *, scale: Tensor) -> Tensor:
        return scale * ((output - target) ** 2).mean()

    x, y, free = inputs(), torch.randn(4, 6, 2), torch.tensor(0.3, requires_grad=True)
    found = meta_grad(
        network(),
        None,
        (x, y, x, y),
        inner=SGD(),
        loss=weighted,
        loss_params={"scale": free.exp()},
        path=path,
    )
    assert found.losses.isfinite().all()


class DroppedTerm(torch.autograd.Function):
    """The square; its backward pass hides from autograd that it depends on the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad


class MarkedTerm(DroppedTerm):
    """The same, and it says so."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class OnlyFloat32(nn.Module):
    """A network that refuses every other dtype."""

    def __init__(self, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.square = network(), square

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.square(self.body(x))


@pytest.mark.parametrize("function", [DroppedTerm, MarkedTerm])
def test_a_module_of_float32_is_tried_in_float32(function: Any) -> None:
    x, y = inputs(), torch.randn(4, 6, 2)
    batch, loss = (x, y, x, y), nn.functional.mse_loss
    with pytest.raises(RuntimeError, match="has no second derivative"):
        meta_grad(
            OnlyFloat32(function.apply), None, batch, inner=SGD(), loss=loss, path="reference"
        )


@pytest.mark.parametrize("square", [torch.square, torch.relu], ids=["smooth", "kinks"])
def test_a_right_module_of_float32_passes(square: Callable[[Tensor], Tensor]) -> None:
    x, y = inputs(), torch.randn(4, 6, 2)
    model = OnlyFloat32(square)
    found = meta_grad(
        model, None, (x, y, x, y), inner=SGD(), loss=nn.functional.mse_loss, path="reference"
    )
    assert found.losses.isfinite().all()


class Chosen:
    """A loss that calls another."""

    def __init__(self, inner: Any, switch: bool = True) -> None:
        self.inner, self.switch, self.calls = inner, switch, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(output, target)  # type: ignore[no-any-return]


def first(function: Any, output: Tensor, target: Tensor) -> Tensor:
    return function(output - target).mean()  # type: ignore[no-any-return]


DIFFERENT = {
    "partial-function": (
        functools.partial(counts),
        functools.partial(gathered),
    ),
    "partial-argument": (functools.partial(first, counts), functools.partial(first, gathered)),
    "partial-keyword": (
        functools.partial(nn.functional.mse_loss, reduction="sum"),
        functools.partial(nn.functional.mse_loss, reduction="mean"),
    ),
    "attribute-function": (Chosen(counts), Chosen(gathered)),
    "attribute-switch": (Chosen(counts), Chosen(counts, switch=False)),
    "custom-function": (DroppedTerm.apply, MarkedTerm.apply),
    "builtin": (torch.square, torch.abs),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_losses_that_differ_have_keys_that_differ(one: Any, other: Any) -> None:
    assert hash(loss_key(one)) == hash(loss_key(one))
    assert loss_key(one) != loss_key(other)


def test_a_loss_made_anew_or_called_again_keeps_its_key() -> None:
    def made(weight: float) -> Any:
        return functools.partial(lambda output, target, scale: scale * output, scale=weight)

    assert loss_key(made(0.1)) == loss_key(made(0.2))
    loss = Chosen(counts)
    before = loss_key(loss)
    loss(torch.zeros(3, 2), torch.zeros(3))
    assert loss_key(loss) == before


@pytest.mark.parametrize("part", range(4), ids=["support.x", "support.y", "query.x", "query.y"])
@pytest.mark.parametrize("kind", ["sparse", "mkldnn"])
def test_tensors_that_are_not_dense_are_refused_by_name(part: int, kind: str) -> None:
    tensors = [torch.ones(4, 6, 3), torch.ones(4, 6, 2), torch.ones(4, 6, 3), torch.ones(4, 6, 2)]
    tensors[part] = tensors[part].to_sparse() if kind == "sparse" else tensors[part].to_mkldnn()
    name = ["support.x", "support.y", "query.x", "query.y"][part]
    with pytest.raises(ValueError, match=rf"{name} must be a dense tensor .*{kind}"):
        TaskBatch.of(tuple(tensors))


def test_tensors_without_values_are_refused_by_name() -> None:
    x, y = torch.ones(4, 6, 3, device="meta"), torch.ones(4, 6, 2, device="meta")
    with pytest.raises(ValueError, match=r"support\.x must be a dense tensor .* a meta tensor"):
        TaskBatch.of((x, y, x, y))


def squares(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_the_first_adapt_of_a_module_may_be_under_grad(path: Any) -> None:
    x, y, model = inputs(), torch.randn(4, 6, 2), network()

    def value(params: dict[str, Tensor]) -> Tensor:
        found = adapt(model, params, (x, y), inner=SGD(), loss=squares, path=path)
        return squares(found(x), y)

    params = {name: p.detach() for name, p in model.named_parameters()}
    got = torch.func.grad(value)(params)
    want = meta_grad(model, None, (x, y, x, y), inner=SGD(), loss=squares, path="reference")
    torch.testing.assert_close(got, want.grads.params)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("known", [False, True], ids=["first", "again"])
def test_meta_grad_of_transformed_tensors_is_refused(path: Any, known: bool) -> None:
    x, y, model = inputs(), torch.randn(4, 6, 2), network()

    def losses(x: Tensor) -> Tensor:
        return meta_grad(
            model, None, (x, y, x, y), inner=SGD(), loss=squares, path=path
        ).losses.sum()

    if known:
        losses(x)
    for call in (torch.func.grad(losses), lambda x: torch.vmap(losses)(x[None])):
        with pytest.raises(RuntimeError, match=r"tensors must be plain ones, .*torch\.func"):
            call(x)
