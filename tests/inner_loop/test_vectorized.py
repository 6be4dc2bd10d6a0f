"""What vmap runs, runs right, or is kept from."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, meta_grad, trial, vectorized
from fastmeta.inner_loop.request import build_request
from tests.inner_loop.naive import mse, network, regression, rowwise, same


def request(model: nn.Module, batch: Any = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"inner": SGD(0.3, 2), "loss": mse}
    return build_request(model, None, batch or regression(), **{**arguments, **changes})


def reason(model: nn.Module, batch: Any = None, **changes: Any) -> str | None:
    return vectorized.why_not(request(model.double(), batch, **changes))


def masked(weight: float = 0.0) -> TaskBatch:
    xs, ys, xq, yq = regression()
    weights = torch.ones(5, 4).double()
    weights[2, 1] = weight
    return TaskBatch(Examples(xs, ys, weights), Examples(xq, yq))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


class Mixing(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0)


class Last(Branching):
    """An operation that vmap has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x)


class WrongRule(torch.autograd.Function):
    """A square whose vmap rule forgets a factor: what a wrong batching rule looks like."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return 1.001 * x * x, in_dims[0]


class Wrong(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return WrongRule.apply(self.linear(x))


def batch_normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def dropping(p: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(p), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "batch", "changes", "words"),
    [
        (nn.LSTM(3, 2), None, {}, "vmap cannot run the recurrent layer model (LSTM)"),
        (dropping(0.5), None, {}, "1 (Dropout) draws random numbers in training mode"),
        (
            batch_normed(), None, {"batch_norm": "track"},
            "batch_norm='track' updates the module's buffers one task after the other",
        ),
        (network(), None, {"batch_norm": "per_step"}, "batch_norm='per_step' is not implemented"),
        (
            batch_normed(), masked(), {"loss": rowwise},
            "rows of weight zero must stay out of the statistics of 1 (BatchNorm1d)",
        ),
        (Mixing(), masked(), {"loss": rowwise}, "output for a row depends on other rows"),
        (Branching(), None, {}, "vmap cannot run it: RuntimeError: vmap: It looks like you're"),
        (Last(), None, {}, "vmap cannot run it: UserWarning: There is a performance drop"),
        (
            Wrong(), None, {},
            "vmap runs it, but its gradient is not that of the definition (relative difference",
        ),
    ],
    ids=[
        "recurrent", "dropout", "track", "per-step", "masked-batch-norm", "masked-mixing",
        "branch-on-data", "no-batching-rule", "wrong-batching-rule",
    ],
)  # fmt: skip
def test_refused_by_name(model: nn.Module, batch: Any, changes: Any, words: str) -> None:
    found = reason(model, batch, **changes)
    assert found is not None
    assert words in found


@pytest.mark.parametrize(
    ("model", "batch", "changes"),
    [
        (network(), None, {}),
        (network(), masked(), {"loss": rowwise}),
        (dropping(0.0), None, {}),
        (dropping(0.5).eval(), None, {}),
        (batch_normed(), None, {}),
        (batch_normed(), masked(0.5), {"loss": rowwise}),
        (batch_normed(), masked(), {"loss": rowwise, "batch_norm": "frozen"}),
        (Mixing(), masked(0.5), {"loss": rowwise}),
        (network(), None, {"batch_norm": "track"}),
    ],
    ids=[
        "mlp", "masked", "no-dropout", "eval", "batch-norm", "weighted-batch-norm",
        "masked-frozen", "weighted-mixing", "nothing-to-track",
    ],
)  # fmt: skip
def test_right(model: nn.Module, batch: Any, changes: Any) -> None:
    assert reason(model, batch, **changes) is None


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3), nn.Flatten())


def test_the_loop_is_preferred_where_it_is_faster() -> None:
    conv = convolutional().double()
    assert reason(conv) is None
    assert "convolution is slower than the loop: 1 (Conv1d)" in str(
        vectorized.slower(request(conv))
    )
    assert meta_grad(conv, None, regression(), inner=SGD(), loss=mse).path == "reference"
    assert vectorized.slower(request(network())) is None
    assert vectorized.slower(request(network(), regression(T=2))) is not None


NORMS = {
    "batch": lambda: nn.BatchNorm1d(4),
    "batch-plain": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "layer": lambda: nn.LayerNorm(4),
    "layer-no-bias": lambda: nn.LayerNorm(4, bias=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "rms": lambda: nn.RMSNorm(4),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "batch-2d": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.BatchNorm2d(1), nn.Flatten()),
}


@pytest.mark.parametrize("norm", list(NORMS))
def test_second_derivatives_of_normalisation(norm: str) -> None:
    """torch's own batching rules are silently wrong here; see norms.py."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), NORMS[norm](), nn.Tanh(), nn.Linear(4, 2)).double()
    assert reason(net) is None
    results = [
        meta_grad(net, None, regression(), inner=SGD(0.3, 2), loss=mse, path=path)  # type: ignore[arg-type]
        for path in ("vectorized", "reference")
    ]
    same(results[0].grads.params, results[1].grads.params)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_one_value_for_each_channel_is_refused_as_by_torch(norm: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), NORMS[norm](), nn.Linear(4, 2)).double()
    if norm == "instance":
        net[1] = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.InstanceNorm1d(4), nn.Flatten())
    xs, ys, xq, yq = regression(S=1)
    with pytest.raises(ValueError, match=r"more than 1 (value per channel|spatial element)"):
        meta_grad(net, None, (xs, ys, xq, yq), inner=SGD(0.3), loss=mse)


class Detached(torch.autograd.Function):
    """A sine that vmap can run, whose backward hides from autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].detach().cos()


def test_an_opaque_backward_is_seen_though_vmap_and_loop_agree() -> None:
    class Opaque(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return Detached.apply(self.linear(x))

    assert "some backward pass is not itself differentiable" in str(reason(Opaque()))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        meta_grad(Opaque().double(), None, regression(), inner=SGD(0.3), loss=mse)
    assert reason(Opaque(), order=1) is None


def test_the_verdict_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tries = network(), []
    probe = vectorized._probe
    monkeypatch.setattr(vectorized, "_probe", lambda r: tries.append(1) or probe(r))
    for _ in range(3):
        assert reason(net, loss=lambda o, y: mse(o, y)) is None
    assert len(tries) == 1
    for _ in range(2):
        assert reason(net.eval()) is None
    assert len(tries) == 2


def test_a_module_that_insists_on_its_dtype_is_compared_in_it() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) @ torch.eye(2, dtype=torch.float32)

    batch = tuple(value.float() for value in regression())
    assert vectorized.why_not(request(Stubborn(), batch)) is None
    assert meta_grad(Stubborn(), None, batch, inner=SGD(), loss=mse).path == "vectorized"


def test_losses_are_told_apart_by_their_code() -> None:
    def closing(inner: Any) -> Any:
        return lambda o, y: inner(o, y)

    key = trial.loss_key
    assert key(closing(mse)) == key(closing(mse))
    assert key(closing(mse)) != key(closing(rowwise))
    assert key(functools.partial(mse)) == key(functools.partial(mse))
    assert key(functools.partial(mse)) != key(functools.partial(rowwise))
    assert key(nn.MSELoss()) == key(nn.MSELoss())
    assert key(nn.MSELoss()) != key(nn.L1Loss())
    assert key(nn.MSELoss().forward) == key(nn.MSELoss().forward)
