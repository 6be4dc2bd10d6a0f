"""What the reader reads of modules, and what it refuses, by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastmeta.program import (
    ELU,
    GELU,
    BatchNorm1d,
    Flatten,
    Layer,
    LeakyReLU,
    Linear,
    Program,
    ReLU,
    Sigmoid,
    SiLU,
    Tanh,
    Unsupported,
)
from fastmeta.program.interpreter import forward, loss_and_grad
from fastmeta.program.reader import read
from fastmeta.program.table import LAYERS, READERS
from tests.program.drawing import TORCH, loss_function, module_of, programs, random_rows

X = torch.linspace(-1, 1, 10).reshape(5, 2)
Y = torch.linspace(0, 1, 15).reshape(5, 3)


class Function(nn.Module):
    """A module whose forward is a function of itself and x."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def layers(model: nn.Module, x: Tensor = X, **options: Any) -> list[Layer]:
    return [node.layer for node in read(model, None, x, **options).nodes]


def refusal(model: nn.Module, x: Tensor = X, y: Tensor = Y, **options: Any) -> str:
    with pytest.raises(Unsupported) as error:
        read(model, options.pop("loss", F.mse_loss), x, y, **options)
    return str(error.value)


def test_every_layer_type_of_a_sequential() -> None:
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 5, bias=False),
        nn.LeakyReLU(0.3),
        nn.BatchNorm1d(5, eps=1e-3),
        nn.Tanh(),
        nn.BatchNorm1d(5, affine=False, track_running_stats=False),
        nn.Sigmoid(),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.SiLU(),
        nn.ELU(0.5),
        nn.Linear(5, 3),
    )
    program = read(model, F.mse_loss, torch.randn(6, 2, 2), torch.randn(6, 3))
    assert [node.layer for node in program.nodes] == [
        Flatten(),
        Linear(4, 5),
        ReLU(),
        Linear(5, 5),
        LeakyReLU(0.3),
        BatchNorm1d(5, 1e-3),
        Tanh(),
        BatchNorm1d(5),
        Sigmoid(),
        GELU(),
        GELU("tanh"),
        SiLU(),
        ELU(0.5),
        Linear(5, 3),
    ]
    assert program.is_chain
    assert [node.params for node in program.nodes if node.params] == [
        ("1.weight", "1.bias"),
        ("3.weight", None),
        ("5.weight", "5.bias"),
        (None, None),
        ("13.weight", "13.bias"),
    ]
    assert list(program.params) == [name for name, _ in model.named_parameters()]
    assert program.notes == ("module '5': the update of the running statistics is dropped",)


@settings(max_examples=12)
@given(program=programs(), seed=st.integers(0, 2**31))
def test_a_drawn_program_is_read_back_from_its_module(program: Program, seed: int) -> None:
    assert program.loss is not None
    # Over one class the loss is zero, whatever its divisor.
    assume(program.loss.kind == "mse" or program.output_shape != (1,))
    rows = random_rows(program, seed, 3, dtype=torch.float32)
    model, loss = module_of(program), loss_function(program.loss)
    found = read(model, loss, rows.x, rows.y)
    assert found.loss is not None
    assert found.loss.factor == pytest.approx(program.loss.factor, rel=1e-12)
    assert replace(found, loss=program.loss) == program


def test_the_table_has_every_layer_once() -> None:
    kinds = [entry.layer.kind for entry in LAYERS]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) == set(TORCH)  # each has its definition in the tests
    assert len(READERS) == sum(len(entry.reads) for entry in LAYERS)


W, V, B = (nn.Parameter(torch.randn(shape)) for shape in ((4, 2), (3, 4), (3,)))

FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "functional": lambda m, x: F.linear(F.relu(F.linear(x, m.w)), m.v, m.b),
    "matmul": lambda m, x: torch.relu(x @ m.w.t()) @ m.v.T + m.b,
    "mm": lambda m, x: m.b + x.mm(m.w.mT).relu().mm(m.v.transpose(0, 1)),
    "addmm": lambda m, x: torch.addmm(m.b, torch.relu(x @ m.w.T), m.v.permute(1, 0)),
    "in place": lambda m, x: F.linear(F.relu_(F.linear(x, m.w)), m.v, m.b),
    "method in place": lambda m, x: F.linear(F.linear(x, m.w).relu_(), m.v).add_(m.b),
    "view": lambda m, x: F.linear(F.relu(F.linear(x.view(x.size(0), -1), m.w)), m.v, m.b),
    "views": lambda m, x: F.linear(
        F.relu(F.linear(x, m.w).reshape(len(x), 2, 2)).flatten(1).contiguous(), m.v, m.b
    ),
    "view in place": lambda m, x: (
        (h := F.linear(x, m.w)),
        h.view(-1, 2, 2).relu_(),
        F.linear(h, m.v, m.b),
    )[-1],
    "no-ops": lambda m, x: F.linear(
        F.dropout(F.relu(F.linear(x.clone(), m.w)).unsqueeze(1).squeeze(1), 0.0), m.v, m.b
    ),
    "dead code": lambda m, x: (torch.tanh(x), F.linear(F.relu(F.linear(x, m.w)), m.v, m.b))[1],
    "cast": lambda m, x: F.linear(F.relu(F.linear(x.float(), m.w)), m.v, m.b),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_hand_written_forward(name: str) -> None:
    model = Function(FORWARDS[name], w=W, v=V, b=B)
    program = read(model, F.mse_loss, X, Y)
    assert [node.layer for node in program.nodes] == [Linear(2, 4), ReLU(), Linear(4, 3)]
    assert [node.params for node in program.nodes] == [("w", None), (), ("v", "b")]
    params = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(forward(program, params, X), model(X))


def test_a_flatten_stands_where_rows_are_used_flat() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Flatten(), nn.Linear(6, 2))
    assert layers(model, torch.randn(3, 1, 2, 3)) == [Tanh(), Flatten(), Linear(6, 2)]
    assert layers(nn.Sequential(nn.Flatten(), nn.Linear(2, 3))) == [Linear(2, 3)]


@pytest.mark.parametrize(
    ("end", "shape"),
    [
        (lambda m, x: m.line(x).squeeze(-1), ()),
        (lambda m, x: m.line(x)[:, 0], ()),
        (lambda m, x: m.line(x).view(-1), ()),
        (lambda m, x: m.line(x).unsqueeze(-1), (1, 1)),
    ],
    ids=["squeeze", "select", "view", "unsqueeze"],
)
def test_an_output_may_be_seen_in_another_shape(
    end: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    model = Function(end, line=nn.Linear(2, 1))
    program = read(model, lambda o, y: ((o - y) ** 2).mean(), X, torch.randn(5, *shape))
    assert program.output_shape == shape
    params = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(forward(program, params, X), model(X))


def test_one_row_is_enough() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    assert layers(model, X[:1]) == [Linear(2, 3), ReLU()]
    # BatchNorm cannot run on it, but the program is the same at any row count.
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert layers(model, X[:1]) == [Linear(2, 3), BatchNorm1d(3)]


def test_forward_hooks_are_part_of_it() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].register_forward_hook(lambda module, inputs, output: torch.tanh(output))
    assert layers(model) == [Linear(2, 3), Tanh()]


def test_layers_that_do_nothing_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3), nn.AlphaDropout(0.5), nn.Identity())
    assert layers(model.eval()) == [Linear(2, 3)]


def test_frozen_and_unused_parameters_are_named_too() -> None:
    model = Function(lambda m, x: m.a(x), a=nn.Linear(2, 3), unused=nn.Linear(7, 7))
    model.a.weight.requires_grad_(False)
    program = read(model, F.mse_loss, X, Y)
    assert list(program.params) == ["a.weight", "a.bias", "unused.weight", "unused.bias"]


def test_the_module_and_the_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    read(model, F.mse_loss, X, Y)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_reading_inside_no_grad_and_autocast() -> None:
    with torch.no_grad(), torch.autocast("cpu"):
        assert layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU())) == [Linear(2, 3), ReLU()]


def test_float64() -> None:
    model = nn.Linear(2, 3).double()
    program = read(model, F.mse_loss, X.double(), Y.double())
    params = {name: p.detach() for name, p in model.named_parameters()}
    got = loss_and_grad(program, params, X.double(), Y.double()).loss
    torch.testing.assert_close(got, F.mse_loss(model(X.double()), Y.double()).detach())


def test_data_with_nan_can_be_read() -> None:
    assert layers(nn.Linear(2, 3), torch.full((4, 2), torch.nan)) == [Linear(2, 3)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class Straight(torch.autograd.Function):
    """relu forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def changes_a_buffer(m: Any, x: Tensor) -> Tensor:
    m.count.add_(1)
    return m.a(x)


def looks_at_the_data(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if x.sum() > 0 else m.a(-x)


def without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.a(x)


def a(**parts: Any) -> dict[str, Any]:
    return {"a": nn.Linear(2, 3), **parts}


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    return model


def in_backward() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].register_full_backward_hook(lambda module, given, made: None)
    return model


def with_parameter_hook() -> nn.Module:
    model = nn.Linear(2, 3)
    model.weight.register_hook(lambda g: 2 * g)
    return model


SEQUENCE = torch.zeros(5, 4, 2)

# What `explain` shows as the reason why a module is no program.
REFUSALS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "recurrent net": (
        lambda: Function(
            lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(2, 3), head=nn.Linear(3, 3)
        ),
        SEQUENCE,
        "aten.lstm is not a layer of the program (in module 'rnn')",
    ),
    "bare GRU": (
        lambda: nn.GRU(2, 3),
        SEQUENCE,
        "aten.gru is not a layer of the program (in the module)",
    ),
    "attention block": (
        lambda: nn.Sequential(nn.Linear(2, 4), Attention()),
        SEQUENCE,
        "aten.scaled_dot_product_attention is not a layer of the program (in module '1')",
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)),
        torch.zeros(5, 1, 4, 4),
        "aten.conv2d is not a layer of the program (in module '0')",
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)),
        X,
        "aten.layer_norm is not a layer of the program (in module '1')",
    ),
    "BatchNorm in eval mode": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval(),
        X,
        "aten.batch_norm with running statistics (eval mode) is not a layer of the program, which "
        "takes the statistics of the batch (in module '1')",
    ),
    "BatchNorm of sequences": (
        lambda: nn.BatchNorm1d(4),
        SEQUENCE,
        "aten.batch_norm is a layer only on rows of shape (features,), got (4, 2) (in the module)",
    ),
    "Linear of sequences": (
        lambda: nn.Sequential(nn.Linear(2, 3)),
        SEQUENCE,
        "aten.linear is a layer only on rows of shape (2,), got (4, 2) (in module '0')",
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)),
        X,
        "aten.dropout with p=0.5 in train mode draws at random (in module '1')",
    ),
    "SELU": (
        lambda: nn.SELU(),
        X,
        "aten.selu is not a layer of the program (in the module)",
    ),
    "CELU": (
        lambda: nn.CELU(2.0),
        X,
        "aten.celu is not a layer of the program (in the module)",
    ),
    "scaled ELU": (
        lambda: Function(lambda m, x: torch.ops.aten.elu(x, 1.0, 2.0)),
        X,
        "aten.elu with a scale is not a layer of the program (in the module)",
    ),
    "residual": (
        lambda: Function(lambda m, x: x + m.a(x), a=nn.Linear(2, 2)),
        X,
        "aten.add is a layer of the program only as the bias of a linear layer (in the module)",
    ),
    "weight stored [in, out]": (
        lambda: Function(lambda m, x: x @ m.w, w=nn.Parameter(torch.zeros(2, 3))),
        X,
        "aten.matmul is a linear layer only with a parameter W [out, in] as x @ W.t() "
        "(in the module)",
    ),
    "constant factor": (
        lambda: Function(lambda m, x: 2 * m.a(x), **a()),
        X,
        "aten.mul is not a layer of the program (in the module)",
    ),
    "detach": (
        lambda: Function(lambda m, x: m.a(x).detach(), **a()),
        X,
        "aten.detach is not a layer of the program (in the module)",
    ),
    "no_grad": (
        lambda: Function(without_grad, **a()),
        X,
        "torch.no_grad is not a layer of the program (in the module)",
    ),
    "changed buffer": (
        lambda: Function(changes_a_buffer, **a(count=torch.zeros(2))),
        X,
        "aten.add_ changes buffer 'count', and a program changes no buffer (in the module)",
    ),
    "added buffer": (
        lambda: Function(lambda m, x: m.a(x) + m.shift, **a(shift=torch.zeros(3))),
        X,
        "aten.add is a layer of the program only as the bias of a linear layer (in the module)",
    ),
    "weight that is a buffer": (
        lambda: Function(lambda m, x: F.linear(x, m.w), w=torch.zeros(3, 2)),
        X,
        "aten.linear must take a parameter as weight, not buffer 'w' (in the module)",
    ),
    "changed input": (
        lambda: Function(lambda m, x: m.a(x.relu_()), **a()),
        X,
        "aten.relu_ changes the input in place, which a program does not (in the module)",
    ),
    "rows mixed": (
        lambda: Function(lambda m, x: m.a(x.unsqueeze(0)), **a()),
        X,
        "aten.unsqueeze to shape [1, 5, 2] does not keep the rows apart (in the module)",
    ),
    "squeeze of everything": (
        lambda: Function(lambda m, x: m.a(x).squeeze(), a=nn.Linear(2, 1)),
        X,
        "aten.squeeze without a dim also drops the row axis of one row; name the dim "
        "(in the module)",
    ),
    "cast": (
        lambda: Function(lambda m, x: m.a(x).double(), **a()),
        X,
        "aten.to casts to torch.float64, which a program does not (in the module)",
    ),
    "control flow": (
        lambda: Function(looks_at_the_data, **a()),
        X,
        "control flow that depends on the data cannot be traced (in the module)",
    ),
    "tied weights": (
        tied,
        X,
        "tied weights: '0.weight' and '2.weight' are one parameter",
    ),
    "layer used twice": (
        lambda: Function(lambda m, x: m.b(m.b(x)), b=nn.Linear(2, 2)),
        X,
        "parameter 'b.weight' is read by two layers (in the module)",
    ),
    "backward hook": (in_backward, X, "a backward hook is not a layer (in module '0')"),
    "gradient hook": (with_parameter_hook, X, "parameter 'weight' has a gradient hook"),
    "custom backward": (
        lambda: Function(lambda m, x: Straight.apply(m.a(x)), **a()),
        X,
        "the program's gradient differs from the module's (in the comparison)",
    ),
    "two inputs": (
        lambda: nn.Bilinear(2, 2, 3),
        X,
        "torch.export cannot trace it: TypeError: Bilinear.forward() missing 1 required "
        "positional argument: 'input2' (in the module)",
    ),
    "several outputs": (
        lambda: Function(lambda m, x: (m.a(x), x), **a()),
        X,
        "it returns a tuple where a program has one tensor (in the module)",
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        X,
        "aten._weight_norm is not a layer of the program (in module 'parametrizations.weight.0')",
    ),
    "lazy module": (
        lambda: nn.LazyLinear(3),
        X,
        "a lazy parameter is not initialized: run the module once",
    ),
    "integers": (
        lambda: nn.Embedding(4, 3),
        torch.zeros(5, dtype=torch.int64),
        "x must be float32 or float64, got torch.int64",
    ),
    "other dtype": (
        lambda: nn.Linear(2, 3).double(),
        X,
        "parameter 'weight' is torch.float64 where x is torch.float32",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, x, message = REFUSALS[name]
    assert refusal(make(), x) == message
    assert capfd.readouterr() == ("", "")  # torch.export keeps quiet


@pytest.mark.parametrize("option", ["per_step", "frozen", "track"])
def test_batch_norm_options(option: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert refusal(model, batch_norm=option) == (
        f"aten.batch_norm with batch_norm='{option}' is not a layer of the program, which takes "
        "the statistics of the batch and keeps no running ones (batch_norm='batch') (in module '1')"
    )
    assert layers(nn.Linear(2, 3), batch_norm=option) == [Linear(2, 3)]  # nothing to choose there


def test_inputs_and_loss_parameters_are_refused() -> None:
    model = nn.Linear(2, 3)
    assert refusal(model, (X, X)) == "a program has one tensor as x, not a tuple"  # type: ignore[arg-type]
    assert refusal(model, X, {"y": Y}) == "a program has one tensor as y, not a dict"  # type: ignore[arg-type]
    assert refusal(model, loss_params={"t": Y}) == (
        "loss parameters ['t'] have no place in it (in the loss)"
    )


def test_a_loss_that_does_not_run_is_told_from_a_module_that_does_not() -> None:
    def broken(o: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("no such thing\nand more")

    assert refusal(nn.Linear(2, 3), loss=broken) == (
        "torch.export cannot trace it: RuntimeError: no such thing (in the loss)"
    )
    assert refusal(nn.Linear(7, 3)).endswith("(in the module)")


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        read(lambda x: x, F.mse_loss, X, Y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss must be callable, got str"):
        read(nn.Linear(2, 3), "mse", X, Y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_norm must be one of .* got 'none'"):
        read(nn.Linear(2, 3), F.mse_loss, X, Y, batch_norm="none")
    with pytest.raises(ValueError, match="y must be given with a loss"):
        read(nn.Linear(2, 3), F.mse_loss, X)


def test_reading_leaves_the_log_of_torch_as_it_was() -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = list(logger.filters)
    layers(nn.Linear(2, 3))
    assert logger.filters == before
