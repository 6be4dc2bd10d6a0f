"""The examples in the docstrings, module by module."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastmeta

# Kernels need Triton to be imported; their examples, if any, belong into tests/kernels/.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(fastmeta.__path__, "fastmeta.")
    if not module.name.startswith(("fastmeta.kernels.", "fastmeta._core"))
    and not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=flags, verbose=False).failed == 0
