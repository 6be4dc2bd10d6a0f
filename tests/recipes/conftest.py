from __future__ import annotations

from tests.training.threads import one_thread

__all__ = ["one_thread"]
