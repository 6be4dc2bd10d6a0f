"""Algorithms: one file each, over the engine's one function."""

from __future__ import annotations

from fastmeta.algorithms.base import Algorithm
from fastmeta.algorithms.fomaml import FOMAML
from fastmeta.algorithms.maml import MAML

__all__ = ["FOMAML", "MAML", "Algorithm"]
