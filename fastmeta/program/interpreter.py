"""The plain interpreter of the layer program: one task, the hand rules, no autograd.

It is the oracle of every executor, so it is written to be read: it keeps nothing that it could
compute again. The derivation of `meta_gradient` is in the folder's README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmeta.program.ir import Params, Program, Saved
from fastmeta.program.losses import Loss, LossSaved

__all__ = [
    "LossAndGrad",
    "Rows",
    "TaskGradient",
    "forward",
    "hvp",
    "loss_and_grad",
    "meta_gradient",
]

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """One task's support or query rows.

    Args:
        x: Inputs [S, ...].
        y: Targets [S, ...].
        weight: Row weights [S]; a row of weight zero has no influence. None: all ones.
        index: Rows that each inner step sees, int64 [I, B]. None: all of them at every step.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    index: Tensor | None = None

    def at(self, step: int) -> Rows:
        """The rows of one inner step."""
        if self.index is None:
            return self
        rows = self.index[step]
        weight = None if self.weight is None else self.weight[rows]
        return Rows(self.x[rows], self.y[rows], weight)


class LossAndGrad(NamedTuple):
    """The loss [] of one task, its gradient for every parameter, and the output [S, ...]."""

    loss: Tensor
    grads: dict[str, Tensor]
    output: Tensor


class TaskGradient(NamedTuple):
    """What `meta_gradient` returns for one task.

    Args:
        loss: The query loss [] after the last inner step.
        grads: The meta-gradient of every parameter of the program.
        rates: The gradient of every rate, in the shape it was given in.
        adapted: The adapted parameters after the last inner step.
        support_losses: The support loss [I] before each inner step.
        output: The query output [Q, ...].
    """

    loss: Tensor
    grads: dict[str, Tensor]
    rates: dict[str, Tensor]
    adapted: dict[str, Tensor]
    support_losses: Tensor
    output: Tensor


class _Trace(NamedTuple):
    """A forward pass: every node's saved values, the output in the program's shape, the loss."""

    saved: list[Saved]
    values: list[Tensor]
    output: Tensor


def forward(program: Program, params: Named, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The program's output for one task.

    Args:
        program: The program.
        params: Every parameter by name.
        x: Inputs [S, *input_shape].
        mask: Rows [S] that count; the others stay out of BatchNorm's statistics. None: all.

    Returns:
        The output [S, *output_shape].

    Raises:
        ValueError: parameters or x that do not fit the program.

    Example:
        >>> from fastmeta.program import Linear, Program
        >>> program = Program.chain([Linear(2, 1)], (2,), without=["0.bias"])
        >>> forward(program, {"0.weight": torch.tensor([[1.0, 2.0]])}, torch.ones(3, 2))
        tensor([[3.],
                [3.],
                [3.]])
    """
    _check_params(program, params)
    return _run(program, params, x, mask).output


def loss_and_grad(
    program: Program, params: Named, x: Tensor, y: Tensor, weight: Tensor | None = None
) -> LossAndGrad:
    """The loss of one task and its gradient, by the hand-written vjp of each layer.

    Args:
        program: The program, with a loss.
        params: Every parameter by name.
        x: Inputs [S, *input_shape].
        y: Targets [S, ...].
        weight: Row weights [S], or None. Needs a per-row loss.

    Returns:
        The loss, the gradient of every parameter, and the output.

    Raises:
        ValueError: arguments that do not fit the program.
    """
    _check_params(program, params)
    loss, rows = _ready(program, Rows(x, y, weight))
    trace = _run(program, params, rows.x, _mask(rows))
    value, saved = loss.forward(trace.output, rows.y, rows.weight)
    grads = _reverse(program, params, trace, loss, saved)
    return LossAndGrad(value, grads, trace.output)


def hvp(
    program: Program,
    params: Named,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    v: Named,
) -> dict[str, Tensor]:
    """The Hessian of the loss times v: one forward and one reverse pass of the R-operator.

    Args:
        program: The program, with a loss.
        params: Every parameter by name.
        x: Inputs [S, *input_shape].
        y: Targets [S, ...].
        weight: Row weights [S], or None. Needs a per-row loss.
        v: Tangents by name; a parameter that is missing has tangent zero, and still gets its
            part of the product.

    Returns:
        sum_j d^2 L / dp_i dp_j v_j for every parameter p_i of the program.

    Raises:
        ValueError: arguments that do not fit the program.

    Reference:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994, section 4.
    """
    _check_params(program, params)
    loss, rows = _ready(program, Rows(x, y, weight))
    trace = _run(program, params, rows.x, _mask(rows))
    _, saved = loss.forward(trace.output, rows.y, rows.weight)
    return _r_reverse(program, params, v, trace, loss, saved)


def meta_gradient(
    program: Program,
    params: Named,
    support: Rows,
    query: Rows,
    *,
    rates: Mapping[str, Tensor | float],
    steps: int,
    order: Literal[1, 2] = 2,
) -> TaskGradient:
    """The gradient of one task's query loss through its inner loop, exact.

    With g_k the support gradient at theta_k and theta_(k+1) = theta_k - alpha_k g_k, the reverse
    recursion from lambda_I = dL_query/dtheta_I is

        lambda_k = lambda_(k+1) - H(theta_k) (alpha_k lambda_(k+1)),   dalpha_k = -lambda_(k+1) g_k.

    Args:
        program: The program, with a loss.
        params: Every parameter by name, as they are before the inner loop.
        support: The rows that the inner loop sees.
        query: The rows of the outer loss.
        rates: The inner rate alpha of every parameter that adapts: a number, or a tensor that
            broadcasts to [I, *shape]. A parameter that is missing does not adapt.
        steps: Inner steps I.
        order: 1 takes the inner loop's gradients as constants.

    Returns:
        The query loss, the meta-gradients, and what else the inner loop made.

    Raises:
        ValueError: arguments that do not fit the program.

    Reference:
        Finn, Abbeel and Levine, "Model-agnostic meta-learning", ICML 2017, algorithm 1, with the
        products by the Hessian of section 2.2 done by hand.
    """
    if steps < 0:
        raise ValueError(f"meta_gradient: steps must be at least 0, got {steps}")
    if order not in (1, 2):
        raise ValueError(f"meta_gradient: order must be 1 or 2, got {order}")
    _check_params(program, params)
    alpha = _spread(program, params, rates, steps)

    # The inner loop. Only theta_k and g_k are kept; the way back recomputes the rest.
    theta, thetas, inner_grads = dict(params), [], []
    support_losses = []
    for step in range(steps):
        rows = support.at(step)
        value, grads, _ = loss_and_grad(program, theta, rows.x, rows.y, rows.weight)
        thetas.append(theta)
        inner_grads.append(grads)
        support_losses.append(value)
        theta = {
            name: value - alpha[name][step] * grads[name] if name in alpha else value
            for name, value in theta.items()
        }

    query_loss, lam, output = loss_and_grad(program, theta, query.x, query.y, query.weight)

    # The way back. lam holds lambda for what adapts; for the rest it gathers the meta-gradient.
    d_alpha = {name: torch.zeros_like(a) for name, a in alpha.items()}
    for step in reversed(range(steps)):
        for name in alpha:
            d_alpha[name][step] = -lam[name] * inner_grads[step][name]
        if order == 2:
            v = {name: a[step] * lam[name] for name, a in alpha.items()}
            rows = support.at(step)
            product = hvp(program, thetas[step], rows.x, rows.y, rows.weight, v)
            lam = {name: value - product[name] for name, value in lam.items()}

    return TaskGradient(
        loss=query_loss,
        grads=lam,
        rates={name: _gather(d, rates[name]) for name, d in d_alpha.items()},
        adapted={name: theta[name] for name in alpha},
        support_losses=torch.stack(support_losses) if steps else query_loss.new_empty(0),
        output=output,
    )


def _run(program: Program, params: Named, x: Tensor, mask: Tensor | None) -> _Trace:
    if x.dim() == 0 or tuple(x.shape[1:]) != program.input_shape:
        raise ValueError(
            f"program: x must have shape [S, {', '.join(map(str, program.input_shape))}], "
            f"got {list(x.shape)}"
        )
    values, saved = [x], []
    for node in program.nodes:
        y, kept = node.layer.forward(values[node.inputs[0]], _of(params, node.params), mask)
        values.append(y)
        saved.append(kept)
    output = values[-1].reshape(x.shape[0], *program.output_shape)
    return _Trace(saved, values, output)


def _reverse(
    program: Program, params: Named, trace: _Trace, loss: Loss, loss_saved: LossSaved
) -> dict[str, Tensor]:
    """The gradient of every parameter: each layer's vjp, from the loss back."""
    grads = {name: torch.zeros_like(params[name]) for name in program.params}
    dvalues = [torch.zeros_like(value) for value in trace.values]
    dvalues[-1] = loss.vjp(loss_saved).reshape(trace.values[-1].shape)
    for i, node in reversed(list(enumerate(program.nodes))):
        dx, dparams = node.layer.vjp(trace.saved[i], _of(params, node.params), dvalues[i + 1])
        dvalues[node.inputs[0]] = dvalues[node.inputs[0]] + dx
        _put(grads, node.params, dparams)
    return grads


def _r_reverse(
    program: Program, params: Named, v: Named, trace: _Trace, loss: Loss, loss_saved: LossSaved
) -> dict[str, Tensor]:
    """The tangent along v of every gradient: r_forward to the loss, then vjp and r_vjp back."""
    rvalues, rsaved = [torch.zeros_like(trace.values[0])], []
    for i, node in enumerate(program.nodes):
        ry, kept = node.layer.r_forward(
            trace.saved[i], _of(params, node.params), rvalues[node.inputs[0]], _of(v, node.params)
        )
        rvalues.append(ry)
        rsaved.append(kept)

    products = {name: torch.zeros_like(params[name]) for name in program.params}
    dvalues = [torch.zeros_like(value) for value in trace.values]
    rdvalues = [torch.zeros_like(value) for value in trace.values]
    dvalues[-1] = loss.vjp(loss_saved).reshape(trace.values[-1].shape)
    rdvalues[-1] = loss.r_vjp(loss_saved, rvalues[-1]).reshape(trace.values[-1].shape)
    for i, node in reversed(list(enumerate(program.nodes))):
        here, rhere = _of(params, node.params), _of(v, node.params)
        dy, rdy = dvalues[i + 1], rdvalues[i + 1]
        dx, _ = node.layer.vjp(trace.saved[i], here, dy)
        rdx, rdparams = node.layer.r_vjp(trace.saved[i], rsaved[i], here, rhere, dy, rdy)
        source = node.inputs[0]
        dvalues[source] = dvalues[source] + dx
        rdvalues[source] = rdvalues[source] + rdx
        _put(products, node.params, rdparams)
    return products


def _of(named: Named, names: tuple[str | None, ...]) -> Params:
    return [None if name is None else named.get(name) for name in names]


def _put(grads: dict[str, Tensor], names: tuple[str | None, ...], values: Params) -> None:
    for name, value in zip(names, values, strict=True):
        if name is not None and value is not None:
            grads[name] = value


def _mask(rows: Rows) -> Tensor | None:
    return None if rows.weight is None else rows.weight != 0


def _ready(program: Program, rows: Rows) -> tuple[Loss, Rows]:
    """Check one side against the program, and empty its masked rows: padding may hold anything."""
    loss = program.loss
    if loss is None:
        raise ValueError("program: loss must be given for this call, got a program without one")
    if rows.weight is None:
        return loss, rows
    if not loss.per_row:
        raise ValueError("program: weight needs a loss that returns one number a row")
    if rows.weight.shape != rows.x.shape[:1]:
        raise ValueError(
            f"program: weight must have shape [{rows.x.shape[0]}], got {list(rows.weight.shape)}"
        )
    live = rows.weight.reshape(-1, *[1] * (rows.x.dim() - 1)) != 0
    return loss, replace(rows, x=torch.where(live, rows.x, torch.zeros_like(rows.x)))


def _check_params(program: Program, params: Named) -> None:
    for name, shape in program.params.items():
        if name not in params:
            raise ValueError(f"program: params must hold {name!r}, got {sorted(params)}")
        if tuple(params[name].shape) != shape:
            raise ValueError(
                f"program: params[{name!r}] must have shape {list(shape)}, "
                f"got {list(params[name].shape)}"
            )
    extra = sorted(set(params) - set(program.params))
    if extra:
        raise ValueError(f"program: params must be {sorted(program.params)}, got also {extra}")


def _spread(
    program: Program, params: Named, rates: Mapping[str, Tensor | float], steps: int
) -> dict[str, Tensor]:
    """Every rate as [I, *shape]."""
    alpha = {}
    for name, rate in rates.items():
        if name not in program.params:
            raise ValueError(
                f"meta_gradient: rates must name parameters of the program, got {name!r}"
            )
        like = params[name]
        shape = (steps, *like.shape)
        rate = torch.as_tensor(rate, dtype=like.dtype, device=like.device)
        try:
            alpha[name] = rate.broadcast_to(shape)
        except RuntimeError as error:
            raise ValueError(
                f"meta_gradient: rates[{name!r}] must broadcast to {list(shape)}, "
                f"got {list(rate.shape)}"
            ) from error
    return alpha


def _gather(d: Tensor, rate: Tensor | float) -> Tensor:
    """The gradient of a rate from that of its [I, *shape] copies."""
    return d.sum_to_size(rate.shape) if isinstance(rate, Tensor) else d.sum()
