from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest

from fastmeta import _native


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test asks for the extension as if for the first time."""
    for cached in (_native._import_core, _native._warn_once):
        cached.cache_clear()
    yield
    for cached in (_native._import_core, _native._warn_once):
        cached.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _native.load()


def stand_in(monkeypatch: pytest.MonkeyPatch, result: ModuleType | Exception) -> None:
    def import_module(name: str) -> ModuleType:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_a_pure_install_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ModuleNotFoundError("no", name="fastmeta._core"))
    assert not _native.available()  # asking is silent
    with pytest.warns(RuntimeWarning, match=r"without its C\+\+ extension"):
        assert _native.load() is None
    assert _native.load() is None  # a second warning would be an error here


def test_a_core_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ImportError("libgomp.so.1: cannot open shared object file"))
    assert "does not load: libgomp.so.1" in _native.reason()
    with pytest.raises(RuntimeError, match=r"op: backend 'cpp' must be available, got: .*libgomp"):
        _native.require("op")


def test_another_missing_module_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ModuleNotFoundError("no", name="something_else"))
    with pytest.raises(ModuleNotFoundError):
        _native.available()


def test_the_instruction_set_is_the_best_or_the_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    core = ModuleType("core")
    core.isas = lambda: ["baseline", "avx2"]  # type: ignore[attr-defined]
    stand_in(monkeypatch, core)
    monkeypatch.delenv("FASTMETA_ISA", raising=False)
    assert _native.isa() == "avx2"
    monkeypatch.setenv("FASTMETA_ISA", "baseline")
    assert _native.isa() == "baseline"
    monkeypatch.setenv("FASTMETA_ISA", "avx512")
    with pytest.raises(ValueError, match="must be one of baseline, avx2, got 'avx512'"):
        _native.isa()


@pytest.mark.needs("cpp")
def test_the_core_of_this_machine() -> None:
    core = _native.require("test")
    assert core is _native.load()
    assert core.isas()[0] == "baseline"
    assert _native.isa() in core.isas()
