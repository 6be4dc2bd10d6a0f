"""The engine: whole meta-batches through the inner loop, with exact gradients."""

from __future__ import annotations
