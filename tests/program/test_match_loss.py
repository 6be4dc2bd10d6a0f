"""Losses as their users write them, in canonical form; and those that have none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.program import Loss, Unsupported
from fastmeta.program.reader import read

X = torch.linspace(-1, 1, 10).reshape(5, 2)
Y = torch.linspace(0, 1, 15).reshape(5, 3)
LABELS = torch.tensor([0, 2, 1, 0, 2])
LINE = torch.linspace(0, 1, 5)


def loss_of(loss: Any, y: Tensor, model: nn.Module | None = None) -> Loss:
    program = read(model or nn.Linear(2, 3), loss, X, y)
    assert program.loss is not None
    return program.loss


def refusal(loss: Any, y: Tensor, model: nn.Module | None = None) -> str:
    with pytest.raises(Unsupported) as error:
        loss_of(loss, y, model)
    return str(error.value)


def mse(factor: float, divisor: str = "rows", *, per_row: bool = False) -> Loss:
    return Loss("mse", divisor, factor, per_row)  # type: ignore[arg-type]


def ce(factor: float = 1.0, divisor: str = "rows", *, per_row: bool = False) -> Loss:
    return Loss("cross_entropy", divisor, factor, per_row)  # type: ignore[arg-type]


class OwnLoss:
    """A callable object, with a method that is a loss too."""

    def __call__(self, o: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(o, y)

    def summed(self, o: Tensor, y: Tensor) -> Tensor:
        return (o - y).square().sum()


def with_optional_weight(output: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    terms = ((output - y) ** 2).mean(dim=1)
    return terms if weight is None else weight * terms


SQUARES: dict[str, tuple[Callable[..., Any], Loss]] = {
    "F.mse_loss": (F.mse_loss, mse(1 / 3)),
    "sum": (functools.partial(F.mse_loss, reduction="sum"), mse(1.0, "one")),
    "MSELoss": (nn.MSELoss(), mse(1 / 3)),
    "MSELoss sum": (nn.MSELoss(reduction="sum"), mse(1.0, "one")),
    "none, mean of rows": (
        lambda o, y: F.mse_loss(o, y, reduction="none").mean(-1),
        mse(1 / 3, per_row=True),
    ),
    "target first": (lambda o, y: F.mse_loss(y, o), mse(1 / 3)),
    "squared difference": (lambda o, y: ((o - y) ** 2).mean(), mse(1 / 3)),
    "target less output": (lambda o, y: ((y - o) ** 2.0).mean(), mse(1 / 3)),
    "pow, sum": (lambda o, y: (o - y).pow(2).sum(), mse(1.0, "one")),
    "torch.square": (lambda o, y: torch.square(o - y).mean(), mse(1 / 3)),
    "times itself": (lambda o, y: ((o - y) * (o - y)).mean(), mse(1 / 3)),
    "per row, mean": (lambda o, y: torch.square(o - y).mean(-1), mse(1 / 3, per_row=True)),
    "per row, sum": (lambda o, y: ((o - y) ** 2).sum(dim=1), mse(1.0, per_row=True)),
    "mean over dim 1, then rows": (lambda o, y: ((o - y) ** 2).mean(dim=1).mean(), mse(1 / 3)),
    "sum over dim 1, mean of rows": (lambda o, y: ((o - y) ** 2).sum(1).mean(), mse(1.0)),
    "rows first": (lambda o, y: ((o - y) ** 2).mean(0).sum(), mse(1.0)),
    "keepdim": (lambda o, y: ((o - y) ** 2).sum(1, keepdim=True).mean(), mse(1.0)),
    "keepdim, squeezed": (
        lambda o, y: ((o - y) ** 2).sum(1, keepdim=True).squeeze(1),
        mse(1.0, per_row=True),
    ),
    "half": (lambda o, y: 0.5 * F.mse_loss(o, y), mse(0.5 / 3)),
    "half inside": (lambda o, y: (0.5 * (o - y) ** 2).sum(), mse(0.5, "one")),
    "scaled difference": (lambda o, y: ((o - y) * 2).pow(2).sum(), mse(4.0, "one")),
    "over two": (lambda o, y: ((o - y) ** 2).sum() / 2, mse(0.5, "one")),
    "over len": (lambda o, y: ((o - y) ** 2).sum() / len(y), mse(1.0)),
    "over shape[0]": (lambda o, y: ((o - y) ** 2).sum() / (2 * o.shape[0]), mse(0.5)),
    "over numel": (lambda o, y: ((o - y) ** 2).sum() / y.numel(), mse(1 / 3)),
    "over 5, which is no row count": (lambda o, y: ((o - y) ** 2).sum() / 5, mse(0.2, "one")),
    "over 7, which is no row count": (lambda o, y: ((o - y) ** 2).sum() / 7, mse(1 / 7, "one")),
    "flat": (lambda o, y: ((o.flatten() - y.flatten()) ** 2).mean(), mse(1 / 3)),
    "seen row by row": (
        lambda o, y: ((o - y) ** 2).view(len(y), -1).sum(1),
        mse(1.0, per_row=True),
    ),
    "detached target": (lambda o, y: F.mse_loss(o, y.detach()), mse(1 / 3)),
    "casts that do nothing": (lambda o, y: F.mse_loss(o.float(), y.float()), mse(1 / 3)),
    "callable object": (OwnLoss(), mse(1 / 3)),
    "bound method": (OwnLoss().summed, mse(1.0, "one")),
    "optional weight": (with_optional_weight, mse(1 / 3, per_row=True)),
    "minus minus": (lambda o, y: ((o - y) ** 2).neg().mean().neg(), mse(1 / 3)),
}


@pytest.mark.parametrize("name", SQUARES)
def test_squares(name: str) -> None:
    loss, expected = SQUARES[name]
    assert loss_of(loss, Y) == expected


def gathered(o: Tensor, y: Tensor) -> Tensor:
    return -F.log_softmax(o, dim=1).gather(1, y.unsqueeze(1)).squeeze(1)


def indexed(o: Tensor, y: Tensor) -> Tensor:
    return -o.log_softmax(-1)[torch.arange(len(y)), y].mean()


def one_hot(o: Tensor, y: Tensor) -> Tensor:
    return -(F.one_hot(y, 3) * o.log_softmax(-1)).sum(-1).mean()


CROSS_ENTROPIES: dict[str, tuple[Callable[..., Any], Loss]] = {
    "F.cross_entropy": (F.cross_entropy, ce()),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), ce(1.0, "one")),
    "none": (nn.CrossEntropyLoss(reduction="none"), ce(per_row=True)),
    "half": (lambda o, y: 0.5 * F.cross_entropy(o, y), ce(0.5)),
    "nll_loss": (lambda o, y: F.nll_loss(F.log_softmax(o, dim=-1), y), ce()),
    "NLLLoss": (lambda o, y: nn.NLLLoss(reduction="sum")(o.log_softmax(1), y), ce(1.0, "one")),
    "gather": (gathered, ce(per_row=True)),
    "index": (indexed, ce()),
    "one_hot": (one_hot, ce()),
    "one_hot as float": (
        lambda o, y: -(F.one_hot(y, 3).float() * F.log_softmax(o, 1)).sum() / len(y),
        ce(),
    ),
    "labels cast": (lambda o, y: F.cross_entropy(o, y.long()), ce()),
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_cross_entropies(name: str) -> None:
    loss, expected = CROSS_ENTROPIES[name]
    assert loss_of(loss, LABELS) == expected


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: F.mse_loss(o.squeeze(-1), y),
        lambda o, y: F.mse_loss(o[:, 0], y),
        lambda o, y: F.mse_loss(o, y.unsqueeze(1)),
        lambda o, y: F.mse_loss(o, y[:, None]),
        lambda o, y: F.mse_loss(o, y.view(-1, 1)),
        lambda o, y: F.mse_loss(o.view(-1), y),
        lambda o, y: ((o.reshape(y.shape) - y) ** 2).mean(),
    ],
    ids=["squeeze", "select", "unsqueeze", "None", "view", "flat", "reshape"],
)
def test_one_number_a_row_against_a_vector_of_targets(loss: Callable[..., Any]) -> None:
    assert loss_of(loss, LINE, nn.Linear(2, 1)) == mse(1.0)


MODEL = nn.Linear(2, 3)
WEIGHTS = torch.ones(3)


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.mse_loss(o, y)


REFUSALS: dict[str, tuple[Any, Tensor, str]] = {
    "l1": (F.l1_loss, Y, "aten.l1_loss is not part of a loss that the program knows"),
    "cubes": (
        lambda o, y: ((o - y) ** 3).mean(),
        Y,
        "aten.pow to 3 is no loss the program knows",
    ),
    "no target": (
        lambda o, y: (o**2).mean(),
        Y,
        "aten.pow of the output is not part of a loss that the program knows",
    ),
    "regularised": (
        lambda o, y: F.mse_loss(o, y) + 0.1 * MODEL.weight.square().sum(),
        Y,
        "it reads parameter 'weight' of the module",
    ),
    "own parameter": (WithParameter(), Y, "it reads parameter 'scale' of the loss"),
    "weights from outside": (
        lambda o, y: (WEIGHTS * (o - y) ** 2).mean(),
        Y,
        "it reads a tensor that is neither a parameter nor an argument",
    ),
    "label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        LABELS,
        "aten.cross_entropy_loss with label_smoothing=0.1 is not known to the program",
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        LABELS,
        "aten.cross_entropy_loss with class weights is not known to the program",
    ),
    "ignore_index": (
        nn.CrossEntropyLoss(ignore_index=1),
        LABELS,
        "aten.cross_entropy_loss with ignore_index=1 is not known to the program",
    ),
    "class probabilities": (
        F.cross_entropy,
        torch.full((5, 3), 1 / 3),
        "aten.cross_entropy_loss needs class numbers int64 [S] as target, "
        "got torch.float32 ['S', 3]",
    ),
    "integer targets": (
        lambda o, y: ((o - y) ** 2).mean(),
        torch.ones(5, 3, dtype=torch.int64),
        "aten.sub of a target of dtype torch.int64 is no loss the program knows",
    ),
    "broadcast": (
        lambda o, y: ((o - y) ** 2).mean(),
        torch.ones(5, 1),
        "aten.sub broadcasts ['S', 3] with ['S', 1]: give both the same shape",
    ),
    "not reduced": (
        nn.MSELoss(reduction="none"),
        Y,
        "it must return one number, or one a row [S], got shape ['S', 3]",
    ),
    "reduced over rows alone": (
        lambda o, y: ((o - y) ** 2).mean(0),
        Y,
        "it must return one number, or one a row [S], got shape [3]",
    ),
    "root": (
        lambda o, y: F.mse_loss(o, y).sqrt(),
        Y,
        "aten.sqrt is not part of a loss that the program knows",
    ),
    "a number": (lambda o, y: 1.0, Y, "it must return one tensor"),
    "the output": (lambda o, y: o, Y, "its result is the output, not a known loss"),
    "detached output": (
        lambda o, y: F.mse_loss(o.detach(), y),
        Y,
        "aten.detach of the output cuts the gradient",
    ),
    "part of the output": (
        lambda o, y: F.mse_loss(o[:, :1], y[:, :1]),
        Y,
        "aten.slice takes a part of the output",
    ),
    "in place": (
        lambda o, y: ((o - y).relu_() ** 2).mean(),
        Y,
        "aten.relu_ changes a tensor in place",
    ),
    "control flow": (
        lambda o, y: F.mse_loss(o, y) if o.sum() > 0 else o.sum(),
        Y,
        "control flow that depends on the data cannot be traced",
    ),
    "squeeze of everything": (
        lambda o, y: F.mse_loss(o.squeeze(), y.squeeze()),
        Y,
        "aten.squeeze without a dim also drops the row axis of one row; name the dim",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    loss, y, message = REFUSALS[name]
    assert refusal(loss, y, MODEL) == f"{message} (in the loss)"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: ((o - y) ** 2).sum() / len(y) ** 2,
        lambda o, y: ((o - y) ** 2).sum(1) / len(y),
        lambda o, y: ((o - y) ** 2).sum() / (len(y) + 1),
    ],
    ids=["squared", "per row", "plus one"],
)
def test_a_row_count_that_is_no_divisor_is_refused(loss: Callable[..., Any]) -> None:
    message = "the program's loss differs from the module's (in the comparison)"
    assert refusal(loss, Y) == message
