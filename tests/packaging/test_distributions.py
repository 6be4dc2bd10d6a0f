"""What ships, and that it works far from the repository."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.packaging.builds import run

Install = Callable[[Path], Path]


def test_the_sdist_holds_the_whole_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"csrc/module.cpp", "kernels/__init__.py", "fastmeta/py.typed", "setup.py"}
    expected |= {"LICENSE", "CHANGELOG.md", "constraints.txt", "tests/conftest.py"}
    expected |= {f"csrc/isa/{isa}.cpp" for isa in ("baseline", "avx2", "avx512")}
    assert expected <= names
    assert any(name.endswith(".h") for name in names)
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastmeta"}
    assert "fastmeta/py.typed" in names
    assert "fastmeta/kernels/__init__.py" in names
    assert [name for name in names if name.startswith("fastmeta/_core.")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_alone(wheel: Path, install: Install, tmp_path: Path) -> None:
    python = install(wheel)
    program = (
        "import fastmeta, fastmeta.kernels, fastmeta._core as core, sys\n"
        "assert fastmeta.__file__.startswith(sys.prefix), fastmeta.__file__\n"
        "assert core.__file__.startswith(sys.prefix), core.__file__\n"
        "from fastmeta import _native\n"
        "print(_native.isa())\n"
    )
    done = run(python, "-W", "error", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.strip() in {"baseline", "avx2", "avx512"}


def test_the_command_is_installed(wheel: Path, install: Install, tmp_path: Path) -> None:
    command = install(wheel).parent / "fastmeta"
    done = run(command, "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "loaded" in done.stdout
