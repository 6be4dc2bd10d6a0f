"""That the first-use comparison sees a program that is not the module's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.program import (
    BatchNorm1d,
    Layer,
    LeakyReLU,
    Linear,
    Loss,
    Program,
    ReLU,
    Tanh,
    Unsupported,
    read,
)
from fastmeta.program.verify import verify

X, Y = torch.linspace(-1, 1, 8).reshape(4, 2), torch.linspace(0, 1, 12).reshape(4, 3)


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Program]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh()).to(dtype)
    return model, read(model, F.mse_loss, X.to(dtype), Y.to(dtype))


def with_layer(program: Program, index: int, layer: Layer) -> Program:
    nodes = list(program.nodes)
    nodes[index] = replace(nodes[index], layer=layer)
    return replace(program, nodes=tuple(nodes))


def test_the_right_program_passes() -> None:
    model, program = pair()
    assert verify(model, F.mse_loss, [program], X, Y) is program
    assert verify(model, None, [replace(program, loss=None)], X, None).loss is None


@pytest.mark.parametrize(
    ("index", "layer"),
    [(1, BatchNorm1d(3, 1.1e-5)), (2, ReLU()), (2, LeakyReLU(0.999))],
    ids=["eps", "function", "slope"],
)
def test_another_layer_is_seen(index: int, layer: Layer) -> None:
    model, program = pair()
    with pytest.raises(Unsupported, match="the program's output differs from the module's"):
        verify(model, F.mse_loss, [with_layer(program, index, layer)], X, Y)


def test_another_output_shape_is_seen() -> None:
    model, program = nn.Linear(2, 1), read(nn.Linear(2, 1), None, X)
    with pytest.raises(Unsupported, match=r"output of shape \[4\], not \[4, 1\], differs"):
        verify(model, None, [replace(program, output_shape=())], X, None)


def test_the_first_loss_that_fits_is_taken() -> None:
    model, program = pair()
    wrong = [replace(program, loss=Loss("mse", "rows", f, False)) for f in (1.0, 0.3333)]
    assert verify(model, F.mse_loss, [*wrong, program], X, Y) is program
    with pytest.raises(Unsupported, match="the program's loss differs"):
        verify(model, F.mse_loss, wrong, X, Y)


class Wrong(Tanh):
    """A layer with the right value and a wrong second derivative."""

    def ddf(self, x: Tensor) -> Tensor:
        """Off by a tenth."""
        return 1.1 * super().ddf(x)


def test_a_wrong_second_derivative_is_seen() -> None:
    model, program = pair()
    with pytest.raises(Unsupported, match="the program's second derivative differs"):
        verify(model, F.mse_loss, [with_layer(program, 2, Wrong())], X, Y)


class OnlyFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32, please")
        return super().forward(x)


def test_a_module_of_one_dtype_is_compared_in_it() -> None:
    model = OnlyFloat32(2, 3)
    program = read(model, F.mse_loss, X, Y)
    assert program.nodes[0].layer == Linear(2, 3)
    wrong = replace(program, loss=Loss("mse", "rows", 0.3, False))
    with pytest.raises(Unsupported, match="the program's loss differs"):
        verify(model, F.mse_loss, [wrong], X, Y)


class OnlyFour(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 5:
            raise ValueError("not five")
        return super().forward(x)


def test_a_module_that_does_not_run_at_another_row_count_is_refused() -> None:
    # Four rows given, five to compare on. (It is exported at yet another count.)
    model = OnlyFour(2, 5)
    with pytest.raises(Unsupported, match="the module does not run on 4 and 5 rows: not five"):
        read(model, None, X)


def test_float64_modules() -> None:
    model, program = pair(torch.float64)
    assert verify(model, F.mse_loss, [program], X.double(), Y.double()) is program
