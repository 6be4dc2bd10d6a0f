"""Adapted learners: the same numbers as meta_grad, derivatives of every order, modules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmeta.batch import Examples
from fastmeta.inner_loop import SGD, Adam, Momentum, adapt, meta_grad
from fastmeta.program import Linear, Loss, Program
from tests.inner_loop import naive
from tests.inner_loop.naive import mse, network, parameters, regression, rowwise, same

PATHS = ["reference", "vectorized"]
on_both = pytest.mark.parametrize("path", PATHS)


@on_both
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 3])
def test_backward_gives_the_numbers_of_the_direct_call(path: Any, order: Any, steps: int) -> None:
    net, (xs, ys, xq, yq) = network(), regression()
    lr = {
        "*.weight": torch.rand(steps, dtype=torch.float64).requires_grad_(),
        "*.bias": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    }
    inner = SGD(lr, steps, exclude="2.weight")
    want = meta_grad(net, None, (xs, ys, xq, yq), inner=inner, loss=mse, order=order, path=path)
    adapted = adapt(net, None, (xs, ys), inner=inner, loss=mse, order=order, path=path)
    assert adapted.path == path
    mse(adapted(xq), yq).backward()
    same({n: p.grad for n, p in net.named_parameters()}, want.grads.params)  # type: ignore[misc]
    for key, rate in lr.items():
        grad = torch.zeros_like(rate) if rate.grad is None else rate.grad
        torch.testing.assert_close(grad, want.grads.inner.lr[key], **naive.TOLERANCE)
    torch.testing.assert_close(adapted.support_loss, want.metrics["support_loss"])
    assert set(adapted.params) == {"0.weight", "0.bias", "2.bias"}


@on_both
@pytest.mark.parametrize(
    "inner", [SGD(0.3, 2), Momentum(0.2, 2), Adam(0.05, 2, eps=1e-2)], ids=["sgd", "mom", "adam"]
)
def test_gradcheck_and_gradgradcheck(path: Any, inner: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    xs, ys = torch.randn(2, 3, 2).double(), torch.randn(2, 3, 1).double()
    names = [name for name, _ in net.named_parameters()]

    def ends(*values: Tensor) -> tuple[Tensor, ...]:
        params = dict(zip(names, values, strict=True))
        adapted = adapt(net, params, (xs, ys), inner=inner, loss=mse, path=path)
        return tuple(adapted.params.values())

    start = [p.detach().clone().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(ends, start)
    assert torch.autograd.gradgradcheck(ends, start)


@on_both
def test_gradgradcheck_to_rates_and_parameters_for_each_task(path: Any) -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 1).double()
    xs, ys = torch.randn(2, 3, 2).double(), torch.randn(2, 3, 1).double()

    def ends(weight: Tensor, bias: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        params = {"weight": weight, "bias": bias}

        def loss(output: Tensor, y: Tensor) -> Tensor:
            return ((output - y) ** 4).mean()

        return tuple(
            adapt(net, params, (xs, ys), inner=SGD(lr, 2), loss=loss, path=path).params.values()
        )

    start = [torch.randn(2, 1, 2), torch.randn(1), torch.tensor([0.1, 0.2])]
    leaves = [value.double().requires_grad_() for value in start]
    assert torch.autograd.gradcheck(ends, leaves)
    assert torch.autograd.gradgradcheck(ends, leaves)


@on_both
def test_gradients_reach_the_data_and_the_losss_parameters(path: Any) -> None:
    net, (xs, ys, xq, yq) = network(), regression(T=3)
    xs.requires_grad_()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    adapted = adapt(
        net,
        None,
        (xs, ys),
        inner=SGD(0.3, 1),
        loss=lambda o, y, scale: scale * mse(o, y),
        loss_params={"scale": scale},
        path=path,
    )
    mse(adapted(xq), yq).backward()
    assert xs.grad is not None
    assert xs.grad.norm() > 0
    assert scale.grad is not None
    assert scale.grad != 0


@on_both
def test_without_grad_mode_nothing_is_kept(path: Any) -> None:
    net, (xs, ys, xq, _) = network(), regression()
    kept = adapt(net, None, (xs, ys), inner=SGD(0.3, 2), loss=mse, path=path)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            adapted = adapt(net, None, (xs, ys), inner=SGD(0.3, 2), loss=mse, path=path)
            output = adapted(xq)
        assert not output.requires_grad
        assert all(not value.requires_grad for value in adapted.params.values())
        same(adapted.params, {n: v.detach() for n, v in kept.params.items()})
    assert all(value.requires_grad for value in kept.params.values())


@on_both
def test_learners_of_single_tasks(path: Any) -> None:
    net, (xs, ys, xq, _) = network(), regression()
    params = {**parameters(net), "2.weight": torch.randn(5, 2, 4).double()}
    inner = SGD(0.3, 2, adapt="0.*")
    adapted = adapt(net, params, (xs, ys), inner=inner, loss=mse, path=path)
    outputs = adapted(xq)
    assert len(adapted) == len(list(adapted)) == 5
    for task, learner in enumerate(adapted):
        torch.testing.assert_close(learner(xq[task]), outputs[task])
        module = learner.to_module()
        assert type(module) is nn.Sequential
        torch.testing.assert_close(module(xq[task]), outputs[task])
        same(learner.params, {n: p[task] for n, p in adapted.params.items()})
        torch.testing.assert_close(module[2].weight, params["2.weight"][task])
    torch.testing.assert_close(adapted[-1](xq[-1]), outputs[-1])


def test_a_module_of_ones_own_class_with_everything_in_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                OrderedDict(a=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 2))
            )
            self.body.a.requires_grad_(False)
            self.seen = 0
            self.register_forward_hook(lambda *_: setattr(self, "seen", self.seen + 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    net, (xs, ys, _, _) = Net().double().eval(), regression()
    net(xs[0])
    net.body.b.weight.grad = torch.ones_like(net.body.b.weight)
    adapted = adapt(net, None, (xs, ys), inner=SGD(0.3), loss=mse, batch_norm="frozen")
    module = adapted[1].to_module()
    assert type(module) is Net
    assert not module.training
    assert not module.body.a.weight.requires_grad
    assert module.body.b.weight.requires_grad
    assert module.body.b.weight.is_leaf
    assert module.body.b.weight.grad is None
    assert module.seen == net.seen
    torch.testing.assert_close(module.body.b.weight, adapted.params["body.b.weight"][1])
    with torch.no_grad():
        module.body.b.weight.zero_()
        module.body.norm.running_mean.add_(1)
    assert net.body.b.weight.norm() > 0
    assert net.body.norm.running_mean.norm() == 0
    assert adapted.params["body.b.weight"].norm() > 0


def test_a_module_can_be_made_while_the_graph_is_alive() -> None:
    net, (xs, ys, xq, yq) = network(), regression()
    adapted = adapt(net, None, (xs, ys), inner=SGD(0.3, 2), loss=mse)
    module = adapted[0].to_module()
    module(xq[0]).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    mse(adapted(xq), yq).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_weighted_and_indexed_support() -> None:
    net, (xs, ys, _, _) = network(), regression()
    weight = torch.ones(5, 4).double()
    weight[:, 0] = 0
    index = torch.tensor([[1, 2], [3, 1]]).expand(5, 2, 2)
    masked = adapt(net, None, Examples(xs, ys, weight), inner=SGD(0.3, 2), loss=rowwise)
    dropped = adapt(net, None, (xs[:, 1:], ys[:, 1:]), inner=SGD(0.3, 2), loss=rowwise)
    same(masked.params, {n: v.detach() for n, v in dropped.params.items()})
    batches = adapt(net, None, Examples(xs, ys, None, index), inner=SGD(0.3, 2), loss=rowwise)
    first = adapt(net, None, (xs[:, [1, 2]], ys[:, [1, 2]]), inner=SGD(0.3, 1), loss=rowwise)
    second = adapt(
        net, first.params, (xs[:, [3, 1]], ys[:, [3, 1]]), inner=SGD(0.3, 1), loss=rowwise
    )
    same(batches.params, {n: v.detach() for n, v in second.params.items()})


def test_state_in_and_out() -> None:
    net, (xs, ys, _, _) = network(), regression()
    whole = adapt(net, None, (xs, ys), inner=Adam(0.05, 4), loss=mse)
    first = adapt(net, None, (xs, ys), inner=Adam(0.05, 2), loss=mse)
    second = adapt(net, first.params, (xs, ys), inner=Adam(0.05, 2), loss=mse, state=first.state)
    same(second.params, {n: v.detach() for n, v in whole.params.items()})


@pytest.mark.parametrize("kind", ["recurrent", "convolution", "layer-norm"])
def test_calls_of_modules_of_every_path(kind: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = {
        "recurrent": nn.Sequential(nn.Unflatten(1, (1, 3)), nn.GRU(3, 2)),
        "convolution": nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 2)
        ),
        "layer-norm": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
    }[kind].double()
    xs, ys, xq, _ = regression()

    def loss(output: Any, y: Tensor) -> Tensor:
        return mse(output[0][:, 0] if kind == "recurrent" else output, y)

    adapted = adapt(net, None, (xs, ys), inner=SGD(0.3, 2), loss=loss)
    outputs = adapted(xq)
    for task in range(5):
        want = adapted[task].to_module()(xq[task])
        if kind == "recurrent":  # an output that is a pytree is one whose tensors have a task axis
            torch.testing.assert_close(outputs[0][task], want[0])
            torch.testing.assert_close(outputs[1][task], want[1])
        else:
            torch.testing.assert_close(outputs[task], want)


def test_batch_statistics_are_those_of_the_call() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    xs, ys, xq, _ = regression()
    adapted = adapt(net, None, (xs, ys), inner=SGD(0.3, 2), loss=mse)
    assert not torch.allclose(adapted(xq)[:, :3], adapted(xq[:, :3]))
    frozen = adapt(net, None, (xs, ys), inner=SGD(0.3, 2), loss=mse, batch_norm="frozen")
    torch.testing.assert_close(frozen(xq)[:, :3], frozen(xq[:, :3]))


def test_a_programs_learners() -> None:
    program = Program.chain(
        [Linear(3, 2)], (3,), Loss("mse", divisor="rows", factor=0.5, per_row=False)
    )
    params = {"0.weight": torch.randn(2, 3).double(), "0.bias": torch.randn(2).double()}
    xs, ys, xq, _ = regression()
    adapted = adapt(program, params, (xs, ys), inner=SGD(0.3, 2), loss=None)
    torch.testing.assert_close(
        adapted(xq), xq @ adapted.params["0.weight"].mT + adapted.params["0.bias"][:, None]
    )
    with pytest.raises(TypeError, match="to_module: the adapted learner must be of a module"):
        adapted[0].to_module()


def test_what_learners_refuse() -> None:
    xs, ys, xq, _ = regression()
    adapted = adapt(network(), None, (xs, ys), inner=SGD(0.3), loss=mse)
    with pytest.raises(ValueError, match=r"Adapted: x must have shape \[5, Q, ...\], got"):
        adapted(xq[:4])
    with pytest.raises(TypeError, match="Adapted: x must hold tensors"):
        adapted([1.0])
    with pytest.raises(IndexError, match="Adapted: the subscript must be below 5, got 5"):
        adapted[5]
    with pytest.raises(TypeError, match="Adapted: the subscript must be an int"):
        adapted[1.0]  # type: ignore[index]
