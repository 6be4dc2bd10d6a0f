"""The fully connected layer: y = x W^T + b."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastmeta.program.ir import Params, Saved, Shape
from fastmeta.program.reading import Call, Param, Placed, Value

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


def read_linear(call: Call) -> Placed:
    """aten.linear(x, W, b)."""
    weight, bias = call.param("weight"), call.param("bias")
    if weight is None or weight.transposed:
        raise call.refuse("must take a parameter [out, in] as weight")
    return _place(call, call.value("input"), weight, bias)


def read_matmul(call: Call) -> Placed:
    """The product x @ W.t() with a parameter W [out, in]."""
    weight = call.param("other" if "other" in call.operation.arguments else "mat2")
    return _place(call, call.value("self"), _transposed(call, weight), None)


def read_addmm(call: Call) -> Placed:
    """torch.addmm(b, x, W.t())."""
    if call.number("alpha") != 1.0 or call.number("beta") != 1.0:
        raise call.refuse("must have alpha and beta 1")
    weight = _transposed(call, call.param("mat2"))
    return _place(call, call.value("mat1"), weight, call.param("self"))


def read_add(call: Call) -> Placed:
    """The bias added to x @ W.t(): the layer once more, now with it; the one without is dead."""
    sides = [call.get("self"), call.get("other")]
    value = next((side for side in sides if isinstance(side, Value)), None)
    bias = next((side for side in sides if isinstance(side, Param)), None)
    node = None if value is None else call.maker(value)
    if value is None or bias is None or node is None or call.number("alpha") != 1.0:
        raise call.refuse("is a layer of the program only as the bias of a linear layer")
    layer = node.layer
    if not isinstance(layer, Linear) or node.params[1] is not None:
        raise call.refuse("is a layer of the program only as the bias of a linear layer")
    if bias.shape != (layer.out_features,) or value.shape != bias.shape:
        raise call.refuse(f"must add a bias of shape ({layer.out_features},), got {bias.shape}")
    source = Value(node.inputs[0], (layer.in_features,))
    return Placed(layer, source, (node.params[0], bias.name))


def _transposed(call: Call, weight: Param | None) -> Param:
    if weight is None or not weight.transposed:
        raise call.refuse("is a linear layer only with a parameter W [out, in] as x @ W.t()")
    return weight


def _place(call: Call, x: Value, weight: Param, bias: Param | None) -> Placed:
    outputs, inputs = weight.shape
    if x.shape != (inputs,):
        raise call.refuse(f"is a layer only on rows of shape ({inputs},), got {x.shape}")
    if bias is not None and (bias.shape != (outputs,) or bias.transposed):
        raise call.refuse(f"must add a bias of shape ({outputs},), got {bias.shape}")
    name = None if bias is None else bias.name
    return Placed(Linear(inputs, outputs), x, (weight.name, name))


READS = {
    "linear": read_linear,
    "matmul": read_matmul,
    "mm": read_matmul,
    "addmm": read_addmm,
    "add": read_add,
}
