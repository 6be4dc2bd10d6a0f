r"""The elementwise layers, in one table.

Each is a function f of one number with its first two derivatives; the four rules follow once for
all of them from the chain rule:

    y = f(x)    dx = f'(x) dy    R{y} = f'(x) rx    R{dx} = f'(x) rdy + f''(x) rx dy

| layer | f | f' | f'' |
| --- | --- | --- | --- |
| ReLU | max(x, 0) | [x > 0] | 0 |
| LeakyReLU | x, or a x where x <= 0 | 1, or a | 0 |
| ELU | x, or a (e^x - 1) where x <= 0 | 1, or a e^x | 0, or a e^x |
| Tanh | t = tanh x | 1 - t^2 | -2 t (1 - t^2) |
| Sigmoid | s = 1 / (1 + e^-x) | s' = s (1 - s) | s'' = s' (1 - 2 s) |
| SiLU | x s | s + x s' | 2 s' + x s'' |
| GELU | x Phi(x) | Phi + x phi | (2 - x^2) phi |
| GELU, tanh | x (1 + t) / 2, t = tanh u | (1 + t + x t') / 2 | t' + x t'' / 2 |

Phi and phi are the normal distribution and density; u = sqrt(2/pi) (x + 0.044715 x^3),
t' = (1 - t^2) u', t'' = (1 - t^2) (u'' - 2 t u'^2). At a kink the derivative is the left one,
as in torch.

Reference:
    Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2 (GELU, SiLU);
    Clevert, Unterthiner and Hochreiter, "ELU", ICLR 2016, equation 15.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastmeta.program.ir import Params, Saved, Shape
from fastmeta.program.reading import Call, Placed

__all__ = ["ELU", "GELU", "Elementwise", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Tanh"]


class Elementwise:
    """The rules that every elementwise layer shares; a layer adds f and its derivatives."""

    kind: ClassVar[str]
    param_names: ClassVar[tuple[str, ...]] = ()

    def f(self, x: Tensor) -> Tensor:
        """The function, element by element."""
        raise NotImplementedError

    def df(self, x: Tensor) -> Tensor:
        """Its first derivative."""
        raise NotImplementedError

    def ddf(self, x: Tensor) -> Tensor:
        """Its second derivative."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.kind

    def param_shapes(self) -> tuple[Shape, ...]:
        """No parameters."""
        return ()

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of the input."""
        return shape

    def forward(self, x: Tensor, params: Params, mask: Tensor | None) -> tuple[Tensor, Saved]:
        """Output y = f(x); keeps x."""
        return self.f(x), (x,)

    def vjp(self, saved: Saved, params: Params, dy: Tensor) -> tuple[Tensor, Params]:
        """Cotangents dx = f'(x) dy."""
        (x,) = saved
        return self.df(x) * dy, ()

    def r_forward(
        self, saved: Saved, params: Params, rx: Tensor, rparams: Params
    ) -> tuple[Tensor, Saved]:
        """Tangents R{y} = f'(x) rx; keeps rx."""
        (x,) = saved
        return self.df(x) * rx, (rx,)

    def r_vjp(
        self,
        saved: Saved,
        rsaved: Saved,
        params: Params,
        rparams: Params,
        dy: Tensor,
        rdy: Tensor,
    ) -> tuple[Tensor, Params]:
        """Tangents R{dx} = f'(x) rdy + f''(x) rx dy."""
        (x,), (rx,) = saved, rsaved
        return self.df(x) * rdy + self.ddf(x) * rx * dy, ()


@dataclass(frozen=True)
class ReLU(Elementwise):
    """max(x, 0)."""

    kind: ClassVar[str] = "relu"

    def f(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return x.clamp(min=0.0)  # keeps NaN, which a comparison would hide

    def df(self, x: Tensor) -> Tensor:
        """1 above zero, else 0."""
        return torch.where(x <= 0, torch.zeros_like(x), 1.0)

    def ddf(self, x: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class LeakyReLU(Elementwise):
    """The value x above zero, slope * x elsewhere.

    Args:
        slope: The derivative below zero.
    """

    kind: ClassVar[str] = "leaky_relu"

    slope: float = 0.01

    def __str__(self) -> str:
        return f"{self.kind} slope {self.slope:g}"

    def f(self, x: Tensor) -> Tensor:
        """The value x above zero, else slope * x."""
        return torch.where(x > 0, x, self.slope * x)

    def df(self, x: Tensor) -> Tensor:
        """1 above zero, else slope."""
        return torch.where(x > 0, torch.ones_like(x), self.slope)

    def ddf(self, x: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class ELU(Elementwise):
    """The value x above zero, alpha * (exp(x) - 1) elsewhere.

    Args:
        alpha: Minus the value far below zero.
    """

    kind: ClassVar[str] = "elu"

    alpha: float = 1.0

    def __str__(self) -> str:
        return f"{self.kind} alpha {self.alpha:g}"

    def f(self, x: Tensor) -> Tensor:
        """The value x above zero, else alpha * (exp(x) - 1)."""
        return torch.where(x > 0, x, self.alpha * torch.expm1(x.clamp(max=0.0)))

    def df(self, x: Tensor) -> Tensor:
        """1 above zero, else alpha * exp(x)."""
        return torch.where(x > 0, 1.0, self.alpha * x.clamp(max=0.0).exp())

    def ddf(self, x: Tensor) -> Tensor:
        """0 above zero, else alpha * exp(x)."""
        return torch.where(x > 0, 0.0, self.alpha * x.clamp(max=0.0).exp())


@dataclass(frozen=True)
class Tanh(Elementwise):
    """The hyperbolic tangent."""

    kind: ClassVar[str] = "tanh"

    def f(self, x: Tensor) -> Tensor:
        """The value tanh x."""
        return x.tanh()

    def df(self, x: Tensor) -> Tensor:
        """1 - tanh^2 x."""
        return 1 - x.tanh().square()

    def ddf(self, x: Tensor) -> Tensor:
        """-2 tanh x (1 - tanh^2 x)."""
        t = x.tanh()
        return -2 * t * (1 - t * t)


@dataclass(frozen=True)
class Sigmoid(Elementwise):
    """The logistic function 1 / (1 + exp(-x))."""

    kind: ClassVar[str] = "sigmoid"

    def f(self, x: Tensor) -> Tensor:
        """The value s = 1 / (1 + exp(-x))."""
        return x.sigmoid()

    def df(self, x: Tensor) -> Tensor:
        """The product s (1 - s)."""
        s = x.sigmoid()
        return s * (1 - s)

    def ddf(self, x: Tensor) -> Tensor:
        """The product s (1 - s) (1 - 2 s)."""
        s = x.sigmoid()
        return s * (1 - s) * (1 - 2 * s)


@dataclass(frozen=True)
class SiLU(Elementwise):
    """x times its logistic function, also called swish."""

    kind: ClassVar[str] = "silu"

    def f(self, x: Tensor) -> Tensor:
        """The product x s."""
        return x * x.sigmoid()

    def df(self, x: Tensor) -> Tensor:
        """The sum s + x s'."""
        s = x.sigmoid()
        return s + x * s * (1 - s)

    def ddf(self, x: Tensor) -> Tensor:
        """2 s' + x s''."""
        s = x.sigmoid()
        ds = s * (1 - s)
        return 2 * ds + x * ds * (1 - 2 * s)


@dataclass(frozen=True)
class GELU(Elementwise):
    """x times the normal distribution function of x, or the usual tanh approximation.

    Args:
        approximate: "none" or "tanh", as in torch.

    Raises:
        ValueError: another approximation.
    """

    kind: ClassVar[str] = "gelu"

    approximate: Literal["none", "tanh"] = "none"

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise ValueError(
                f"gelu: approximate must be 'none' or 'tanh', got {self.approximate!r}"
            )

    def __str__(self) -> str:
        return self.kind if self.approximate == "none" else f"{self.kind} (tanh)"

    def f(self, x: Tensor) -> Tensor:
        """The product x Phi(x)."""
        if self.approximate == "tanh":
            return 0.5 * x * (1 + self._tanh(x)[0])
        return x * _distribution(x)

    def df(self, x: Tensor) -> Tensor:
        """Phi + x phi."""
        if self.approximate == "tanh":
            t, dt, _ = self._tanh(x)
            return 0.5 * (1 + t + x * dt)
        return _distribution(x) + x * _density(x)

    def ddf(self, x: Tensor) -> Tensor:
        """(2 - x^2) phi."""
        if self.approximate == "tanh":
            _, dt, ddt = self._tanh(x)
            return dt + 0.5 * x * ddt
        return (2 - x * x) * _density(x)

    @staticmethod
    def _tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value t = tanh u of the approximation, with its first two derivatives by x."""
        c, a = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (x + a * x**3))
        du, ddu = c * (1 + 3 * a * x * x), 6 * c * a * x
        slope = 1 - t * t
        return t, slope * du, slope * (ddu - 2 * t * du * du)


def _distribution(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def read_relu(call: Call) -> Placed:
    """aten.relu."""
    return Placed(ReLU(), call.value("self"))


def read_leaky_relu(call: Call) -> Placed:
    """aten.leaky_relu."""
    return Placed(LeakyReLU(call.number("negative_slope")), call.value("self"))


def read_elu(call: Call) -> Placed:
    """aten.elu, without its scales."""
    if call.number("scale") != 1.0 or call.number("input_scale") != 1.0:
        raise call.refuse("with a scale is not a layer of the program")
    return Placed(ELU(call.number("alpha")), call.value("self"))


def read_tanh(call: Call) -> Placed:
    """aten.tanh."""
    return Placed(Tanh(), call.value("self"))


def read_sigmoid(call: Call) -> Placed:
    """aten.sigmoid."""
    return Placed(Sigmoid(), call.value("self"))


def read_silu(call: Call) -> Placed:
    """aten.silu."""
    return Placed(SiLU(), call.value("self"))


def read_gelu(call: Call) -> Placed:
    """aten.gelu."""
    return Placed(GELU(call.get("approximate")), call.value("self"))
