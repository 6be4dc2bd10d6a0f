"""Which backend is asked for: argument, then context manager, then environment."""

from __future__ import annotations

import threading

import pytest

from fastmeta.ops.backend import BACKENDS, backend, current_backend


def test_who_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTMETA_BACKEND", raising=False)
    assert current_backend() == "auto"
    monkeypatch.setenv("FASTMETA_BACKEND", "cpp")
    assert current_backend() == "cpp"
    with backend("reference"):
        assert current_backend() == "reference"
        assert current_backend("triton") == "triton"
        with backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "reference"
    assert current_backend() == "cpp"


def test_a_block_is_left_by_an_error_too() -> None:
    before = current_backend()
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert current_backend() == before


def test_other_threads_do_not_see_it() -> None:
    seen = []
    outside = current_backend()
    with backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == [outside]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_name(name: str) -> None:
    with backend(name):
        assert current_backend() == name


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match=r"backend: name must be one of auto, .*, got 'gpu'"),
        backend("gpu"),
    ):
        pass
    with pytest.raises(TypeError, match="backend: name must be a string, got 3"), backend(3):  # type: ignore[arg-type]
        pass
    monkeypatch.setenv("FASTMETA_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend: FASTMETA_BACKEND must be one of"):
        current_backend()
