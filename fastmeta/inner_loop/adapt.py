"""``adapt``: the inner loop alone, differentiable, and the learners it leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, type_error, value_error
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import vectorized
from fastmeta.inner_loop.engine import PathName, choose, public, runner
from fastmeta.inner_loop.first_use import check_first_use
from fastmeta.inner_loop.learner import Learner
from fastmeta.inner_loop.optimizers import InnerOptimizer, OptimizerState
from fastmeta.inner_loop.request import BatchNormOption, Request, build_request
from fastmeta.ops.backend import backend as backend_context
from fastmeta.program.ir import Program
from fastmeta.program.norms import PrimitiveNorms

__all__ = ["Adapted", "AdaptedTask", "adapt"]


@dataclass(frozen=True, eq=False)
class Adapted:
    """T adapted learners.

    Call it on ``x [T, Q, ...]`` (or a pytree of such) for outputs ``[T, Q, ...]``; take one with
    ``adapted[i]``. It holds the meta-model by reference and never changes it. Outputs are
    differentiable with respect to whatever the adapted parameters are.

    BatchNorm does in a call what ``batch_norm`` said in ``adapt``: with "batch" the statistics are
    those of the rows of the call, so that predictions are transductive. Call it with one query row
    at a time, or use "frozen", for predictions that are not.

    Args:
        params: the adapted parameters by name, ``[T, ...]``.
        support_loss: ``[T, I]``, the support loss before each inner step.
        state: the inner optimizer's state after the last step, ``[T, ...]``.
        path: the path that ran.

    Example:
        >>> import torch, fastmeta
        >>> net = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 1)
        >>> adapted = fastmeta.adapt(net, None, (x, y), inner=fastmeta.SGD(lr=0.1),
        ...                          loss=torch.nn.functional.mse_loss)
        >>> adapted(torch.randn(4, 7, 3)).shape
        torch.Size([4, 7, 1])
        >>> type(adapted[2].to_module())
        <class 'torch.nn.modules.linear.Linear'>
    """

    params: dict[str, Tensor]
    support_loss: Tensor
    state: OptimizerState | None
    path: str
    _request: Request

    def __len__(self) -> int:
        """The number of tasks T."""
        return self._request.num_tasks

    def __getitem__(self, task: int) -> AdaptedTask:
        """One task's learner.

        Raises:
            TypeError: ``task`` is no int.
            IndexError: ``task`` is outside ``[-T, T)``.
        """
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            raise type_error("Adapted", "the subscript", "be an int", describe(task))
        index = int(task)
        if not -len(self) <= index < len(self):
            raise IndexError(f"Adapted: the subscript must be below {len(self)}, got {index}")
        return AdaptedTask(
            {name: p[index] for name, p in self.params.items()}, index, self._request
        )

    def __iter__(self) -> Iterator[AdaptedTask]:
        """The learners of all tasks."""
        return (self[index] for index in range(len(self)))

    def __call__(self, x: Any) -> Any:
        """Outputs ``[T, Q, ...]`` for inputs ``[T, Q, ...]``, all tasks at once where vmap can."""
        return _predict(self, x)


@dataclass(frozen=True, eq=False)
class AdaptedTask:
    """One task's adapted learner, callable on ``x [Q, ...]``.

    Args:
        params: the adapted parameters by name, ``[...]``.
        task: which task of the batch.
    """

    params: dict[str, Tensor]
    task: int
    _request: Request

    def __call__(self, x: Any) -> Any:
        """The output ``[Q, ...]`` for ``x [Q, ...]``."""
        return _predict_one(self, x)

    def to_module(self) -> nn.Module:
        """An ordinary module of the user's class, with the adapted parameters in it.

        A deep copy of the meta-model: nothing is shared with it, buffers are copied, hooks and
        modes kept, and each parameter requires grad as it did before.

        Raises:
            TypeError: a program was adapted, which has no module.
        """
        request = self._request
        if request.model is None:
            raise type_error("to_module", "the adapted learner", "be of a module", "a program's")
        module = copy.deepcopy(request.model)
        values = {**_of_task(request, self.task), **self.params}
        with torch.no_grad():
            for name, param in module.named_parameters():
                if name in values:
                    param.data = values[name].detach().clone()
                param.grad = None
        return module


@public
def adapt(
    model: nn.Module | Program,
    params: Mapping[str, Tensor] | None,
    support: Examples | tuple[Any, Any],
    *,
    inner: InnerOptimizer,
    loss: Callable[..., Tensor] | None,
    loss_params: Mapping[str, Any] | None = None,
    order: Literal[1, 2] = 2,
    state: OptimizerState | None = None,
    path: PathName = "auto",
    backend: str = "auto",
    batch_norm: BatchNormOption = "batch",
) -> Adapted:
    """Run the inner loop of a batch of tasks; the result is differentiable.

    The adapted parameters carry gradients to ``params``, to the tensors of ``inner`` and of
    ``loss_params``, unless grad mode is off (then nothing is kept for a backward pass). So
    ``loss(adapt(...)(xq), yq).backward()`` gives the numbers of ``meta_grad``. The module and its
    buffers are never changed, whatever ``batch_norm`` says.

    Args:
        model: the module, or a layer program.
        params: name -> tensor ``[...]`` or ``[T, ...]``; None means the module's own.
        support: ``(x [T, S, ...], y [T, S, ...])`` or ``Examples``.
        inner: the inner optimizer.
        loss: ``loss(output, y, **loss_params)``, as for ``meta_grad``.
        loss_params: further arguments of the loss.
        order: 1 holds the inner gradients constant.
        state: the inner optimizer's state before the first step.
        path: how the inner loop runs.
        backend: who computes operations.
        batch_norm: what BatchNorm layers do, as for ``meta_grad``; "track" behaves as in training
            but the running update is dropped.

    Returns:
        The T adapted learners.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Example:
        >>> import torch, fastmeta
        >>> net = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 1)
        >>> mse = torch.nn.functional.mse_loss
        >>> adapted = fastmeta.adapt(net, None, (x, y), inner=fastmeta.SGD(lr=0.1), loss=mse)
        >>> mse(adapted(x), y).backward()
        >>> net.weight.grad.shape
        torch.Size([1, 3])

    Reference:
        Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning", algorithm 2, lines 5 to 8.
    """
    request = build_request(
        model,
        params,
        _as_batch(support),
        inner=inner,
        loss=loss,
        loss_params=loss_params,
        order=order,
        state=state,
        batch_norm=batch_norm,
        backend=backend,
        op="adapt",
    )
    check_first_use(request)
    with backend_context(request.backend):
        chosen = choose(request, path).path
        adapted = runner(request, chosen).adapt(request)
    found = request.cache
    return Adapted(adapted, found["support_loss"], found.get("state"), chosen, request)


def _as_batch(support: Any) -> TaskBatch:
    """The support as a batch; its query is the support again, and nothing reads it."""
    if isinstance(support, (tuple, list)) and len(support) == 2:
        support = Examples(support[0], support[1])
    if not isinstance(support, Examples):
        raise type_error("adapt", "support", "be Examples or a pair (x, y)", describe(support))
    return TaskBatch.of(TaskBatch(support, Examples(support.x, support.y, support.weight)))


def _of_task(request: Request, task: int) -> dict[str, Tensor]:
    values = {**request.params, **request.frozen}
    return {n: v[task] if n in request.per_task else v for n, v in values.items()}


@public
def _predict(adapted: Adapted, x: Any) -> Any:
    request, tasks = adapted._request, len(adapted)
    leaves = pytree.tree_leaves(x)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise type_error("Adapted", "x", "hold tensors [T, Q, ...]", describe(leaf))
        if leaf.ndim < 2 or leaf.shape[0] != tasks:
            raise value_error("Adapted", "x", f"have shape [{tasks}, Q, ...]", leaf)
    if vectorized.slower(request) is not None or vectorized.why_not(request) is not None:
        rows = [
            task(pytree.tree_map(lambda leaf, t=t: leaf[t], x)) for t, task in enumerate(adapted)
        ]
        return pytree.tree_map(lambda *outputs: torch.stack(outputs), *rows)
    learner = Learner(request)
    params = {**request.params, **request.frozen, **adapted.params}
    batched = {*request.per_task, *adapted.params}
    dims = {name: 0 if name in batched else None for name in params}
    buffers = learner.fresh_buffers()
    with learner.session(), PrimitiveNorms():
        return torch.vmap(lambda at, rows: learner(at, rows, buffers=buffers), in_dims=(dims, 0))(
            params, x
        )


@public
def _predict_one(adapted: AdaptedTask, x: Any) -> Any:
    learner = Learner(adapted._request)
    with learner.session():
        return learner({**_of_task(adapted._request, adapted.task), **adapted.params}, x)
