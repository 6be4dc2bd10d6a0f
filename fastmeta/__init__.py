"""fastmeta: exact, batched meta-gradients for PyTorch from hand-written kernels.

Importing this package is cheap: it initialises no device, starts no compiler, reaches no
network, and loads neither plotting nor image libraries.
"""

from __future__ import annotations

from fastmeta._version import __version__
from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop.optimizers import SGD
from fastmeta.ops.backend import backend

__all__ = ["SGD", "Examples", "TaskBatch", "__version__", "backend"]
