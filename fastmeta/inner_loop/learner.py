"""A module (or a program) as a pure function of its parameters, and its loss on one task.

Nothing here has a task axis, so the same code runs in a plain loop and under ``vmap``. The module
is never changed: parameters and buffers are swapped in for the length of a call, and what must be
switched (BatchNorm's mode, attention's implementation) is switched back on the way out.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from fastmeta._checks import describe, type_error, value_error
from fastmeta.batch import Examples
from fastmeta.inner_loop.request import Request
from fastmeta.program import interpreter
from fastmeta.program.norms import ScaledNorms

__all__ = ["Facts", "Learner", "Rows", "facts", "log_once", "note_dropped"]

logger = logging.getLogger("fastmeta")


class Rows(NamedTuple):
    """Rows of one task: ``x [S, ...]``, ``y [S, ...]``, ``weight [S]`` or None."""

    x: Any
    y: Any
    weight: Tensor | None


class Facts(NamedTuple):
    """What decides which path is right for a module, each a tuple of submodule names."""

    recurrent: tuple[str, ...] = ()
    batch_norm: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    tracked: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()


def facts(model: nn.Module | None) -> Facts:
    """Walk a module once. Not cached: a user may change modes and layers between calls."""
    if model is None:
        return Facts()
    found: dict[str, list[str]] = {field: [] for field in Facts._fields}
    for name, module in model.named_modules():
        label = f"{name or 'model'} ({type(module).__name__})"
        if isinstance(module, nn.RNNBase):
            found["recurrent"].append(label)
        if isinstance(module, _BatchNorm):
            found["batch_norm"].append(label)
            if getattr(module, "weight", None) is None:  # not affine, or a shift alone
                found["unscaled"].append(label)
        if isinstance(module, _NormBase) and module.track_running_stats and module.training:
            found["tracked"].append(label)
        if isinstance(module, _ConvNd):
            found["convolutions"].append(label)
        if module.training and _is_random(module):
            found["random"].append(label)
    return Facts(*(tuple(found[field]) for field in Facts._fields))


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    return isinstance(module, nn.RReLU)


_attention = threading.Lock()
_attention_users = 0
_attention_before = ExitStack()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention from its definition: flash and fused ones have no double backward on a CPU.

    torch's switches are the process's, so the first thread in sets them and the last one out puts
    them back.
    """
    global _attention_users
    with _attention:
        if _attention_users == 0:
            backend = torch.nn.attention.SDPBackend.MATH
            _attention_before.enter_context(torch.nn.attention.sdpa_kernel(backend))
            if torch.backends.mha.get_fastpath_enabled():
                torch.backends.mha.set_fastpath_enabled(False)
                _attention_before.callback(torch.backends.mha.set_fastpath_enabled, True)
        _attention_users += 1
    try:
        yield
    finally:
        with _attention:
            _attention_users -= 1
            if _attention_users == 0:
                _attention_before.close()


class Learner:
    """What the inner loop calls: outputs and losses of one task at given parameters.

    Args:
        request: the call it serves.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.model = request.model
        self.buffers = dict(request.model.named_buffers()) if request.model is not None else {}
        if request.cache.get("float64"):  # the trial run of `vectorized`
            self.buffers = {n: _double(buffer) for n, buffer in self.buffers.items()}
        self.facts = facts(request.model)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Switch the module, and torch, to what the inner loop needs; switch back at the end."""
        with ExitStack() as stack:
            if self.model is None:
                yield
                return
            stack.enter_context(_plain_attention())
            if self.facts.recurrent and torch.backends.cudnn.enabled:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if self.facts.unscaled:
                stack.enter_context(ScaledNorms())
            if self.request.batch_norm != "track":
                before: list[tuple[_NormBase, bool, bool]] = []
                stack.callback(_restore, before)
                _switch_norms(self.request, self.model, before)
            yield

    def fresh_buffers(self) -> dict[str, Tensor]:
        """Copies of the module's buffers, for a forward pass to change if it likes."""
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def __call__(
        self,
        params: Mapping[str, Tensor],
        x: Any,
        *,
        weight: Tensor | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> Any:
        """The output for one task.

        Args:
            params: every trainable (and every given frozen) parameter ``[...]``.
            x: ``[S, ...]``; a tuple becomes positional and a dict keyword arguments of the module,
                any other pytree is its one argument.
            weight: ``[S]``, or None; a program keeps rows of weight zero out of its statistics.
            buffers: what stands for the module's buffers, changed in place by layers that do so.
        """
        request = self.request
        if request.program is not None:
            mask = None if weight is None else weight > 0
            return interpreter.forward(request.program, params, x, mask)
        if request.model is None:
            raise value_error(request.op, "model", "be given", None)
        args, kwargs = call_arguments(x)
        both = params if not self.buffers else (params, buffers or self.fresh_buffers())
        return torch.func.functional_call(request.model, both, args, kwargs)  # type: ignore[arg-type]

    def loss(
        self,
        params: Mapping[str, Tensor],
        rows: Rows,
        loss_params: Mapping[str, Any] | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """The loss ``[]`` of one task's rows, and the output.

        A per-row loss becomes the mean over rows, or the weighted mean: the engine weighs rows
        itself, and never hands its weights to a loss whose own ``weight`` means something else
        (that of ``cross_entropy`` is per class).
        """
        output = self(params, rows.x, weight=rows.weight, buffers=buffers)
        program = self.request.program
        if program is not None and program.loss is not None:
            return program.loss.forward(output, rows.y, rows.weight)[0], output
        if self.request.loss is None:
            raise value_error(self.request.op, "loss", "be given", None)
        value = self.request.loss(output, rows.y, **(loss_params or {}))
        return self._reduced(value, rows), output

    def _reduced(self, value: Any, rows: Rows) -> Tensor:
        op = self.request.op
        if not isinstance(value, Tensor):
            raise type_error(op, "loss", "return a tensor", describe(value))
        if not value.is_floating_point():
            raise type_error(op, "loss", "return a floating tensor", value)
        size = pytree.tree_leaves(rows.y)[0].shape[0]
        if rows.weight is None:
            if value.ndim == 0:
                return value
            if value.ndim == 1 and value.shape[0] == size:
                return value.mean()
            must = f"return a scalar, or one number for each of the {size} rows"
            raise value_error(op, "loss", must, value)
        if value.ndim != 1 or value.shape[0] != size:
            must = f"return one number for each of the {size} rows, because the batch has weights"
            raise value_error(op, "loss", must, value)
        weight = rows.weight.to(value.dtype)
        return (weight * value).sum() / weight.sum()


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How inputs reach a module: a tuple as positional, a dict as keyword arguments."""
    if type(x) is tuple:
        return x, {}
    if isinstance(x, dict):
        return (), x
    return (x,), {}


def rows_of(examples: Examples, step: int | None = None, *, drop: bool = False) -> Rows:
    """One task's rows (no task axis): all, or those of one inner step.

    Args:
        examples: x and y ``[S, ...]``, weight ``[S]``, index ``[I, B]``.
        step: the inner step, if the index is to be followed.
        drop: whether rows of weight zero are taken out (a shape that depends on data, so not for
            ``vmap``).
    """
    rows = Rows(examples.x, examples.y, examples.weight)
    if step is not None and examples.index is not None:
        rows = take(rows, examples.index[step])
    if drop and rows.weight is not None:
        kept = rows.weight > 0
        if not bool(kept.all()):
            rows = take(rows, kept.nonzero().squeeze(1))
    return rows


def take(rows: Rows, index: Tensor) -> Rows:
    """The rows at ``index [B]``."""
    weight = None if rows.weight is None else rows.weight[index]
    x, y = pytree.tree_map(lambda leaf: leaf[index], (rows.x, rows.y))
    return Rows(x, y, weight)


def accuracy(output: Any, rows: Rows) -> Tensor | None:
    """The share of rows, by weight, whose largest output is at the label; None if y is no label."""
    y = rows.y
    if not is_classification(output, y):
        return None
    right: Tensor = (output.detach().argmax(-1) == y).to(output.dtype)
    if rows.weight is None:
        return right.mean()
    weight = rows.weight.to(output.dtype)
    share: Tensor = (right * weight).sum() / weight.sum()
    return share


def is_classification(output: Any, y: Any) -> bool:
    """Whether ``y [S]`` are integers and ``output [S, C]`` scores."""
    return (
        isinstance(y, Tensor)
        and isinstance(output, Tensor)
        and y.ndim == 1
        and output.ndim == 2
        and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    )


def _switch_norms(
    request: Request, model: nn.Module, before: list[tuple[_NormBase, bool, bool]]
) -> None:
    """Set every normalisation layer to the option; note in ``before`` how to set it back."""
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        training, track = module.training, module.track_running_stats
        if not isinstance(module, _BatchNorm):
            track = track and not training  # instance norm: its running update is dropped
        elif request.batch_norm == "frozen":
            if module.running_mean is None:
                must = "be 'batch' for a layer without running statistics"
                raise value_error(request.op, "batch_norm", must, f"'frozen' with {name!r}")
            training, track = False, True
        else:  # the batch's statistics whatever the module's mode, and no running update at all
            training, track = True, False
        before.append((module, module.training, module.track_running_stats))
        module.training, module.track_running_stats = training, track


def _restore(before: list[tuple[_NormBase, bool, bool]]) -> None:
    for module, training, track in before:
        module.training, module.track_running_stats = training, track


def note_dropped(request: Request, buffers: dict[str, Tensor], before: Mapping[str, int]) -> None:
    """Say once which buffers a forward pass changed: the module keeps its own values."""
    changed = [
        name
        for name, buffer in buffers.items()
        if name not in before or buffer._version != before[name]
    ]
    if changed:
        words = f"the update of buffers {', '.join(changed)} is dropped (batch_norm='track' keeps)"
        log_once(request.model, words, logging.WARNING)


_logged: dict[int, set[str]] = {}


def log_once(model: object, message: str, level: int = logging.INFO) -> None:
    """Log ``message`` the first time it comes up for ``model``."""
    key = id(model)
    if key not in _logged:
        _logged[key] = set()
        weakref.finalize(model, _logged.pop, key, None)
    if message not in _logged[key]:
        _logged[key].add(message)
        logger.log(level, "%s: %s", type(model).__name__, message)
