"""The definition once more, by hand: a two-layer network and a loop, nothing of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
D, H, C = 3, 4, 2
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}  # float64, a few hundred roundings of order-one numbers


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).double()


def parameters(model: nn.Module) -> Params:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def forward(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
    return hidden @ params["2.weight"].T + params["2.bias"]


def mse(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def rowwise(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean(-1)


def regression(T: int = 5, S: int = 4, Q: int = 6, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(T, S, D), draw(T, S, C), draw(T, Q, D), draw(T, Q, C)


def adapted(
    params: Mapping[str, Tensor],
    x: Callable[[int], Tensor],
    y: Callable[[int], Tensor],
    rates: Callable[[str, int], Any],
    steps: int,
    order: int = 2,
    loss: Callable[[Tensor, Tensor], Tensor] = mse,
    names: tuple[str, ...] = NAMES,
) -> list[Params]:
    """The parameters of one task before the first and after each step."""
    path = [dict(params)]
    for step in range(steps):
        now = path[-1]
        grads = torch.autograd.grad(
            loss(forward(now, x(step)), y(step)), [now[name] for name in names], create_graph=True
        )
        moved = dict(now)
        for name, grad in zip(names, grads, strict=True):
            grad = grad if order == 2 else grad.detach()
            moved[name] = now[name] - rates(name, step) * grad
        path.append(moved)
    return path


def meta_objective(
    params: Mapping[str, Tensor],
    batch: Batch,
    rates: Callable[[str, int], Any],
    steps: int,
    order: int = 2,
    weights: tuple[float, ...] | None = None,
    names: tuple[str, ...] = NAMES,
    per_task: tuple[str, ...] = (),
) -> Tensor:
    """The outer loss of each task ``[T]``; with weights, a sum over the losses after each step."""
    losses = []
    for task, (xs, ys, xq, yq) in enumerate(zip(*batch, strict=True)):
        mine = {name: p[task] if name in per_task else p for name, p in params.items()}
        path = adapted(mine, lambda _: xs, lambda _: ys, rates, steps, order, names=names)  # noqa: B023
        if weights is None:
            losses.append(mse(forward(path[-1], xq), yq))
        else:
            each = [w * mse(forward(p, xq), yq) for w, p in zip(weights, path[1:], strict=True)]
            losses.append(torch.stack(each).sum())
    return torch.stack(losses)


def gradient(objective: Callable[[Params], Tensor], params: Params) -> Params:
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    grads = torch.autograd.grad(objective(leaves), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
