"""The program's own checks, its printed form, and that it is a value."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - that a program survives it, not a file format

import pytest

from fastmeta.program import BatchNorm1d, Flatten, Linear, Loss, Node, Program, ReLU, Unsupported

MSE = Loss("mse", divisor="rows", factor=0.5, per_row=False)


def test_chain_and_its_printed_form() -> None:
    program = Program.chain(
        [Flatten(), Linear(6, 4), BatchNorm1d(4), ReLU(), Linear(4, 2)],
        (2, 3),
        MSE,
        without=["4.bias"],
    )
    assert program.is_chain
    assert program.shapes == ((2, 3), (6,), (4,), (4,), (4,), (2,))
    assert list(program.params) == ["1.weight", "1.bias", "2.weight", "2.bias", "4.weight"]
    assert str(program).splitlines() == [
        "input [S, 2, 3]",
        "1 flatten",
        "2 linear 6 -> 4 (1.weight, 1.bias)",
        "3 batch_norm 4 eps 1e-05 (2.weight, 2.bias)",
        "4 relu",
        "5 linear 4 -> 2 (4.weight)",
        "output [S, 2]",
        "loss 0.5 * mse, mean over rows",
    ]


def test_a_program_is_a_value() -> None:
    program = Program.chain([Linear(2, 3), ReLU()], (2,), MSE)
    again = Program.chain([Linear(2, 3), ReLU()], (2,), MSE)
    assert program == again
    assert hash(program) == hash(again)
    assert copy.deepcopy(program) == program
    assert pickle.loads(pickle.dumps(program)) == program  # noqa: S301
    assert program != Program.chain([Linear(2, 3), ReLU()], (2,), None)


WEIGHTS = {"w": (3, 2), "b": (3,)}
LINEAR = Node(Linear(2, 3), (0,), ("w", "b"))


@pytest.mark.parametrize(
    ("nodes", "output", "message"),
    [
        ((Node(ReLU(), (1,)),), (2,), "must read one earlier value"),
        ((Node(ReLU(), (0, 0)),), (2,), "must read one earlier value"),
        ((Node(Linear(2, 3), (0,), ("w",)),), (3,), "must name 2 parameters"),
        ((Node(Linear(2, 3), (0,), ("b", None)),), (3,), r"'b' must have shape \(3, 2\)"),
        ((Node(Linear(2, 3), (0,), ("z", None)),), (3,), "'z' must have shape"),
        ((LINEAR, Node(Linear(2, 3), (0,), ("w", None))), (3,), "read by one node each"),
        ((Node(Linear(4, 3), (0,), (None, None)),), (3,), r"rows must have shape \(4,\)"),
        ((LINEAR,), (2,), r"output_shape must view \(3,\), got \(2,\)"),
    ],
    ids=["later", "two", "count", "shape", "unknown", "twice", "rows", "output"],
)
def test_refusals(nodes: tuple[Node, ...], output: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Program(nodes, WEIGHTS, (2,), output)


def test_unsupported_names_what_and_where() -> None:
    error = Unsupported("aten.lstm is not a layer of the program", "module 'rnn'")
    assert (error.reason, error.where) == (
        "aten.lstm is not a layer of the program",
        "module 'rnn'",
    )
    assert str(Unsupported("tied weights")) == "tied weights"
