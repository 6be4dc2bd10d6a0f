"""The bare call of a compiled executor behind ``fastmeta.meta_grad``, and what the door adds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastmeta
from benchmarks.workloads import Problem
from fastmeta import _native
from fastmeta.batch import TaskBatch
from fastmeta.inner_loop import door
from fastmeta.ops import executor as executors


class Bare(NamedTuple):
    """An executor and one prepared call of it; the tensors are kept for their addresses."""

    executor: Any
    call: Callable[[], None]
    tensors: tuple[Tensor | None, ...]


def bare_call(problem: Problem) -> Bare:
    """The executor's own call on the addresses that ``meta_grad`` would hand it."""
    recorded: list[tuple[Any, int, tuple[Tensor | None, ...], float]] = []
    run = executors.run

    def record(executor: Any, tasks: int, tensors: Any, scale: float) -> None:
        recorded.append((executor, tasks, tuple(tensors), scale))
        run(executor, tasks, tensors, scale)

    door.forget()  # a door would go past what is recorded
    executors.run = record
    try:
        _meta_grad(problem, TaskBatch.of(problem.batch))()
    finally:
        executors.run = run
    executor, tasks, tensors, scale = recorded[-1]
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    threads = torch.get_num_threads()
    return Bare(executor, lambda: executor.run(tasks, addresses, scale, threads), tensors)


def _meta_grad(problem: Problem, batch: TaskBatch) -> Callable[[], Any]:
    inner = fastmeta.SGD(lr=problem.lr, steps=problem.steps)
    model, loss = problem.model, problem.loss
    return lambda: fastmeta.meta_grad(model, None, batch, inner=inner, loss=loss)


def bare_is_right(problem: Problem) -> bool:
    """Whether the bare call fills its own tensors with what ``meta_grad`` returns, bit for bit."""
    bare = bare_call(problem)
    wanted = list(_meta_grad(problem, TaskBatch.of(problem.batch))().grads.params.values())
    count = len(wanted)
    outputs = [t for t in bare.tensors[3 * count : 4 * count] if t is not None]
    for tensor in outputs:
        tensor.fill_(float("nan"))
    bare.call()
    return len(outputs) == count and all(map(torch.equal, outputs, wanted))


def memory_goal(problem: Problem) -> int:
    """One gradient per leaf of the reduction tree in flight, the result, 4 MB a thread beside."""
    executor, threads = bare_call(problem).executor, torch.get_num_threads()
    leaves = -(-len(problem.batch[0]) // _native.require("memory_goal").leaf_tasks)
    waiting = leaves.bit_length()  # finished subtrees, at most one of each height
    in_flight = min(leaves, int(executor.leaves_in_flight(threads))) + waiting + 1
    gradient = int(executor.gradient_bytes())
    return int(in_flight * gradient + threads * 4_000_000)


def overhead(problem: Problem, calls: int) -> dict[str, float]:
    """Seconds of the bare call, of ``meta_grad``, and of it with every gradient looked at."""
    bare = bare_call(problem)
    full = _meta_grad(problem, TaskBatch.of(problem.batch))

    def read() -> None:
        full().grads.params.values()

    read()  # the first call of its kind opens the door for the next
    turns = {"kernel": bare.call, "call": full, "call_and_read": read}
    return {name: _mean_seconds(turn, calls) for name, turn in turns.items()}


def _mean_seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls
