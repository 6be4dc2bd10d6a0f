"""The losses' hand-written rules against torch's own losses and automatic derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.program import Linear, Loss, Program
from tests.program.drawing import loss_with_torch, losses

# float64, a handful of operations on numbers near 1.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@given(
    loss=losses(),
    rows=st.integers(1, 6),
    width=st.integers(1, 5),
    weighted=st.booleans(),
    scale=st.sampled_from((1.0, 30.0)),
    seed=st.integers(0, 2**31),
)
def test_rules(loss: Loss, rows: int, width: int, weighted: bool, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    o = scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    ro = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if loss.kind == "mse":
        y = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    else:
        y = torch.randint(width, (rows,), generator=generator)
    weight = None
    if weighted and loss.divisor == "rows":
        weight = torch.rand(rows, generator=generator, dtype=torch.float64)
        weight[: rows // 2] = 0.0

    o.requires_grad_()
    expected = loss_with_torch(loss, o, y, weight)
    (do,) = torch.autograd.grad(expected, o, create_graph=True)
    (rdo,) = torch.autograd.grad(do, o, ro, materialize_grads=True)

    value, saved = loss.forward(o.detach(), y, weight)
    torch.testing.assert_close(value, expected.detach(), **TOLERANCE)
    torch.testing.assert_close(loss.vjp(saved), do.detach(), **TOLERANCE)
    torch.testing.assert_close(loss.r_vjp(saved, ro), rdo, **TOLERANCE)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_mse_reads_rows_of_any_shape(shape: tuple[int, ...]) -> None:
    loss = Loss("mse", divisor="rows", factor=1.0, per_row=True)
    o, y = torch.randn(4, *shape), torch.randn(4, *shape)
    value, saved = loss.forward(o, y, None)
    torch.testing.assert_close(value, ((o - y) ** 2).sum() / 4)
    assert loss.vjp(saved).shape == (4, saved.residual.shape[1])


@pytest.mark.parametrize("kind", ["mse", "cross_entropy"])
def test_a_row_of_weight_zero_may_hold_anything(kind: str) -> None:
    loss = Loss(kind, divisor="rows", factor=1.0, per_row=True)  # type: ignore[arg-type]
    weight = torch.tensor([1.0, 0.0, 2.0])
    o = torch.randn(3, 2, dtype=torch.float64)
    if kind == "mse":
        y = torch.randn(3, 2, dtype=torch.float64)
        padded = torch.where(weight.unsqueeze(1) == 0, torch.nan, y)
    else:
        y = torch.tensor([0, 1, 1])
        padded = torch.where(weight == 0, -100, y)
    clean, wild = loss.forward(o, y, weight), loss.forward(o, padded, weight)
    torch.testing.assert_close(wild[0], clean[0], rtol=0, atol=0)
    for rule in (loss.vjp, lambda saved: loss.r_vjp(saved, o)):
        torch.testing.assert_close(rule(wild[1]), rule(clean[1]), rtol=0, atol=0)
        assert not rule(wild[1])[1].any()


def test_cross_entropy_of_large_logits_is_finite() -> None:
    loss = Loss("cross_entropy", divisor="one", factor=1.0, per_row=False)
    o = torch.tensor([[1e4, -1e4]])
    value, saved = loss.forward(o, torch.tensor([1]), None)
    assert value.item() == 2e4
    assert torch.isfinite(loss.r_vjp(saved, torch.ones(1, 2))).all()


def test_nan_shows_in_the_loss() -> None:
    loss = Loss("mse", divisor="rows", factor=1.0, per_row=False)
    assert loss.forward(torch.tensor([[torch.nan]]), torch.zeros(1, 1), None)[0].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hinge"}, "kind must be 'mse' or 'cross_entropy', got 'hinge'"),
        ({"divisor": "cols"}, "divisor must be 'rows' or 'one', got 'cols'"),
        ({"divisor": "one", "per_row": True}, "divisor must be 'rows' for a per-row loss"),
    ],
    ids=["kind", "divisor", "per_row"],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    fields = {"kind": "mse", "divisor": "rows", "factor": 1.0, "per_row": False} | change
    with pytest.raises(ValueError, match=message):
        Loss(**fields)  # type: ignore[arg-type]


def test_cross_entropy_refuses_an_output_that_is_no_row_of_logits() -> None:
    loss = Loss("cross_entropy", divisor="rows", factor=1.0, per_row=False)
    program = Program.chain([Linear(2, 1)], (2,))
    with pytest.raises(ValueError, match=r"output must have rows of shape \(N,\), got \(\)"):
        Program(program.nodes, program.params, (2,), (), loss)
