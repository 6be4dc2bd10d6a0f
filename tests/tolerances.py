"""How far apart two right answers may lie, in one table, each entry with the reason for its size.

Every entry is relative to the largest number of the group that is compared (all gradients of a
call, say), because that is what rounding is relative to: a small entry of a gradient is often the
difference of large ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Tolerance", "assert_close", "distance", "float32_tolerance", "size"]


class Tolerance(NamedTuple):
    """A bound on the distance relative to the largest number, and why it is that large."""

    relative: float
    reason: str


EXACT = Tolerance(0.0, "the same operations in the same order: not one bit may differ")

FLOAT64 = Tolerance(
    1e-10,
    "two orders of summation in float64: 2e-16 a rounding, up to 1e3 roundings in a row, and a "
    "condition of up to 1e3 (an inner loop of 5 steps, BatchNorm over few rows)",
)

FLOAT32 = Tolerance(
    1e-5,
    "one operation of a small network in float32: 6e-8 a rounding, up to 1e2 of them in a row; "
    "the polynomials for exp, tanh and erf are good to 2e-7",
)

COARSE = Tolerance(
    1e-3,
    "a meta-gradient in float32 whose condition is not measured: enough to tell a wrong sum from a "
    "rounded one, and a first-order gradient from an exact one",
)

EXTREME = {
    torch.float32: Tolerance(1e-4, "float32 far from one, where torch's own exp and erf also err"),
    torch.float64: Tolerance(1e-9, "float64 far from one: one more digit of condition"),
}

FINITE_DIFFERENCE = Tolerance(
    1e-6,
    "central differences in float64 with a step of 1e-6: the truncation is of order 1e-12, and the "
    "rounding of the function 2e-16 / 1e-6, times a condition of 1e3",
)


def float32_tolerance(change: float, stray: float, stages: int) -> float:
    """The bound for a whole meta-gradient in float32 against float64.

    Rounding is modelled as a perturbation of one unit in the last place at each of the `stages`
    (a pass over a layer) in a row. Each moves the result about as far as such a perturbation of
    the inputs, which the caller measures in float64; their signs are independent, so distances
    grow by the square root of their number. No perturbation of inputs shows what cancels inside a
    layer (BatchNorm's gradient over two rows vanishes whatever they are), so the error of a plain
    float32 program counts too. The factor 8 covers the sums inside a stage, of up to 100 terms, and
    a measurement from only a few directions; in 500 draws the largest error was 0.2 of the bound.

    Args:
        change: how far the float64 result moves when every input moves by 2**-24 of itself,
            relative to its largest number.
        stray: how far the interpreter in float32 is from itself in float64.
        stages: passes over layers, one after the other, from the input to the result.
    """
    unit = torch.finfo(torch.float32).eps / 2
    return 8 * max(math.sqrt(stages) * max(change, unit), stray)


def size(group: Mapping[str, Tensor]) -> float:
    """The largest number of a group."""
    return max((float(t.detach().abs().max()) for t in group.values() if t.numel()), default=0.0)


def distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor], floor: float = 0.0) -> float:
    """The largest difference, relative to the largest number that is wanted; NaN is far.

    Args:
        got: numbers by name.
        want: the right ones, of the same shapes.
        floor: the least size to measure by, where all that is wanted may be rounding errors of 0.
    """
    assert set(got) == set(want), sorted(set(got) ^ set(want))
    worst = 0.0
    for name, value in want.items():
        assert got[name].shape == value.shape, f"{name}: {got[name].shape}, not {value.shape}"
        if value.numel():
            away = float((got[name].detach().double() - value.detach().double()).abs().max())
            worst = max(worst, math.inf if math.isnan(away) else away)
    return worst and worst / max(size(want), floor, torch.finfo(torch.float64).tiny)


def assert_close(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    tolerance: Tolerance | float,
    what: str,
    *,
    floor: float = 0.0,
) -> None:
    """Assert that two groups of numbers are the same within a tolerance of this table."""
    bound = tolerance.relative if isinstance(tolerance, Tolerance) else tolerance
    away = distance(got, want, floor)
    if away <= bound:
        return
    each = {n: f"{distance({n: got[n]}, {n: want[n]}):.1e}" for n in want}
    raise AssertionError(f"{what}: {away:.2e} apart, {bound:.2e} is allowed; by name {each}")
