"""Inner optimizers: plain values that say how one task's parameters move.

Each is a frozen dataclass and a pytree whose leaves are its numbers and tensors, so a
meta-gradient with respect to an optimizer has the optimizer's own structure. Every update is
exact, differentiable torch code on one task's tensors (no task axis), so it runs under autograd
and under ``vmap`` alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, number, type_error, value_error, whole_number

__all__ = ["SGD", "Adam", "InnerOptimizer", "Momentum", "OptimizerState", "ResolvedSGD", "resolve"]

Number: TypeAlias = float | Tensor
Rate: TypeAlias = float | Tensor | Mapping[str, float | Tensor]


class OptimizerState(NamedTuple):
    """What an inner optimizer carries from step to step, and from call to call.

    Args:
        step: int64, updates made so far; ``[]`` for one task, ``[T]`` for a batch.
        first: the momentum buffer, or Adam's first moment, by parameter name; ``[...]`` for one
            task, ``[T, ...]`` for a batch. Empty for SGD.
        second: Adam's second moment, likewise.
    """

    step: Tensor
    first: dict[str, Tensor]
    second: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class InnerOptimizer:
    """What every inner optimizer has: a rate, a number of steps, and which parameters adapt."""

    lr: Rate = 0.01
    steps: int = 1
    adapt: tuple[str, ...] | str = "*"
    exclude: tuple[str, ...] | str = ()

    _static: ClassVar[tuple[str, ...]] = ("steps", "adapt", "exclude")

    def __post_init__(self) -> None:
        op = type(self).__name__
        set_field = object.__setattr__
        set_field(self, "lr", _checked_rate(op, self.lr))
        set_field(self, "steps", whole_number(op, "steps", self.steps))
        set_field(self, "adapt", _patterns(op, "adapt", self.adapt))
        set_field(self, "exclude", _patterns(op, "exclude", self.exclude))

    def initial_state(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """The state before the first step of one task; ``params`` are those that adapt."""
        raise NotImplementedError

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, Number],
        state: OptimizerState,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """One step of one task, out of place and differentiable."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class SGD(InnerOptimizer):
    r"""Gradient descent: :math:`\theta_{k+1} = \theta_k - \alpha_k \odot \nabla L(\theta_k)`.

    Args:
        lr: the rate. A number; a tensor ``[]`` (one rate) or ``[I]`` (one per step); or a mapping
            from a name pattern to a number or tensor (a rate per layer), where a tensor may be
            ``[]``, ``[I]``, the parameter's own shape (per element), or ``[I, *shape]`` (per step
            and element; sizes of 1 broadcast). Each adapted parameter must match exactly one key.
            A tensor that requires grad is a meta-parameter, and its sign is not checked, because
            learned rates may turn negative.
        steps: the number of inner steps I, at least 0.
        adapt: patterns (as in ``fnmatch``) of the parameters that adapt.
        exclude: patterns taken out again, such as ``"*.bias"``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: negative steps, or a rate that is a negative or non-finite number.

    Example:
        >>> SGD(lr=0.4, steps=3).steps
        3
        >>> SGD(lr=-1.0)
        Traceback (most recent call last):
        ValueError: SGD: lr must be at least 0, got -1.0

    Reference:
        Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning", equation 1; per-element rates:
        Li, Zhou, Chen, Li (2017), "Meta-SGD", equation 1; per-layer, per-step rates: Antoniou,
        Edwards, Storkey (2019), "How to train your MAML", section 4.
    """

    def initial_state(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """SGD carries only the count of its steps."""
        return OptimizerState(_zero_step(params), {}, {})

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, Number],
        state: OptimizerState,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """One step of one task, out of place and differentiable."""
        moved = {name: param - rates[name] * grads[name] for name, param in params.items()}
        return moved, state._replace(step=state.step + 1)


@dataclass(frozen=True, eq=False)
class Momentum(InnerOptimizer):
    r"""Heavy-ball or Nesterov momentum, with the conventions of ``torch.optim.SGD``.

    :math:`b_{k+1} = \mu b_k + \nabla L(\theta_k)` with :math:`b_0 = 0`, then
    :math:`\theta_{k+1} = \theta_k - \alpha_k b_{k+1}`, or with ``nesterov``
    :math:`\theta_{k+1} = \theta_k - \alpha_k (\nabla L(\theta_k) + \mu b_{k+1})`.

    Args:
        lr: the rate, as for :class:`SGD`.
        steps: the number of inner steps I.
        adapt: patterns of the parameters that adapt.
        exclude: patterns taken out again.
        momentum: :math:`\mu`, a number or a tensor ``[]`` (a meta-parameter if it requires grad).
        nesterov: whether to use Nesterov's form.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.

    Example:
        >>> Momentum(lr=0.1, steps=2, momentum=0.9).momentum
        0.9

    Reference:
        Sutskever, Martens, Dahl, Hinton (2013), "On the importance of initialization and momentum
        in deep learning", section 2.
    """

    momentum: Number = 0.9
    nesterov: bool = False

    _static: ClassVar[tuple[str, ...]] = ("steps", "adapt", "exclude", "nesterov")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "momentum", _checked_number("Momentum", "momentum", self.momentum))

    def initial_state(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """Zero buffers."""
        buffers = {name: torch.zeros_like(param) for name, param in params.items()}
        return OptimizerState(_zero_step(params), buffers, {})

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, Number],
        state: OptimizerState,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """One step of one task, out of place and differentiable."""
        mu = self.momentum
        buffers = {name: mu * state.first[name] + grads[name] for name in params}
        moves = {name: grads[name] + mu * b for name, b in buffers.items()}
        moves = moves if self.nesterov else buffers
        moved = {name: param - rates[name] * moves[name] for name, param in params.items()}
        return moved, OptimizerState(state.step + 1, buffers, {})


@dataclass(frozen=True, eq=False)
class Adam(InnerOptimizer):
    r"""Adam, with the conventions (and the values) of ``torch.optim.Adam``.

    The step divides by :math:`\sqrt{\hat v} + \epsilon`. Where the second moment is exactly zero,
    autograd's square root has an infinite derivative and the meta-gradient would be NaN. There all
    gradients so far were zero, hence so is the first moment, and the true derivative of
    :math:`\hat m / (\sqrt{\hat v} + \epsilon)` is that of :math:`\hat m / \epsilon`: the square
    root is held constant at such elements, which is exact.

    Args:
        lr: the rate, as for :class:`SGD`.
        steps: the number of inner steps I.
        adapt: patterns of the parameters that adapt.
        exclude: patterns taken out again.
        betas: the two decay rates, numbers or tensors ``[]`` (meta-parameters if they require
            grad).
        eps: added to the square root.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.

    Example:
        >>> Adam(lr=1e-3, steps=5, betas=(0.0, 0.999)).betas
        (0.0, 0.999)

    Reference:
        Kingma, Ba (2015), "Adam: A Method for Stochastic Optimization", algorithm 1.
    """

    lr: Rate = 0.001
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: float = 1e-8

    _static: ClassVar[tuple[str, ...]] = ("steps", "adapt", "exclude", "eps")

    def __post_init__(self) -> None:
        super().__post_init__()
        betas: Any = self.betas
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise type_error("Adam", "betas", "be a pair of numbers", describe(betas))
        checked = tuple(_checked_number("Adam", "betas", beta) for beta in betas)
        for beta in checked:
            if not isinstance(beta, Tensor) and beta >= 1:
                raise value_error("Adam", "betas", "be below 1", beta)
        object.__setattr__(self, "betas", checked)
        object.__setattr__(self, "eps", number("Adam", "eps", self.eps, at_least=0.0))

    def initial_state(self, params: Mapping[str, Tensor]) -> OptimizerState:
        """Zero moments."""
        first = {name: torch.zeros_like(param) for name, param in params.items()}
        second = {name: torch.zeros_like(param) for name, param in params.items()}
        return OptimizerState(_zero_step(params), first, second)

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, Number],
        state: OptimizerState,
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """One step of one task, out of place and differentiable."""
        beta1, beta2 = self.betas
        step = state.step + 1
        correction1 = 1 - _power(beta1, step)
        correction2 = 1 - _power(beta2, step)
        moved, first, second = {}, {}, {}
        for name, param in params.items():
            g = grads[name]
            m = first[name] = beta1 * state.first[name] + (1 - beta1) * g
            v = second[name] = beta2 * state.second[name] + (1 - beta2) * g * g
            root = _sqrt(v / correction2.to(v.dtype))
            direction = m / correction1.to(m.dtype) / (root + self.eps)
            moved[name] = param - rates[name] * direction
        return moved, OptimizerState(step, first, second)


def _sqrt(value: Tensor) -> Tensor:
    """A square root whose derivative at zero is zero instead of infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def _power(base: Number, exponent: Tensor) -> Tensor:
    # in float64: 1 - 0.999 ** 1 loses half of float32's digits
    if isinstance(base, Tensor):
        return base.to(torch.float64) ** exponent
    return torch.pow(base, exponent.to(torch.float64))


def _zero_step(params: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(params.values())).device if params else None
    return torch.zeros((), dtype=torch.int64, device=device)


@dataclass(frozen=True, eq=False)
class ResolvedSGD:
    """An inner optimizer's rates worked out for the parameters at hand.

    Args:
        adapted: the names of the parameters that adapt, in the order of the parameters.
        rates: for each of them a float, or a tensor of ``1 + ndim`` axes that broadcasts to
            ``[I, *shape]`` (its first axis is 1 or I).
        steps: the number of inner steps I.
    """

    adapted: tuple[str, ...]
    rates: dict[str, Number]
    steps: int

    def at(self, step: int) -> dict[str, Number]:
        """The rates of one inner step, each a float or a tensor that broadcasts to ``[*shape]``."""
        return {
            name: rate[step if rate.shape[0] > 1 else 0] if isinstance(rate, Tensor) else rate
            for name, rate in self.rates.items()
        }


def resolve(
    inner: InnerOptimizer, params: Mapping[str, Tensor] | Mapping[str, tuple[int, ...]]
) -> ResolvedSGD:
    """Work out which parameters adapt, and the rate of each, at each step.

    Args:
        inner: the inner optimizer.
        params: name -> a parameter ``[...]`` of one task (without a task axis), or its shape.

    Returns:
        The adapted names and a rate for each that broadcasts to ``[I, *shape]``. Tensor rates are
        views of ``inner``'s tensors, so gradients flow to them.

    Raises:
        ValueError: a pattern that matches nothing, no parameter left to adapt, a parameter that
            matches no key of a mapping or several, or a rate of a shape that does not fit, or that
            could be read in two ways.

    Example:
        >>> shapes = {"0.weight": (40, 1), "0.bias": (40,)}
        >>> resolve(SGD(lr={"*.weight": 0.1, "*.bias": 0.2}), shapes).rates
        {'0.weight': 0.1, '0.bias': 0.2}
    """
    op = type(inner).__name__
    shapes = {
        name: tuple(value.shape) if isinstance(value, Tensor) else tuple(value)
        for name, value in params.items()
    }
    adapted = _adapted(op, inner, tuple(shapes))
    lr = inner.lr
    if isinstance(lr, Mapping):
        rates = _mapped_rates(op, lr, adapted, shapes, inner.steps)
    elif isinstance(lr, Tensor):
        if lr.ndim > 1 or (lr.ndim == 1 and lr.shape[0] != inner.steps):
            must = f"have shape [] or [{inner.steps}] (a mapping gives rates per parameter)"
            raise value_error(op, "lr", must, lr)
        rates = {name: lr.reshape(-1, *(1,) * len(shapes[name])) for name in adapted}
    else:
        rates = dict.fromkeys(adapted, lr)
    return ResolvedSGD(adapted, rates, inner.steps)


def _adapted(op: str, inner: InnerOptimizer, names: tuple[str, ...]) -> tuple[str, ...]:
    if inner.adapt == ("*",) and not inner.exclude and names:
        return names
    chosen = dict.fromkeys(names, False)
    for argument, patterns, value in (
        ("adapt", inner.adapt, True),
        ("exclude", inner.exclude, False),
    ):
        for pattern in patterns:
            hits = [name for name in names if fnmatchcase(name, pattern)]
            if not hits:
                must = f"match a trainable parameter ({_list(names)})"
                raise value_error(op, argument, must, repr(pattern))
            chosen.update(dict.fromkeys(hits, value))
    adapted = tuple(name for name, yes in chosen.items() if yes)
    if not adapted:
        must = f"leave at least one parameter to adapt ({_list(names)})"
        raise value_error(op, "adapt", must, f"adapt={inner.adapt}, exclude={inner.exclude}")
    return adapted


def _mapped_rates(
    op: str,
    lr: Mapping[str, Number],
    adapted: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    steps: int,
) -> dict[str, Number]:
    unused = dict.fromkeys(lr)
    rates: dict[str, Number] = {}
    for name in adapted:
        keys = [key for key in lr if fnmatchcase(name, key)]
        if len(keys) != 1:
            found = f"{_list(keys)} for it" if keys else f"none for it among {_list(lr)}"
            raise value_error(op, "lr", f"have exactly one key that matches {name!r}", found)
        unused.pop(keys[0], None)
        rates[name] = _shaped_rate(op, f"lr[{keys[0]!r}]", lr[keys[0]], name, shapes[name], steps)
    if unused:
        must = f"have keys that match adapted parameters ({_list(adapted)})"
        raise value_error(op, "lr", must, _list(unused))
    return rates


def _shaped_rate(
    op: str, argument: str, rate: Number, name: str, shape: tuple[int, ...], steps: int
) -> Number:
    if not isinstance(rate, Tensor):
        return rate
    found, rank = tuple(rate.shape), len(shape)
    if rate.ndim == 0:
        return rate.reshape((1,) * (rank + 1))
    if rate.ndim == rank + 1:
        pairs = zip(found, (steps, *shape), strict=True)
        if all(ours in (1, theirs) for ours, theirs in pairs):
            return rate
    per_step, per_element = found == (steps,), found == shape
    if per_step and per_element and steps != 1:
        must = (
            f"say whether it is per step or per element of {name!r}: "
            f"shape [{steps}, 1] or [1, {steps}]"
        )
        raise value_error(op, argument, must, rate)
    if per_element:
        return rate.reshape(1, *shape)
    if per_step:
        return rate.reshape(steps, *(1,) * rank)
    whole = [steps, *shape]
    must = f"have shape [], [{steps}], {list(shape)} or {whole} for {name!r}"
    raise value_error(op, argument, must, rate)


def _checked_rate(op: str, lr: Any) -> Rate:
    if isinstance(lr, Mapping):
        if not lr:
            raise value_error(op, "lr", "have at least one key", "an empty mapping")
        for key in lr:
            if not isinstance(key, str):
                raise type_error(op, "lr", "have name patterns for keys", describe(key))
        # a plain dict: the one mapping that is a pytree, and no longer the caller's to change
        return {key: _checked_number(op, f"lr[{key!r}]", value) for key, value in lr.items()}
    return _checked_number(op, "lr", lr, " or a mapping of them")


def _checked_number(op: str, argument: str, value: Any, more: str = "") -> Number:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise type_error(op, argument, "be a floating tensor", value)
        return value
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise type_error(op, argument, f"be a number or a tensor{more}", describe(value))
    return number(op, argument, value, at_least=0.0)


def _patterns(op: str, argument: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise type_error(op, argument, "be a name pattern or a tuple of them", describe(value))
    return tuple(patterns)


def _list(names: Iterable[str], most: int = 8) -> str:
    names = tuple(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _register(cls: type[Any]) -> None:
    # Rebuilt without __post_init__: a tree_map may put None or gradients where numbers were.
    names = [field.name for field in fields(cls)]
    leaves = tuple(name for name in names if name not in cls._static)

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, n) for n in leaves], tuple(getattr(value, n) for n in cls._static)

    def unflatten(children: Iterable[Any], static: Any) -> Any:
        value = object.__new__(cls)
        for name, child in zip((*leaves, *cls._static), (*children, *static), strict=True):
            object.__setattr__(value, name, child)
        return value

    pytree.register_pytree_node(cls, flatten, unflatten)


for _cls in (SGD, Momentum, Adam):
    _register(_cls)
