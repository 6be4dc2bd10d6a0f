"""The fused path against the interpreter, `vectorized` and `reference`, on drawn calls.

In float64 all four must agree to 1e-10, under every instruction set of this processor. In float32
the fused path is held against float64 with a bound that is derived for each call.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import hypothesis
import pytest
import torch
from hypothesis import given

from fastmeta import _native
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, explain, meta_grad
from fastmeta.program import (
    BatchNorm1d,
    Layer,
    LeakyReLU,
    Linear,
    Loss,
    Program,
    ReLU,
    Sigmoid,
    Tanh,
)
from tests.inner_loop.fused_cases import (
    Case,
    Inputs,
    Params,
    cases,
    groups,
    interpreted,
    is_tame,
    run,
    signs,
)
from tests.tolerances import (
    COARSE,
    EXACT,
    EXTREME,
    FLOAT64,
    Tolerance,
    assert_close,
    distance,
    float32_tolerance,
    size,
)

pytestmark = pytest.mark.needs("cpp")

Groups = dict[str, Params]
UNIT = torch.finfo(torch.float32).eps / 2


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def many(times: float) -> hypothesis.settings:
    """So many times the examples of the profile."""
    return hypothesis.settings(max_examples=int(times * hypothesis.settings().max_examples))


def isas() -> list[str]:
    """All instruction sets of this processor, or the one that is forced."""
    forced = os.environ.get("FASTMETA_ISA")
    return [forced] if forced else _native.require("isas").isas()


def floor_of(case: Case, want: Groups, name: str) -> float:
    """The least size that a group of numbers is measured by: a whole group may cancel to nothing.

    Such as the rate of a bias that a BatchNorm removes. A rate's gradient is a sum over tasks of
    products of two gradients, and rounds like the sum of their sizes, however small it is.
    """
    least = 1e-3 * max(size(want["gradients"]), size(want["losses"]))
    if name != "rate gradients":
        return least
    squares = sum(float(g.square().sum()) for g in want["gradients"].values())
    return max(least, squares / (case.tasks if case.reduction == "sum" else 1))


def same(case: Case, got: Groups, want: Groups, tolerance: Tolerance, what: str) -> None:
    for name, group in want.items():
        floor = floor_of(case, want, name)
        assert_close(got[name], group, tolerance, f"{what}: {name}", floor=floor)


def identical(got: Groups, want: Groups, what: str) -> None:
    for name, group in want.items():
        assert_close(got[name], group, EXACT, f"{what}: {name}")


def everywhere(
    call: Callable[[], Groups], more_threads: tuple[int, ...] = (2, 7)
) -> Iterator[tuple[str, Groups]]:
    """What a call gives on one thread, by instruction set; more threads must give its bits."""
    with pytest.MonkeyPatch.context() as patch:
        for isa in isas():
            patch.setenv("FASTMETA_ISA", isa)
            torch.set_num_threads(1)
            alone = call()
            for threads in more_threads:
                torch.set_num_threads(threads)
                identical(call(), alone, f"{isa}, {threads} threads against one")
            torch.set_num_threads(1)
            yield isa, alone


def vectorized_refuses(case: Case) -> str | None:
    given = case.inputs
    found = explain(
        case.program, given.batch, inner=given.inner, loss=None, params=given.params
    ).verdicts
    return next(v.why_not for v in found if v.path == "vectorized")


def check_float64(case: Case, want: Groups, seen: Counter[str]) -> None:
    slow = groups(run(case, "reference"))
    same(case, slow, want, FLOAT64, "reference against the interpreter")
    why_not = vectorized_refuses(case)
    if why_not is None:
        seen["vectorized"] += 1
        same(
            case,
            groups(run(case, "vectorized")),
            want,
            FLOAT64,
            "vectorized against the interpreter",
        )
    else:  # dropping rows is the one thing of these that vmap cannot do
        assert any(case.weights), why_not
    for isa, got in everywhere(lambda: groups(run(case, "fused"))):
        same(case, got, want, FLOAT64, f"fused, {isa}, against the interpreter")
        same(case, got, slow, FLOAT64, f"fused, {isa}, against the reference")


@pytest.mark.parametrize(
    ("wide", "times"), [(False, 4), (True, 1)], ids=["any", "wide-first-layer"]
)
def test_float64(wide: bool, times: float) -> None:
    seen: Counter[str] = Counter()

    @many(times)
    @given(case=cases(wide=wide))
    def check(case: Case) -> None:
        want = interpreted(case)
        seen["drawn"] += 1
        hypothesis.assume(is_tame(want))
        seen["compared"] += 1
        check_float64(case, want, seen)

    check()
    assert seen["compared"] >= 0.9 * seen["drawn"]
    assert seen["vectorized"] >= 0.4 * seen["compared"]


@pytest.mark.parametrize("wide", [False, True], ids=["any", "wide-first-layer"])
def test_float32(wide: bool) -> None:
    seen: Counter[str] = Counter()

    @many(2 if not wide else 1)
    @given(case=cases(wide=wide, most_rows=12, most_tasks=9, most_steps=3))
    def check(case: Case) -> None:
        want = interpreted(case)
        hypothesis.assume(is_tame(want))
        seen["drawn"] += 1
        exact = case.inputs
        # A value of a kinked layer that rounding may carry over its kink has no one gradient.
        sides = signs(case, exact)
        for seed in range(2):
            if not torch.equal(sides, signs(case, exact.moved(64 * UNIT, seed))):
                seen["kink within reach"] += 1
                hypothesis.reject()
        moved = [groups(run(case, "fused", exact.moved(UNIT, seed))) for seed in range(3)]
        stages = 4 * (case.steps + 1) * len(case.program.nodes)
        single = exact.to(torch.float32)
        plain = interpreted(case, single)
        for isa, got in everywhere(lambda: groups(run(case, "fused", single))):
            for name, group in want.items():
                least = floor_of(case, want, name)
                change = max(distance(other[name], group, least) for other in moved)
                bound = float32_tolerance(change, distance(plain[name], group, least), stages)
                assert_close(got[name], group, bound, f"fused, {isa}: {name}", floor=least)

    check()
    assert seen["kink within reach"] <= 0.2 * seen["drawn"]


# ---- what drawing would seldom find


def case_of(
    layers: list[Layer],
    features: int,
    *,
    rows: tuple[int, int] = (5, 6),
    tasks: int = 9,
    steps: int = 2,
    order: Literal[1, 2] = 2,
    without: tuple[str, ...] = (),
    kind: Literal["mse", "cross_entropy"] = "mse",
    form: str = "one",
    weights: tuple[bool, bool] = (False, False),
) -> Case:
    loss = Loss(kind, divisor="rows", factor=1.0, per_row=any(weights))
    program = Program.chain(layers, (features,), loss, without=without)
    return Case(
        program,
        tasks,
        *rows,
        steps,
        order,
        "mean",
        tuple((name, form, True) for name in program.params),
        form != "per-element",
        frozenset(),
        weights,
        seed=0,
    )


DIRECTED: dict[str, Case] = {
    # a gate in place between a BatchNorm and what it normalises
    "leaky-before-batch-norm": case_of(
        [Linear(3, 17), LeakyReLU(0.3), BatchNorm1d(17), Linear(17, 2)], 3
    ),
    "relu-before-batch-norm": case_of([Linear(3, 17), ReLU(), BatchNorm1d(17), Linear(17, 2)], 3),
    # sums over more than one block of depth
    "depth-of-columns": case_of(
        [Linear(300, 290), ReLU(), Linear(290, 20)], 300, tasks=3, kind="cross_entropy"
    ),
    "depth-of-rows": case_of([Linear(7, 20), ReLU(), Linear(20, 3)], 7, rows=(260, 513), tasks=3),
    "wide-and-many-rows": case_of(
        [Linear(600, 20), ReLU(), Linear(20, 3)], 600, rows=(270, 290), tasks=2
    ),
    "wide-and-many-rows-without-bias": case_of(
        [Linear(600, 20), ReLU(), Linear(20, 3)],
        600,
        rows=(270, 290),
        tasks=2,
        without=("0.bias",),
    ),
    "wide-over-whole-vectors-of-rows": case_of(
        [Linear(67, 16), Tanh(), Linear(16, 3)], 67, rows=(8, 16), weights=(True, True)
    ),
    "wide-first-order": case_of([Linear(80, 16), Tanh(), Linear(16, 3)], 80, rows=(8, 9), order=1),
    "wide-without-steps": case_of([Linear(80, 16), Tanh(), Linear(16, 3)], 80, steps=0),
    # f(0) is not zero, and eps = 0 makes infinity of it: the padding must stay zero
    "sigmoid-before-narrow": case_of([Linear(3, 5), Sigmoid(), Linear(5, 1)], 3),
    "eps-zero-before-narrow": case_of(
        [Linear(3, 5), BatchNorm1d(5, eps=0.0), Linear(5, 1)], 3, form="per-element"
    ),
    "eps-zero-last": case_of([Linear(3, 5), BatchNorm1d(5, eps=0.0)], 3, form="per-step"),
    "many-classes": case_of([Linear(3, 130)], 3, kind="cross_entropy", tasks=3, steps=5),
    "only-batch-norm": case_of([BatchNorm1d(5), Tanh()], 5),
    "more-steps-than-usual": case_of([Linear(3, 20), Tanh(), Linear(20, 1)], 3, tasks=3, steps=12),
    # strides of a multiple of 512 bytes get another vector
    "widths-of-512-bytes": case_of(
        [Linear(64, 128), ReLU(), Linear(128, 64)],
        64,
        rows=(20, 3),
        tasks=3,
        kind="cross_entropy",
    ),
}


@pytest.mark.parametrize("name", list(DIRECTED))
def test_directed(name: str) -> None:
    case = DIRECTED[name]
    want = interpreted(case)
    assert is_tame(want)
    check_float64(case, want, Counter())
    # the same in float32, loosely: that the tuned tiles of that type do the same sums
    single = case.inputs.to(torch.float32)
    for isa, got in everywhere(lambda: groups(run(case, "fused", single)), ()):
        for group in want:
            what = f"fused in float32, {isa}: {group}"
            assert_close(got[group], want[group], COARSE, what, floor=floor_of(case, want, group))


def test_the_bound_of_float32_would_see_a_first_order_gradient() -> None:
    case = case_of([Linear(3, 17), Tanh(), Linear(17, 2)], 3, steps=3, form="per-step")
    first = groups(run(replace(case, order=1), "fused"))
    assert distance(first["gradients"], interpreted(case)["gradients"]) > 1e-3


# ---- extreme numbers


def layers_of(name: str) -> list[Layer]:
    from tests.program.drawing import ACTIVATIONS

    activation = next(layer for layer in ACTIVATIONS if str(layer) == name)
    return [Linear(2, 5), activation, Linear(5, 3)]


def activation_names() -> list[str]:
    from tests.program.drawing import ACTIVATIONS

    return [str(layer) for layer in ACTIVATIONS]


@pytest.mark.parametrize("name", activation_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e9], ids=str)
def test_extreme_values(name: str, dtype: torch.dtype, scale: float) -> None:
    """Saturated and vanishing values: the same finite numbers as torch, and no NaN of our own."""
    case = replace(
        case_of(layers_of(name), 2, kind="cross_entropy", tasks=3, steps=1), reduction="sum"
    )
    inputs = case.inputs.to(dtype)
    batch = TaskBatch(
        Examples(inputs.batch.support.x * scale, inputs.batch.support.y),
        Examples(inputs.batch.query.x * scale, inputs.batch.query.y),
    )
    inner = SGD(1e-3 / max(scale, 1.0) ** 2, 1)
    made = Inputs(inputs.params, batch, inner)
    want = groups(run(case, "reference", made))
    for isa, got in everywhere(lambda: groups(run(case, "fused", made)), ()):
        for group in ("gradients", "losses", "adapted"):
            finite = {n: v for n, v in want[group].items() if bool(v.isfinite().all())}
            assert finite, f"{group} of the reference are not finite"
            ours = {n: got[group][n] for n in finite}
            assert_close(ours, finite, EXTREME[dtype], f"{isa}: {group}")


@pytest.mark.parametrize("where", ["support.x", "query.x", "support.y", "query.y"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("middle", ["relu", "leaky_relu 0.2", "tanh", "batch_norm"])
def test_a_bad_number_shows_in_its_task_alone(where: str, value: float, middle: str) -> None:
    layer: Any = {"relu": ReLU(), "leaky_relu 0.2": LeakyReLU(0.2), "tanh": Tanh()}.get(
        middle, BatchNorm1d(17)
    )
    case = case_of([Linear(3, 17), layer, Linear(17, 2)], 3, tasks=11)
    clean = groups(run(case, "fused"))
    side, name = where.split(".")
    tensor = getattr(getattr(case.inputs.batch, side), name).clone()
    tensor[4, 1, 1] = value
    examples = replace(getattr(case.inputs.batch, side), **{name: tensor})
    batch = replace(case.inputs.batch, **{side: examples})
    bad = Inputs(case.inputs.params, batch, case.inputs.inner)
    want = run(case, "reference", bad)
    got = run(case, "fused", bad)
    others = torch.arange(case.tasks) != 4
    assert torch.equal(got.losses[others], clean["losses"]["query"][others])
    assert bool(want.losses[4].isfinite()) or not bool(got.losses[4].isfinite())
    for key, gradient in want.grads.params.items():
        if bool(gradient.isnan().all()):
            assert bool(got.grads.params[key].isnan().any()), f"a silent number in {key}"
    # and nothing of it stays in the executor's memory
    identical(groups(run(case, "fused")), clean, "the next call")


def test_meta_grad_takes_a_program_with_frozen_sizes() -> None:
    case = case_of([Linear(3, 4), Tanh(), Linear(4, 1)], 3)
    given = case.inputs
    cut = TaskBatch(
        Examples(given.batch.support.x[:, :3], given.batch.support.y[:, :3]), given.batch.query
    )
    whole = meta_grad(
        case.program, given.params, given.batch, inner=SGD(0.1), loss=None, path="fused"
    )
    part = meta_grad(case.program, given.params, cut, inner=SGD(0.1), loss=None, path="fused")
    assert not torch.equal(whole.losses, part.losses)
    assert part.losses.shape == whole.losses.shape
