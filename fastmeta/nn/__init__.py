"""The usual learners of the papers, as ordinary modules."""

from __future__ import annotations

from fastmeta.nn.conv4 import conv4
from fastmeta.nn.init import maml_init_
from fastmeta.nn.mlp import mlp, omniglot_mlp

__all__ = ["conv4", "maml_init_", "mlp", "omniglot_mlp"]
