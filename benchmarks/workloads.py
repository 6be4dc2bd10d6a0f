"""The fixed workloads, their goals, and how their useful arithmetic is counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.nn import mlp, omniglot_mlp
from fastmeta.tasks import Sinusoid

WAYS, QUERIES = 5, 15  # of the image workloads; queries are a class

SMOKE_TASKS = SMOKE_STEPS = 2  # of a run for correctness alone

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # xs [T, S, ...], ys, xq [T, Q, ...], yq


class Goal(NamedTuple):
    """A goal and the stretch behind it.

    Args:
        against: a candidate's key (a ratio to be above), "peak" (a share to be above), "threads"
            (the ratio of one thread's time to all threads') or "memory" (bytes to stay below).
        least: the goal; None for "memory", whose bound depends on the executor.
        stretch: what comes after it, or None.
    """

    against: str
    least: float | None = None
    stretch: float | None = None


class Problem(NamedTuple):
    """A workload with its numbers: what a candidate is given."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    steps: int
    batch: Batch


@dataclass(frozen=True)
class Workload:
    """One exact second-order meta-gradient of T tasks after I inner SGD steps.

    Args:
        name: the workload's fixed name.
        variant: what distinguishes workloads of one name beside T and I.
        tasks: T.
        steps: I.
        threads: of every candidate.
        lr: the inner rate.
        model: makes the module.
        rows: makes the batch for a number of tasks.
        loss: of the output and y.
        flops: of one task.
        goals: what shall be reached.
        left_out: candidate key -> why it is not timed here.
        memory: whether extra memory is measured.
    """

    name: str
    variant: str
    tasks: int
    steps: int
    threads: int
    lr: float
    model: Callable[[], nn.Module]
    rows: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    flops: float
    goals: tuple[Goal, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    memory: bool = False

    @property
    def id(self) -> str:
        """Such as ``omniglot-mlp-1-shot-I5-T32-2-threads``."""
        variant = f"-{self.variant}" if self.variant else ""
        threads = "" if self.threads == 1 else f"-{self.threads}-threads"
        return f"{self.name}{variant}-I{self.steps}-T{self.tasks}{threads}"

    @property
    def title(self) -> str:
        """Such as ``omniglot-mlp 1-shot, I=5, T=32, 2 threads``."""
        name = f"{self.name} {self.variant}".strip()
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{name}, I={self.steps}, T={self.tasks}, {threads}"

    def problem(self, tasks: int | None = None, steps: int | None = None) -> Problem:
        """The same numbers every time; all of the workload, or fewer tasks or steps."""
        torch.manual_seed(0)
        model, rows = self.model(), self.rows(tasks or self.tasks)
        return Problem(model, self.loss, self.lr, steps or self.steps, rows)


def tolerance(tasks: int) -> float:
    """How far from the float64 gradient a candidate may be, see ``candidates.distance``.

    A thousandth for rounding, and one unit in one task, whose ReLU (or arg-max) falls on the other
    side of its kink: up to 4 % of that task's gradient was seen. Leaving out the second order is
    off by at least 6 %, mostly by half.
    """
    return 1e-3 + 0.04 / tasks


def mlp_flops(widths: list[int], support: int, query: int, steps: int) -> float:
    """Useful arithmetic of one task's exact second-order meta-gradient of an MLP.

    The matrix products of the recursion without a tape, two operations a multiply-add; nothing
    is computed twice, and elementwise work, losses and normalisation are not counted. With
    ``P`` the sum over layers of in * out, ``P1`` that of the first layer, and n rows:

    - loss and gradient ``2 n (3 P - P1)``: forward P, weights' gradient P, rows' gradient P - P1;
    - Hessian-vector product ``2 n (6 P - 4 P1)``, from the activations and adjoints that the
      former left: forward 2 P - P1, rows' adjoint 2 P - 2 P1, weights' 2 P - P1;
    - all: I (gradient + product) on the support, and one gradient on the query.
    """
    products = [a * b for a, b in itertools.pairwise(widths)]
    P, P1 = sum(products), products[0]
    gradient, product = 2 * (3 * P - P1), 2 * (6 * P - 4 * P1)
    return float(steps * support * (gradient + product) + query * gradient)


def conv4() -> nn.Sequential:
    """Four blocks of conv3x3(64), BatchNorm with batch statistics, ReLU, 2x2 max-pooling."""
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        norm = nn.BatchNorm2d(64, track_running_stats=False)
        layers += [nn.Conv2d(channels, 64, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, WAYS))


def sinusoid_rows(tasks: int) -> Batch:
    """10 support and 10 query rows of each sine curve."""
    batch = Sinusoid(shots=10, queries=10, seed=0).batch(step=0, num_tasks=tasks)
    return batch.support.x, batch.support.y, batch.query.x, batch.query.y


def image_rows(shots: int, *shape: int) -> Callable[[int], Batch]:
    """Images as sparse as Omniglot's, with balanced labels; no data set is needed.

    The ground is noisy: on a plain one activations are equal to the bit, and rounding decides
    which of them a max-pool takes.
    """

    def rows(tasks: int) -> Batch:
        generator = torch.Generator().manual_seed(1)

        def side(per_class: int) -> tuple[Tensor, Tensor]:
            count = WAYS * per_class
            ink, ground = torch.rand(2, tasks, count, 784, generator=generator)
            images = torch.where(ink < 0.1, 10 * ink, 0.1 * ground)
            labels = torch.arange(WAYS).repeat_interleave(per_class).expand(tasks, count)
            return images.view(tasks, count, *shape), labels.contiguous()

        return *side(shots), *side(QUERIES)

    return rows


_SLOW_LOOP = "a loop over so many tasks takes seconds a call"
_NO_LOOPS = tuple(
    (key, _SLOW_LOOP) for key in ("reference", "loop", "learn2learn", "higher", "torchopt")
)
_SLOW_COMPILE = ("compile", "its compiler takes minutes here")


def _sinusoid(tasks: int, steps: int, threads: int, *goals: Goal, memory: bool = False) -> Workload:
    left_out = _NO_LOOPS if tasks > 25 else ()
    return Workload(
        name="sinusoid",
        variant="",
        tasks=tasks,
        steps=steps,
        threads=threads,
        lr=0.01,
        model=lambda: mlp([1, 40, 40, 1]),
        rows=sinusoid_rows,
        loss=F.mse_loss,
        flops=mlp_flops([1, 40, 40, 1], 10, 10, steps),
        goals=goals,
        left_out=(*left_out, _SLOW_COMPILE) if steps > 5 else left_out,
        memory=memory,
    )


_OMNIGLOT_WIDTHS = [784, 256, 128, 64, 64, WAYS]


def _omniglot_mlp(shots: int, *goals: Goal, memory: bool = False) -> Workload:
    return Workload(
        name="omniglot-mlp",
        variant=f"{shots}-shot",
        tasks=32,
        steps=5,
        threads=1,
        lr=0.1,
        model=lambda: mlp(_OMNIGLOT_WIDTHS),
        rows=image_rows(shots, 784),
        loss=F.cross_entropy,
        flops=mlp_flops(_OMNIGLOT_WIDTHS, WAYS * shots, WAYS * QUERIES, 5),
        goals=goals,
        memory=memory,
    )


def _with_batch_norm(workload: Workload) -> Workload:
    """The paper's network, batch normalisation after each hidden layer, inner rate 0.4.

    With a scale, which the published code leaves out: torch 2.13 cannot differentiate its own
    batch normalisation twice without one.
    """
    return replace(
        workload,
        variant=f"{workload.variant}-batch-norm",
        model=lambda: omniglot_mlp(WAYS, scale=True, init="torch"),
        lr=0.4,
        goals=(),
        left_out=(_SLOW_COMPILE,),
        memory=False,
    )


_CONV4 = Workload(
    name="omniglot-conv4",
    variant="1-shot",
    tasks=4,
    steps=5,
    threads=2,
    lr=0.4,
    model=conv4,
    rows=image_rows(1, 1, 28, 28),
    loss=F.cross_entropy,
    flops=8.68e9,
    goals=(
        Goal("loop", 2, 3),
        Goal("vmap", 3.7, 5.5),
        Goal("jax", 13, 19),
        Goal("peak", 0.54, 0.8),
    ),
    left_out=(
        _SLOW_COMPILE,
        ("jax", "its compiler takes over a minute; nothing to compare it with yet"),
        *((key, "not timed before there is a kernel") for key in ("learn2learn", "higher")),
        ("torchopt", "not timed before there is a kernel"),
    ),
)

_1_SHOT = _omniglot_mlp(
    1, Goal("loop", 7, 9), Goal("vmap", 6.5, 8), Goal("jax", 5, 6), Goal("memory"), memory=True
)
_5_SHOT = _omniglot_mlp(5, Goal("loop", 4, 4.5), Goal("vmap", 4, 4.4), Goal("jax", 3.4, 3.8))
_T25 = (Goal("loop", 140, 150), Goal("vmap", 22, 25), Goal("jax", 2.7, 3), Goal("peak", 0.75))

WORKLOADS: dict[str, Workload] = {
    workload.id: workload
    for workload in (
        _sinusoid(25, 1, 1, *_T25),
        _sinusoid(25, 5, 1, *_T25),
        _sinusoid(256, 1, 1, Goal("vmap", 9), Goal("peak", 0.75)),
        _sinusoid(256, 5, 1, Goal("vmap", 9), Goal("peak", 0.75)),
        _sinusoid(
            4096, 10, 1, Goal("vmap", 9), Goal("jax", 6), Goal("peak", 0.75), Goal("memory"),
            memory=True,
        ),
        _sinusoid(256, 1, 2, Goal("jax", 5), Goal("threads", 1.8)),
        _sinusoid(256, 5, 2, Goal("jax", 5), Goal("threads", 1.8)),
        _sinusoid(4096, 10, 2, Goal("jax", 5), Goal("threads", 1.8)),
        _1_SHOT,
        _5_SHOT,
        _with_batch_norm(_1_SHOT),
        _with_batch_norm(_5_SHOT),
        _CONV4,
    )
}  # fmt: skip

NOT_YET = {
    "omniglot-conv4": "at T=32, and with a fused kernel",
    "hvp": "Hessian-vector product of the inner loss of the two MLPs",
    "mann": "memory 128x40, LSTM controller 200, batch 16, sequence 50, 4 read heads",
    "prototypes": "distance and softmax head, 5-way D=64 and 60-way D=1600",
}
"""Workloads that the project has named and nothing here measures yet."""
