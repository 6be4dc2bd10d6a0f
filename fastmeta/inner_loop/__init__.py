"""The engine: whole meta-batches through the inner loop, with exact gradients."""

from __future__ import annotations

from fastmeta.inner_loop.adapt import Adapted, AdaptedTask, adapt
from fastmeta.inner_loop.engine import meta_grad
from fastmeta.inner_loop.explain import Explanation, explain
from fastmeta.inner_loop.optimizers import (
    SGD,
    Adam,
    InnerOptimizer,
    Momentum,
    OptimizerState,
    ResolvedSGD,
    resolve,
)
from fastmeta.inner_loop.request import Request
from fastmeta.inner_loop.result import Grads, MetaGrad, accumulate_grad

__all__ = [
    "SGD",
    "Adam",
    "Adapted",
    "AdaptedTask",
    "Explanation",
    "Grads",
    "InnerOptimizer",
    "MetaGrad",
    "Momentum",
    "OptimizerState",
    "Request",
    "ResolvedSGD",
    "accumulate_grad",
    "adapt",
    "explain",
    "meta_grad",
    "resolve",
]
