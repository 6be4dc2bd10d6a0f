"""A row of any shape as a row of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from fastmeta.program.ir import Params, Saved, Shape

__all__ = ["Flatten"]


@dataclass(frozen=True)
class Flatten:
    """[S, ...] as [S, D], D the product of a row's dimensions; a view, and so is every rule."""

    kind: ClassVar[str] = "flatten"
    param_names: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return self.kind

    def param_shapes(self) -> tuple[Shape, ...]:
        """No parameters."""
        return ()

    def output_shape(self, shape: Shape) -> Shape:
        """(D,)."""
        return (prod(shape),)

    def forward(self, x: Tensor, params: Params, mask: Tensor | None) -> tuple[Tensor, Saved]:
        """Output y is x as [S, D]; keeps x for its shape."""
        return x.reshape(x.shape[0], -1), (x,)

    def vjp(self, saved: Saved, params: Params, dy: Tensor) -> tuple[Tensor, Params]:
        """Cotangent dx is dy in the shape of x."""
        (x,) = saved
        return dy.reshape(x.shape), ()

    def r_forward(
        self, saved: Saved, params: Params, rx: Tensor, rparams: Params
    ) -> tuple[Tensor, Saved]:
        """Tangents R{y} is rx as [S, D]."""
        return rx.reshape(rx.shape[0], -1), ()

    def r_vjp(
        self,
        saved: Saved,
        rsaved: Saved,
        params: Params,
        rparams: Params,
        dy: Tensor,
        rdy: Tensor,
    ) -> tuple[Tensor, Params]:
        """Tangents R{dx} is rdy in the shape of x."""
        return self.vjp(saved, params, rdy)
