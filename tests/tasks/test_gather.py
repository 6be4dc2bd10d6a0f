"""The gather of byte rows: the compiled one and torch's give the same bits."""

from __future__ import annotations

import pytest
import torch

from fastmeta import _native
from fastmeta.tasks._gather import gather_rows


@pytest.mark.parametrize("width", [1, 15, 64, 784])
@pytest.mark.parametrize("count", [1, 5, 700])
def test_it_is_indexing_and_division(width: int, count: int) -> None:
    table = torch.randint(0, 256, (37, width), dtype=torch.uint8)
    rows = torch.randint(0, 37, (count, 2))
    expected = table[rows].float() / 255
    assert gather_rows(table, rows, 255.0, torch.float32).equal(expected)
    strided = rows[:, :1]  # not contiguous
    assert gather_rows(table, strided, 255.0, torch.float32).equal(expected[:, :1])


def test_torch_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randint(0, 256, (100, 99), dtype=torch.uint8)
    rows = torch.randint(0, 100, (3000,))
    compiled = gather_rows(table, rows, 7.0, torch.float32)
    monkeypatch.setattr(_native, "load", lambda: None)
    assert gather_rows(table, rows, 7.0, torch.float32).equal(compiled)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_matter(threads: int) -> None:
    table = torch.randint(0, 256, (100, 33), dtype=torch.uint8)
    rows = torch.randint(0, 100, (501,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert gather_rows(table, rows, 255.0, torch.float32).equal(table[rows].float() / 255)
    finally:
        torch.set_num_threads(before)
