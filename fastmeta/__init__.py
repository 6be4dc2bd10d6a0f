"""fastmeta: exact, batched meta-gradients for PyTorch from hand-written kernels.

Importing this package is cheap: it initialises no device, starts no compiler, reaches no
network, and loads neither plotting nor image libraries.
"""

from __future__ import annotations

from fastmeta._version import __version__
from fastmeta.algorithms import FOMAML, MAML
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, MetaGrad, adapt, explain, meta_grad
from fastmeta.ops.backend import backend

__all__ = [
    "FOMAML",
    "MAML",
    "SGD",
    "Examples",
    "MetaGrad",
    "TaskBatch",
    "__version__",
    "adapt",
    "backend",
    "explain",
    "meta_grad",
]
