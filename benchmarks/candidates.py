"""Everyone's way to the same number: the mean meta-gradient of a batch of tasks.

A candidate is prepared outside the clock (modules copied, data in its own format, compilers run)
and gives a function of no arguments, which is timed, and a function that reads its result.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import fastmeta
from benchmarks.workloads import Problem
from fastmeta.batch import TaskBatch

Gradient = Mapping[str, Tensor]


class Prepared(NamedTuple):
    """A candidate ready for one problem.

    Args:
        call: what is timed; it returns when the result is there.
        read: from its result to the gradient by parameter name.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Gradient] = dict


@dataclass(frozen=True)
class Candidate:
    """One way to a meta-gradient.

    Args:
        key: short name, in goals and results.
        title: as tables show it.
        package: the distribution it needs.
        prepare: makes it ready for a problem; ValueError where it refuses one.
        compiles: whether it compiles for seconds or minutes; smoke runs then leave it out.
    """

    key: str
    title: str
    package: str
    prepare: Callable[[Problem], Prepared]
    compiles: bool = False

    def version(self) -> str | None:
        """The version installed, or None."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            found = importlib.util.find_spec(self.package)
            module = importlib.import_module(self.package) if found is not None else None
            return getattr(module, "__version__", None)


# fastmeta's own paths, through the direct call.


def _path(path: Any) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        batch = TaskBatch.of(problem.batch)
        inner = fastmeta.SGD(lr=problem.lr, steps=problem.steps)
        model, loss = problem.model, problem.loss
        fastmeta.explain(model, batch, inner=inner, loss=loss)  # so that the module is read

        def call() -> Gradient:
            result = fastmeta.meta_grad(model, None, batch, inner=inner, loss=loss, path=path)
            return result.grads.params

        return Prepared(call)

    return prepare


# What a user writes in torch alone.


def _loop(problem: Problem) -> Prepared:
    """A loop over tasks, with autograd through the inner steps of one task at a time."""
    model, loss, lr, steps, batch = problem
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    count = len(batch[0])

    def call() -> Gradient:
        total = {name: torch.zeros_like(param) for name, param in params.items()}
        for x, y, query_x, query_y in zip(*batch, strict=True):
            fast = params
            for _ in range(steps):
                value = loss(functional_call(model, fast, (x,)), y)
                grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
                fast = {n: p - lr * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            value = loss(functional_call(model, fast, (query_x,)), query_y) / count
            grads = torch.autograd.grad(value, list(params.values()))
            for mean, own in zip(total.values(), grads, strict=True):
                mean += own
        return total

    return Prepared(call)


def _task_loss(problem: Problem) -> Callable[..., Tensor]:
    model, loss, lr, steps, _ = problem

    def value(params: Gradient, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, dict(params), (x,)), y)

    def task_loss(
        params: Gradient, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        for _ in range(steps):
            grads = grad(value)(params, x, y)
            params = {name: param - lr * grads[name] for name, param in params.items()}
        return value(params, query_x, query_y)

    return task_loss


def _batched(problem: Problem) -> tuple[Callable[..., Gradient], tuple[Any, ...]]:
    """The mean of vmap(grad); on every workload here it is faster than the grad of a mean."""
    each = vmap(grad(_task_loss(problem)), in_dims=(None, 0, 0, 0, 0))
    params = {n: p.detach() for n, p in problem.model.named_parameters()}

    def mean(params: Gradient, *batch: Tensor) -> Gradient:
        return {name: value.mean(0) for name, value in each(params, *batch).items()}

    return mean, (params, *problem.batch)


def _vmap(problem: Problem) -> Prepared:
    function, arguments = _batched(problem)
    return Prepared(lambda: function(*arguments))


def _compile(problem: Problem) -> Prepared:
    function, arguments = _batched(problem)
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    return Prepared(lambda: compiled(*arguments))


# What users have today. Each accumulates into the .grad of a module of its own.


def _accumulated(model: torch.nn.Module, tasks: Callable[[], None]) -> Prepared:
    def call() -> Gradient:
        model.zero_grad(set_to_none=True)
        tasks()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    return Prepared(call)


def _learn2learn(problem: Problem) -> Prepared:
    from learn2learn.algorithms.maml import MAML

    model, loss, lr, steps, batch = problem
    model, count = copy.deepcopy(model), len(batch[0])
    maml = MAML(model, lr=lr)

    def tasks() -> None:
        for x, y, query_x, query_y in zip(*batch, strict=True):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(loss(learner(x), y))
            torch.autograd.backward(loss(learner(query_x), query_y) / count)

    return _accumulated(model, tasks)


def _higher(problem: Problem) -> Prepared:
    import higher

    model, loss, lr, steps, batch = problem
    model, count = copy.deepcopy(model), len(batch[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def tasks() -> None:
        for x, y, query_x, query_y in zip(*batch, strict=True):
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, step):
                for _ in range(steps):
                    step.step(loss(fast(x), y))
                torch.autograd.backward(loss(fast(query_x), query_y) / count)

    return _accumulated(model, tasks)


def _torchopt(problem: Problem) -> Prepared:
    import torchopt

    model, loss, lr, steps, batch = problem
    model, count = copy.deepcopy(model), len(batch[0])
    optimizer = torchopt.MetaSGD(model, lr=lr)
    start = torchopt.extract_state_dict(model, by="reference")
    start_optimizer = torchopt.extract_state_dict(optimizer, by="reference")

    def tasks() -> None:
        for x, y, query_x, query_y in zip(*batch, strict=True):
            for _ in range(steps):
                optimizer.step(loss(model(x), y))
            torch.autograd.backward(loss(model(query_x), query_y) / count)
            torchopt.recover_state_dict(model, start)
            torchopt.recover_state_dict(optimizer, start_optimizer)

    return _accumulated(model, tasks)


def _jax(problem: Problem) -> Prepared:
    from benchmarks import jax_candidate

    return Prepared(*jax_candidate.prepare(problem))


CANDIDATES: dict[str, Candidate] = {
    candidate.key: candidate
    for candidate in (
        Candidate("fused", "**fastmeta**, fused", "fastmeta", _path("fused")),
        Candidate("vectorized", "fastmeta, vectorized", "fastmeta", _path("vectorized")),
        Candidate("reference", "fastmeta, reference", "fastmeta", _path("reference")),
        Candidate("loop", "torch, loop over tasks", "torch", _loop),
        Candidate("vmap", "torch.func, vmap(grad)", "torch", _vmap),
        Candidate("compile", "torch.compile of that", "torch", _compile, compiles=True),
        Candidate("learn2learn", "learn2learn", "learn2learn", _learn2learn),
        Candidate("higher", "higher", "higher", _higher),
        Candidate("torchopt", "TorchOpt", "torchopt", _torchopt),
        Candidate("jax", "JAX, jit of grad of vmap", "jax", _jax, compiles=True),
    )
}

OURS = ("fused", "vectorized", "reference")
MUST_BE_RIGHT = (*OURS, "loop", "vmap")
"""A wrong number from one of these is a mistake in this repository."""


def exact(problem: Problem) -> Gradient:
    """The gradient in float64 by autograd: by the plain loop, or its vmap where T is large."""
    model, count, most = copy.deepcopy(problem.model).double(), len(problem.batch[0]), 64

    def part(first: int, last: int) -> Problem:
        xs, ys, xq, yq = (
            t[first:last].double() if t.is_floating_point() else t[first:last]
            for t in problem.batch
        )
        return problem._replace(model=model, batch=(xs, ys, xq, yq))

    if count <= most:
        whole: Gradient = _loop(part(0, count)).call()
        return whole
    total = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for first in range(0, count, most):
        last = min(first + most, count)
        for name, value in _vmap(part(first, last)).call().items():
            total[name] += (last - first) / count * value
    return total


def distance(gradient: Gradient, truth: Gradient) -> float:
    """The largest relative distance of a parameter's gradient, in the Euclidean norm.

    Relative to the parameter's own gradient, or to a hundredth of the whole one where its own is
    smaller: what hardly counts in an update is not held to its own size.
    """
    if set(gradient) != set(truth):
        return float("inf")
    whole = torch.stack([value.norm() for value in truth.values()]).norm()
    worst = 0.0
    for name, value in truth.items():
        found = gradient[name]
        if found.shape != value.shape or not bool(found.isfinite().all()):
            return float("inf")
        error = (found.detach().double() - value).norm() / max(value.norm(), 0.01 * whole)
        worst = max(worst, float(error))
    return worst
