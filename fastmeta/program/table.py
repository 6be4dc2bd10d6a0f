"""The table of layers: one line for each layer type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastmeta.program import activations, batch_norm, flatten, linear
from fastmeta.program.ir import Layer
from fastmeta.program.reading import ReadLayer

__all__ = ["LAYERS", "READERS", "Entry"]


class Entry(NamedTuple):
    """A layer type and the ATen operations it is read from; "relu" stands for "relu_" too."""

    layer: type[Layer]
    reads: Mapping[str, ReadLayer]


LAYERS: tuple[Entry, ...] = (
    Entry(linear.Linear, linear.READS),
    Entry(batch_norm.BatchNorm1d, batch_norm.READS),
    Entry(flatten.Flatten, {}),  # views are read by the reader: they are free, and it places this
    Entry(activations.ReLU, {"relu": activations.read_relu}),
    Entry(activations.LeakyReLU, {"leaky_relu": activations.read_leaky_relu}),
    Entry(activations.ELU, {"elu": activations.read_elu}),
    Entry(activations.Tanh, {"tanh": activations.read_tanh}),
    Entry(activations.Sigmoid, {"sigmoid": activations.read_sigmoid}),
    Entry(activations.SiLU, {"silu": activations.read_silu}),
    Entry(activations.GELU, {"gelu": activations.read_gelu}),
)

READERS: Mapping[str, ReadLayer] = {
    op: read for entry in LAYERS for op, read in entry.reads.items()
}
