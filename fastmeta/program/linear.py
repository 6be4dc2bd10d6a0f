"""The fully connected layer: y = x W^T + b."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastmeta.program.ir import Params, Saved, Shape

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b, with W [out, in] and b [out]; b may be absent.

    Args:
        in_features: Numbers in an input row.
        out_features: Numbers in an output row.
    """

    kind: ClassVar[str] = "linear"
    param_names: ClassVar[tuple[str, ...]] = ("weight", "bias")

    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.kind} {self.in_features} -> {self.out_features}"

    def param_shapes(self) -> tuple[Shape, ...]:
        """Shapes of weight and bias."""
        return (self.out_features, self.in_features), (self.out_features,)

    def output_shape(self, shape: Shape) -> Shape:
        """(out_features,) for rows of shape (in_features,)."""
        if shape != (self.in_features,):
            raise ValueError(f"linear: rows must have shape ({self.in_features},), got {shape}")
        return (self.out_features,)

    def forward(self, x: Tensor, params: Params, mask: Tensor | None) -> tuple[Tensor, Saved]:
        """Output y = x W^T + b; keeps x."""
        weight, bias = _weight(params), params[1]
        y = x @ weight.mT
        return (y if bias is None else y + bias), (x,)

    def vjp(self, saved: Saved, params: Params, dy: Tensor) -> tuple[Tensor, Params]:
        """Cotangents dx = dy W, dW = dy^T x, db = sum_n dy_n."""
        (x,) = saved
        db = None if params[1] is None else dy.sum(dim=0)
        return dy @ _weight(params), (dy.mT @ x, db)

    def r_forward(
        self, saved: Saved, params: Params, rx: Tensor, rparams: Params
    ) -> tuple[Tensor, Saved]:
        """Tangents R{y} = rx W^T + x rW^T + rb; keeps rx."""
        (x,) = saved
        rweight, rbias = rparams
        ry = rx @ _weight(params).mT
        if rweight is not None:
            ry = ry + x @ rweight.mT
        if rbias is not None:
            ry = ry + rbias
        return ry, (rx,)

    def r_vjp(
        self,
        saved: Saved,
        rsaved: Saved,
        params: Params,
        rparams: Params,
        dy: Tensor,
        rdy: Tensor,
    ) -> tuple[Tensor, Params]:
        """Tangents R{dx} = rdy W + dy rW, R{dW} = rdy^T x + dy^T rx, R{db} = sum_n rdy_n."""
        (x,), (rx,) = saved, rsaved
        rdx = rdy @ _weight(params)
        if rparams[0] is not None:
            rdx = rdx + dy @ rparams[0]
        rdb = None if params[1] is None else rdy.sum(dim=0)
        return rdx, (rdy.mT @ x + dy.mT @ rx, rdb)


def _weight(params: Params) -> Tensor:
    weight = params[0]
    if weight is None:
        raise ValueError("linear: weight must be given, got None")
    return weight
