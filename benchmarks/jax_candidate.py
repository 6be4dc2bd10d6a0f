"""The same meta-gradient in JAX, compiled for the problem's shapes by XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from jax import lax
from torch import Tensor, nn

from benchmarks.workloads import Problem

Params = dict[str, Any]


def _batch_norm(layer: Any, params: Params, name: str, x: Any) -> Any:
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean = x.mean(axes, keepdims=True)
    x = (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(axes, keepdims=True) + layer.eps)
    if layer.weight is not None:
        x = x * params[f"{name}.weight"].reshape(shape)
    return x + params[f"{name}.bias"].reshape(shape)


def _layer(layer: nn.Module, name: str, params: Params, x: Any) -> Any:
    if isinstance(layer, nn.Linear):
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
    if isinstance(layer, nn.ReLU):
        return jnp.maximum(x, 0)
    if isinstance(layer, nn.Flatten):
        return x.reshape(len(x), -1)
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _batch_norm(layer, params, name, x)
    if isinstance(layer, nn.Conv2d):
        y = lax.conv(x, params[f"{name}.weight"], (1, 1), "SAME")
        return y + params[f"{name}.bias"].reshape(1, -1, 1, 1)
    if isinstance(layer, nn.MaxPool2d):
        n, channels, height, width = x.shape
        x = x[:, :, : height // 2 * 2, : width // 2 * 2]
        return x.reshape(n, channels, height // 2, 2, width // 2, 2).max((3, 5))
    raise ValueError(f"{type(layer).__name__} is not written in JAX here")


def _mse(output: Any, y: Any) -> Any:
    return ((output - y) ** 2).mean()


def _cross_entropy(output: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], axis=1).mean()


_LOSSES: dict[Any, Callable[[Any, Any], Any]] = {
    F.mse_loss: _mse,
    F.cross_entropy: _cross_entropy,
}


def _array(tensor: Tensor) -> Any:
    if tensor.dtype == torch.int64:
        tensor = tensor.int()
    return jnp.asarray(tensor.detach().numpy())


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]:
    """The compiled call, and how its result is read."""
    model, loss, lr, steps, batch = problem
    layers, measure = list(model.named_children()), _LOSSES[loss]

    def value(params: Params, x: Any, y: Any) -> Any:
        for name, layer in layers:
            x = _layer(layer, name, params, x)
        return measure(x, y)

    def task_loss(params: Params, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(steps):
            grads = jax.grad(value)(params, x, y)
            params = jax.tree.map(lambda p, g: p - lr * g, params, grads)
        return value(params, query_x, query_y)

    def meta_grad(params: Params, *batch: Any) -> Params:
        # on every workload here faster than the mean of vmap(grad)
        each = jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))
        grads: Params = jax.grad(lambda params: each(params, *batch).mean())(params)
        return grads

    params = {name: _array(param) for name, param in model.named_parameters()}
    arguments = (params, *map(_array, batch))
    compiled = jax.jit(meta_grad).lower(*arguments).compile()

    def call() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    def read(result: Any) -> dict[str, Tensor]:
        return {name: torch.tensor(jax.device_get(value)) for name, value in result.items()}

    return call, read
