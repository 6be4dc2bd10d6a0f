"""The fast door of ``meta_grad``: a call that is like an earlier one skips all but the kernel.

The first call of its kind goes the long way: every argument is checked, the module is read, a path
is chosen. If that path is ``fused`` the outcome is remembered as a door. A later call passes
through it if everything the outcome depended on is still the same, which takes a few microseconds
to see: the objects themselves (module, submodule modes, parameters and where they lie, the inner
optimizer's values, the loss) and the sizes, dtype and layout of the batch. Anything else goes the
long way again, errors included. The numbers are the same bits either way.

No door is made of a module with hooks, or with attributes that can change in place, nor of a loss
that closes over something: those calls always go the long way. A door does not see a global that a
function reads, or ``FASTMETA_ISA`` or ``FASTMETA_BACKEND`` set in the environment of a running
process. ``forget`` closes all doors.
"""

from __future__ import annotations

import threading
import types
import weakref
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from fastmeta import _native
from fastmeta.batch import TaskBatch
from fastmeta.inner_loop.encode import spec_of
from fastmeta.inner_loop.fused import LazyAdapted
from fastmeta.inner_loop.optimizers import SGD, OptimizerState
from fastmeta.inner_loop.request import Request
from fastmeta.inner_loop.result import Grads, MetaGrad
from fastmeta.ops.backend import forced_backend
from fastmeta.ops.executor import executor_of
from fastmeta.program import cache

__all__ = ["Door", "find", "forget", "remember"]

_MOST_DOORS = 8  # a module: training and evaluation, a last small batch, a few rates


class _ByModule(dict[int, "list[Door]"]):
    """A dict that can be referred to weakly: a module's finalizer outlives a thread."""


class _Doors(threading.local):
    """A thread's doors by the module's id: executors, too, belong to a thread."""

    def __init__(self) -> None:
        self.of = _ByModule()


_doors = _Doors()


def forget() -> None:
    """Close all doors of this thread, and forget what was read, so that calls look anew.

    Example:
        >>> forget()
    """
    _doors.of.clear()
    cache.clear()


class Door:
    """What one kind of call needs, prepared.

    Args:
        request: the call that went the long way, over the ``fused`` path.
        options: its order, reduction, path and backend, as it was called.
    """

    def __init__(self, request: Request, options: tuple[Any, ...]) -> None:
        program, chain = request.cache["fused"]
        module, batch = request.model, request.batch
        if module is None:
            raise ValueError("Door: the call must have a module, got a program")
        self.module = weakref.ref(module)
        self.loss, self.inner, self.options = request.loss, request.inner, options
        self.values = _values(request.inner)
        self.tasks, self.steps = request.num_tasks, request.inner.steps
        rates = request.rates.rates
        spec = spec_of(request, program, chain, rates, batch.query.y.shape[1])
        dtype = batch.support.x.dtype
        owners = {name: _owner(module, name) for name in chain.names}
        self.params = {name: owner[key] for name, (owner, key) in owners.items()}
        self.trainable = tuple(name for name in chain.names if name in request.params)
        self.adapted = request.rates.adapted
        self.classifies = spec.loss == "cross_entropy"
        # the rates' tensors are kept, because the door has their addresses
        self.rates = {rate: torch.tensor([rate], dtype=dtype) for rate in set(rates.values())}
        numbers = self.tasks * (1 + spec.steps + self.classifies)
        self.blank = torch.empty(1, dtype=dtype).expand(numbers)  # a shape without memory
        watched = [*module.modules(), *_loss_modules(request.loss)]
        self.native = _native.require("meta_grad").Door(
            executor=executor_of(spec, dtype),
            tasks=self.tasks,
            scale=1.0 / self.tasks if request.reduction == "mean" else 1.0,
            tensor_type=Tensor,
            rows=[batch.support.x, batch.support.y, batch.query.x, batch.query.y],
            places=[(o, k, o[k], o[k].requires_grad) for o, k in owners.values()],
            attributes=[(m.__dict__, list(m.__dict__.values())) for m in watched],
            empty=[hooks for m in watched for hooks in _hooks(m)],
            children=[(m._modules, list(m._modules.values())) for m in watched],
            rates=[self.rates[rates[n]].data_ptr() if n in rates else 0 for n in chain.names],
            classifies=self.classifies,
            block=self.blank,
            empty_like=torch.empty_like,
            thread_count=torch.get_num_threads,
        )

    def is_for(self, inner: Any, loss: Any, options: tuple[Any, ...]) -> bool:
        """Whether a call has this door's inner optimizer, loss and options."""
        return (
            loss is self.loss
            and options == self.options
            and (inner is self.inner or _values(inner) == self.values)
        )


_Found: TypeAlias = tuple[tuple[Tensor, ...], Tensor, tuple[int, ...]]


class PreparedMetaGrad(MetaGrad):
    """A result whose parts are put together when they are first looked at."""

    path: str = "fused"

    def __init__(self, door: Door, batch: Any, found: _Found) -> None:
        self._of = (door, batch, found)

    def __getattr__(self, name: str) -> Any:
        door, batch, (grads, block, versions) = self._of
        if name == "grads":
            named = dict(zip(door.params, grads, strict=True))
            inner = pytree.tree_map(lambda _: None, door.inner)
            self.grads = Grads({name: named[name] for name in door.trainable}, inner)
        elif name == "adapted":
            rows = _rows(batch) or ()
            watched = zip((*door.params.values(), *rows[:2]), versions, strict=True)
            self.adapted = LazyAdapted(door.adapted, watched, lambda: _adapted(door, batch))
        elif name in ("losses", "metrics"):
            tasks, steps = door.tasks, door.steps
            self.losses = block[:tasks]
            support = block[tasks : tasks * (1 + steps)].view(tasks, steps)
            self.metrics = {"support_loss": support}
            if door.classifies:
                self.metrics["accuracy"] = block[tasks * (1 + steps) :]
        else:
            raise AttributeError(name)
        return self.__dict__[name]

    @property
    def state(self) -> OptimizerState:  # type: ignore[override]
        """The state after the last step; SGD carries the count of its steps alone."""
        door = self._of[0]
        return OptimizerState(torch.full((door.tasks,), door.steps), {}, {})

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a plain result, with all its parts."""
        parts = (self.grads, self.losses, self.metrics, dict(self.adapted), self.state, self.path)
        return MetaGrad, parts


def _adapted(door: Door, batch: Any) -> dict[str, Tensor]:
    from fastmeta.inner_loop.adapt import adapt

    module = door.module()
    if module is None:
        raise RuntimeError("meta_grad: adapted must be read while the module is alive")
    support = TaskBatch.of(batch).support
    return adapt(module, None, support, inner=door.inner, loss=door.loss, path="fused").params


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    value
    for name, value in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(value, dict)
)
_INTERNAL = frozenset(nn.Module().__dict__)  # what every module has; looked at by its content
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.Size)


def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
    """Dictionaries that must be empty: a module's hooks, and those of all modules."""
    return [*(module.__dict__[name] for name in _HOOKS), *_GLOBAL_HOOKS]


def _loss_modules(loss: Any) -> list[nn.Module]:
    return list(loss.modules()) if isinstance(loss, nn.Module) else []


def _is_plain(module: nn.Module, loss: Any) -> bool:
    """Whether all that a call depends on shows in the identity of attributes."""
    if not isinstance(loss, nn.Module) and (
        not isinstance(loss, types.FunctionType) or loss.__closure__ is not None
    ):
        return False
    for part in (*module.modules(), *_loss_modules(loss)):
        if any(_hooks(part)):
            return False
        if part._buffers and not isinstance(part, _NormBase):  # whose batch statistics are used
            return False
        extra = [value for name, value in part.__dict__.items() if name not in _INTERNAL]
        if not all(_never_changes(value) for value in extra):
            return False
    return True


def _never_changes(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_never_changes(entry) for entry in value)
    function = isinstance(value, types.FunctionType) and value.__closure__ is None
    return function or isinstance(value, (*_PLAIN, types.BuiltinFunctionType))


def _close(doors: weakref.ref[_ByModule], key: int) -> None:
    mine = doors()
    if mine is not None:
        mine.pop(key, None)


def _owner(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a parameter, and its key there."""
    *path, key = name.split(".")
    for part in path:
        module = getattr(module, part)
    return module._parameters, key


def _values(inner: Any) -> tuple[Any, ...]:
    """An inner optimizer's values, for comparing; itself where they are not plain."""
    if type(inner) is SGD and type(inner.lr) is float:
        return (inner.lr, inner.steps, inner.adapt, inner.exclude)
    return (inner,)


def _rows(batch: Any) -> tuple[Any, ...] | None:
    """x, y of the support and of the query of a plain batch, or None."""
    kind = type(batch)
    if kind is tuple:
        return batch if len(batch) == 4 else None
    if kind is not TaskBatch:
        return None
    support, query = batch.support, batch.query
    if support.weight is not None or query.weight is not None:
        return None
    if support.index is not None or query.index is not None:
        return None
    return support.x, support.y, query.x, query.y


def find(
    module: Any, batch: Any, inner: Any, loss: Any, options: tuple[Any, ...]
) -> MetaGrad | None:
    """The result through a door, or None if no door fits.

    Args:
        module: the first argument of ``meta_grad``, whose parameters are its own.
        batch: the batch as it was given.
        inner: the inner optimizer.
        loss: the loss.
        options: order, reduction, path, backend; everything else has its default.
    """
    doors = _doors.of.get(id(module))
    if doors is None or torch.is_autocast_enabled("cpu"):
        return None
    rows = _rows(batch)
    if rows is None:
        return None
    options = _in_force(options)
    for door in doors:
        if door.is_for(inner, loss, options) and door.module() is module:
            found = door.native.call(*rows)
            if found is not None:
                return PreparedMetaGrad(door, batch, found)
    return None


def _in_force(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The options with the backend that an enclosing block forces."""
    backend = forced_backend()
    return options if backend is None or options[3] != "auto" else (*options[:3], backend)


def remember(request: Request, options: tuple[Any, ...]) -> None:
    """Keep what a call over the ``fused`` path found, if a door can be made of it."""
    batch, module = request.batch, request.model
    rows = _rows(batch)
    if module is None or rows is None or request.per_task or request.frozen or request.loss_params:
        return
    if any(isinstance(rate, Tensor) for rate in request.rates.rates.values()):
        return
    if not all(type(t) is Tensor and t.is_contiguous() for t in rows):
        return
    if not _is_plain(module, request.loss):
        return
    if not _native.require("meta_grad").has_doors(Tensor):
        return  # a torch without DLPack's C interface: every call goes the long way
    _, chain = request.cache["fused"]
    if any(name not in chain.names or not p.is_contiguous() for name, p in request.params.items()):
        return
    door = Door(request, _in_force(options))
    key = id(module)
    doors = _doors.of.setdefault(key, [])
    if not doors:
        weakref.finalize(module, _close, weakref.ref(_doors.of), key).atexit = False
    doors[:] = [door, *(d for d in doors if d.module() is module)][:_MOST_DOORS]
