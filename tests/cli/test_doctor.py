from __future__ import annotations

from pathlib import Path

import pytest

from fastmeta import _native
from fastmeta.cli import doctor


class FakeCore:
    """What doctor asks of the extension."""

    def isas(self) -> list[str]:
        return ["baseline", "avx2"]


@pytest.fixture
def with_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_import_core", lambda: (FakeCore(), ""))


def test_facts_with_a_core(with_core: None) -> None:
    facts = doctor.gather()
    assert facts["C++ core"]["extension"] == "loaded"
    assert facts["C++ core"]["instruction set"].endswith("this processor runs baseline, avx2")
    assert facts["backends"]["cpp"] == "yes"


def test_a_missing_core_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_import_core", lambda: (None, "no extension"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    facts = doctor.gather()
    assert facts["C++ core"]["extension"] == "no: no extension"
    assert "no-such-compiler not found" in facts["C++ core"]["compiler"]
    assert facts["backends"]["cpp"] == "no: no extension"


def test_an_impossible_instruction_set_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], with_core: None
) -> None:
    monkeypatch.setenv("FASTMETA_ISA", "sse9")
    doctor.main()
    printed = capsys.readouterr().out
    assert printed.count("FASTMETA_ISA must be one of baseline, avx2, got 'sse9'") == 2


def test_a_wrong_backend_is_shown(monkeypatch: pytest.MonkeyPatch, with_core: None) -> None:
    monkeypatch.setenv("FASTMETA_BACKEND", "abacus")
    assert "abacus" in doctor.gather()["backends"]["asked for"]


@pytest.mark.parametrize("name", ["images_background.zip", "images_background"])
def test_data_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "omniglot" / name).mkdir(parents=True)
    monkeypatch.setenv("FASTMETA_DATA", str(tmp_path))
    data = doctor.gather()["data"]
    assert data["omniglot"] == "background"
    assert data["mini-imagenet"] == "not found"


def test_a_data_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_DATA", str(tmp_path / "nowhere"))
    assert doctor.gather()["data"]["FASTMETA_DATA"].endswith("nowhere is no folder")


def test_every_section_is_printed(capsys: pytest.CaptureFixture[str], with_core: None) -> None:
    doctor.main()
    printed = capsys.readouterr().out
    for section, facts in doctor.gather().items():
        assert f"{section}\n" in printed
        assert all(f"  {name} " in printed for name in facts)
