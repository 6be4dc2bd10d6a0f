"""Operations that have kernels, one file each, and the choice of who computes them."""

from __future__ import annotations
