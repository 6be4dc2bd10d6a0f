"""What only the plain loop can run: recurrent nets, tracked BatchNorm, dropout, dropped rows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, adapt, meta_grad
from tests.inner_loop import naive
from tests.inner_loop.naive import mse, network, regression, rowwise, same

cross_entropy = torch.nn.functional.cross_entropy


class Recurrent(nn.Module):
    """The last hidden state, mapped linearly; by torch's layer, or written out."""

    def __init__(self, kind: str, by_hand: bool) -> None:
        super().__init__()
        self.kind, self.by_hand = kind, by_hand
        self.net = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}[kind](3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_hand:
            return self.head(self.net(x)[0][:, -1])
        h = c = x.new_zeros(len(x), 4)
        for now in x.unbind(1):
            a = now @ self.net.weight_ih_l0.T + self.net.bias_ih_l0
            b = h @ self.net.weight_hh_l0.T + self.net.bias_hh_l0
            if self.kind == "RNN":
                h = torch.tanh(a + b)
            elif self.kind == "LSTM":
                i, f, g, o = (a + b).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
                h = (1 - z) * (an + r * bn).tanh() + z * h
        return self.head(h)


def sequences(T: int = 3) -> naive.Batch:
    _, ys, _, yq = regression(T)
    generator = torch.Generator().manual_seed(3)
    xs, xq = (torch.randn(T, n, 5, 3, generator=generator, dtype=torch.float64) for n in (4, 6))
    return xs, ys, xq, yq


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_recurrent_layers_land_here_with_exact_second_order(kind: str) -> None:
    torch.manual_seed(0)
    net = Recurrent(kind, by_hand=False).double()
    twin = Recurrent(kind, by_hand=True).double()
    twin.load_state_dict(net.state_dict())
    got = meta_grad(net, None, sequences(), inner=SGD(0.3, 2), loss=mse)
    want = meta_grad(twin, None, sequences(), inner=SGD(0.3, 2), loss=mse, path="reference")
    assert got.path == "reference"
    same(got.grads.params, want.grads.params)


def test_attention_has_a_second_derivative() -> None:
    class Block(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.fused = fused
            self.project, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).chunk(3, -1)
            if self.fused:
                mixed = nn.functional.scaled_dot_product_attention(
                    q[:, None], k[:, None], v[:, None]
                )[:, 0]
            else:
                mixed = (q @ k.mT / 2).softmax(-1) @ v
            return self.head(mixed.mean(1))

    torch.manual_seed(0)
    net, twin = Block(True).double(), Block(False).double()
    twin.load_state_dict(net.state_dict())
    for path in ("reference", "vectorized"):
        got, want = (
            meta_grad(module, None, sequences(), inner=SGD(0.3, 2), loss=mse, path=path)  # type: ignore[arg-type]
            for module in (net, twin)
        )
        same(got.grads.params, want.grads.params)


def normalised(track: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=track), nn.Tanh(), nn.Linear(4, 2)
    ).double()


def test_tracked_statistics_are_those_of_the_plain_loop() -> None:
    net, twin, batch = normalised(), normalised(), regression(T=3)
    result = meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, batch_norm="track")
    assert result.path == "reference"
    for xs, ys, xq, _ in zip(*batch, strict=True):
        start = {name: p.detach().clone() for name, p in twin.named_parameters()}
        for _ in range(2):
            twin.zero_grad()
            mse(twin(xs), ys).backward()
            with torch.no_grad():
                for p in twin.parameters():
                    p -= 0.3 * p.grad
        twin(xq)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(start[name])
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(net.named_buffers())[name], value)
    assert net[1].num_batches_tracked == 9


@pytest.mark.parametrize("option", ["batch", "frozen", "track"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_adapting_never_changes_the_meta_model(option: Any, training: bool) -> None:
    net = normalised().train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    xs, ys, xq, _ = regression(T=3)
    adapted = adapt(net, None, (xs, ys), inner=SGD(0.3, 2), loss=mse, batch_norm=option)
    adapted(xq)
    adapted[0](xq[0])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[1].training is training


@pytest.mark.parametrize("path", ["reference", "vectorized"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_statistics_whatever_the_mode(path: Any, training: bool) -> None:
    batch = regression()
    want = meta_grad(normalised(track=False), None, batch, inner=SGD(0.3, 2), loss=mse, path=path)
    net = normalised().train(training)
    same(
        meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path=path).grads.params,
        want.grads.params,
    )


@pytest.mark.parametrize("path", ["reference", "vectorized"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_statistics_whatever_the_mode(path: Any, training: bool) -> None:
    net = normalised()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    net.train(training)
    result = meta_grad(
        net, None, regression(), inner=SGD(0.3, 2), loss=mse, batch_norm="frozen", path=path
    )
    twin = normalised()
    twin.load_state_dict(net.state_dict())
    twin.eval()
    want = meta_grad(
        twin, None, regression(), inner=SGD(0.3, 2), loss=mse, batch_norm="track", path="reference"
    )
    same(result.grads.params, want.grads.params)
    with pytest.raises(ValueError, match="batch_norm must be 'batch' for a layer without running"):
        meta_grad(
            normalised(track=False), None, regression(), inner=SGD(), loss=mse,
            batch_norm="frozen", path="reference",
        )  # fmt: skip


def test_rows_of_weight_zero_stay_out_of_the_statistics() -> None:
    net, (xs, ys, xq, yq) = normalised(), regression()
    weight = torch.ones(5, 4).double()
    weight[:, 1] = 0
    masked = TaskBatch(Examples(xs, ys, weight), Examples(xq, yq))
    kept = [0, 2, 3]
    got, want = (
        meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=rowwise, path="reference")
        for batch in (masked, (xs[:, kept], ys[:, kept], xq, yq))
    )
    same(got.grads.params, want.grads.params)


def test_dropout_draws_from_the_global_generator_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    with caplog.at_level(logging.WARNING, "fastmeta"):
        torch.manual_seed(0)
        one = meta_grad(net, None, regression(), inner=SGD(0.3), loss=mse)
        torch.manual_seed(0)
        two = meta_grad(net, None, regression(), inner=SGD(0.3), loss=mse)
        three = meta_grad(net, None, regression(), inner=SGD(0.3), loss=mse)
    assert one.path == "reference"
    assert torch.equal(one.losses, two.losses)
    assert not torch.equal(two.losses, three.losses)
    (message,) = (m for m in caplog.messages if "global generator" in m)
    assert "1 (Dropout)" in message
    assert meta_grad(net.eval(), None, regression(), inner=SGD(0.3), loss=mse).path != "reference"


class Stuck(torch.autograd.Function):
    """An operation whose backward is an opaque one: no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class WithStuck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return Stuck.apply(self.linear(x))


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (WithStuck(), mse),
        (nn.Sequential(nn.Linear(3, 2), nn.Hardsigmoid()), mse),
    ],
    ids=["once-differentiable", "not-implemented"],
)
def test_no_second_derivative_is_said_not_passed_over(net: nn.Module, loss: Any) -> None:
    net = net.double()
    with pytest.raises(RuntimeError, match=r"has no second derivative.* order=1 does without"):
        meta_grad(net, None, regression(), inner=SGD(0.3), loss=loss)
    first = meta_grad(net, None, regression(), inner=SGD(0.3), loss=loss, order=1)
    assert all(value.isfinite().all() for value in first.grads.params.values())


def test_buffers_of_the_users_own_are_dropped_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    net = Counting().double()
    with caplog.at_level(logging.WARNING, "fastmeta"):
        result = meta_grad(net, None, regression(), inner=SGD(0.3), loss=mse)
    assert result.path == "reference"
    assert net.calls == 0
    assert any("the update of buffers calls is dropped" in m for m in caplog.messages)
    tracked = meta_grad(net, None, regression(), inner=SGD(0.3), loss=mse, batch_norm="track")
    assert tracked.path == "reference"
    assert net.calls == 10


@pytest.mark.parametrize("option", ["batch", "track"])
def test_an_error_midway_leaves_everything_as_it_was(option: Any) -> None:
    net, (xs, ys, xq, yq) = normalised(), regression()
    ys[3] = 100.0  # the fourth task is one that the loss does not like

    def failing(output: Tensor, y: Tensor) -> Tensor:
        if (y == 100.0).all():
            raise RuntimeError("user code")
        return mse(output, y)

    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="user code"):
        meta_grad(
            net, None, (xs, ys, xq, yq), inner=SGD(0.3), loss=failing,
            path="reference", batch_norm=option,
        )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[1].track_running_stats
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))[..., :2]

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))[..., :2]

    torch.manual_seed(0)
    tied, once = Tied().double(), Once().double()
    once.a.weight = tied.a.weight
    for path in ("reference", "vectorized"):
        got, want = (
            meta_grad(net, None, regression(), inner=SGD(0.3, 2), loss=mse, path=path)  # type: ignore[arg-type]
            for net in (tied, once)
        )
        same(got.grads.params, want.grads.params)


def test_a_plain_network_agrees_with_finite_differences() -> None:
    net, batch = network(), regression(T=2)
    grads = meta_grad(net, None, batch, inner=SGD(0.3, 2), loss=mse, path="reference").grads.params

    def value(step: float) -> Tensor:
        params = naive.parameters(net)
        params["0.weight"][1, 2] += step
        return meta_grad(net, params, batch, inner=SGD(0.3, 2), loss=mse).losses.mean()

    numeric = (value(1e-6) - value(-1e-6)) / 2e-6
    torch.testing.assert_close(grads["0.weight"][1, 2], numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_small_initial_weights_under_batch_norm_pass_the_first_use_check(network: str) -> None:
    # weights of deviation 0.01 behind BatchNorm without a scale: sharp curvature, many kinks
    torch.manual_seed(0)
    net = fastmeta.nn.omniglot_mlp() if network == "mlp" else fastmeta.nn.conv4()
    x, y = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)
    result = fastmeta.meta_grad(
        net,
        None,
        (x, y, x, y),
        inner=fastmeta.SGD(lr=0.4),
        loss=torch.nn.functional.cross_entropy,
        path="reference",
    )
    assert result.path == "reference"
    assert all(bool(grad.isfinite().all()) for grad in result.grads.params.values())
