"""The interpreter's derivatives against autograd through a plain loop, in float64 at 1e-10."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.program import Linear, Loss, Program, ReLU, Rows
from fastmeta.program.interpreter import forward, hvp, loss_and_grad, meta_gradient
from tests.program.drawing import (
    loss_with_torch,
    programs,
    random_params,
    random_rows,
    run_with_torch,
)

# Relative to the largest number compared: float64 through a few dozen small products.
RELATIVE = 1e-10

seeds = st.integers(0, 2**31)
row_counts = st.integers(2, 6)


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(got) == set(expected)
    scale = max([1.0, *(float(t.abs().max()) for t in expected.values() if t.numel())])
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=RELATIVE * scale, msg=name)


def plain_loss(program: Program, params: Mapping[str, Tensor], rows: Rows) -> Tensor:
    mask = None if rows.weight is None else rows.weight != 0
    o = run_with_torch(program, dict(params), rows.x, mask)
    assert program.loss is not None
    return loss_with_torch(program.loss, o, rows.y, rows.weight)


def gradients(loss: Tensor, of: Mapping[str, Tensor], *, graph: bool = False) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(of.values()), create_graph=graph, materialize_grads=True)
    return dict(zip(of, grads, strict=True))


def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


@given(program=programs(), rows=row_counts, seed=seeds)
def test_forward(program: Program, rows: int, seed: int) -> None:
    params, side = random_params(program, seed), random_rows(program, seed + 1, rows)
    expected = run_with_torch(program, params, side.x)
    got = forward(program, params, side.x)
    assert got.shape == (rows, *program.output_shape)
    assert_same({"output": got}, {"output": expected})


@given(data=st.data(), rows=row_counts, seed=seeds, masked=st.none() | st.integers(0, 2))
def test_loss_and_grad_and_hvp(
    data: st.DataObject, rows: int, seed: int, masked: int | None
) -> None:
    program = data.draw(programs(per_row=None if masked is None else True))
    side = random_rows(program, seed + 1, rows + (masked or 0), masked=masked)
    params = leaves(random_params(program, seed))
    v = random_params(program, seed + 2)

    expected_loss = plain_loss(program, params, side)
    expected = gradients(expected_loss, params, graph=True)
    along = sum(((g * v[name]).sum() for name, g in expected.items()), torch.zeros(()))
    expected_hv = gradients(along, params) if along.requires_grad else {}

    params = {name: p.detach() for name, p in params.items()}
    loss, grads, _ = loss_and_grad(program, params, side.x, side.y, side.weight)
    got = hvp(program, params, side.x, side.y, side.weight, v)
    assert_same(
        {"loss": loss, **grads},
        {"loss": expected_loss.detach(), **{n: g.detach() for n, g in expected.items()}},
    )
    if expected_hv:
        assert_same(got, expected_hv)


def plain_meta_gradient(
    program: Program,
    params: Mapping[str, Tensor],
    support: Rows,
    query: Rows,
    rates: Mapping[str, Tensor],
    steps: int,
    order: int,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """MAML as its paper writes it, by autograd."""
    start, rates = leaves(params), leaves(rates)
    theta = dict(start)
    for step in range(steps):
        loss = plain_loss(program, theta, support.at(step))
        grads = gradients(loss, theta, graph=order == 2)
        for name, rate in rates.items():
            alpha = rate.broadcast_to((steps, *params[name].shape))[step]
            g = grads[name] if order == 2 else grads[name].detach()
            theta[name] = theta[name] - alpha * g
    query_loss = plain_loss(program, theta, query)
    both = gradients(
        query_loss, {**start, **{f"rate {name}": rate for name, rate in rates.items()}}
    )
    return (
        query_loss.detach(),
        {name: both[name] for name in start},
        {name: both[f"rate {name}"] for name in rates},
        {name: theta[name].detach() for name in rates},
    )


@st.composite
def rate_forms(draw: st.DrawFn, shape: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """The shapes a rate may have: one, per step, per element, or both."""
    ones = (1,) * len(shape)
    return draw(st.sampled_from(((), (steps, *ones), shape, (1, *shape), (steps, *shape))))


@given(
    data=st.data(),
    rows=st.tuples(row_counts, row_counts),
    steps=st.integers(0, 3),
    order=st.sampled_from((1, 2)),
    masked=st.none() | st.integers(0, 2),
    seed=seeds,
)
def test_meta_gradient(
    data: st.DataObject,
    rows: tuple[int, int],
    steps: int,
    order: int,
    masked: int | None,
    seed: int,
) -> None:
    program = data.draw(programs(max_depth=3, per_row=None if masked is None else True))
    adapt = data.draw(st.sets(st.sampled_from(sorted(program.params))), label="adapt")
    params = random_params(program, seed)
    support, query = (
        random_rows(program, seed + i, n + (masked or 0), masked=masked)
        for i, n in enumerate(rows, start=1)
    )
    generator = torch.Generator().manual_seed(seed + 3)
    rates = {}
    for name in sorted(adapt):
        shape = data.draw(rate_forms(program.params[name], steps), label=name)
        rates[name] = 0.05 * torch.rand(shape, generator=generator, dtype=torch.float64)

    loss, grads, rate_grads, adapted = plain_meta_gradient(
        program, params, support, query, rates, steps, order
    )
    got = meta_gradient(program, params, support, query, rates=rates, steps=steps, order=order)
    assert_same(
        {"loss": got.loss, **got.grads, **named("rate", got.rates), **named("at", got.adapted)},
        {"loss": loss, **grads, **named("rate", rate_grads), **named("at", adapted)},
    )
    assert got.support_losses.shape == (steps,)


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix} {name}": t for name, t in tensors.items()}


def test_meta_gradient_of_a_module_through_functional_call() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.GELU(), nn.Linear(8, 4)
    ).double()
    program = program_of(model)
    params = dict(model.named_parameters())
    support = random_rows(program, 1, 5)
    query = random_rows(program, 2, 7)

    theta = params
    for _ in range(3):
        o = torch.func.functional_call(model, theta, (support.x,))
        g = torch.autograd.grad(
            F.cross_entropy(o, support.y), list(theta.values()), create_graph=True
        )
        theta = {n: p - 0.1 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    o = torch.func.functional_call(model, theta, (query.x,))
    expected_loss = F.cross_entropy(o, query.y)
    expected = gradients(expected_loss, params)

    plain = {n: p.detach() for n, p in params.items()}
    got = meta_gradient(program, plain, support, query, rates=dict.fromkeys(plain, 0.1), steps=3)
    assert_same(
        {"loss": got.loss, "o": got.output, **got.grads},
        {"loss": expected_loss.detach(), "o": o.detach(), **expected},
    )


def program_of(model: nn.Sequential) -> Program:
    from fastmeta.program import GELU, BatchNorm1d

    layers = [Linear(3, 8), BatchNorm1d(8), GELU(), Linear(8, 4)]
    return Program.chain(layers, (3,), Loss("cross_entropy", "rows", 1.0, False))


def test_first_order_differs_and_its_parts_that_do_not_adapt_see_the_query_only() -> None:
    program = Program.chain(
        [Linear(2, 3), ReLU(), Linear(3, 2)], (2,), Loss("mse", "rows", 0.5, False)
    )
    params = random_params(program, 0)
    support, query = random_rows(program, 1, 4), random_rows(program, 2, 4)
    rates = {"2.weight": 0.1}
    second = meta_gradient(program, params, support, query, rates=rates, steps=2)
    first = meta_gradient(program, params, support, query, rates=rates, steps=2, order=1)
    adapted = {**params, **first.adapted}
    direct = loss_and_grad(program, adapted, query.x, query.y).grads
    assert_same(first.grads, direct)
    assert not torch.allclose(first.grads["2.weight"], second.grads["2.weight"])
    assert not torch.allclose(first.grads["0.weight"], second.grads["0.weight"])


@given(program=programs(per_row=True), seed=seeds)
def test_masked_rows_may_hold_anything(program: Program, seed: int) -> None:
    params = random_params(program, seed)
    side = random_rows(program, seed, 5, masked=2)
    assert side.weight is not None
    live = side.weight != 0
    wild = Rows(
        torch.where(live.reshape(-1, *[1] * (side.x.dim() - 1)), side.x, torch.nan),
        torch.where(live.reshape(-1, *[1] * (side.y.dim() - 1)), side.y, -100),
        side.weight,
    )
    few = Rows(side.x[live], side.y[live], side.weight[live])
    rates = dict.fromkeys(program.params, 0.05)
    query = random_rows(program, seed + 1, 4)
    results = [
        meta_gradient(program, params, support, query, rates=rates, steps=2)
        for support in (wild, few)
    ]
    assert_same(results[0].grads, results[1].grads)


def test_index_picks_the_rows_of_each_step() -> None:
    program = Program.chain([Linear(2, 1)], (2,), Loss("mse", "rows", 1.0, False))
    params, whole = random_params(program, 0), random_rows(program, 1, 6)
    query, rates = random_rows(program, 2, 3), dict.fromkeys(program.params, 0.1)
    index = torch.tensor([[0, 1, 2], [3, 5, 5]])
    got = meta_gradient(
        program, params, Rows(whole.x, whole.y, None, index), query, rates=rates, steps=2
    )
    loss, grads, _, adapted = plain_meta_gradient(
        program,
        params,
        Rows(whole.x, whole.y, None, index),
        query,
        {name: torch.tensor(0.1, dtype=torch.float64) for name in params},
        2,
        2,
    )
    assert_same({"loss": got.loss, **got.grads}, {"loss": loss, **grads})
    assert_same(got.adapted, adapted)


def test_a_parameter_no_layer_reads_has_gradient_zero() -> None:
    program = Program.chain([Linear(2, 1)], (2,), Loss("mse", "rows", 1.0, False))
    params = {**program.params, "unused": (3,)}
    program = Program(program.nodes, params, (2,), (1,), program.loss)
    side = random_rows(program, 0, 4)
    got = meta_gradient(
        program, random_params(program, 1), side, side, rates={"unused": 0.1}, steps=1
    )
    assert not got.grads["unused"].any()
    assert got.grads["0.weight"].any()


def test_an_output_is_viewed_in_the_programs_shape() -> None:
    program = Program.chain([Linear(2, 1)], (2,))
    squeezed = Program(program.nodes, program.params, (2,), (), Loss("mse", "rows", 1.0, False))
    params, side = random_params(squeezed, 0), random_rows(squeezed, 1, 4)
    assert forward(squeezed, params, side.x).shape == (4,)
    assert side.y.shape == (4,)
    grads = loss_and_grad(squeezed, params, side.x, side.y).grads
    o = side.x @ params["0.weight"][0] + params["0.bias"]
    torch.testing.assert_close(grads["0.bias"], (2 * (o - side.y)).mean().reshape(1))


LINE = Program.chain([Linear(2, 1)], (2,), Loss("mse", "rows", 1.0, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"rates": {"w": 0.1}}, "rates must name parameters of the program, got 'w'"),
        (
            {"rates": {"0.bias": torch.ones(5, 7)}},
            r"rates\['0.bias'\] must broadcast to \[1, 1\], got \[5, 7\]",
        ),
        ({"params": {}}, "params must hold '0.weight'"),
        (
            {"params": {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(1)}},
            r"params\['0.weight'\] must have shape \[1, 2\], got \[2, 2\]",
        ),
        ({"params": {**random_params(LINE, 0), "z": torch.ones(1)}}, r"got also \['z'\]"),
        ({"support": Rows(torch.ones(3, 4), torch.ones(3, 1))}, r"x must have shape \[S, 2\]"),
        (
            {"support": Rows(torch.ones(3, 2), torch.ones(3, 1), torch.ones(3))},
            "weight needs a loss that returns one number a row",
        ),
        ({"program": Program.chain([Linear(2, 1)], (2,))}, "loss must be given"),
    ],
    ids=[
        "steps",
        "order",
        "rate",
        "rate-shape",
        "missing",
        "shape",
        "extra",
        "x",
        "weight",
        "loss",
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments = {
        "program": LINE,
        "params": random_params(LINE, 0),
        "support": random_rows(LINE, 1, 3),
        "query": random_rows(LINE, 2, 3),
        "rates": {},
        "steps": 1,
    } | change
    with pytest.raises(ValueError, match=message):
        meta_gradient(**arguments)  # type: ignore[arg-type]


def test_weight_must_have_one_number_a_row() -> None:
    program = Program.chain([Linear(2, 1)], (2,), Loss("mse", "rows", 1.0, True))
    side = random_rows(program, 1, 3)
    with pytest.raises(ValueError, match=r"weight must have shape \[3\], got \[2\]"):
        loss_and_grad(program, random_params(program, 0), side.x, side.y, torch.ones(2))
