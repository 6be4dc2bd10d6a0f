"""The wording of errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastmeta import _checks


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        ("a", "'a'"),
        ((1, 2), "a tuple of length 2"),
        ({}, "a dict of length 0"),
        (torch.zeros(2, 3), "a float32 tensor of shape [2, 3]"),
        (torch.zeros(0).long(), "an int64 tensor of shape [0]"),
        (torch.zeros(1, device="meta"), "a float32 tensor of shape [1] on meta"),
        (np.zeros(1), "an object of type numpy.ndarray"),
        (object(), "an object of type object"),
        (torch.int64, "torch.int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_in_words(value: Any, words: str) -> None:
    assert _checks.describe(value) == words


def test_errors_name_op_argument_must_and_got() -> None:
    error = _checks.value_error("meta_grad", "steps", "be at least 0", -1)
    assert isinstance(error, ValueError)
    assert str(error) == "meta_grad: steps must be at least 0, got -1"
    assert isinstance(_checks.type_error("f", "x", "be a tensor", "a list"), TypeError)


def test_whole_numbers() -> None:
    number = _checks.whole_number("f", "n", np.int64(3))
    assert (number, type(number)) == (3, int)
    assert _checks.positive_int("f", "n", torch.tensor(2)) == 2
    for wrong in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="f: n must be an int"):
            _checks.whole_number("f", "n", wrong)
    with pytest.raises(ValueError, match="f: n must be at least 1, got 0"):
        _checks.positive_int("f", "n", 0)


def test_numbers() -> None:
    assert _checks.number("f", "rate", torch.tensor(0.5)) == 0.5
    for wrong in (True, "0.1", None, torch.zeros(2)):
        with pytest.raises(TypeError, match="f: rate must be a number"):
            _checks.number("f", "rate", wrong)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="f: rate must be finite"):
            _checks.number("f", "rate", value)
    with pytest.raises(ValueError, match=r"f: rate must be at least 0, got -1\.0"):
        _checks.number("f", "rate", -1, at_least=0)


def test_devices_and_tensors() -> None:
    x = torch.zeros(1)
    assert _checks.tensor("f", "x", x) is x
    _checks.same_device("f", "x", x, torch.device("cpu"))
    with pytest.raises(ValueError, match="f: x must be on meta like the rest, got cpu"):
        _checks.same_device("f", "x", x, torch.device("meta"))
    with pytest.raises(TypeError, match=r"f: x must be a tensor, got 1\.0"):
        _checks.tensor("f", "x", 1.0)
