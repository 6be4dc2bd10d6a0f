"""``meta_grad``: the engine's one pure function, and the choice of the path it takes."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, type_error, value_error
from fastmeta.batch import BatchLike, TaskBatch
from fastmeta.inner_loop import door, fused, reference, vectorized
from fastmeta.inner_loop.first_use import check_first_use
from fastmeta.inner_loop.learner import facts, log_once
from fastmeta.inner_loop.optimizers import InnerOptimizer, OptimizerState
from fastmeta.inner_loop.request import (
    BatchNormOption,
    Outer,
    Request,
    TaskTransform,
    build_request,
)
from fastmeta.inner_loop.result import MetaGrad
from fastmeta.ops.backend import backend as backend_context
from fastmeta.program.ir import Program

__all__ = ["PATHS", "Choice", "PathName", "Verdict", "choose", "decide", "meta_grad", "verdict"]

PathName = Literal["auto", "fused", "vectorized", "reference"]
PATHS = ("fused", "vectorized", "reference")
"""Every path, the one to be preferred first."""


class Path(Protocol):
    """What a path's file provides."""

    def why_not(self, request: Request) -> str | None:
        """None if the path is right for the request, else the reason, by name."""

    def meta_grad(self, request: Request) -> MetaGrad:
        """The meta-gradient of the batch."""

    def adapt(self, request: Request) -> dict[str, Tensor]:
        """The adapted parameters ``[T, ...]``; "support_loss" and "state" go to the cache."""


class Verdict(NamedTuple):
    """What was found out about one path.

    Args:
        path: its name.
        why_not: why it would be wrong or impossible, or None.
        slower: why another one is faster here although this one is right, or None.
    """

    path: str
    why_not: str | None
    slower: str | None = None

    def __str__(self) -> str:
        if self.why_not is not None:
            return f"no: {self.why_not}"
        return f"right, but slower here: {self.slower}" if self.slower is not None else "yes"


class Choice(NamedTuple):
    """The path that runs, and the verdicts on those that were preferable.

    Args:
        path: the path's name.
        verdicts: in order of preference, up to the one chosen.
    """

    path: str
    verdicts: tuple[Verdict, ...]


_FILES = {
    "fused": cast(Path, fused),
    "vectorized": cast(Path, vectorized),
    "reference": cast(Path, reference),
}


def verdict(request: Request, name: str) -> Verdict:
    """What one path says about a request."""
    reason = _FILES[name].why_not(request)
    slower = vectorized.slower(request) if name == "vectorized" and reason is None else None
    return Verdict(name, reason, slower)


def decide(verdicts: Sequence[Verdict]) -> str | None:
    """The first path that is right and not the slower one; else any that is right; else None."""
    right = [found for found in verdicts if found.why_not is None]
    for found in right:
        if found.slower is None:
            return found.path
    return right[-1].path if right else None


def choose(request: Request, path: str = "auto") -> Choice:
    """Which path a request takes: the one asked for, or the fastest that is right.

    Raises:
        TypeError: ``path`` is no string.
        ValueError: an unknown path, or one that is not right for the request.
    """
    if not isinstance(path, str):
        raise type_error(request.op, "path", "be a string", describe(path))
    if path != "auto":
        if path not in PATHS:
            names = ", ".join(("auto", *PATHS))
            raise value_error(request.op, "path", f"be one of {names}", repr(path))
        asked = verdict(request, path)
        if asked.why_not is not None:
            must = "be a path that is right for this call"
            raise value_error(request.op, "path", must, f"{path!r}: {asked.why_not}")
        return Choice(path, (asked,))
    verdicts: list[Verdict] = []
    for name in PATHS:
        verdicts.append(verdict(request, name))
        if verdicts[-1].why_not is None and verdicts[-1].slower is None:
            break
    chosen = decide(verdicts)
    if chosen is None:
        reasons = "; ".join(f"{found.path}: {found.why_not}" for found in verdicts)
        raise value_error(request.op, "the call", "be one that some path can run", reasons)
    _log_batch_norm(request)
    passed = [found for found in verdicts if found.path != chosen]
    if passed:
        reasons = "; ".join(f"{found.path}: {found}" for found in passed)
        owner = request.program if request.model is None else request.model
        log_once(owner, f"path {chosen!r} ({reasons})")
    return Choice(chosen, tuple(verdicts))


_P = ParamSpec("_P")
_R = TypeVar("_R")


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A public call of the engine: a graph break under ``torch.compile``, inference mode left.

    Compiled code runs the function as it is, with the same kernels; ``fullgraph=True`` is an
    error that says so. The compiler is not imported for this: that costs a second.
    """
    disabled: list[Callable[_P, _R]] = []
    hooked = torch._C._dynamo.eval_frame.get_eval_frame_callback  # dynamo's hook in this thread
    reason = f"fastmeta.{function.__name__} runs its own kernels: let the graph break here"

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # either this very frame is being compiled, or its callees would be; that torch.export
        # has imported dynamo does not mean that anything is
        if torch.compiler.is_dynamo_compiling() or (
            "torch._dynamo" in sys.modules and hooked() not in (None, False)
        ):
            if not disabled:
                disabled.append(
                    torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
                )
            return disabled[0](*args, **kwargs)
        if torch.is_inference_mode_enabled():  # no tape, but the inner loop needs gradients
            with torch.inference_mode(False), torch.no_grad():
                args, kwargs = pytree.tree_map_only(Tensor, _normal, (args, kwargs))
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    return call


def _normal(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value


_norms_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _log_batch_norm(request: Request) -> None:
    """Say once for a module that BatchNorm's running statistics are left alone."""
    model = request.model
    if model is None or request.batch_norm != "batch" or model in _norms_seen:
        return
    _norms_seen.add(model)
    found = facts(model)
    if found.batch_norm and found.tracked:
        what = "batch_norm='batch': the statistics of each call's rows; the running update of"
        log_once(model, f"{what} {', '.join(found.tracked)} is dropped")


@public
def meta_grad(
    model: nn.Module | Program,
    params: Mapping[str, Tensor] | None,
    batch: TaskBatch | BatchLike,
    *,
    inner: InnerOptimizer,
    loss: Callable[..., Tensor] | None,
    loss_params: Mapping[str, Any] | None = None,
    outer: Outer | Tensor | list[float] = "query",
    order: Literal[1, 2] = 2,
    reduction: Literal["mean", "sum"] = "mean",
    task_transform: TaskTransform | None = None,
    state: OptimizerState | None = None,
    path: PathName = "auto",
    backend: str = "auto",
    batch_norm: BatchNormOption = "batch",
) -> MetaGrad:
    r"""The exact meta-gradient of a whole batch of tasks, in one call.

    .. math:: \nabla \; \mathrm{reduce}_t \, L^q_t(\theta_{t,I}), \qquad
        \theta_{t,k+1} = \theta_{t,k} - \alpha_k \odot \nabla L^s_t(\theta_{t,k}), \quad
        \theta_{t,0} = \theta

    with respect to the parameters :math:`\theta`, the tensors of ``inner`` and those of
    ``loss_params`` that require grad, and with other updates for other inner optimizers. A pure
    function: the module, its buffers and ``.grad`` are left as they are (but for
    ``batch_norm="track"``). See :func:`fastmeta.accumulate_grad` for ``.grad``.

    Args:
        model: the module. A tuple ``x`` reaches it as positional, a dict as keyword arguments.
            Or a layer program.
        params: name -> tensor, ``[...]`` shared by all tasks, or ``[T, ...]``, one for each. None
            means the module's own. Parameters that are frozen in the module may be left out.
        batch: a ``TaskBatch``, or tuples of tensors ``(xs [T, S, ...], ys [T, S, ...],
            xq [T, Q, ...], yq [T, Q, ...])``.
        inner: the inner optimizer; it says which parameters adapt. The others still receive
            meta-gradients.
        loss: ``loss(output, y, **loss_params)`` of one task's rows: a scalar, or ``[S]`` (the mean
            over rows is then taken; by weight in a weighted batch, which needs this form). None
            for a program that has its own.
        loss_params: further arguments of the loss; its tensors that require grad are
            meta-parameters.
        outer: "query" (the query loss after the last step); I numbers, the weight of the query
            loss after each step (multi-step loss); or "displacement"
            (:math:`\theta_0 - \theta_I`, Reptile's direction). Implicit gradients are yet to come.
        order: 2 is exact; 1 holds the inner gradients constant (FOMAML).
        reduction: over tasks, "mean" or "sum".
        task_transform: a function of one task's gradients, name -> ``[...]``, before the
            reduction (clipping per task, say). It sees parameters only.
        state: the inner optimizer's state before the first step, from an earlier call: ``[...]``,
            or ``[T, ...]``. A constant.
        path: how the inner loop runs; "auto" takes the fastest path that is right.
        backend: who computes operations.
        batch_norm: "batch": batch statistics, whatever the module's mode, and no running update;
            "frozen": running statistics; "track": as torch does it in the module's mode, task
            after task, the running update kept. "per_step" is yet to come.

    Returns:
        Gradients, losses ``[T]``, metrics, the adapted parameters ``[T, ...]``, the state.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value, or a path that is not right
            for the call. Labels are checked against the output on a CPU only: on another device
            that would mean waiting for it.
        RuntimeError: an operation without a second derivative, at order 2.

    Example:
        >>> import torch, fastmeta
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.ReLU(),
        ...                           torch.nn.Linear(40, 1))
        >>> x, y = torch.randn(25, 10, 1), torch.randn(25, 10, 1)
        >>> result = fastmeta.meta_grad(net, None, (x, y, x, y), inner=fastmeta.SGD(lr=0.01),
        ...                             loss=torch.nn.functional.mse_loss)
        >>> result.losses.shape, result.grads.params["0.weight"].shape
        (torch.Size([25]), torch.Size([40, 1]))

    Reference:
        Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
        Networks", algorithm 1; Nichol, Achiam, Schulman (2018), "On First-Order Meta-Learning
        Algorithms", sections 2 and 5; Antoniou, Edwards, Storkey (2019), "How to train your MAML",
        equation 4.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse_transformed(model, (params, batch, loss_params))
    # a call with no more than the usual arguments may be one that was prepared before
    plain = (
        params is None
        and loss_params is None
        and task_transform is None
        and state is None
        and isinstance(outer, str)
        and outer == "query"
        and batch_norm == "batch"
    )
    options = (order, reduction, path, backend)
    if plain:
        found = door.find(model, batch, inner, loss, options)
        if found is not None:
            return found
    request = build_request(
        model,
        params,
        batch,
        inner=inner,
        loss=loss,
        loss_params=loss_params,
        outer=outer,
        order=order,
        reduction=reduction,
        task_transform=task_transform,
        state=state,
        batch_norm=batch_norm,
        backend=backend,
        op="meta_grad",
    )
    check_first_use(request)
    with backend_context(request.backend):
        result = runner(request, path).meta_grad(request)
    if plain and result.path == "fused":
        door.remember(request, options)
    return result


def _refuse_transformed(model: Any, given: Any) -> None:
    own = model.parameters() if isinstance(model, nn.Module) else ()
    for leaf in (*pytree.tree_leaves(given), *own):
        if isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            raise RuntimeError(
                "meta_grad: tensors must be plain ones, got one of a torch.func transform (grad, "
                "vmap): a batch has its task axis, and adapt is the call to differentiate through"
            )


def runner(request: Request, path: str) -> Path:
    """The file of the path that a request takes."""
    return _FILES[choose(request, path).path]
