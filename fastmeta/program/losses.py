"""Losses in canonical form, L = factor / divisor * sum_n w_n l_n, with their hand-written rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Loss", "LossSaved"]


class LossSaved(NamedTuple):
    """What the loss keeps from its forward pass.

    `residual` [S, D] is o - y for mse and softmax(o) - onehot(y) for cross-entropy; `scale` [S, 1]
    is factor * w_n / divisor; `probs` [S, D] is softmax(o), for cross-entropy.
    """

    residual: Tensor
    scale: Tensor
    probs: Tensor | None


@dataclass(frozen=True)
class Loss:
    """A loss as the program knows it: L = factor / divisor * sum_n w_n l_n.

    Args:
        kind: "mse": l_n = sum_d (o_nd - y_nd)^2. "cross_entropy": l_n = -log softmax(o_n)[y_n].
        divisor: "rows": the number of rows S, or the sum of the weights when there are weights.
            "one": a plain sum.
        factor: What stands before the sum, such as 1/D for the mean over rows and features.
        per_row: Whether the user's function returns [S], one number a row. Their mean is the loss
            of a task. Weighted batches need this; the divisor is then "rows".

    Raises:
        ValueError: an unknown kind or divisor, or a per-row loss with divisor "one".

    Example:
        >>> print(Loss("mse", divisor="one", factor=0.5, per_row=False))
        0.5 * mse, sum over rows
    """

    kind: Literal["mse", "cross_entropy"]
    divisor: Literal["rows", "one"]
    factor: float
    per_row: bool

    def __post_init__(self) -> None:
        if self.kind not in ("mse", "cross_entropy"):
            raise ValueError(f"loss: kind must be 'mse' or 'cross_entropy', got {self.kind!r}")
        if self.divisor not in ("rows", "one"):
            raise ValueError(f"loss: divisor must be 'rows' or 'one', got {self.divisor!r}")
        if self.per_row and self.divisor != "rows":
            raise ValueError("loss: divisor must be 'rows' for a per-row loss, got 'one'")

    def __str__(self) -> str:
        factor = "" if self.factor == 1.0 else f"{self.factor:.6g} * "
        over = "mean" if self.divisor == "rows" else "sum"
        rows = ", one number a row" if self.per_row else ""
        return f"{factor}{self.kind}, {over} over rows{rows}"

    def check_output_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the loss can read output rows of this shape."""
        if self.kind == "cross_entropy" and len(shape) != 1:
            raise ValueError(f"loss: output must have rows of shape (N,), got {shape}")

    def forward(self, o: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, LossSaved]:
        """The loss of one task.

        Args:
            o: Output [S, ...].
            y: Targets of o's shape, or class numbers int64 [S] for cross-entropy.
            weight: Row weights [S], or None for ones. A row of weight zero has no influence,
                whatever stands in it.

        Returns:
            The loss [] and what the other rules need.
        """
        rows = o.shape[0]
        flat = o.reshape(rows, -1)
        if weight is None:
            weight = flat.new_ones(rows)
        divisor = weight.sum() if self.divisor == "rows" else flat.new_ones(())
        scale = (self.factor * weight / divisor).unsqueeze(1)
        live = (weight != 0).unsqueeze(1)
        if self.kind == "mse":
            residual = torch.where(live, flat - y.reshape(rows, -1), 0.0)
            return (scale * residual.square()).sum(), LossSaved(residual, scale, None)
        labels = torch.where(live, y.reshape(rows, 1), 0)
        shifted = flat - flat.amax(dim=1, keepdim=True)
        log_probs = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
        probs = log_probs.exp()
        residual = probs - torch.zeros_like(probs).scatter(1, labels, 1.0)
        terms = torch.where(live, scale * log_probs.gather(1, labels), 0.0)
        return -terms.sum(), LossSaved(residual, scale, probs)

    def vjp(self, saved: LossSaved) -> Tensor:
        """The gradient [S, D] of the loss with respect to the output."""
        if saved.probs is None:
            return 2 * saved.scale * saved.residual
        return saved.scale * saved.residual

    def r_vjp(self, saved: LossSaved, ro: Tensor) -> Tensor:
        """The tangent [S, D] of `vjp` along the output's tangent ro [S, ...]."""
        flat = ro.reshape(saved.residual.shape)
        if saved.probs is None:
            return 2 * saved.scale * flat
        mean = (saved.probs * flat).sum(dim=1, keepdim=True)
        return saved.scale * saved.probs * (flat - mean)
