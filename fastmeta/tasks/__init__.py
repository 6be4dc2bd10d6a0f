"""Where tasks come from. A task is a function of (seed, step, index)."""

from __future__ import annotations

from fastmeta.tasks.dataset import from_dataset
from fastmeta.tasks.few_shot import FewShot
from fastmeta.tasks.omniglot import Omniglot
from fastmeta.tasks.sinusoid import Sinusoid
from fastmeta.tasks.source import TaskSource

__all__ = ["FewShot", "Omniglot", "Sinusoid", "TaskSource", "from_dataset"]
