r"""Random numbers that are pure functions of integers: no generator, no state, no stream to store.

Draw number c of the task ``(seed, step, index)`` in a stream is a hash of the five integers:

.. math::

    h_0 = 0, \qquad h_{i+1} = M(h_i \oplus M(v_i + g)), \qquad
    (v_0, \dots, v_4) = (\text{seed}, \text{stream}, \text{step}, \text{index}, c)

where M is the 64-bit finalizer of SplitMix64 (Stafford's variant 13, a bijection in which every
input bit flips every output bit with probability close to 1/2) and g is the golden gamma
0x9E3779B97F4A7C15. All arithmetic is modulo 2**64. Because each of seed, stream, step, index and
counter enters by a bijection, two draws that differ in one of them alone never collide.

So a task does not depend on which others are drawn with it, in what order or in how many chunks,
nor on the machine: :func:`bits`, :func:`uniform`, :func:`integers`, :func:`permutation` and
:func:`choice` give the same bits on every device. :func:`normal` does up to the last bits of the
device's logarithm and sine. These are numbers for simulation, not for cryptography.

Reference:
    Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", section 3:
    counter-based generators. Steele, Lea, Flood (2014), "Fast splittable pseudorandom number
    generators", section 4: the finalizer and the golden gamma.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastmeta._checks import (
    describe,
    positive_int,
    same_device,
    type_error,
    value_error,
    whole_number,
)

__all__ = ["Index", "as_index", "bits", "choice", "integers", "normal", "permutation", "uniform"]

Index: TypeAlias = Tensor | range | Sequence[int]
Shape: TypeAlias = int | tuple[int, ...]
_Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MUL_1 = 0xBF58476D1CE4E5B9
_MUL_2 = 0x94D049BB133111EB

# A choice of k is traced draw by draw (k^2/2 vector operations) if k is at most the first and the
# population more than the second times k; otherwise random keys of the whole population are
# sorted. Constants of the definition: changing them changes the tasks.
_TRACE_LIMIT = 64
_SPARSE = 4

_U64 = np.uint64
_NP_GAMMA, _NP_MUL_1, _NP_MUL_2 = _U64(_GAMMA), _U64(_MUL_1), _U64(_MUL_2)
_NP_27, _NP_30, _NP_31 = _U64(27), _U64(30), _U64(31)


def as_index(index: Index, *, device: torch.device | str | None = None) -> Tensor:
    """Task indices as a tensor.

    Args:
        index: ``[T]`` int64 tensor, a range or a sequence of ints.
        device: where to; None leaves a tensor where it is and puts anything else on the CPU.

    Returns:
        ``[T]`` int64.

    Raises:
        TypeError: not integers.
        ValueError: not one axis, or no index.

    Example:
        >>> as_index(range(2, 5))
        tensor([2, 3, 4])
    """
    if isinstance(index, Tensor):
        if index.dtype != torch.int64:
            raise type_error("random", "index", "be int64", describe(index))
        result = index if device is None else index.to(device)
    elif isinstance(index, range):
        result = torch.arange(index.start, index.stop, index.step, device=device)
    else:
        if not isinstance(index, (list, tuple)):
            must = "be an int64 tensor [T], a range or a sequence of ints"
            raise type_error("random", "index", must, describe(index))
        numbers = [whole_number("random", "index", i, at_least=-(1 << 63)) for i in index]
        result = torch.tensor(numbers, dtype=torch.int64, device=device)
    if result.ndim != 1 or result.numel() == 0:
        raise value_error("random", "index", "have shape [T] with T at least 1", result)
    return result


def bits(seed: int, step: int, index: Index, stream: int, n: Shape) -> Tensor:
    """Uniform 64-bit words, as int64 (all values, the negative ones too).

    Draw c of a task is the same however many are drawn: a larger ``n`` only adds to the end.

    Args:
        seed: which run, in ``[0, 2**64)``.
        step: which meta-batch, in ``[0, 2**64)``.
        index: ``[T]``: which tasks of it; the result lies on its device.
        stream: which purpose, in ``[0, 2**64)``; draws of different streams are independent.
        n: draws for each task, a number or the shape of an array in row-major order.

    Returns:
        ``[T, n]`` or ``[T, *n]`` int64.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.

    Example:
        >>> bits(0, 0, range(2), 0, 2)
        tensor([[ 6032501310980943459, -6331357519817171350],
                [-8402907980618345887,  6243295062644583991]])
        >>> bool((bits(7, 3, [5], 0, 4) == bits(7, 3, range(6), 0, 9)[5:, :4]).all())
        True

    Reference:
        Salmon et al. (2011), section 2: a keyed bijection applied to a counter.
    """
    shape = _shape(n)
    tasks = as_index(index)
    prefix = _prefix(_word("seed", seed), _word("stream", stream), _word("step", step))
    count = math.prod(shape)
    if tasks.device.type == "cpu":
        words = _words_numpy(prefix, tasks, count)
    else:
        words = _words_torch(prefix, tasks, count)
    return words.view(-1, *shape)


def uniform(
    seed: int,
    step: int,
    index: Index,
    stream: int,
    n: Shape,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in ``[0, 1)``.

    Args:
        seed: which run.
        step: which meta-batch.
        index: ``[T]``: which tasks of it.
        stream: which purpose.
        n: draws for each task, a number or a shape.
        dtype: float32 (multiples of 2**-24) or float64 (multiples of 2**-53); the float32 draw is
            the float64 draw rounded down.

    Returns:
        ``[T, n]`` or ``[T, *n]`` of ``dtype``.

    Raises:
        TypeError: another dtype; otherwise as :func:`bits`.

    Example:
        >>> uniform(0, 0, range(1), 0, 3)
        tensor([[0.3270, 0.6568, 0.7525]])
    """
    if dtype not in (torch.float32, torch.float64):
        raise type_error("random.uniform", "dtype", "be float32 or float64", dtype)
    digits = 24 if dtype == torch.float32 else 53
    words = bits(seed, step, index, stream, n)
    return _shift_right(words, 64 - digits).to(dtype).mul_(2.0**-digits)


def integers(
    seed: int, step: int, index: Index, stream: int, n: Shape, high: int | Tensor
) -> Tensor:
    """Uniform whole numbers in ``[0, high)``.

    The value is the upper half of ``bits * high``, so no value's probability is off by more than
    2**-64.

    Args:
        seed: which run.
        step: which meta-batch.
        index: ``[T]``: which tasks of it.
        stream: which purpose.
        n: draws for each task, a number or a shape.
        high: the bound, in ``[1, 2**31]``, an int or an int64 tensor that broadcasts to the
            result (whose values are not looked at: that would wait for the device).

    Returns:
        ``[T, n]`` or ``[T, *n]`` int64.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.

    Example:
        >>> integers(0, 0, range(1), 0, 5, 10)
        tensor([[3, 6, 7, 5, 0]])
    """
    words = bits(seed, step, index, stream, n)
    return _scale(words, _bound("random.integers", "high", high, words.device))


def normal(
    seed: int,
    step: int,
    index: Index,
    stream: int,
    n: Shape,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers, by the transform of Box and Muller in float64.

    Args:
        seed: which run.
        step: which meta-batch.
        index: ``[T]``: which tasks of it.
        stream: which purpose.
        n: draws for each task, a number or a shape.
        dtype: a floating dtype, to which the float64 value is rounded.

    Returns:
        ``[T, n]`` or ``[T, *n]`` of ``dtype``.

    Raises:
        TypeError: ``dtype`` is not floating, or an argument is of the wrong kind.
        ValueError: an argument out of range.

    Example:
        >>> normal(0, 0, range(1), 0, (2, 2)).shape
        torch.Size([1, 2, 2])

    Reference:
        Box, Muller (1958), "A note on the generation of random normal deviates".
    """
    if not dtype.is_floating_point:
        raise type_error("random.normal", "dtype", "be a floating dtype", dtype)
    shape = _shape(n)
    count = math.prod(shape)
    pairs = (count + 1) // 2  # draws 2i and 2i+1 of the uniform make normals 2i and 2i+1
    u = uniform(seed, step, index, stream, (pairs, 2), dtype=torch.float64)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[..., 0]))  # 1 - u is in (0, 1]
    angle = u[..., 1] * (2.0 * math.pi)
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten(1)[:, :count].reshape(-1, *shape).to(dtype)


def permutation(seed: int, step: int, index: Index, stream: int, n: int) -> Tensor:
    """Uniformly random orders of n things.

    Args:
        seed: which run.
        step: which meta-batch.
        index: ``[T]``: which tasks of it.
        stream: which purpose.
        n: how many things.

    Returns:
        ``[T, n]`` int64, each row the numbers ``0 .. n-1`` in random order.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.

    Example:
        >>> permutation(0, 0, range(2), 0, 5)
        tensor([[3, 1, 2, 4, 0],
                [4, 0, 2, 1, 3]])
    """
    n = positive_int("random.permutation", "n", n)
    return choice(seed, step, index, stream, n, n)


def choice(
    seed: int,
    step: int,
    index: Index,
    stream: int,
    n: Shape,
    population: int | Tensor,
    *,
    at_most: int | None = None,
) -> Tensor:
    """Whole numbers in ``[0, population)`` without replacement, in random order.

    Every ordered selection is equally likely (to 2**-32). A few of many are the beginning of a
    Fisher-Yates shuffle whose array is never built, so the cost does not depend on the population:
    draw i picks a position in ``[i, population)``, and what stands there is found by following
    the earlier swaps back. Otherwise random keys ``[T, ..., population]`` are sorted.

    Args:
        seed: which run.
        step: which meta-batch.
        index: ``[T]``: which tasks of it.
        stream: which purpose.
        n: draws for each task, k, or a shape ``(..., k)`` whose last axis is drawn without
            replacement, independently of the others.
        population: how many there are to choose from, at least k and at most 2**31: an int, or an
            int64 tensor that broadcasts to ``[T, ...]`` (whose values are not looked at: that
            would wait for the device).
        at_most: a bound on a population that is a tensor.

    Returns:
        ``[T, k]`` or ``[T, ..., k]`` int64.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or k larger than the population.

    Example:
        >>> choice(0, 0, range(2), 0, 3, 1000)
        tensor([[327, 657, 753],
                [544, 339, 746]])

    Reference:
        Knuth (1997), "The Art of Computer Programming", volume 2, section 3.4.2, algorithm P.
    """
    op = "random.choice"
    shape = _shape(n)
    k = shape[-1]
    if isinstance(population, Tensor):
        if at_most is None:
            raise type_error(op, "at_most", "be given with a population that is a tensor", None)
        largest = positive_int(op, "at_most", at_most)
    else:
        largest = positive_int(op, "population", population)
    if k > largest:
        raise value_error(op, "n", f"be at most the population, {largest},", k)
    tasks = as_index(index)
    bound = _bound(op, "population", population, tasks.device)
    if k > _TRACE_LIMIT or largest <= _SPARSE * k:
        words = bits(seed, step, tasks, stream, (*shape[:-1], largest))
        return _smallest(words, k, bound)
    return _trace(bits(seed, step, tasks, stream, shape), bound)


def _trace(words: Tensor, bound: Tensor) -> Tensor:
    """Algorithm P on an array that is only thought of; ``words [T, ..., k]``."""
    positions: list[Tensor] = []
    chosen: list[Tensor] = []
    for i in range(words.shape[-1]):
        at = _scale(words[..., i], bound - i) + i
        positions.append(at)
        for earlier in range(i - 1, -1, -1):
            # swap `earlier` put what stood at `earlier` at the position it drew
            at = torch.where(at == positions[earlier], earlier, at)
        chosen.append(at)
    return torch.stack(chosen, dim=-1)


def _smallest(words: Tensor, k: int, bound: Tensor) -> Tensor:
    """The places of the k smallest words in order; only those below the bound take part."""
    size = words.shape[-1]
    digits = size.bit_length()
    place = torch.arange(size, device=words.device)
    # The place in the low digits makes all keys different: any sort gives one answer.
    keys = (words >> digits << digits) | place
    if bound.ndim:
        keys = torch.where(place < bound.unsqueeze(-1), keys, torch.iinfo(torch.int64).max)
    if keys.device.type == "cpu":
        keys = torch.from_numpy(np.sort(keys.numpy()))  # four times as fast as torch's
    else:
        keys = keys.sort(dim=-1).values
    return keys[..., :k] & ((1 << digits) - 1)


def _shape(n: Any) -> tuple[int, ...]:
    if isinstance(n, tuple):
        if not n:
            raise value_error("random", "n", "be a number or a shape of at least one axis", "()")
        return tuple(positive_int("random", "n", axis) for axis in n)
    return (positive_int("random", "n", n),)


def _bound(op: str, argument: str, value: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise type_error(op, argument, "be an int or an int64 tensor", describe(value))
        same_device(op, argument, value, device)
        return value
    value = positive_int(op, argument, value)
    if value > 1 << 31:
        raise value_error(op, argument, "be at most 2**31", value)
    return torch.tensor(value, device=device)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MUL_1) & _MASK
    z = ((z ^ (z >> 27)) * _MUL_2) & _MASK
    return z ^ (z >> 31)


def _word(name: str, value: int) -> int:
    if type(value) is not int or not 0 <= value <= _MASK:
        value = whole_number("random", name, value)
        if value > _MASK:
            raise value_error("random", name, "be less than 2**64", value)
    return value


@functools.lru_cache(maxsize=4096)
def _prefix(seed: int, stream: int, step: int) -> int:
    """The hash of what all tasks of a call share."""
    state = 0
    for value in (seed, stream, step):
        state = _mix(state ^ _mix((value + _GAMMA) & _MASK))
    return state


def _words_numpy(prefix: int, tasks: Tensor, count: int) -> Tensor:
    """``[T, count]`` on the CPU: unsigned arithmetic wraps by definition, and calls are cheap."""
    keys = _mix_numpy(tasks.numpy().view(_U64) + _NP_GAMMA)
    keys ^= _U64(prefix)
    words = _mix_numpy(_mix_numpy(keys)[:, None] ^ _counters(count))
    return torch.from_numpy(words.view(np.int64))


@functools.lru_cache(maxsize=64)
def _counters(count: int) -> _Words:
    hashed = _mix_numpy(np.arange(count, dtype=_U64) + _NP_GAMMA)
    hashed.flags.writeable = False
    return hashed


def _mix_numpy(z: _Words) -> _Words:
    """M in place: the argument is a fresh array."""
    z ^= z >> _NP_30
    z *= _NP_MUL_1
    z ^= z >> _NP_27
    z *= _NP_MUL_2
    z ^= z >> _NP_31
    return z


def _words_torch(prefix: int, tasks: Tensor, count: int) -> Tensor:
    """``[T, count]`` on any device: the same in int64, whose products wrap in two's complement."""
    keys = _mix_torch(_mix_torch(tasks + _signed(_GAMMA)) ^ _signed(prefix))
    counters = torch.arange(count, device=tasks.device)
    return _mix_torch(keys[:, None] ^ _mix_torch(counters + _signed(_GAMMA)))


def _mix_torch(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MUL_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MUL_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, count: int) -> Tensor:
    """The logical shift; torch's own copies the sign."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _scale(words: Tensor, high: Tensor) -> Tensor:
    """The upper 64 bits of the unsigned 128-bit product, for ``high`` up to 2**31."""
    upper = _shift_right(words, 32) * high
    lower = ((words & 0xFFFFFFFF) * high) >> 32  # below 2**31, so the sum stays below 2**63
    return (upper + lower) >> 32
