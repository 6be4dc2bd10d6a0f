"""Programs, parameters and rows drawn by hypothesis, for every test that compares executors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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
    Loss,
    Program,
    ReLU,
    Rows,
    Sigmoid,
    SiLU,
    Tanh,
)

ACTIVATIONS: tuple[Layer, ...] = (
    ReLU(),
    LeakyReLU(0.2),
    Tanh(),
    Sigmoid(),
    GELU(),
    GELU("tanh"),
    SiLU(),
    ELU(0.7),
)

# What torch computes for each layer: the definition that the hand rules are held against.
TORCH: dict[str, Callable[..., Tensor]] = {
    "relu": lambda layer, x: F.relu(x),
    "leaky_relu": lambda layer, x: F.leaky_relu(x, layer.slope),
    "tanh": lambda layer, x: torch.tanh(x),
    "sigmoid": lambda layer, x: torch.sigmoid(x),
    "gelu": lambda layer, x: F.gelu(x, approximate=layer.approximate),
    "silu": lambda layer, x: F.silu(x),
    "elu": lambda layer, x: F.elu(x, layer.alpha),
    "flatten": lambda layer, x: x.flatten(1),
    "linear": lambda layer, x, w, b: F.linear(x, w, b),
    "batch_norm": lambda layer, x, w, b: F.batch_norm(
        x, None, None, w, b, training=True, eps=layer.eps
    ),
}


def activations() -> st.SearchStrategy[Layer]:
    return st.sampled_from(ACTIVATIONS)


@st.composite
def losses(draw: st.DrawFn, *, per_row: bool | None = None) -> Loss:
    rows = draw(st.booleans()) if per_row is None else per_row
    return Loss(
        kind=draw(st.sampled_from(("mse", "cross_entropy"))),
        divisor="rows" if rows else draw(st.sampled_from(("rows", "one"))),
        factor=draw(st.sampled_from((1.0, 0.5, 1 / 3))),
        per_row=rows,
    )


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    max_depth: int = 4,
    max_width: int = 6,
    batch_norm: bool = True,
    per_row: bool | None = None,
) -> Program:
    """A fully connected program: Flatten or not, then blocks of Linear, BatchNorm, activation."""
    width = st.integers(1, max_width)
    input_shape = draw(st.one_of(st.tuples(width), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    layers: list[Layer] = []
    without: list[str] = []
    features = input_shape[0]
    if len(input_shape) > 1:
        layers.append(Flatten())
        features = input_shape[0] * input_shape[1]
    depth = draw(st.integers(1, max_depth))
    for block in range(depth):
        out = draw(width)
        if not draw(st.booleans()):
            without.append(f"{len(layers)}.bias")
        layers.append(Linear(features, out))
        features = out
        if block == depth - 1:
            break
        if batch_norm and draw(st.integers(0, 2)) == 0:
            if draw(st.integers(0, 3)) == 0:
                without += [f"{len(layers)}.weight", f"{len(layers)}.bias"]
            layers.append(BatchNorm1d(out, eps=draw(st.sampled_from((1e-5, 1e-3)))))
        if draw(st.integers(0, 4)) > 0:
            layers.append(draw(activations()))
    return Program.chain(layers, input_shape, draw(losses(per_row=per_row)), without=without)


def random_params(
    program: Program, seed: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) * 0.7
        for name, shape in program.params.items()
    }


def random_rows(
    program: Program,
    seed: int,
    rows: int,
    *,
    masked: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Rows for one task; with `masked`, random weights of which that many are zero."""
    assert program.loss is not None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *program.input_shape, generator=generator, dtype=dtype)
    if program.loss.kind == "mse":
        y = torch.randn(rows, *program.output_shape, generator=generator, dtype=dtype)
    else:
        y = torch.randint(program.output_shape[0], (rows,), generator=generator)
    weight = None
    if masked is not None:
        weight = torch.rand(rows, generator=generator, dtype=dtype) + 0.5
        weight[torch.randperm(rows, generator=generator)[:masked]] = 0.0
    return Rows(x, y, weight)


def run_with_torch(
    program: Program, params: dict[str, Tensor], x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The program's output by torch's own functions, differentiable as often as you like."""
    values = [x]
    for node in program.nodes:
        own = [None if name is None else params[name] for name in node.params]
        source = values[node.inputs[0]]
        if node.layer.kind == "batch_norm":
            values.append(batch_norm_with_torch(node.layer, source, own, mask))
        else:
            values.append(TORCH[node.layer.kind](node.layer, source, *own))
    return values[-1].reshape(x.shape[0], *program.output_shape)


def batch_norm_with_torch(
    layer: Layer, x: Tensor, params: list[Tensor | None], mask: Tensor | None
) -> Tensor:
    """BatchNorm in the plain words of its definition: torch has no row mask."""
    assert isinstance(layer, BatchNorm1d)
    live = x if mask is None else x[mask]
    y = (x - live.mean(0)) / torch.sqrt(live.var(0, correction=0) + layer.eps)
    weight, bias = params
    y = y if weight is None else weight * y
    return y if bias is None else y + bias


def loss_with_torch(loss: Loss, o: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """The canonical loss by torch's own functions."""
    rows = o.shape[0]
    if loss.kind == "mse":
        terms = F.mse_loss(o, y, reduction="none").reshape(rows, -1).sum(1)
    else:
        terms = F.cross_entropy(o, y, reduction="none")
    if weight is not None:
        total = (weight * terms).sum() / weight.sum()
    else:
        total = terms.mean() if loss.divisor == "rows" else terms.sum()
    return loss.factor * total


def module_of(program: Program) -> nn.Sequential:
    """The `nn.Sequential` that a chain is named after, in torch's own layers."""
    parts: list[nn.Module] = []
    for i, node in enumerate(program.nodes):
        layer = node.layer
        if isinstance(layer, Linear):
            bias = f"{i}.bias" in program.params
            parts.append(nn.Linear(layer.in_features, layer.out_features, bias=bias))
        elif isinstance(layer, BatchNorm1d):
            affine = f"{i}.weight" in program.params
            parts.append(nn.BatchNorm1d(layer.features, eps=layer.eps, affine=affine))
        elif isinstance(layer, LeakyReLU):
            parts.append(nn.LeakyReLU(layer.slope))
        elif isinstance(layer, ELU):
            parts.append(nn.ELU(layer.alpha))
        elif isinstance(layer, GELU):
            parts.append(nn.GELU(layer.approximate))
        else:
            parts.append(getattr(nn, type(layer).__name__)())
    return nn.Sequential(*parts)


def loss_function(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss as a user would write it, of the same canonical form."""

    def function(o: Tensor, y: Tensor) -> Tensor:
        if loss.kind == "mse":
            terms = ((o - y) ** 2).sum(1)
        else:
            terms = F.cross_entropy(o, y, reduction="none")
        if loss.per_row:
            return loss.factor * terms
        return loss.factor * (terms.mean() if loss.divisor == "rows" else terms.sum())

    return function
