"""meta_grad's numbers on both torch paths, against the hand-written loop of naive.py."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, Adam, Momentum, meta_grad
from fastmeta.program import Linear, Loss, Program, Tanh
from tests.inner_loop import naive
from tests.inner_loop.naive import NAMES, mse, network, parameters, regression, rowwise, same

PATHS = ["reference", "vectorized"]
on_both = pytest.mark.parametrize("path", PATHS)


@on_both
@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_query_loss(path: Any, order: Any, steps: int) -> None:
    net, batch = network(), regression()
    result = meta_grad(net, None, batch, inner=SGD(0.3, steps), loss=mse, order=order, path=path)
    params = parameters(net)
    losses = naive.meta_objective(
        {n: p.requires_grad_() for n, p in params.items()}, batch, lambda *_: 0.3, steps
    )
    want = naive.gradient(
        lambda p: naive.meta_objective(p, batch, lambda *_: 0.3, steps, order).mean(), params
    )
    same(result.grads.params, want)
    torch.testing.assert_close(result.losses, losses.detach())
    assert result.path == path
    assert result.metrics["support_loss"].shape == (5, steps)
    assert not result.losses.requires_grad


def test_orders_differ() -> None:
    grads = [
        meta_grad(
            network(), None, regression(), inner=SGD(0.3, 2), loss=mse, order=order
        ).grads.params["0.weight"]
        for order in (1, 2)
    ]
    assert (grads[0] - grads[1]).norm() > 1e-2 * grads[1].norm()


@on_both
def test_metrics_and_adapted_parameters(path: Any) -> None:
    net, batch = network(), regression(T=3)
    result = meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path=path)
    for task in range(3):
        xs, ys = batch[0][task], batch[1][task]
        params = {n: p.requires_grad_() for n, p in parameters(net).items()}
        steps = naive.adapted(params, lambda _: xs, lambda _: ys, lambda *_: 0.3, 2)  # noqa: B023
        same(
            {n: p[task] for n, p in result.adapted.items()},
            {n: p.detach() for n, p in steps[-1].items()},
        )
        support = torch.stack([mse(naive.forward(p, xs), ys) for p in steps[:-1]]).detach()
        torch.testing.assert_close(result.metrics["support_loss"][task], support)
    assert "accuracy" not in result.metrics


@on_both
def test_accuracy_is_the_share_of_right_query_labels(path: Any) -> None:
    net = network()
    xs, _, xq, _ = regression(T=3)
    ys, yq = torch.zeros(3, 4, dtype=torch.int64), torch.randint(2, (3, 6))
    loss = torch.nn.functional.cross_entropy
    result = meta_grad(net, None, (xs, ys, xq, yq), inner=SGD(0.3, 2), loss=loss, path=path)
    for task in range(3):
        output = naive.forward({n: p[task] for n, p in result.adapted.items()}, xq[task])
        assert result.metrics["accuracy"][task] == (output.argmax(1) == yq[task]).double().mean()


@on_both
@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_multi_step_loss(path: Any, form: str) -> None:
    net, batch, weights = network(), regression(), (0.5, 0.0, 0.25)
    outer: Any = weights if form == "tuple" else torch.tensor(weights)
    result = meta_grad(net, None, batch, inner=SGD(0.3, 3), loss=mse, outer=outer, path=path)

    def objective(p: naive.Params) -> Tensor:
        return naive.meta_objective(p, batch, lambda *_: 0.3, 3, weights=weights)

    same(result.grads.params, naive.gradient(lambda p: objective(p).mean(), parameters(net)))
    want = objective({n: p.requires_grad_() for n, p in parameters(net).items()})
    torch.testing.assert_close(result.losses, want.detach())


@on_both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_displacement(path: Any, reduction: Any) -> None:
    net, batch = network(), regression()
    result = meta_grad(
        net,
        None,
        batch,
        inner=SGD(0.3, 3, exclude="*.bias"),
        loss=mse,
        outer="displacement",
        reduction=reduction,
        path=path,
    )
    ends = result.adapted["0.weight"]
    each = parameters(net)["0.weight"] - ends
    want = each.mean(0) if reduction == "mean" else each.sum(0)
    torch.testing.assert_close(result.grads.params["0.weight"], want)
    assert torch.equal(result.grads.params["0.bias"], torch.zeros(4).double())
    assert each.norm() > 0.1


@on_both
def test_sum_is_the_mean_times_the_tasks(path: Any) -> None:
    def grads(reduction: Any) -> naive.Params:
        return meta_grad(
            network(), None, regression(), inner=SGD(0.3), loss=mse, reduction=reduction, path=path
        ).grads.params

    same(grads("sum"), {name: 5 * value for name, value in grads("mean").items()})


RATES: dict[str, tuple[Any, Any]] = {
    "number": (0.3, lambda lr, name, k: 0.3),
    "tensor": (torch.tensor(0.3), lambda lr, name, k: lr),
    "per-step": (torch.tensor([0.3, 0.1, 0.2]), lambda lr, name, k: lr[k]),
    "per-layer": (
        {"0.*": torch.tensor(0.3), "2.*": 0.1},
        lambda lr, name, k: lr[name[0] + ".*"],
    ),
    "per-layer-and-step": (
        {"0.*": torch.tensor([0.3, 0.1, 0.2]), "2.*": 0.1},
        lambda lr, name, k: lr["0.*"][k] if name[0] == "0" else 0.1,
    ),
    "per-element": (
        {
            name: torch.rand(shape)
            for name, shape in zip(NAMES, [(4, 3), (4,), (2, 4), (2,)], strict=True)
        },
        lambda lr, name, k: lr[name],
    ),
    "per-step-and-element": (
        {
            "*.weight": 0.2,
            "0.bias": torch.rand(3, 4),
            "2.bias": torch.rand(1, 2),
        },
        lambda lr, name, k: lr["*.weight"] if "weight" in name else lr[name][k % len(lr[name])],
    ),
}


@on_both
@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("form", list(RATES))
def test_rates_and_their_gradients(path: Any, order: Any, form: str) -> None:
    value, rate = RATES[form]

    def lifted(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: lifted(leaf) for key, leaf in tree.items()}
        return tree.double().requires_grad_() if isinstance(tree, Tensor) else tree

    lr, net, batch = lifted(value), network(), regression()
    result = meta_grad(net, None, batch, inner=SGD(lr, 3), loss=mse, order=order, path=path)

    params = {name: p.requires_grad_() for name, p in parameters(net).items()}
    total = naive.meta_objective(params, batch, lambda n, k: rate(lr, n, k), 3, order).mean()
    keys = list(lr) if isinstance(lr, dict) else [None]
    rates = {key: lr if key is None else lr[key] for key in keys}
    tensors = {key: r for key, r in rates.items() if isinstance(r, Tensor)}
    grads = torch.autograd.grad(total, [*params.values(), *tensors.values()])
    same(result.grads.params, dict(zip(params, grads, strict=False)))
    found = result.grads.inner.lr
    for key, grad in zip(tensors, grads[len(params) :], strict=True):
        got = found if key is None else found[key]
        torch.testing.assert_close(got, grad, **naive.TOLERANCE)
    for key in set(rates) - set(tensors):
        assert (found if key is None else found[key]) is None


@on_both
def test_a_rate_that_requires_no_grad_gets_none(path: Any) -> None:
    lr = torch.tensor(0.3, dtype=torch.float64)
    result = meta_grad(network(), None, regression(), inner=SGD(lr), loss=mse, path=path)
    assert result.grads.inner.lr is None
    assert result.grads.loss_params is None


@on_both
def test_parameters_that_do_not_adapt_still_learn(path: Any) -> None:
    net, batch, names = network(), regression(), ("0.weight", "2.weight")
    inner = SGD(0.3, 3, exclude="*.bias")
    result = meta_grad(net, None, batch, inner=inner, loss=mse, path=path)
    want = naive.gradient(
        lambda p: naive.meta_objective(p, batch, lambda *_: 0.3, 3, names=names).mean(),
        parameters(net),
    )
    same(result.grads.params, want)
    assert set(result.adapted) == set(names)


@on_both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parameters_for_each_task(path: Any, reduction: Any) -> None:
    net, batch = network(), regression()
    params = parameters(net)
    params["0.weight"] = torch.randn(5, 4, 3, dtype=torch.float64)
    params["2.bias"] = torch.randn(5, 2, dtype=torch.float64)
    inner = SGD(0.3, 2, exclude="2.*")
    result = meta_grad(net, params, batch, inner=inner, loss=mse, path=path, reduction=reduction)
    want = naive.gradient(
        lambda p: getattr(
            naive.meta_objective(
                p,
                batch,
                lambda *_: 0.3,
                2,
                names=("0.weight", "0.bias"),
                per_task=("0.weight", "2.bias"),
            ),
            reduction,
        )(),
        params,
    )
    same(result.grads.params, want)
    assert result.adapted["0.weight"].shape == (5, 4, 3)


@on_both
def test_task_transform_sees_each_task(path: Any) -> None:
    net, batch = network(), regression()

    def clipped(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.stack([value.norm() for value in grads.values()]).norm()
        assert float(norm) > 0  # a data-dependent branch is allowed
        return {name: value * min(1.0, 0.1 / float(norm)) for name, value in grads.items()}

    result = meta_grad(
        net, None, batch, inner=SGD(0.3, 2), loss=mse, task_transform=clipped, path=path
    )

    def alone(task: int) -> naive.Params:
        xs, ys, xq, yq = (part[task : task + 1] for part in batch)

        def objective(p: naive.Params) -> Tensor:
            return naive.meta_objective(p, (xs, ys, xq, yq), lambda *_: 0.3, 2).sum()

        return clipped(naive.gradient(objective, parameters(net)))

    rows = [alone(task) for task in range(5)]
    want = {name: torch.stack([row[name] for row in rows]).mean(0) for name in NAMES}
    same(result.grads.params, want)
    assert sum(float(v.norm()) ** 2 for v in want.values()) <= 0.1**2 + 1e-12


@on_both
def test_loss_params(path: Any) -> None:
    net, batch = network(), regression()

    def loss(output: Tensor, y: Tensor, *, scale: Tensor, power: float) -> Tensor:
        return scale * ((output - y).abs() ** power).mean()

    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    result = meta_grad(
        net, None, batch, inner=SGD(0.3, 2), loss=loss, path=path,
        loss_params={"scale": scale, "power": 2.0},
    )  # fmt: skip

    # scaling the loss scales the inner rate, and then the outer loss
    def objective(s: Tensor) -> Tensor:
        params = {n: p.requires_grad_() for n, p in parameters(net).items()}
        return s * naive.meta_objective(params, batch, lambda *_: 0.3 * s, 2).mean()

    (want,) = torch.autograd.grad(objective(scale), scale)
    torch.testing.assert_close(result.grads.loss_params["scale"], want, **naive.TOLERANCE)
    assert result.grads.loss_params["power"] is None


@on_both
def test_a_row_of_weight_zero_is_no_row(path: Any) -> None:
    net = network()
    xs, ys, xq, yq = regression()
    ones = torch.ones(5, 4, dtype=torch.float64)
    alone = TaskBatch(Examples(xs, ys, ones), Examples(xq, yq))
    junk_x, junk_y = torch.full((5, 2, 3), float("nan")), torch.full((5, 2, 2), float("inf"))
    padded = TaskBatch(
        Examples(
            torch.cat([junk_x.double(), xs], 1),
            torch.cat([junk_y.double(), ys], 1),
            torch.cat([torch.zeros(5, 2).double(), ones], 1),
        ),
        Examples(xq, yq),
    )
    inner = SGD(0.3, 2)
    results = [
        meta_grad(net, None, batch, inner=inner, loss=rowwise, path=path)
        for batch in ((xs, ys, xq, yq), alone, padded)
    ]
    for result in results[1:]:
        same(result.grads.params, results[0].grads.params)
        torch.testing.assert_close(
            result.metrics["support_loss"], results[0].metrics["support_loss"]
        )


@on_both
def test_the_divisor_is_the_sum_of_weights(path: Any) -> None:
    net = network()
    xs, ys, xq, yq = regression()
    doubled = TaskBatch(
        Examples(xs, ys, torch.tensor([2.0, 1.0, 1.0, 0.0]).double().expand(5, 4)),
        Examples(xq, yq),
    )
    rows = torch.tensor([0, 0, 1, 2])
    repeated = (xs[:, rows], ys[:, rows], xq, yq)
    inner = SGD(0.3, 2)
    a, b = (
        meta_grad(net, None, batch, inner=inner, loss=rowwise, path=path)
        for batch in (doubled, repeated)
    )
    same(a.grads.params, b.grads.params)


@on_both
def test_weighted_accuracy(path: Any) -> None:
    xs, _, xq, _ = regression(T=2, Q=3)
    ys = torch.zeros(2, 4, dtype=torch.int64)
    yq = torch.tensor([[0, 1, -100], [0, 1, 0]])
    weight = torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]]).double()
    batch = TaskBatch(Examples(xs, ys), Examples(xq, yq, weight))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(output, y, reduction="none")

    result = meta_grad(network(), None, batch, inner=SGD(0.0, 1), loss=loss, path=path)
    guess = network()(xq).argmax(-1)
    right = (guess == yq).double()
    want = (right * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(result.metrics["accuracy"], want)


@on_both
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_index_says_which_rows_a_step_sees(path: Any, weighted: bool) -> None:
    net, (xs, ys, xq, yq) = network(), regression(T=2)
    index = torch.tensor([[[0, 1], [2, 3], [1, 1]], [[3, 0], [2, 0], [1, 3]]])
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5]).double().expand(2, 4) if weighted else None
    batch = TaskBatch(Examples(xs, ys, weight, index), Examples(xq, yq))
    result = meta_grad(net, None, batch, inner=SGD(0.3, 3), loss=rowwise, path=path)

    def objective(p: naive.Params) -> Tensor:
        losses = []
        for t in range(2):

            def loss(output: Tensor, y: Tensor) -> Tensor:
                w = torch.ones(len(y)).double() if weight is None else y[:, -1]
                return (w * rowwise(output, y[:, :2])).sum() / w.sum()

            w = torch.ones(4).double() if weight is None else weight[t]
            targets = torch.cat([ys[t], w[:, None]], 1)
            path = naive.adapted(
                p, lambda k: xs[t, index[t, k]], lambda k: targets[index[t, k]],  # noqa: B023
                lambda *_: 0.3, 3, loss=loss,
            )  # fmt: skip
            losses.append(mse(naive.forward(path[-1], xq[t]), yq[t]))
        return torch.stack(losses).mean()

    same(result.grads.params, naive.gradient(objective, parameters(net)))


@on_both
@pytest.mark.parametrize(
    "inner",
    [Momentum(0.1, 2, momentum=0.8), Momentum(0.1, 2, nesterov=True), Adam(0.05, 2)],
    ids=["momentum", "nesterov", "adam"],
)
def test_state_goes_on_where_it_stopped(path: Any, inner: Any) -> None:
    net, batch = network(), regression()
    longer = (
        Adam(0.05, 4)
        if isinstance(inner, Adam)
        else Momentum(0.1, 4, momentum=inner.momentum, nesterov=inner.nesterov)
    )
    whole = meta_grad(net, None, batch, inner=longer, loss=mse, path=path)
    first = meta_grad(net, None, batch, inner=inner, loss=mse, path=path)
    second = meta_grad(
        net, first.adapted, batch, inner=inner, loss=mse, path=path, state=first.state
    )
    same(second.adapted, whole.adapted)
    assert second.state is not None
    assert second.state.step.tolist() == [4] * 5


@on_both
def test_a_program_in_place_of_a_module(path: Any) -> None:
    net, batch = network(), regression()
    loss = Loss("mse", divisor="rows", factor=0.5, per_row=False)
    program = Program.chain([Linear(3, 4), Tanh(), Linear(4, 2)], (3,), loss)
    params = parameters(net)
    got = meta_grad(program, params, batch, inner=SGD(0.3, 2), loss=None, path=path)
    want = meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path=path)
    same(got.grads.params, want.grads.params)


@on_both
def test_the_module_is_left_as_it_was(path: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    versions = {name: value._version for name, value in net.state_dict().items()}
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    meta_grad(net, None, regression(), inner=SGD(lr, 2), loss=mse, path=path)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        assert value._version == versions[name]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert lr.grad is None
    assert net.training
    assert not net[1].training
    assert net[1].track_running_stats


@on_both
def test_frozen_parameters_are_constants(path: Any) -> None:
    net, batch = network(), regression()
    net[0].requires_grad_(False)
    result = meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path=path)
    names = ("2.weight", "2.bias")
    want = naive.gradient(
        lambda p: naive.meta_objective(p, batch, lambda *_: 0.3, 2, names=names).mean(),
        parameters(net),
    )
    same(result.grads.params, {name: want[name] for name in names})
    again = meta_grad(
        net, dict(net.named_parameters()), batch, inner=SGD(0.3, 2), loss=mse, path=path
    )
    same(again.grads.params, result.grads.params)


@on_both
def test_grad_mode_of_the_caller_does_not_matter(path: Any) -> None:
    net, batch = network(), regression()
    want = meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path=path).grads.params
    with torch.no_grad():
        same(meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path=path).grads.params, want)
    with torch.inference_mode():
        inside = tuple(part.clone() for part in batch)
        same(
            meta_grad(net, None, inside, inner=SGD(0.3, 2), loss=mse, path=path).grads.params, want
        )


def test_auto_says_once_why(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (1, 4)), nn.GRU(4, 2))
    batch = tuple(torch.randn(3, 4, d) for d in (4, 2, 4, 2))
    with caplog.at_level(logging.INFO, "fastmeta"):
        for _ in range(2):
            result = meta_grad(
                net, None, batch, inner=SGD(), loss=lambda o, y: ((o[0][:, 0] - y) ** 2).mean()
            )
    assert result.path == "reference"
    (message,) = (m for m in caplog.messages if "path" in m)
    assert "recurrent layer 3 (GRU)" in message


def test_two_calls_give_the_same_bits() -> None:
    net, batch = network().float(), tuple(part.float() for part in regression(T=20))
    for path in PATHS:
        one, two = (
            meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path=path)  # type: ignore[arg-type]
            for _ in range(2)
        )
        assert all(torch.equal(one.grads.params[n], two.grads.params[n]) for n in NAMES)


def test_chunks_of_the_tree_give_the_same_bits_on_reference() -> None:
    net, batch = network().float(), tuple(part.float() for part in regression(T=24))

    def sums(*parts: slice) -> list[Tensor]:
        return [
            meta_grad(
                net, None, tuple(v[part] for v in batch), inner=SGD(0.3, 2), loss=mse,
                reduction="sum", path="reference",
            ).grads.params["0.weight"]
            for part in parts
        ]  # fmt: skip

    whole, (a, b) = sums(slice(0, 24))[0], sums(slice(0, 16), slice(16, 24))
    assert torch.equal(whole, a + b)


def test_compiled_code_breaks_around_the_call() -> None:
    net, batch = network(), regression()

    def step(scale: Tensor) -> Tensor:
        result = meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path="vectorized")
        return scale * result.grads.params["0.weight"] + 1.0

    def whole(scale: Tensor) -> Tensor:
        return step(scale)

    scale = torch.tensor(2.0, dtype=torch.float64)
    want = step(scale)
    with pytest.raises(Exception, match=r"fastmeta\.meta_grad runs its own kernels"):
        torch.compile(whole, backend="aot_eager", fullgraph=True)(scale)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(scale), want)


def test_a_loss_that_reads_the_models_parameters_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(3, 5, 2), torch.randn(3, 5, 1)

    def decayed(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 2).mean() + sum(p.square().sum() for p in net.parameters())

    with pytest.raises(
        ValueError, match=r"loss must reach .* got the model's parameter '0.weight'"
    ):
        meta_grad(net, None, (x, y, x, y), inner=SGD(), loss=decayed)


def test_a_module_of_length_zero_is_a_module() -> None:
    class Bare(nn.Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    x, y = torch.randn(3, 5, 1), torch.randn(3, 5, 1)
    found = meta_grad(Bare(), None, (x, y, x, y), inner=SGD(), loss=nn.functional.mse_loss)
    assert found.grads.params["scale"].shape == (1,)
