"""A small run to train, stop and resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fastmeta.algorithms import MAML
from fastmeta.batch import Examples, TaskBatch
from fastmeta.tasks import Sinusoid, TaskSource
from fastmeta.training import TrainResult, train


def learner(seed: int = 0, width: int = 8, **options: Any) -> MAML:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1))
    return MAML(model, **{"loss": mse_loss, "lr": 0.01, **options})


class Run:
    """Algorithm, optimizer and scheduler as a fresh process would build them."""

    def __init__(self, **options: Any) -> None:
        self.maml = learner(**options)
        self.optimizer = torch.optim.Adam(self.maml.parameters(), lr=1e-2)
        self.scheduler: Any = torch.optim.lr_scheduler.StepLR(
            self.optimizer, step_size=7, gamma=0.5
        )

    def train(self, iterations: int, **options: Any) -> TrainResult:
        given = {
            "source": Sinusoid(shots=5),
            "meta_batch": 4,
            "log_every": 3,
            "checkpoint_every": 5,
            "progress": False,
            **options,
        }
        return train(
            self.maml,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            iterations=iterations,
            **given,
        )

    def state(self) -> list[Tensor]:
        """Every tensor that a resumed run must have to the bit."""
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return [*self.maml.state_dict().values(), *moments]


def same(left: Run, right: Run) -> bool:
    pairs = list(zip(left.state(), right.state(), strict=True))
    assert len(pairs) == 4 + 3 * 4  # parameters; step and two moments each
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


class Poisoned(TaskSource):
    """Sinusoids, with NaN in two tasks of one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.inner = Sinusoid(shots=5)

    def sample(self, step: int, indices: Any, *, split: str | None = None) -> TaskBatch:
        batch = self.inner.sample(step, indices, split=split)
        if step != self.step:
            return batch
        y = batch.query.y.clone()
        y[1:3, 0] = torch.nan
        return TaskBatch(batch.support, Examples(batch.query.x, y), None, batch.task_id)
