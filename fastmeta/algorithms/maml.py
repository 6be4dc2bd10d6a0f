"""Model-agnostic meta-learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, positive_int, type_error, value_error, whole_number
from fastmeta.algorithms.base import Algorithm
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop.adapt import Adapted, adapt
from fastmeta.inner_loop.engine import PathName, meta_grad
from fastmeta.inner_loop.optimizers import SGD, InnerOptimizer
from fastmeta.inner_loop.request import BatchNormOption
from fastmeta.inner_loop.result import MetaGrad

_MODEL = "model."
_INNER = "inner_tensors."


class MAML(Algorithm):
    """Model-agnostic meta-learning: an initialisation from which a few gradient steps suffice.

    For each task the model's parameters theta take I steps on the support loss,

        theta_0 = theta,    theta_(k+1) = theta_k - alpha grad L_support(theta_k),

    and the meta-objective is the mean over tasks of L_query(theta_I). Its exact gradient runs
    back through the inner loop,

        lambda_I = grad L_query(theta_I),
        lambda_k = lambda_(k+1) - alpha H_support(theta_k) lambda_(k+1),

    and lambda_0 is a task's share. With ``order=1`` the Hessian terms are dropped (FOMAML).

    Args:
        model: the learner; any module. It is kept, not copied: its parameters are the
            meta-parameters, and those with ``requires_grad=False`` neither adapt nor learn.
        loss: ``loss(output, y)`` of one task, a scalar or one number per row.
        lr: inner rate alpha: a number, a tensor ``[]`` or ``[I]`` (per step), or a mapping from
            name patterns to numbers and tensors (per layer, per parameter); see
            :class:`~fastmeta.SGD`. Tensors that require grad are meta-parameters.
        steps: inner steps I.
        inner: the whole inner optimizer as a value, in place of ``lr``, ``steps``, ``adapt`` and
            ``exclude``.
        order: 2 for the exact gradient, 1 for the first-order approximation.
        adapt: name patterns of the parameters that adapt. The others are meta-learned too.
        exclude: name patterns taken out of ``adapt`` again, such as ``"*.bias"``.
        learn_lr: make every rate a meta-parameter (a number becomes a tensor ``[]``).
        path: how the engine runs: ``"auto"``, ``"fused"``, ``"vectorized"``, ``"reference"``.
        backend: who computes: ``"auto"``, ``"cpp"``, ``"reference"``.
        batch_norm: what batch normalisation does: ``"batch"`` (as the papers), ``"per_step"``,
            ``"frozen"``, ``"track"``.

    Raises:
        TypeError: ``model`` is no module, ``loss`` not callable, or a rate of the wrong kind.
        ValueError: a negative rate or number of steps, an unknown order, a pattern that names no
            parameter, ``inner`` given together with what it replaces.

    Example:
        >>> import torch
        >>> from fastmeta import MAML
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... )
        >>> maml = MAML(model, loss=torch.nn.functional.mse_loss, lr=0.1, steps=2)
        >>> optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
        >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)  # 4 tasks
        >>> metrics = maml.meta_gradient((x[:, :5], y[:, :5], x[:, 5:], y[:, 5:]))
        >>> optimizer.step()
        >>> maml.adapt((x, y))(x).shape
        torch.Size([4, 10, 1])

    Reference:
        Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
        Networks", algorithm 2; learned rates: Li et al. (2017), "Meta-SGD".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., Tensor],
        lr: float | Tensor | Mapping[str, float | Tensor] = 0.01,
        steps: int = 1,
        inner: InnerOptimizer | None = None,
        order: Literal[1, 2] = 2,
        adapt: str | tuple[str, ...] = "*",
        exclude: str | tuple[str, ...] = (),
        learn_lr: bool = False,
        path: PathName = "auto",
        backend: str = "auto",
        batch_norm: BatchNormOption = "batch",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if not isinstance(model, nn.Module):
            raise type_error(op, "model", "be a torch.nn.Module", describe(model))
        if not callable(loss):
            raise type_error(op, "loss", "be callable as loss(output, y)", describe(loss))
        if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
            must = "have no parameters of its own (meta_grad takes loss_params)"
            raise value_error(op, "loss", must, f"a {type(loss).__name__} with parameters")
        if order not in (1, 2):
            raise value_error(op, "order", "be 1 or 2", describe(order))
        if inner is None:
            inner = SGD(lr=lr, steps=steps, adapt=adapt, exclude=exclude)
        elif isinstance(lr, Tensor) or (lr, steps, adapt, exclude) != (0.01, 1, "*", ()):
            must = "stand alone, without lr, steps, adapt and exclude"
            raise value_error(op, "inner", must, "both")
        self.model = model
        self.loss = loss
        self.order: Literal[1, 2] = order
        self.path = path
        self.backend = backend
        self.batch_norm = batch_norm
        if learn_lr:
            inner = dataclasses.replace(inner, lr=_as_tensors(inner.lr, model))
        leaves, self._inner_spec = pytree.tree_flatten(inner)
        # The inner optimizer's tensors live in the module: they move with it, they are in its
        # state_dict, and those that learn are among its parameters.
        self.inner_tensors = nn.ParameterList(
            leaf if isinstance(leaf, nn.Parameter) else nn.Parameter(leaf, leaf.requires_grad)
            for leaf in leaves
            if isinstance(leaf, Tensor)
        )
        self._inner_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._inner_places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    @property
    def inner(self) -> InnerOptimizer:
        """The inner optimizer, with the meta-learned rates as they stand."""
        return self._inner(dict(enumerate(self.inner_tensors)))

    def adapt(self, support: Examples | tuple[Any, Any], steps: int | None = None) -> Adapted:
        """Adapt to each task's support set.

        Args:
            support: ``x [T, S, ...]`` and ``y [T, S, ...]``, as :class:`~fastmeta.Examples` or a
                pair of tensors.
            steps: inner steps in place of those of training; 0 is the initialisation itself. With
                a rate ``[I]`` per step, at most I of them: the first ``steps`` rates are used.

        Returns:
            The adapted learners: ``adapted(x)`` with ``x [T, Q, ...]`` predicts, and
            ``adapted[i].to_module()`` is a module of the model's own class. Parameters are
            differentiable back to the meta-parameters unless under ``torch.no_grad``.

        Raises:
            TypeError, ValueError: the support set or ``steps`` is not what it must be.

        Example:
            >>> import torch
            >>> from fastmeta import MAML
            >>> maml = MAML(torch.nn.Linear(2, 1), loss=torch.nn.functional.mse_loss)
            >>> adapted = maml.adapt((torch.randn(3, 5, 2), torch.randn(3, 5, 1)), steps=4)
            >>> adapted[0].to_module()
            Linear(in_features=2, out_features=1, bias=True)
        """
        inner = self.inner
        if steps is not None:
            steps = whole_number("adapt", "steps", steps)
            lr = inner.lr[:steps] if _is_per_step(inner.lr) else inner.lr
            inner = dataclasses.replace(inner, steps=steps, lr=lr)
        return adapt(
            self.model,
            None,
            support,
            inner=inner,
            loss=self.loss,
            order=self.order,
            path=self.path,
            backend=self.backend,
            batch_norm=self.batch_norm,
        )

    def meta_parameters(self) -> dict[str, Tensor]:
        """The model's trainable parameters and the learned rates, by their names here."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def chunk_gradient(
        self, batch: TaskBatch, meta_parameters: Mapping[str, Tensor] | None
    ) -> MetaGrad:
        """The engine's answer for one chunk of tasks, summed over its tasks."""
        params, inner = None, self.inner
        if meta_parameters is not None:
            params = {
                name.removeprefix(_MODEL): value
                for name, value in meta_parameters.items()
                if name.startswith(_MODEL)
            }
            inner = self._inner(
                {
                    number: meta_parameters.get(f"{_INNER}{number}", value)
                    for number, value in enumerate(self.inner_tensors)
                }
            )
        return meta_grad(
            self.model,
            params,
            batch,
            inner=inner,
            loss=self.loss,
            order=self.order,
            reduction="sum",
            path=self.path,
            backend=self.backend,
            batch_norm=self.batch_norm,
        )

    def gradients(self, result: MetaGrad) -> dict[str, Tensor]:
        """The gradients of a result, under the names of :meth:`meta_parameters`."""
        named = {_MODEL + name: value for name, value in result.grads.params.items()}
        if self._inner_places:
            leaves = pytree.tree_leaves(result.grads.inner)
            for number, place in enumerate(self._inner_places):
                if self.inner_tensors[number].requires_grad:
                    named[f"{_INNER}{number}"] = leaves[place]
        return named

    def settings(self) -> dict[str, Any]:
        """What, beside the parameters, decides this algorithm's numbers; plain values."""
        inner = self.inner
        values = {
            field.name: _plain(getattr(inner, field.name)) for field in dataclasses.fields(inner)
        }
        return {
            **super().settings(),
            "inner": type(inner).__name__,
            **{f"inner.{name}": value for name, value in values.items()},
            "loss": _name(self.loss),
            "order": self.order,
            "batch_norm": self.batch_norm,
        }

    def round_chunk(self, size: int) -> int:
        """A subtree of the fused path's tree; exactly ``size`` where another path was asked for."""
        if self.path in ("reference", "vectorized"):
            return positive_int("meta_gradient", "chunk_size", size)
        return super().round_chunk(size)

    def _inner(self, tensors: Mapping[int, Tensor]) -> InnerOptimizer:
        leaves = list(self._inner_leaves)
        for number, place in enumerate(self._inner_places):
            leaves[place] = tensors[number]
        inner: InnerOptimizer = pytree.tree_unflatten(leaves, self._inner_spec)
        return inner


def _is_per_step(lr: Any) -> TypeGuard[Tensor]:
    return isinstance(lr, Tensor) and lr.ndim == 1


def _as_tensors(lr: Any, model: nn.Module) -> Any:
    """Rates as tensors that require grad, where the model is and in its dtype."""
    like = next(model.parameters(), torch.zeros(()))

    def learnable(rate: float | Tensor) -> Tensor:
        if isinstance(rate, Tensor):
            return rate if rate.requires_grad else rate.detach().clone().requires_grad_()
        return torch.tensor(float(rate), dtype=like.dtype, device=like.device, requires_grad=True)

    if isinstance(lr, Mapping):
        return {pattern: learnable(rate) for pattern, rate in lr.items()}
    return learnable(lr)


def _plain(value: Any) -> Any:
    """A setting as JSON: a tensor by its shape, since its value is the checkpoint's."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, nn.Module):
        return repr(function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
