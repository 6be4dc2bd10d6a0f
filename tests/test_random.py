"""Counter-based numbers: exact values, invariance, and statistics that can fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmeta import random
from fastmeta.random import bits, choice, integers, normal, permutation, uniform

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15

VALUES: dict[str, Any] = {
    "uniform": [[0.3202084529222249, 0.15181025273639892]],
    "integers": [[32, 15, 38, 80, 2, 60]],
    "traced": [[320, 152, 383, 805]],
    "sorted": [[5, 3, 4, 1]],
    "permutation": [[6, 5, 3, 4, 1, 0, 2, 7]],
    "normal": [0.5083101804520458, 0.7166302483805654],
}

DRAWS: dict[str, Callable[[int, Any], Tensor]] = {
    "bits": lambda step, index: bits(5, step, index, 2, 7),
    "uniform": lambda step, index: uniform(5, step, index, 2, 7),
    "uniform64": lambda step, index: uniform(5, step, index, 2, (7, 3), dtype=torch.float64),
    "integers": lambda step, index: integers(5, step, index, 2, 7, 1000),
    "normal": lambda step, index: normal(5, step, index, 2, 33),
    "permutation": lambda step, index: permutation(5, step, index, 2, 13),
    "choice-traced": lambda step, index: choice(5, step, index, 2, (3, 5), 1100),
    "choice-sorted": lambda step, index: choice(5, step, index, 2, (5, 16), 20),
}


def mix(z: int) -> int:
    """The definition once more, in whole numbers without bounds."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def word(*values: int) -> int:
    state = 0
    for value in values:
        state = mix(state ^ mix((value + GAMMA) & MASK))
    return state


def test_bits_are_the_hash_of_the_module() -> None:
    got = bits(123, 2**63 + 5, [0, 7, 2**40, -1], 9, 3)
    expected = [
        [word(123, 9, 2**63 + 5, index & MASK, c) for c in range(3)] for index in (0, 7, 2**40, -1)
    ]
    assert (got.numpy().view(np.uint64) == np.array(expected, dtype=np.uint64)).all()


def test_values_never_change() -> None:
    # Checkpoints and published results hang on these.
    assert bits(0, 0, range(1), 0, 2).tolist() == [[6032501310980943459, -6331357519817171350]]
    assert uniform(1, 2, [3], 4, 2, dtype=torch.float64).tolist() == VALUES["uniform"]
    assert integers(1, 2, [3], 4, 6, 100).tolist() == VALUES["integers"]
    assert choice(1, 2, [3], 4, 4, 1000).tolist() == VALUES["traced"]
    assert choice(1, 2, [3], 4, 4, 6).tolist() == VALUES["sorted"]
    assert permutation(1, 2, [3], 4, 8).tolist() == VALUES["permutation"]
    assert normal(1, 2, [3], 4, 2, dtype=torch.float64).tolist()[0] == pytest.approx(
        VALUES["normal"], abs=1e-13
    )


def test_the_finalizer_is_splitmix64() -> None:
    # the first outputs of SplitMix64 seeded with 1234567, as published with its reference code
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + GAMMA) & MASK
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = random._mix_numpy(np.array([1234567 + GAMMA], dtype=np.uint64))
    assert int(words[0]) == outputs[0]


def test_device_arithmetic_has_the_same_bits() -> None:
    index = torch.tensor([0, 1, 2**62, -(2**63), -1])
    assert random._words_torch(word(3, 4), index, 50).equal(
        random._words_numpy(word(3, 4), index, 50)
    )


@pytest.mark.parametrize("draw", DRAWS)
def test_order_and_chunks_do_not_matter(draw: str) -> None:
    whole = DRAWS[draw](3, range(37))
    order = torch.randperm(37)
    assert DRAWS[draw](3, order).equal(whole[order])
    parts = [DRAWS[draw](3, range(a, b)) for a, b in ((0, 1), (1, 20), (20, 37))]
    assert torch.cat(parts).equal(whole)
    assert DRAWS[draw](3, [36, 36]).equal(whole[[36, 36]])


@pytest.mark.parametrize("draw", DRAWS)
def test_steps_and_seeds_differ(draw: str) -> None:
    assert not DRAWS[draw](3, range(8)).equal(DRAWS[draw](4, range(8)))


def test_more_draws_only_add() -> None:
    assert bits(1, 1, range(4), 1, 9)[:, :4].equal(bits(1, 1, range(4), 1, 4))
    few, many = normal(1, 1, range(4), 1, 3), normal(1, 1, range(4), 1, 10)
    torch.testing.assert_close(many[:, :3], few, rtol=1e-6, atol=1e-6)


def test_shapes_are_row_major() -> None:
    assert bits(1, 1, range(4), 1, (3, 5)).equal(bits(1, 1, range(4), 1, 15).view(4, 3, 5))


def chi_square(counts: Tensor) -> float:
    """How many standard deviations the statistic lies from its mean."""
    counts = counts.double().flatten()
    expected = counts.sum() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


AXES: dict[str, Callable[[], Tensor]] = {
    "counter": lambda: bits(0, 0, [0], 0, 65536).flatten(),
    "index": lambda: bits(0, 0, range(65536), 0, 1).flatten(),
    "step": lambda: torch.cat([bits(0, step, [0], 0, 1)[0] for step in range(16384)]),
    "stream": lambda: torch.cat([bits(0, 0, [0], stream, 1)[0] for stream in range(16384)]),
    "seed": lambda: torch.cat([bits(seed, 0, [0], 0, 1)[0] for seed in range(16384)]),
}


@pytest.mark.parametrize("axis", AXES)
def test_uniform_along_each_axis(axis: str) -> None:
    words = AXES[axis]()
    for shift in (0, 8, 29, 56):  # bytes from every part of the word
        byte = (words >> shift) & 0xFF
        assert abs(chi_square(torch.bincount(byte, minlength=256))) < 5
    # pairs of neighbours, as two-dimensional cells
    pair = (words[::2] & 0xF) * 16 + (words[1::2] & 0xF)
    assert abs(chi_square(torch.bincount(pair, minlength=256))) < 5
    assert words.unique().numel() == words.numel()


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_uncorrelated_bit_by_bit(axis: str) -> None:
    words = AXES[axis]()
    signs = (((words[:, None] >> torch.arange(64)) & 1) * 2 - 1).double()
    for lag in (1, 2, 64):
        products = signs[:-lag].T @ signs[lag:] / math.sqrt(len(signs) - lag)
        # 4096 standard normals: the largest is about 3.7; 6 has a chance of 1e-5
        assert products.abs().max() < 6


def test_one_bit_in_flips_half_the_bits_out() -> None:
    index = torch.arange(2000)
    base = bits(0, 0, index, 0, 1)
    for flip in (0, 1, 17, 40, 62):
        other = bits(0, 0, index ^ (1 << flip), 0, 1)
        changed = ((base ^ other)[:, :1] >> torch.arange(64)) & 1
        assert changed.double().mean(0).sub(0.5).abs().max() < 0.07  # 6 standard deviations


def test_no_draw_repeats_over_a_training_run() -> None:
    words = torch.cat([bits(0, step, range(100), 0, 20).flatten() for step in range(500)])
    assert words.unique().numel() == words.numel()  # a chance of 3e-8 to fail by accident


def test_uniform_range_and_rounding() -> None:
    single = uniform(0, 0, range(1000), 0, 50)
    double = uniform(0, 0, range(1000), 0, 50, dtype=torch.float64)
    assert single.min() >= 0
    assert single.max() < 1
    assert (double * 2**24).floor().mul(2.0**-24).equal(single.double())
    assert abs(double.mean() - 0.5) < 5 / math.sqrt(12 * double.numel())


@pytest.mark.parametrize("high", [1, 2, 3, 10, 6492, 2**31])
def test_integers_are_the_upper_half_of_the_product(high: int) -> None:
    words = bits(0, 0, range(50), 3, 20).flatten().tolist()
    expected = [((w & MASK) * high) >> 64 for w in words]
    assert integers(0, 0, range(50), 3, 20, high).flatten().tolist() == expected


def test_integers_with_a_bound_for_each_task() -> None:
    high = torch.tensor([[1], [5], [70]])
    got = integers(0, 0, range(3), 0, 1000, high)
    assert got.amax(1).tolist() == [0, 4, 69]


def test_normal_moments() -> None:
    z = normal(0, 0, range(1000), 0, 101, dtype=torch.float64).flatten()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n)
    inside = torch.special.ndtr(z)
    assert abs(chi_square(torch.histc(inside, 64, 0, 1))) < 5
    assert normal(0, 0, range(2), 0, 3, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("population", [3, 9], ids=["sorted", "traced"])
def test_every_ordered_choice_is_equally_likely(population: int) -> None:
    # n = 2 of 9 takes the traced route, n = 2 of 3 the sorted one
    drawn = choice(0, 0, range(20000), 0, 2, population)
    code = drawn[:, 0] * population + drawn[:, 1]
    counts = torch.bincount(code, minlength=population**2).view(population, population)
    assert (counts.diagonal() == 0).all()
    cells = counts[~torch.eye(population, dtype=torch.bool)]
    assert abs(chi_square(cells)) < 5


def test_every_permutation_is_equally_likely() -> None:
    drawn = permutation(0, 0, range(24000), 0, 4)
    codes = (drawn * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = [
        int((codes == sum(p * 4 ** (3 - i) for i, p in enumerate(order))).sum())
        for order in itertools.permutations(range(4))
    ]
    assert sum(counts) == 24000
    assert abs(chi_square(torch.tensor(counts))) < 5


@pytest.mark.parametrize(
    ("k", "population"),
    [(1, 1), (1, 7), (5, 5), (5, 1100), (20, 81), (64, 400), (65, 400), (70, 70)],
    ids=str,
)
def test_choices_are_distinct_and_in_range(k: int, population: int) -> None:
    drawn = choice(0, 1, range(50), 0, (2, k), population)
    assert drawn.shape == (50, 2, k)
    assert drawn.min() >= 0
    assert drawn.max() < population
    if k > 1:
        assert (drawn.sort(-1).values.diff() > 0).all()


@pytest.mark.parametrize("at_most", [20, 5000], ids=["sorted", "traced"])
def test_choice_from_unequal_populations(at_most: int) -> None:
    sizes = torch.tensor([3, 7, at_most])
    drawn = choice(0, 0, range(3000), 0, (3, 3), sizes.expand(3000, 3), at_most=at_most)
    assert (drawn < sizes[:, None]).all()
    assert (drawn.sort(-1).values.diff() > 0).all()
    for group, size in enumerate((3, 7)):
        counts = torch.bincount(drawn[:, group].flatten(), minlength=size)
        assert (counts > 0).all()
        first = torch.bincount(drawn[:, group, 0], minlength=size)
        assert abs(chi_square(first)) < 5


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "seed-kind": (lambda: bits(1.0, 0, [0], 0, 1), TypeError, "seed must be an int"),  # type: ignore[arg-type]
    "seed-negative": (lambda: bits(-1, 0, [0], 0, 1), ValueError, "seed must be at least 0"),
    "seed-large": (lambda: bits(2**64, 0, [0], 0, 1), ValueError, "seed must be less than 2"),
    "step": (lambda: bits(0, -1, [0], 0, 1), ValueError, "step must be at least 0, got -1"),
    "stream": (lambda: bits(0, 0, [0], -1, 1), ValueError, "stream must be at least 0"),
    "step-bool": (lambda: bits(0, True, [0], 0, 1), TypeError, "step must be an int"),
    "index-empty": (lambda: bits(0, 0, [], 0, 1), ValueError, "index must have shape"),
    "index-rank": (lambda: bits(0, 0, torch.zeros(1, 1).long(), 0, 1), ValueError, "index must"),
    "index-dtype": (lambda: bits(0, 0, torch.zeros(1), 0, 1), TypeError, "index must be int64"),
    "index-kind": (lambda: bits(0, 0, 5, 0, 1), TypeError, "index must be an int64 tensor"),  # type: ignore[arg-type]
    "index-floats": (lambda: bits(0, 0, [0.5], 0, 1), TypeError, "index must be an int"),  # type: ignore[list-item]
    "n-zero": (lambda: bits(0, 0, [0], 0, 0), ValueError, "n must be at least 1"),
    "n-empty": (lambda: bits(0, 0, [0], 0, ()), ValueError, "n must be a number or a shape"),
    "uniform-dtype": (
        lambda: uniform(0, 0, [0], 0, 1, dtype=torch.int64),
        TypeError,
        "dtype must be float32 or float64",
    ),
    "normal-dtype": (
        lambda: normal(0, 0, [0], 0, 1, dtype=torch.int64),
        TypeError,
        "dtype must be a floating dtype",
    ),
    "high-zero": (lambda: integers(0, 0, [0], 0, 1, 0), ValueError, "high must be at least 1"),
    "high-large": (lambda: integers(0, 0, [0], 0, 1, 2**31 + 1), ValueError, "high must be at"),
    "high-dtype": (
        lambda: integers(0, 0, [0], 0, 1, torch.ones(1)),
        TypeError,
        "high must be an int or an int64 tensor",
    ),
    "choice": (lambda: choice(0, 0, [0], 0, 6, 5), ValueError, "n must be at most the population"),
    "choice-bound": (
        lambda: choice(0, 0, [0], 0, 2, torch.tensor([5])),
        TypeError,
        "at_most must be given",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("draw", [name for name in DRAWS if name != "normal"])
def test_same_bits_on_the_gpu(draw: str) -> None:
    there = DRAWS[draw](3, torch.arange(64, device="cuda"))
    assert there.cpu().equal(DRAWS[draw](3, range(64)))
