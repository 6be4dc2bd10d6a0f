"""Batch normalisation of feature rows with the statistics of the batch at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastmeta.program.ir import Params, Saved, Shape
from fastmeta.program.reading import Call, Placed

__all__ = ["BatchNorm1d"]


@dataclass(frozen=True)
class BatchNorm1d:
    """y = g (x - mu) r + b with r = (v + eps)^(-1/2); mu and v are the batch's mean and variance.

    The variance is the biased one (divided by the number of rows). With a mask, mu and v are those
    of the m rows whose mask is True; the other rows are normalised with them too, but no statistic
    depends on them. g and b may be absent (1 and 0). The derivations are in the folder's README.

    Args:
        features: Numbers in a row.
        eps: Added to the variance.

    Raises:
        ValueError: from `forward`, with fewer than two rows to take statistics of.

    Reference:
        Ioffe and Szegedy, "Batch normalization", ICML 2015, algorithm 1 and section 3.
    """

    kind: ClassVar[str] = "batch_norm"
    param_names: ClassVar[tuple[str, ...]] = ("weight", "bias")

    features: int
    eps: float = 1e-5

    def __str__(self) -> str:
        return f"{self.kind} {self.features} eps {self.eps:g}"

    def param_shapes(self) -> tuple[Shape, ...]:
        """Shapes of weight (g) and bias (b)."""
        return (self.features,), (self.features,)

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of the input, which must be (features,)."""
        if shape != (self.features,):
            raise ValueError(f"batch_norm: rows must have shape ({self.features},), got {shape}")
        return shape

    def forward(self, x: Tensor, params: Params, mask: Tensor | None) -> tuple[Tensor, Saved]:
        """Output y = g xh + b; keeps xh = (x - mu) r, r and each row's share: 1/m, 0 if masked."""
        rows = x.shape[0] if mask is None else int(mask.sum())
        if rows < 2:
            raise ValueError(
                "batch_norm: x must have more than 1 value per channel for batch statistics, "
                f"got {rows} row{'' if rows == 1 else 's'}"
            )
        live = x.new_ones(x.shape[0]) if mask is None else mask.to(x.dtype)
        share = (live / rows).unsqueeze(1)
        centred = x - (share * x).sum(dim=0)
        r = ((share * centred.square()).sum(dim=0) + self.eps).rsqrt()
        xh = centred * r
        g, b = params
        y = xh if g is None else g * xh
        return (y if b is None else y + b), (xh, r, share)

    def vjp(self, saved: Saved, params: Params, dy: Tensor) -> tuple[Tensor, Params]:
        """With dxh = g dy: dx = r (dxh - share (sum dxh + xh sum dxh xh)), dg = sum dy xh, db."""
        xh, r, share = saved
        g, b = params
        dxh = dy if g is None else g * dy
        dx = r * (dxh - share * (dxh.sum(dim=0) + xh * (dxh * xh).sum(dim=0)))
        dg = None if g is None else (dy * xh).sum(dim=0)
        db = None if b is None else dy.sum(dim=0)
        return dx, (dg, db)

    def r_forward(
        self, saved: Saved, params: Params, rx: Tensor, rparams: Params
    ) -> tuple[Tensor, Saved]:
        """Tangents R{y} = rg xh + g rxh + rb; keeps rxh and rr."""
        xh, r, share = saved
        g, _ = params
        rg, rb = rparams
        # q = R{log r}: R{v} = 2 sum share (x - mu) rx, R{r} = -r^3 R{v} / 2, (x - mu) r = xh.
        q = -r * (share * xh * rx).sum(dim=0)
        rxh = r * (rx - (share * rx).sum(dim=0)) + q * xh
        ry = rxh if g is None else g * rxh
        if rg is not None:
            ry = ry + rg * xh
        if rb is not None:
            ry = ry + rb
        return ry, (rxh, q * r)

    def r_vjp(
        self,
        saved: Saved,
        rsaved: Saved,
        params: Params,
        rparams: Params,
        dy: Tensor,
        rdy: Tensor,
    ) -> tuple[Tensor, Params]:
        """The product rule on `vjp`, with A = sum dxh and B = sum dxh xh."""
        xh, r, share = saved
        rxh, rr = rsaved
        (g, b), rg = params, rparams[0]
        dxh = dy if g is None else g * dy
        rdxh = rdy if g is None else g * rdy
        if rg is not None:
            rdxh = rdxh + rg * dy
        sum_a, sum_b = dxh.sum(dim=0), (dxh * xh).sum(dim=0)
        rsum_a, rsum_b = rdxh.sum(dim=0), (rdxh * xh + dxh * rxh).sum(dim=0)
        rdx = rr * (dxh - share * (sum_a + xh * sum_b)) + r * (
            rdxh - share * (rsum_a + rxh * sum_b + xh * rsum_b)
        )
        rdg = None if g is None else (rdy * xh + dy * rxh).sum(dim=0)
        rdb = None if b is None else rdy.sum(dim=0)
        return rdx, (rdg, rdb)


def read_batch_norm(call: Call) -> Placed:
    """aten.batch_norm with the statistics of the batch; an update of running ones is dropped."""
    if not call.get("training"):
        raise call.refuse(
            "with running statistics (eval mode) is not a layer of the program, "
            "which takes the statistics of the batch"
        )
    if call.batch_norm != "batch":
        raise call.refuse(
            f"with batch_norm={call.batch_norm!r} is not a layer of the program, which takes the "
            "statistics of the batch and keeps no running ones (batch_norm='batch')"
        )
    x, weight, bias = call.value("input"), call.param("weight"), call.param("bias")
    if len(x.shape) != 1:
        raise call.refuse(f"is a layer only on rows of shape (features,), got {x.shape}")
    note = ""
    if call.get("running_mean") is not None:
        note = f"{call.operation.where}: the update of the running statistics is dropped"
    names = (None if weight is None else weight.name, None if bias is None else bias.name)
    return Placed(BatchNorm1d(x.shape[0], call.number("eps")), x, names, note)


READS = {"batch_norm": read_batch_norm}
