"""That an answer is kept as long as it is right, and no longer than its module."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.program import LeakyReLU, ReLU, Unsupported, cache, reader
from fastmeta.program.reader import read

X, Y = torch.zeros(4, 2), torch.zeros(4, 3)


class Counter:
    """Counts how often a module is really read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, *args: Any) -> Any:
        self.reads += 1
        return self.wrapped(*args)

    wrapped = staticmethod(reader.export)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    cache.clear()
    count = Counter()
    monkeypatch.setattr(reader, "export", count)
    yield count
    cache.clear()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU())


def test_a_second_read_is_the_same_program(counter: Counter) -> None:
    model = mlp()
    first = read(model, F.mse_loss, X, Y)
    assert read(model, F.mse_loss, X, Y) is first
    assert read(model, F.mse_loss, X + 1, Y + 1) is first
    assert counter.reads == 1


def test_another_row_count_is_no_new_read(counter: Counter) -> None:
    model = mlp()
    assert read(model, F.mse_loss, X, Y) is read(model, F.mse_loss, X[:3], Y[:3])
    assert counter.reads == 1


def test_refusals_are_kept_too(counter: Counter) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Softmax(dim=1))
    for _ in range(3):
        with pytest.raises(Unsupported, match=r"aten.softmax.*module '1'"):
            read(model, F.mse_loss, X, Y)
    assert counter.reads == 1


def test_the_loss_is_told_by_what_it_is(counter: Counter) -> None:
    model = mlp()
    for _ in range(3):
        read(model, lambda o, y: ((o - y) ** 2).mean(), X, Y)
        read(model, functools.partial(F.mse_loss, reduction="sum"), X, Y)
    assert counter.reads == 2
    for factor in (1.0, 2.0):  # a closure is another function each time
        program = read(model, lambda o, y, factor=factor: factor * F.mse_loss(o, y), X, Y)
        assert program.loss is not None
        assert program.loss.factor == pytest.approx(factor / 3)
    assert counter.reads == 4


def test_a_new_loss_at_the_address_of_a_dead_one_is_read(counter: Counter) -> None:
    model = mlp()
    for factor in (1.0, 2.0, 3.0):

        def loss(o: Tensor, y: Tensor) -> Tensor:
            return factor * F.mse_loss(o, y)  # noqa: B023 - used inside the iteration

        program = read(model, loss, X, Y)
        del loss
        assert program.loss is not None
        assert program.loss.factor == pytest.approx(factor / 3)


@pytest.mark.parametrize("change", ["mode", "layer", "hook", "width", "batch_norm", "dtype"])
def test_a_changed_module_is_read_again(counter: Counter, change: str) -> None:
    model = mlp()
    assert read(model, None, X).nodes[-1].layer == ReLU()
    x, options = X, {}
    if change == "mode":
        model[0].eval()
    elif change == "layer":
        model[1] = nn.LeakyReLU()
    elif change == "hook":
        model[1].register_forward_hook(lambda module, inputs, output: F.leaky_relu(output))
    elif change == "width":
        model[0] = nn.Linear(2, 7)
    elif change == "batch_norm":
        options = {"batch_norm": "track"}
    else:
        model.double()
        x = X.double()
    program = read(model, None, x, **options)
    assert counter.reads == 2
    if change in ("layer", "hook"):
        assert program.nodes[-1].layer == LeakyReLU(0.01)
    if change == "width":
        assert program.output_shape == (7,)


def test_the_module_is_not_kept_alive(counter: Counter) -> None:
    model = mlp()
    softmax = nn.Sequential(nn.Linear(2, 3), nn.Softmax(dim=1))

    def loss(o: Tensor, y: Tensor, kept: nn.Module = model) -> Tensor:
        return F.l1_loss(o, y)

    with pytest.raises(Unsupported):
        read(model, loss, X, Y)
    with pytest.raises(Unsupported):
        read(softmax, F.mse_loss, X, Y)
    read(model, F.mse_loss, X, Y)
    gone = [weakref.ref(model), weakref.ref(softmax), weakref.ref(loss)]
    del model, softmax, loss
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_only_so_many_answers_are_kept(counter: Counter) -> None:
    model = nn.Flatten()
    for n in range(2, 22):
        read(model, None, torch.zeros(3, n))
    assert len(cache._answers[model]) <= cache._KEPT
