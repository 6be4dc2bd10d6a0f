"""fastmeta: exact, batched meta-gradients for PyTorch from hand-written kernels.

Importing this package is cheap: it initialises no device, starts no compiler, reaches no
network, and loads neither plotting nor image libraries.
"""

from __future__ import annotations

from fastmeta import nn, tasks
from fastmeta._version import __version__
from fastmeta.algorithms import FOMAML, MAML
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import (
    SGD,
    Adam,
    Adapted,
    MetaGrad,
    Momentum,
    accumulate_grad,
    adapt,
    explain,
    meta_grad,
)
from fastmeta.ops.backend import backend

__all__ = [
    "FOMAML",
    "MAML",
    "SGD",
    "Adam",
    "Adapted",
    "Examples",
    "MetaGrad",
    "Momentum",
    "TaskBatch",
    "__version__",
    "accumulate_grad",
    "adapt",
    "backend",
    "explain",
    "meta_grad",
    "nn",
    "tasks",
]
