"""The first-use comparison: a program against the module and loss it was read from, on numbers.

Output, loss, gradient and a product with the Hessian are compared at two row counts, in float64
where the module runs in it, with random parameters: the module's own may hold zeros that hide a
difference. So a custom backward, a constant that is the row count, or a mistake of ours shows here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.program.interpreter import forward, hvp, loss_and_grad
from fastmeta.program.ir import Loss, Program, Unsupported
from fastmeta.program.norms import ScaledNorms

__all__ = ["verify"]

# Relative to the largest number of what is compared. The module and the interpreter do the same
# sums in another order; BatchNorm of few rows amplifies the rounding, more so at second order.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


class _Side(NamedTuple):
    """Rows to compare on: x [S, ...], y [S, ...] or None, and weights [S] for a loss per row."""

    x: Tensor
    y: Tensor | None
    weight: Tensor


def verify(
    model: nn.Module,
    loss: Callable[..., Any] | None,
    candidates: list[Program],
    x: Tensor,
    y: Tensor | None,
    *,
    exact_dtype: bool = False,
) -> Program:
    """The first candidate whose numbers are the module's, at the rows given and at one more.

    Args:
        model: The module; it is run with other parameters and buffers, its own stay as they are.
        loss: The loss, or None.
        candidates: Programs that differ in the loss alone.
        x: Inputs [S, ...].
        y: Targets [S, ...], or None without a loss.
        exact_dtype: Whether the program is the module's only in the dtype of x.

    Returns:
        The program.

    Raises:
        Unsupported: no candidate has the module's numbers, or the module does not run.
    """
    dtypes = [x.dtype] if exact_dtype else [torch.float64, x.dtype]
    for dtype in dict.fromkeys(dtypes):
        params, buffers = _state(model, dtype)
        sides = _sides(candidates[0], x, y, dtype)
        try:
            try:
                expected = [_of_module(model, loss, params, buffers, side) for side in sides]
            except RuntimeError:
                # torch has no second derivative of a normalisation without a scale
                with ScaledNorms():
                    expected = [_of_module(model, loss, params, buffers, side) for side in sides]
        except Exception as error:
            if dtype != x.dtype:
                continue  # a module that holds on to its own dtype
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unsupported(f"the module does not run on {_rows(sides)} rows: {first}") from error
        worst = ""
        for program in candidates:
            worst = _difference(program, loss, params, sides, expected, TOLERANCES[dtype])
            if not worst:
                return program
        raise Unsupported(f"the program's {worst} differs from the module's", "the comparison")
    raise AssertionError("the dtype of x is always tried")


def _rows(sides: list[_Side]) -> str:
    return " and ".join(str(side.x.shape[0]) for side in sides)


def _difference(
    program: Program,
    loss: Callable[..., Any] | None,
    params: Mapping[str, Tensor],
    sides: list[_Side],
    expected: list[list[tuple[str, Tensor]]],
    tolerance: float,
) -> str:
    """What differs first, or nothing."""
    for side, wanted in zip(sides, expected, strict=True):
        for (what, theirs), (_, ours) in zip(
            wanted, _of_program(program, params, side), strict=True
        ):
            if ours.shape != theirs.shape:
                return f"{what} of shape {list(ours.shape)}, not {list(theirs.shape)},"
            scale = max(float(t.abs().max()) if t.numel() else 0.0 for t in (ours, theirs))
            if not bool((ours - theirs).abs().max() <= tolerance * scale if ours.numel() else True):
                return what
    return ""


def _of_module(
    model: nn.Module,
    loss: Callable[..., Any] | None,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    side: _Side,
) -> list[tuple[str, Tensor]]:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    fresh = {name: b.clone() for name, b in buffers.items()}
    with torch.enable_grad(), torch.autocast(side.x.device.type, enabled=False):
        o = torch.func.functional_call(model, {**leaves, **fresh}, (side.x,))
        output = o
        value = (o * o).sum() if loss is None or side.y is None else loss(o, side.y)
        if value.dim():
            value = (side.weight * value).sum() / side.weight.sum()
        if not leaves:
            return [("output", output.detach()), ("loss", value.detach())]
        grads = torch.autograd.grad(
            value, list(leaves.values()), create_graph=True, materialize_grads=True
        )
        along = sum((g * v).sum() for g, v in zip(grads, _tangents(leaves).values(), strict=True))
        if isinstance(along, Tensor) and along.requires_grad:
            products = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
        else:
            products = tuple(torch.zeros_like(g) for g in grads)
    return [
        ("output", output.detach()),
        ("loss", value.detach()),
        ("gradient", _flat(grads)),
        ("second derivative", _flat(products)),
    ]


def _of_program(
    program: Program, params: Mapping[str, Tensor], side: _Side
) -> list[tuple[str, Tensor]]:
    y = side.y
    if program.loss is None or y is None:
        # |o|^2 as the loss, which shows the same derivatives.
        program = replace(program, loss=Loss("mse", "one", 1.0, per_row=False))
        y = torch.zeros_like(forward(program, params, side.x))
    weight = side.weight if program.loss is not None and program.loss.per_row else None
    value, grads, output = loss_and_grad(program, params, side.x, y, weight)
    if not params:
        return [("output", output), ("loss", value)]
    products = hvp(program, params, side.x, y, weight, _tangents(params))
    return [
        ("output", output),
        ("loss", value),
        ("gradient", _flat(grads[name] for name in params)),
        ("second derivative", _flat(products[name] for name in params)),
    ]


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _state(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random parameters of the module's shapes, and its buffers, in a dtype."""
    generator = torch.Generator().manual_seed(0)
    params = {}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=dtype).to(p.device)
        fan_in = p[0].numel() if p.dim() > 1 and p.shape[0] else 1
        params[name] = noise * fan_in**-0.5 + (0.5 if p.dim() == 1 else 0.0)
    buffers = {
        name: b.to(dtype) if b.is_floating_point() else b for name, b in model.named_buffers()
    }
    return params, buffers


def _tangents(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        for name, p in params.items()
    }


def _sides(program: Program, x: Tensor, y: Tensor | None, dtype: torch.dtype) -> list[_Side]:
    """The rows given, and random ones at another row count."""
    generator = torch.Generator().manual_seed(2)
    kinds = {node.layer.kind for node in program.nodes}
    least = 2 if "batch_norm" in kinds else 1
    rows = x.shape[0]
    given = rows >= least and bool(torch.isfinite(x).all())
    sides = []
    for count, inputs in ((max(rows, least), x if given else None), (max(rows, least) + 1, None)):
        if inputs is None:
            inputs = torch.randn(count, *x.shape[1:], generator=generator, dtype=dtype)
        targets: Tensor | None = None
        if y is not None and y.is_floating_point():
            targets = torch.randn(count, *y.shape[1:], generator=generator, dtype=dtype)
        elif y is not None:
            classes = program.output_shape[0] if program.output_shape else 1
            targets = torch.randint(classes, (count, *y.shape[1:]), generator=generator)
            targets = targets.to(y.dtype)
        weight = torch.rand(count, generator=generator, dtype=dtype) + 0.5
        sides.append(
            _Side(
                inputs.detach().to(x.device, dtype),
                None if targets is None else targets.to(x.device),
                weight.to(x.device),
            )
        )
    return sides
