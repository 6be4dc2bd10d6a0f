"""The command line: ``fastmeta train | evaluate | doctor``."""

from __future__ import annotations

from fastmeta.cli.app import main

__all__ = ["main"]
