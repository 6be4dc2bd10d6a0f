"""Rows of a table by number, bytes turned into floats on the way: the cost of an image batch.

A meta-batch of 1024 five-way tasks is 80,000 images, 250 MB of float32. What it costs is memory
traffic: so bytes are converted while they are in cache, and large blocks are used again.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastmeta import _native

__all__ = ["gather_rows"]

_Block: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_POOLED_BYTES = 1 << 20  # smaller blocks the allocator already keeps for itself
_POOL_BLOCKS = 4  # support and query of two batches: one in use, one being filled
_ALIGNMENT = 64
_CHUNK_ROWS = 256


class _Pool:
    """Blocks of memory that are given out again once nothing refers to them.

    A fresh block of this size costs more in page faults than the gather that fills it. A tensor
    made by ``torch.from_numpy`` holds its array as long as any view, or anything autograd saved,
    holds its storage; a finalizer on that array hands the block back, so no tensor is ever
    overwritten that someone can still see.
    """

    def __init__(self) -> None:
        self._free: list[_Block] = []  # oldest first
        self._lock = threading.RLock()  # a finalizer may run inside the locked region

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised CPU memory ``shape``."""
        count = math.prod(shape) * dtype.itemsize
        if count < _POOLED_BYTES:
            return torch.empty(shape, dtype=dtype)
        block = self._take(count)
        offset = -block.ctypes.data % _ALIGNMENT
        lent = block[offset : offset + count]
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _take(self, count: int) -> _Block:
        with self._lock:
            for i in range(len(self._free) - 1, -1, -1):
                if 0 <= self._free[i].nbytes - _ALIGNMENT - count <= count // 4:
                    return self._free.pop(i)
        return np.empty(count + _ALIGNMENT, dtype=np.uint8)  # of huge pages, where there are any

    def _give_back(self, block: _Block) -> None:
        with self._lock:
            self._free.append(block)
            del self._free[:-_POOL_BLOCKS]


_pool = _Pool()


def gather_rows(table: Tensor, rows: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """``table[rows]``, bytes divided by ``divisor`` and turned into ``dtype``.

    Args:
        table: ``[M, W]`` contiguous. Bytes (uint8) are divided; any other dtype is taken as it is.
        rows: int64 of any shape, on the table's device, each in ``[0, M)``.
        divisor: what bytes are divided by.
        dtype: a floating dtype, of the result if the table holds bytes.

    Returns:
        ``[*rows.shape, W]``.
    """
    flat = rows.reshape(-1).contiguous()  # a view of a part of the draws has strides
    shape = (*rows.shape, table.shape[1])
    if table.dtype != torch.uint8:
        return table.index_select(0, flat).view(shape)
    if table.device.type != "cpu":
        return table.index_select(0, flat).to(dtype).div_(divisor).view(shape)
    out = _pool.empty((len(flat), table.shape[1]), dtype)
    core = _native.load() if dtype == torch.float32 else None
    if core is not None:
        core.gather_rows(
            table.data_ptr(),
            table.shape[1],
            flat.data_ptr(),
            len(flat),
            divisor,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    else:
        for first in range(0, len(flat), _CHUNK_ROWS):
            part = slice(first, first + _CHUNK_ROWS)
            torch.div(table.index_select(0, flat[part]).to(dtype), divisor, out=out[part])
    return out.view(shape)
