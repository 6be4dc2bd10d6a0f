"""The fast door of ``meta_grad``: a call that is like an earlier one skips all but the kernel.

The first call of its kind goes the long way: every argument is checked, the module is read, a path
is chosen. If that path is ``fused`` the outcome is remembered as a door. A later call passes
through it if everything the outcome depended on is still the same, which takes a few microseconds
to see: the objects themselves (module, submodule modes, parameters and where they lie, the inner
optimizer's values, the loss) and the sizes, dtype and layout of the batch. Anything else goes the
long way again, errors included. The numbers are the same bits either way.

A door does not see what its checks do not touch: a layer's hyper-parameter changed in place
(``leaky.negative_slope = 0.3``), a forward hook added, ``FASTMETA_ISA`` or ``FASTMETA_BACKEND`` set
in the environment of a running process. ``forget`` closes all doors.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta import _native
from fastmeta.batch import TaskBatch
from fastmeta.inner_loop.encode import spec_of
from fastmeta.inner_loop.fused import LazyAdapted
from fastmeta.inner_loop.optimizers import SGD, OptimizerState
from fastmeta.inner_loop.request import Request
from fastmeta.inner_loop.result import Grads, MetaGrad
from fastmeta.ops.backend import forced_backend
from fastmeta.ops.executor import executor_of

__all__ = ["Door", "find", "forget", "remember"]

_MOST_DOORS = 8  # a module: training and evaluation, a last small batch, a few rates


class _Doors(threading.local):
    """A thread's doors by the module's id: executors, too, belong to a thread."""

    def __init__(self) -> None:
        self.of: dict[int, list[Door]] = {}


_doors = _Doors()


def forget() -> None:
    """Close all doors of this thread, so that the next calls look at everything anew.

    Example:
        >>> forget()
    """
    _doors.of.clear()


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
        self.state = OptimizerState(torch.full((self.tasks,), spec.steps), {}, {})
        # the rates' tensors are kept, because the door has their addresses
        self.rates = {rate: torch.tensor([rate], dtype=dtype) for rate in set(rates.values())}
        numbers = sum(param.numel() for param in self.params.values())
        numbers += self.tasks * (1 + spec.steps + self.classifies)
        self.blank = torch.empty(1, dtype=dtype).expand(numbers)  # a shape without memory
        self.native = _native.require("meta_grad").Door(
            executor=executor_of(spec, dtype),
            tasks=self.tasks,
            scale=1.0 / self.tasks if request.reduction == "mean" else 1.0,
            tensor_type=Tensor,
            rows=[batch.support.x, batch.support.y, batch.query.x, batch.query.y],
            places=[(o, k, o[k], o[k].requires_grad) for o, k in owners.values()],
            modes=[(m.__dict__, m.training) for m in module.modules()],
            children=[(m._modules, list(m._modules.values())) for m in module.modules()],
            rates=[self.rates[rates[n]].data_ptr() if n in rates else 0 for n in chain.names],
            classifies=self.classifies,
            block=self.blank,
            allocate=torch.empty_like,
            thread_count=torch.get_num_threads,
        )

    def is_for(self, inner: Any, loss: Any, options: tuple[Any, ...]) -> bool:
        """Whether a call has this door's inner optimizer, loss and options."""
        return (
            loss is self.loss
            and options == self.options
            and (inner is self.inner or _values(inner) == self.values)
        )


class PreparedMetaGrad(MetaGrad):
    """A result whose parts are made when the first of them is looked at.

    One block of memory holds all numbers; the gradients are views of it.
    """

    path: str = "fused"

    def __init__(self, door: Door, batch: Any, found: tuple[Tensor, tuple[int, ...]]) -> None:
        self._of = (door, batch, found)

    def __getattr__(self, name: str) -> Any:
        if name not in ("grads", "losses", "metrics", "adapted"):
            raise AttributeError(name)
        self._make()
        return getattr(self, name)

    @property
    def state(self) -> OptimizerState:  # type: ignore[override]
        """The state after the last step; SGD carries the count of its steps alone."""
        return self._of[0].state

    def _make(self) -> None:
        door, batch, (block, versions) = self._of
        tasks, steps = door.tasks, door.steps
        shapes = [*(p.shape for p in door.params.values()), (tasks,), (tasks, steps)]
        if door.classifies:
            shapes.append((tasks,))
        parts = block.split_with_sizes([math.prod(shape) for shape in shapes])
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        by_name = dict(zip(door.params, views, strict=False))
        self.grads = Grads({name: by_name[name] for name in door.trainable})
        count = len(door.params)
        self.losses, self.metrics = views[count], {"support_loss": views[count + 1]}
        if door.classifies:
            self.metrics["accuracy"] = views[count + 2]
        rows = _rows(batch) or ()
        watched = zip((*door.params.values(), *rows[:2]), versions, strict=True)
        self.adapted = LazyAdapted(door.adapted, watched, lambda: _adapted(door, batch))


def _adapted(door: Door, batch: Any) -> dict[str, Tensor]:
    from fastmeta.inner_loop.adapt import adapt

    module = door.module()
    if module is None:
        raise RuntimeError("meta_grad: adapted must be read while the module is alive")
    support = TaskBatch.of(batch).support
    return adapt(module, None, support, inner=door.inner, loss=door.loss, path="fused").params


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
    if support.weight is not None or support.index is not None or query.weight is not None:
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
    if doors is None:
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
    if not _native.require("meta_grad").has_doors(Tensor):
        return  # a torch without DLPack's C interface: every call goes the long way
    _, chain = request.cache["fused"]
    if any(name not in chain.names or not p.is_contiguous() for name, p in request.params.items()):
        return
    door = Door(request, _in_force(options))
    key = id(module)
    doors = _doors.of.setdefault(key, [])
    if not doors:
        mine = _doors.of
        weakref.finalize(module, mine.pop, key, None).atexit = False
    doors[:] = [door, *(d for d in doors if d.module() is module)][:_MOST_DOORS]
