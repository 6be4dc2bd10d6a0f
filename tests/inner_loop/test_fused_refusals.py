"""What the fused path refuses, by name, and where `auto` goes instead: to a path that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, Momentum, adapt, explain, meta_grad
from fastmeta.ops.backend import backend
from fastmeta.program import BatchNorm1d, Linear, Loss, Node, Program, ReLU
from tests.tolerances import FLOAT32, assert_close

pytestmark = pytest.mark.needs("cpp")

T, S, D, C = 4, 5, 3, 2


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, C))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(D, 4, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embed, self.head = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.mix(h, h, h, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(D, D))
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(F.linear(x, self.weight)), self.weight))  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


def tracked() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, C))


def dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Dropout(0.5), nn.Linear(6, C))


def rows(*inner: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, y = data(T, 2, S, *inner, D), data(T, 2, S, C, seed=1)
    return tuple(t.to(dtype) for t in (x[:, 0], y[:, 0], x[:, 1], y[:, 1]))


def one_live_row() -> TaskBatch:
    xs, ys, xq, yq = rows()
    weight = torch.ones(T, S)
    weight[1, 1:] = 0
    return TaskBatch(Examples(xs, ys, weight), Examples(xq, yq))


class Refusal(NamedTuple):
    """A call, what the refusal must name, the path that `auto` takes (None: none is right)."""

    words: str
    path: str | None
    model: Callable[[], nn.Module] = mlp
    batch: Callable[[], Any] = rows
    options: dict[str, Any] = {}  # noqa: RUF012 - read only


def huber(output: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(output, y)


def scaled(output: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return scale * F.mse_loss(output, y)


def needs_grad() -> tuple[Tensor, ...]:
    xs, *rest = rows()
    return (xs.requires_grad_(), *rest)


def with_index() -> TaskBatch:
    xs, ys, xq, yq = rows()
    return TaskBatch(
        Examples(xs, ys, index=torch.zeros(T, 1, 3, dtype=torch.int64)), Examples(xq, yq)
    )


def weighted() -> TaskBatch:
    xs, ys, xq, yq = rows()
    return TaskBatch(Examples(xs, ys, torch.ones(T, S)), Examples(xq, yq))


def one_row() -> tuple[Tensor, ...]:
    xs, ys, xq, yq = rows()
    return xs[:, :1], ys[:, :1], xq, yq


REFUSALS: dict[str, Refusal] = {
    "recurrent": Refusal("gru", "reference", Recurrent, lambda: rows(7)),
    "attention": Refusal("attention", "vectorized", Attention, lambda: rows(7)),
    "tracked-batch-norm": Refusal("track", "reference", tracked, options={"batch_norm": "track"}),
    "dropout": Refusal("dropout", "reference", dropout),
    "tied-weights": Refusal("'weight'", "vectorized", Tied),
    "branches": Refusal("", "vectorized", Residual),
    "momentum": Refusal("Momentum", "vectorized", options={"inner": Momentum(0.1)}),
    "unknown-loss": Refusal("smooth_l1", "vectorized", options={"loss": huber}),
    "loss-params": Refusal(
        "loss_params",
        "vectorized",
        options={"loss": scaled, "loss_params": {"scale": torch.tensor(2.0)}},
    ),
    "x-requires-grad": Refusal("support.x requires grad", "vectorized", batch=needs_grad),
    "index": Refusal("support.index", "vectorized", batch=with_index),
    "weight-without-a-loss-a-row": Refusal("weight", None, batch=weighted),
    "multi-step-loss": Refusal("outer", "vectorized", options={"outer": [1.0]}),
    "displacement": Refusal("outer", "vectorized", options={"outer": "displacement"}),
    "task-transform": Refusal(
        "task_transform", "vectorized", options={"task_transform": lambda grads: grads}
    ),
    "frozen-statistics": Refusal("frozen", "vectorized", tracked, options={"batch_norm": "frozen"}),
    "another-backend": Refusal("reference", "vectorized", options={"backend": "reference"}),
    "float16": Refusal(
        "float16", "vectorized", lambda: mlp().half(), lambda: rows(dtype=torch.float16)
    ),
    "bfloat16": Refusal(
        "bfloat16", "vectorized", lambda: mlp().bfloat16(), lambda: rows(dtype=torch.bfloat16)
    ),
}


def arguments(refusal: Refusal) -> dict[str, Any]:
    return {"inner": SGD(0.1), "loss": F.mse_loss, **refusal.options}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_asked_for_it_says_why_not(name: str) -> None:
    refusal = REFUSALS[name]
    with pytest.raises(ValueError, match="path") as caught:
        meta_grad(refusal.model(), None, refusal.batch(), path="fused", **arguments(refusal))
    words = str(caught.value)
    assert "fused" in words
    assert refusal.words.lower() in words.lower()
    assert "\n" not in words, "one line"


@pytest.mark.parametrize("name", [n for n, r in REFUSALS.items() if r.path is not None])
def test_auto_takes_a_path_that_is_right(name: str) -> None:
    refusal = REFUSALS[name]
    model, batch = refusal.model(), refusal.batch()
    torch.manual_seed(0)
    found = meta_grad(model, None, batch, **arguments(refusal))
    assert found.path == refusal.path
    if name == "tracked-batch-norm":
        model = refusal.model()  # the running statistics have moved
    torch.manual_seed(0)
    want = meta_grad(model, None, batch, path="reference", **arguments(refusal))
    tolerance = FLOAT32 if "float16" not in name else 0.05
    assert_close(found.grads.params, want.grads.params, tolerance, name)


@pytest.mark.parametrize("name", [n for n, r in REFUSALS.items() if r.path is not None])
def test_explain_says_which_path_and_why(name: str) -> None:
    refusal = REFUSALS[name]
    found = explain(refusal.model(), refusal.batch(), **arguments(refusal))
    assert found.path == refusal.path
    verdict = next(v for v in found.verdicts if v.path == "fused")
    assert verdict.why_not is not None
    assert refusal.words.lower() in verdict.why_not.lower()
    assert f"path: {refusal.path}" in str(found)


def test_adapt_refuses_likewise() -> None:
    xs, ys, *_ = rows(7)
    with pytest.raises(ValueError, match=r"adapt: path must .*'fused'.*gru"):
        adapt(Recurrent(), None, (xs, ys), inner=SGD(0.1), loss=F.mse_loss, path="fused")
    found = adapt(Recurrent(), None, (xs, ys), inner=SGD(0.1), loss=F.mse_loss)
    assert found.path == "reference"


def test_batch_norm_over_one_row_is_refused() -> None:
    loss = Loss("mse", divisor="rows", factor=1.0, per_row=True)
    program = Program.chain([Linear(D, C), BatchNorm1d(C)], (D,), loss)
    params = {name: torch.ones(shape) for name, shape in program.params.items()}
    for batch in (one_row(), one_live_row()):
        with pytest.raises(ValueError, match=r"more than (one row|1 value)"):
            meta_grad(program, params, batch, inner=SGD(0.1), loss=None, path="fused")


def test_a_forced_backend_wins_over_a_call_that_came_before() -> None:
    model, batch = mlp(), rows()
    options: dict[str, Any] = {"inner": SGD(0.1), "loss": F.mse_loss}
    assert meta_grad(model, None, batch, **options).path == "fused"
    with backend("reference"):
        assert meta_grad(model, None, batch, **options).path != "fused"
    assert meta_grad(model, None, batch, **options).path == "fused"


def test_a_later_call_is_checked_as_the_first_was() -> None:
    """A prepared call must not carry on where the first would have been refused."""
    model = nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, C))
    xs, ys, xq, yq = rows()
    options: dict[str, Any] = {"inner": SGD(0.1), "loss": F.mse_loss, "path": "fused"}
    for _ in range(3):
        meta_grad(model, None, (xs, ys, xq, yq), **options)
    with pytest.raises(ValueError, match="x requires grad"):
        meta_grad(model, None, (xs.clone().requires_grad_(), ys, xq, yq), **options)
    with pytest.raises(TypeError, match="x must be"):
        meta_grad(model, None, (xs.double(), ys, xq.double(), yq), **options)
    with pytest.raises(ValueError, match="meta"):
        meta_grad(model, None, tuple(t.to("meta") for t in (xs, ys, xq, yq)), **options)
    model[1] = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="dropout"):
        meta_grad(model, None, (xs, ys, xq, yq), **options)


def test_a_later_call_sees_a_module_that_changed() -> None:
    model = nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, C))
    batch = rows()
    options: dict[str, Any] = {"inner": SGD(0.1, 2), "loss": F.mse_loss}

    def both() -> None:
        fused = meta_grad(model, None, batch, path="fused", **options)
        want = meta_grad(model, None, batch, path="reference", **options)
        assert_close(fused.grads.params, want.grads.params, FLOAT32, "gradients")
        assert_close(dict(fused.adapted), dict(want.adapted), FLOAT32, "adapted")

    both()
    both()
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    both()
    model[0].weight.data = model[0].weight.data.clone() * 2
    both()
    model[2].bias.requires_grad_(False)
    both()
    model[1] = nn.Tanh()
    both()
    model[2] = nn.Linear(6, C)
    both()
    model[2].bias = None
    both()


def test_strides_are_no_matter() -> None:
    model = mlp()
    xs, ys, xq, yq = rows()
    options: dict[str, Any] = {"inner": SGD(0.1, 2), "loss": F.mse_loss, "path": "fused"}
    want = meta_grad(model, None, (xs, ys, xq, yq), **options)
    strided = tuple(torch.stack([t, t + 1], dim=-1)[..., 0] for t in (xs, ys, xq, yq))
    assert not any(t.is_contiguous() for t in strided)
    found = meta_grad(model, None, strided, **options)
    assert_close(found.grads.params, want.grads.params, 0.0, "strided rows")
    with torch.no_grad():
        model[0].weight.data = model[0].weight.data.t().contiguous().t()
    assert not model[0].weight.is_contiguous()
    found = meta_grad(model, None, (xs, ys, xq, yq), **options)
    assert_close(found.grads.params, want.grads.params, 0.0, "a strided parameter")


def test_a_program_that_the_executors_do_not_run() -> None:
    loss = Loss("mse", divisor="rows", factor=1.0, per_row=False)
    branches = Program(
        (
            Node(Linear(D, D), (0,), ("a", None)),
            Node(ReLU(), (1,)),
            Node(Linear(D, C), (1,), ("b", None)),
        ),
        {"a": (D, D), "b": (C, D)},
        (D,),
        (C,),
        loss,
    )
    params = {"a": data(D, D), "b": data(C, D)}
    with pytest.raises(ValueError, match="branches"):
        meta_grad(branches, params, rows(), inner=SGD(0.1), loss=None, path="fused")
    assert meta_grad(branches, params, rows(), inner=SGD(0.1), loss=None).path != "fused"
