"""The layer program: layers and losses with hand-written rules, the reader, the interpreter."""

from __future__ import annotations

from fastmeta.program.activations import ELU, GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from fastmeta.program.batch_norm import BatchNorm1d
from fastmeta.program.flatten import Flatten
from fastmeta.program.interpreter import Rows
from fastmeta.program.ir import Layer, Loss, Node, Program, Unsupported
from fastmeta.program.linear import Linear
from fastmeta.program.reader import read

__all__ = [
    "ELU",
    "GELU",
    "BatchNorm1d",
    "Flatten",
    "Layer",
    "LeakyReLU",
    "Linear",
    "Loss",
    "Node",
    "Program",
    "ReLU",
    "Rows",
    "SiLU",
    "Sigmoid",
    "Tanh",
    "Unsupported",
    "read",
]
