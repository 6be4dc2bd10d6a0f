"""The bits of the fused path: the same whatever ran before, at any thread count, chunk or route."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastmeta import MAML
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, adapt, meta_grad
from fastmeta.inner_loop.door import forget
from fastmeta.ops import executor
from tests.inner_loop.fused_cases import (
    Case,
    Inputs,
    Params,
    cases,
    groups,
    interpreted,
    is_tame,
    of_task,
    run,
    sides,
)
from tests.program.drawing import loss_with_torch, run_with_torch
from tests.tolerances import EXACT, FLOAT32, FLOAT64, assert_close

pytestmark = pytest.mark.needs("cpp")

T = 37  # leaves of 8, 8, 8, 8 and 5 tasks


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def many(times: float) -> hypothesis.settings:
    return hypothesis.settings(max_examples=int(times * hypothesis.settings().max_examples))


def drop_executors() -> None:
    """Make the next call start from a fresh executor, as in another process."""
    executor._cache.executors.clear()
    forget()


def identical(got: dict[str, Params], want: dict[str, Params], what: str) -> None:
    for name, group in want.items():
        assert_close(got[name], group, EXACT, f"{what}: {name}")


def first_tasks(inputs: Inputs, case: Case, tasks: int) -> tuple[Case, Inputs]:
    params = {n: p[:tasks] if n in case.per_task else p for n, p in inputs.params.items()}
    return replace(case, tasks=tasks), Inputs(params, inputs.batch[:tasks], inputs.inner)


def unweighted(inputs: Inputs) -> Inputs:
    """The same rows without weights; what was masked becomes zero, with the label zero."""

    def side(rows: Examples) -> Examples:
        x, y = rows.x.nan_to_num(0.5), rows.y
        y = y.nan_to_num(0.5) if y.is_floating_point() else y.clamp(min=0)
        return Examples(x, y)

    batch = TaskBatch(side(inputs.batch.support), side(inputs.batch.query))
    return Inputs(inputs.params, batch, inputs.inner)


def poisoned(inputs: Inputs) -> Inputs:
    batch = unweighted(inputs).batch
    nan = Examples(torch.full_like(batch.support.x, float("nan")), batch.support.y)
    return Inputs(inputs.params, TaskBatch(nan, batch.query), inputs.inner)


@many(1)
@given(
    case=cases(most_rows=17, most_steps=3),
    order=st.permutations(("whole", "few tasks", "unweighted", "poisoned", "whole")),
    single=st.booleans(),
    threads=st.sampled_from((1, 2)),
)
def test_no_call_leaves_a_trace_in_the_next(
    case: Case, order: list[str], single: bool, threads: int
) -> None:
    whole = case.inputs.to(torch.float32 if single else torch.float64)
    calls: dict[str, tuple[Case, Inputs]] = {
        "whole": (case, whole),
        "few tasks": first_tasks(whole, case, (case.tasks + 1) // 2),
        "unweighted": (case, unweighted(whole)),
    }
    if not case.program.loss.per_row:  # type: ignore[union-attr]
        assert not any(case.weights)
    torch.set_num_threads(threads)
    alone = {}
    for name, (its, inputs) in calls.items():
        drop_executors()
        alone[name] = groups(run(its, "fused", inputs))
    drop_executors()
    for name in order:
        if name == "poisoned":
            run(case, "fused", poisoned(whole))
        else:
            its, inputs = calls[name]
            identical(groups(run(its, "fused", inputs)), alone[name], f"{name} in {order}")


@many(1)
@given(case=cases(most_rows=12, most_steps=3), single=st.booleans())
def test_the_differentiable_route(case: Case, single: bool) -> None:
    """`adapt`, the query loss in torch, and autograd: the numbers of the direct call."""
    want = interpreted(case)
    hypothesis.assume(is_tame(want))
    inputs = case.inputs
    learned = [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(inputs.inner)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    params = {n: p.clone().requires_grad_() for n, p in inputs.params.items()}
    adapted = adapt(
        case.program,
        params,
        inputs.batch.support,
        inner=inputs.inner,
        loss=None,
        order=case.order,
        path="fused",
    )
    total = torch.zeros((), dtype=torch.float64)
    for task in range(case.tasks):
        own = of_task(case, Inputs(params, inputs.batch, inputs.inner), task)
        theta = {**own, **{n: v[task] for n, v in adapted.params.items()}}
        rows = sides(case, inputs, task)[1]
        mask = None if rows.weight is None else rows.weight != 0
        x = rows.x if mask is None else rows.x[mask]
        y = rows.y if mask is None else rows.y[mask]
        weight = None if mask is None or rows.weight is None else rows.weight[mask]
        output = run_with_torch(case.program, theta, x)
        assert case.program.loss is not None
        total = total + loss_with_torch(case.program.loss, output, y, weight)
    total = total / case.tasks if case.reduction == "mean" else total
    grads = torch.autograd.grad(
        total, [*params.values(), *learned], allow_unused=True, materialize_grads=True
    )
    got = dict(zip(params, grads, strict=False))
    assert_close(got, want["gradients"], FLOAT64, "through adapt")
    rates = dict(zip(map(str, range(len(learned))), grads[len(params) :], strict=True))
    largest = max(float(g.abs().max()) for g in want["gradients"].values())
    assert_close(rates, want["rate gradients"], FLOAT64, "rates through adapt", floor=largest)
    if not single:
        return
    narrow = inputs.to(torch.float32)
    lone = run(case, "fused", narrow).adapted
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        again = adapt(
            case.program,
            narrow.params,
            narrow.batch.support,
            inner=narrow.inner,
            loss=None,
            order=case.order,
            path="fused",
        )
        assert_close(again.params, dict(lone), EXACT, f"adapt, {threads} threads")


# ---- MAML over the fused path


def learner(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 17), nn.Tanh(),
        nn.Linear(17, 4),
    )  # fmt: skip


def images(tasks: int = T, rows: int = 9, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 2, rows, 3, generator=generator)
    y = torch.randint(4, (tasks, 2, rows), generator=generator)
    return x[:, 0], y[:, 0], x[:, 1], y[:, 1]


def maml(**options: Any) -> MAML:
    chosen = {"lr": 0.1, "steps": 3, "path": "fused", "learn_lr": True, **options}
    return MAML(learner(), loss=F.cross_entropy, **chosen)


def grads(module: nn.Module) -> Params:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


RATES: dict[str, Any] = {
    "one": 0.1,
    "one-per-step": torch.tensor([0.1, 0.05, 0.2]),
    "one-per-layer": {"0.*": torch.tensor(0.1), "[1345].*": torch.tensor([0.1, 0.05, 0.2])},
    "each-element": {
        name: torch.full((1, *value.shape), 0.1) for name, value in learner().named_parameters()
    },
}


@functools.cache
def rated(rate: str, order: Any) -> MAML:
    return maml(order=order, lr=RATES[rate])


@pytest.mark.parametrize("rate", list(RATES))
@pytest.mark.parametrize("tasks", [5, 8, 16, 37, 64])
@pytest.mark.parametrize("chunk", [1, 8, 11, 16, 24, 64])
def test_chunks_do_not_show(chunk: int, tasks: int, rate: str) -> None:
    module, batch = rated(rate, 1 + tasks % 2), images(tasks)
    metrics = module.meta_gradient(batch)
    whole = grads(module)
    module.zero_grad(set_to_none=True)
    torch.set_num_threads(7 if chunk == 16 else 2)
    again = module.meta_gradient(batch, chunk_size=chunk)
    cut = grads(module)
    module.zero_grad(set_to_none=True)
    assert any("inner" in name for name in whole)
    assert_close(cut, whole, EXACT, "gradients")
    assert_close(again, metrics, EXACT, "metrics")


def test_the_three_routes_give_the_same_bits() -> None:
    direct, backward = maml(), maml()
    batch = images()
    metrics = direct.meta_gradient(batch)
    loss = backward(batch)
    loss.backward()
    assert torch.equal(loss.detach(), metrics["loss"])
    assert_close(grads(backward), grads(direct), EXACT, "loss.backward() against meta_gradient")
    inner = SGD(torch.tensor(0.1), 3)
    summed = meta_grad(
        learner(),
        None,
        batch,
        inner=inner,
        loss=F.cross_entropy,
        reduction="sum",
        path="fused",
    )
    shared = {n: g / T for n, g in summed.grads.params.items()}
    own = {n.removeprefix("model."): g for n, g in grads(direct).items() if "model" in n}
    assert_close(shared, own, EXACT, "meta_grad's sum, divided, against meta_gradient")
    mean = meta_grad(
        learner(), None, batch, inner=inner, loss=F.cross_entropy, path="fused"
    ).grads.params
    # a mean is the sum times 1 / T, which is rounded once more than a division
    assert_close(mean, own, FLOAT32, "meta_grad's mean against meta_gradient")


def test_scaled_and_added_to_other_losses() -> None:
    plain, scaled = maml(), maml()
    batch = images()
    plain.meta_gradient(batch)
    (3 * scaled(batch) + 0 * sum(p.sum() for p in scaled.parameters())).backward()
    assert_close(
        grads(scaled), {n: 3 * g for n, g in grads(plain).items()}, FLOAT32, "three times the loss"
    )


def test_run_to_run_and_thread_to_thread() -> None:
    batch, found = images(), []

    def work(module: MAML) -> None:
        module.meta_gradient(batch)
        found.append(grads(module))

    work(maml())
    for _ in range(3):
        drop_executors()
        work(maml())
    # each thread its own module, made here: the generator that draws weights is everyone's
    team = [threading.Thread(target=work, args=(module,)) for module in (maml(), maml(), maml())]
    for member in team:
        member.start()
    for member in team:
        member.join()
    assert len(found) == 7
    for other in found[1:]:
        assert_close(other, found[0], EXACT, "another run")


def test_more_kinds_of_calls_than_executors_are_kept() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def once(rows: int) -> Params:
        return meta_grad(
            net, None, images(4, rows), inner=SGD(0.1, 2), loss=F.cross_entropy, path="fused"
        ).grads.params

    first = {rows: once(rows) for rows in range(1, executor._MOST_EXECUTORS + 6)}
    for rows, want in first.items():
        assert_close(once(rows), want, EXACT, f"{rows} rows again")
    assert len(executor._cache.executors) <= executor._MOST_EXECUTORS


def test_close_calls_are_not_taken_for_one_another() -> None:
    """What differs in one setting alone gives other numbers, in any order of calls."""
    net = nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.1), nn.Linear(5, 4))
    other = nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.4), nn.Linear(5, 4))
    other.load_state_dict(net.state_dict())
    batch = images(9)
    calls: dict[str, Any] = {
        "base": {},
        "rate": {"inner": SGD(0.2, 2)},
        "steps": {"inner": SGD(0.1, 3)},
        "no bias": {"inner": SGD(0.1, 2, exclude="*.bias")},
        "order": {"order": 1},
        "sum": {"reduction": "sum"},
        "slope": {"model": other},
        "sum of rows": {"loss": lambda o, y: F.cross_entropy(o, y, reduction="sum")},
        "twice": {"loss": lambda o, y: 2 * F.cross_entropy(o, y)},
    }

    def once(options: dict[str, Any]) -> Params:
        chosen = {"inner": SGD(0.1, 2), "loss": F.cross_entropy, **options}
        model = chosen.pop("model", net)
        return meta_grad(model, None, batch, path="fused", **chosen).grads.params

    found = {name: once(options) for name, options in calls.items()}
    for name, options in reversed(calls.items()):
        assert_close(once(options), found[name], EXACT, name)
        reference = {**calls[name]}
        chosen = {"inner": SGD(0.1, 2), "loss": F.cross_entropy, **reference}
        model = chosen.pop("model", net)
        want = meta_grad(model, None, batch, path="reference", **chosen).grads.params
        assert_close(found[name], want, FLOAT32, f"{name} against the reference")
