"""Small problems, and MAML written out with nothing but autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastmeta.batch import TaskBatch
from tests.tolerances import FLOAT64, assert_close

Loss = Callable[..., Tensor]


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Smooth, so that derivatives of every order exist."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def regression(
    T: int = 5, S: int = 4, Q: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1
) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return TaskBatch.of((draw(T, S, 2), draw(T, S, 1), draw(T, Q, 2), draw(T, Q, 1)))


def naive_maml(
    model: nn.Module,
    batch: TaskBatch,
    loss: Loss,
    rates: Callable[[str, int], float | Tensor],
    steps: int,
    order: int = 2,
) -> Tensor:
    """The meta-objective, task by task and step by step; differentiable to the model."""
    total = torch.zeros((), dtype=batch.query.x.dtype)
    for task in range(batch.num_tasks):
        params = dict(model.named_parameters())
        for step in range(steps):
            output = torch.func.functional_call(model, params, (batch.support.x[task],))
            names = list(params)
            grads = torch.autograd.grad(
                loss(output, batch.support.y[task]),
                [params[name] for name in names],
                create_graph=order == 2,
                retain_graph=True,
            )
            params = {
                name: params[name] - rates(name, step) * grad
                for name, grad in zip(names, grads, strict=True)
            }
        output = torch.func.functional_call(model, params, (batch.query.x[task],))
        total = total + loss(output, batch.query.y[task])
    return total / batch.num_tasks


def grads_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient, which is then cleared."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def assert_same(got: Tensor | Mapping[str, Tensor], want: Tensor | Mapping[str, Tensor]) -> None:
    """Two ways to compute the same numbers in float64, one tensor each or a group by name."""
    pair = [_detached(value) for value in (got, want)]
    assert_close(pair[0], pair[1], FLOAT64, "two ways to the same numbers")


def _detached(value: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    group = value if isinstance(value, Mapping) else {"value": value}
    return {name: tensor.detach() for name, tensor in group.items()}
