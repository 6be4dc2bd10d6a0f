"""The hand-written rules of each layer against torch's automatic derivatives, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmeta.program import (
    ELU,
    GELU,
    BatchNorm1d,
    Flatten,
    Layer,
    LeakyReLU,
    Linear,
    ReLU,
    Sigmoid,
    SiLU,
    Tanh,
)
from tests.program.drawing import ACTIVATIONS, TORCH, batch_norm_with_torch

# float64 rules of a few multiplications on numbers near 1: rounding stays far below this.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def check(
    layer: Layer,
    x: Tensor,
    params: Sequence[Tensor | None],
    mask: Tensor | None = None,
    *,
    fixed: Sequence[int] = (),
) -> None:
    """Hold all four rules against autograd; `fixed` parameters get no tangent."""
    given_params = [p for p in params if p is not None]

    def fill(present: Sequence[Tensor]) -> list[Tensor | None]:
        rest = iter(present)
        return [None if p is None else next(rest) for p in params]

    def plain(x: Tensor, *present: Tensor) -> Tensor:
        if isinstance(layer, BatchNorm1d):
            return batch_norm_with_torch(layer, x, fill(present), mask)
        return TORCH[layer.kind](layer, x, *fill(present))

    y, saved = layer.forward(x, params, mask)
    expected = plain(x, *given_params)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    assert y.shape == (x.shape[0], *layer.output_shape(tuple(x.shape[1:])))

    generator = torch.Generator().manual_seed(7)

    def randn_like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    rx, dy, rdy = randn_like(x), randn_like(y), randn_like(y)
    tangents = [
        torch.zeros_like(p) if i in fixed else randn_like(p) for i, p in enumerate(given_params)
    ]
    rparams: list[Tensor | None] = [None if i in fixed else t for i, t in enumerate(fill(tangents))]

    inputs = (x, *given_params)

    def plain_vjp(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return gradients([plain(*inputs)], inputs, [dy])

    (dx, *dpresent), (rdx, *rdpresent) = jvp(plain_vjp, (dy, *inputs), (rdy, rx, *tangents))
    got_dx, got_dparams = layer.vjp(saved, params, dy)
    torch.testing.assert_close(got_dx, dx, **TOLERANCE)
    assert_same(got_dparams, fill(dpresent))

    _, (ry,) = jvp(lambda *inputs: (plain(*inputs),), inputs, (rx, *tangents))
    got_ry, rsaved = layer.r_forward(saved, params, rx, rparams)
    torch.testing.assert_close(got_ry, ry, **TOLERANCE)

    got_rdx, got_rdparams = layer.r_vjp(saved, rsaved, params, rparams, dy, rdy)
    torch.testing.assert_close(got_rdx, rdx, **TOLERANCE)
    assert_same(got_rdparams, fill(rdpresent))


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], dy: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    live = [(y, d) for y, d in zip(outputs, dy, strict=True) if y.requires_grad]  # not constants
    ys, ds = zip(*live, strict=True)
    return torch.autograd.grad(ys, inputs, ds, create_graph=True, materialize_grads=True)


def jvp(
    f: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """f and its derivative along the tangents, by reverse mode twice: u -> J^T u is linear."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = f(*leaves)
    u = [torch.zeros_like(y, requires_grad=True) for y in outputs]
    tangent = gradients(gradients(outputs, leaves, u), u, tangents)
    return [y.detach() for y in outputs], [r.detach() for r in tangent]


def assert_same(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, **TOLERANCE)


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


seeds = st.integers(0, 2**31)
sizes = st.integers(1, 7)


@given(
    rows=sizes,
    inputs=sizes,
    outputs=sizes,
    bias=st.booleans(),
    fixed=st.sets(st.integers(0, 1)),
    seed=seeds,
)
def test_linear(
    rows: int, inputs: int, outputs: int, bias: bool, fixed: set[int], seed: int
) -> None:
    params = [randn(outputs, inputs, seed=seed), randn(outputs, seed=seed + 1) if bias else None]
    check(Linear(inputs, outputs), randn(rows, inputs, seed=seed + 2), params, fixed=sorted(fixed))


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
@given(
    shape=st.lists(sizes, min_size=1, max_size=3),
    scale=st.sampled_from((0.3, 1.0, 5.0)),
    seed=seeds,
)
def test_elementwise(layer: Layer, shape: list[int], scale: float, seed: int) -> None:
    x = scale * randn(*shape, seed=seed)
    x = torch.where(x.abs() < 1e-3, 1e-3, x)  # away from the kinks at zero
    check(layer, x, ())


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_elementwise_at_zero_takes_the_derivative_torch_takes(layer: Layer) -> None:
    x = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    y, saved = layer.forward(x.detach(), (), None)
    expected = TORCH[layer.kind](layer, x)
    (dx,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(y, expected.detach(), **TOLERANCE)
    torch.testing.assert_close(layer.vjp(saved, (), torch.ones_like(y))[0], dx, **TOLERANCE)


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("value", [1e4, -1e4, 700.0, -700.0])
def test_elementwise_stays_finite_far_out(layer: Layer, value: float) -> None:
    x = torch.full((2, 1), value, dtype=torch.float64)
    y, saved = layer.forward(x, (), None)
    dx, _ = layer.vjp(saved, (), torch.ones_like(x))
    _, rsaved = layer.r_forward(saved, (), torch.ones_like(x), ())
    rdx, _ = layer.r_vjp(saved, rsaved, (), (), torch.ones_like(x), torch.ones_like(x))
    torch.testing.assert_close(y, TORCH[layer.kind](layer, x), **TOLERANCE)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(rdx).all()


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_elementwise_does_not_hide_nan(layer: Layer) -> None:
    y, _ = layer.forward(torch.tensor([[torch.nan]]), (), None)
    assert y.isnan().all()


@given(shape=st.lists(sizes, min_size=1, max_size=4), seed=seeds)
def test_flatten(shape: list[int], seed: int) -> None:
    check(Flatten(), randn(*shape, 1, seed=seed), ())


@given(
    rows=st.integers(2, 7),
    features=sizes,
    affine=st.tuples(st.booleans(), st.booleans()),
    fixed=st.sets(st.integers(0, 1)),
    eps=st.sampled_from((1e-5, 1e-2)),
    seed=seeds,
)
def test_batch_norm(
    rows: int,
    features: int,
    affine: tuple[bool, bool],
    fixed: set[int],
    eps: float,
    seed: int,
) -> None:
    params = [randn(features, seed=seed + i) if there else None for i, there in enumerate(affine)]
    check_batch_norm(
        BatchNorm1d(features, eps), randn(rows, features, seed=seed + 2), params, fixed
    )


@given(
    live=st.integers(2, 5),
    masked=st.integers(1, 3),
    features=sizes,
    affine=st.booleans(),
    seed=seeds,
)
def test_batch_norm_with_masked_rows(
    live: int, masked: int, features: int, affine: bool, seed: int
) -> None:
    params = [randn(features, seed=seed + i) if affine else None for i in range(2)]
    order = torch.randperm(live + masked, generator=torch.Generator().manual_seed(seed))
    mask = order < live
    x = randn(live + masked, features, seed=seed + 2)
    check_batch_norm(BatchNorm1d(features), x, params, (), mask)


def check_batch_norm(
    layer: BatchNorm1d,
    x: Tensor,
    params: list[Tensor | None],
    fixed: set[int] | tuple[int, ...],
    mask: Tensor | None = None,
) -> None:
    # Rows that happen to lie close together make rsqrt steep; spread them so that 1e-10 is fair.
    x = x + torch.arange(x.shape[0], dtype=x.dtype).unsqueeze(1)
    present = [i for i, p in enumerate(params) if p is not None]
    check(layer, x, params, mask, fixed=[present.index(i) for i in fixed if i in present])


def test_batch_norm_is_torchs_own() -> None:
    x, w, b = randn(5, 3, seed=0), randn(3, seed=1), randn(3, seed=2)
    y, _ = BatchNorm1d(3, 1e-4).forward(x, (w, b), None)
    expected = torch.nn.functional.batch_norm(x, None, None, w, b, training=True, eps=1e-4)
    torch.testing.assert_close(y, expected, **TOLERANCE)


def test_batch_norm_masked_rows_have_no_influence() -> None:
    layer, mask = BatchNorm1d(3), torch.tensor([True, False, True, True])
    params = (randn(3, seed=1), randn(3, seed=2))
    dy = randn(4, 3, seed=3) * mask.unsqueeze(1)
    x = randn(4, 3, seed=4)
    other = torch.where(mask.unsqueeze(1), x, 100.0)
    results = []
    for rows in (x, other):
        y, saved = layer.forward(rows, params, mask)
        dx, dparams = layer.vjp(saved, params, dy)
        assert not dx[~mask].any()
        results.append([y[mask], dx, *dparams])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, False])], ids=["S=1", "masked"])
def test_batch_norm_refuses_a_single_row(mask: Tensor | None) -> None:
    x = torch.randn(1 if mask is None else 3, 2)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*got 1 row"):
        BatchNorm1d(2).forward(x, (None, None), mask)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Linear(3, 2), (4,)),
        (Linear(3, 2), (3, 3)),
        (BatchNorm1d(3), (4,)),
        (BatchNorm1d(3), (3, 2)),
    ],
    ids=str,
)
def test_shape_rules_refuse(layer: Layer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows must have shape"):
        layer.output_shape(shape)


def test_gelu_refuses_an_unknown_approximation() -> None:
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        GELU("erf")  # type: ignore[arg-type]


def test_layers_are_values() -> None:
    pairs = [
        (Linear(1, 2), Linear(1, 2), Linear(2, 1)),
        (LeakyReLU(0.1), LeakyReLU(0.1), LeakyReLU(0.2)),
        (ELU(1.0), ELU(1.0), ELU(2.0)),
        (GELU(), GELU("none"), GELU("tanh")),
        (BatchNorm1d(2), BatchNorm1d(2), BatchNorm1d(2, 1e-3)),
        (ReLU(), ReLU(), Tanh()),
        (Sigmoid(), Sigmoid(), SiLU()),
    ]
    for a, same, other in pairs:
        assert a == same
        assert hash(a) == hash(same)
        assert a != other
