"""No compiler: a pure-Python install that says so. A compiler that fails: no install."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.builds import archive_of, build, run

Install = Callable[[Path], Path]


# Two meta-gradients on the paths that need no core: one warning, and it names the reason.
FIRST_USE = """
import warnings, torch, fastmeta
rows = torch.ones(2, 3, 1), torch.ones(2, 3, 1)
model = torch.nn.Linear(1, 1)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        fastmeta.meta_grad(
            model, None, (rows, rows), inner=fastmeta.SGD(), loss=torch.nn.functional.mse_loss
        )
ours = [str(w.message) for w in seen if "C++ extension" in str(w.message)]
assert len(ours) == 1, ours
"""


def no_cxx(folder: Path) -> dict[str, str]:
    return {"CXX": str(folder / "no-such-compiler")}


def no_path(folder: Path) -> dict[str, str]:
    """A PATH with the shell's tools and no compiler, and no CXX to name one."""
    folder.mkdir()
    for tool in ("sh", "env", "uname", "cat"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    (folder / "python").symlink_to(sys.executable)
    return {"PATH": str(folder), "CXX": ""}


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("missing", [no_cxx, no_path], ids=["CXX-names-none", "PATH-has-none"])
def test_without_a_compiler(
    missing: Callable[[Path], dict[str, str]], source: Path, install: Install, tmp_path: Path
) -> None:
    built = build("wheel", source, tmp_path / "out", **missing(tmp_path / "bin"))
    wheel = archive_of(built)
    assert "no C++ compiler was found" in built.output
    assert wheel.name.endswith("-py3-none-any.whl")

    python = install(wheel)
    done = run(python, "-c", FIRST_USE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout

    done = run(python, "-m", "fastmeta", "doctor", cwd=tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout
    assert "no: fastmeta was installed without its C++ extension" in done.stdout
    assert "no-such-compiler not found" in done.stdout


def test_a_compiler_that_does_not_start(source: Path, tmp_path: Path) -> None:
    cxx = script(tmp_path / "bin" / "broken", 'echo "licence expired" >&2; exit 3')
    built = build("wheel", source, tmp_path / "out", CXX=str(cxx))
    assert built.status != 0
    assert built.archive is None
    assert "licence expired" in built.output


def test_a_source_that_does_not_compile(source: Path, tmp_path: Path) -> None:
    (source / "csrc" / "module.cpp").write_text("this is not C++\n")
    # One file is enough here; compiling the others costs the suite a minute.
    for unit in [*source.glob("csrc/*.cpp"), *source.glob("csrc/ops/*.cpp")]:
        if unit.name != "module.cpp":
            unit.unlink()
    built = build("wheel", source, tmp_path / "out", MAX_JOBS="1")
    assert built.status != 0
    assert built.archive is None
    assert "this is not C++" in built.output or "'this'" in built.output


def test_a_compiler_without_openmp_builds_on_threads(source: Path, tmp_path: Path) -> None:
    """The probe, not the name of the compiler, decides: seen in the commands it is then given."""
    real = shutil.which(os.environ.get("CXX", "c++"))
    assert real is not None
    log = tmp_path / "log"
    refuse = 'for word in "$@"; do [ "$word" != -fopenmp ] || exit 1; done'
    note = f'echo "$@" >> {log}'
    stop = 'case "$*" in *"-c "*) echo "stopped here" >&2; exit 1;; esac'
    text = "\n".join([refuse, note, stop, f'exec {real} "$@"'])
    built = build("wheel", source, tmp_path / "out", CXX=str(script(tmp_path / "cxx", text)))
    assert built.status != 0
    assert "the core is built on std::thread" in built.output
    assert "-DFASTMETA_STD_THREADS" in log.read_text()
