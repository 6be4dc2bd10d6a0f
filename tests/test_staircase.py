"""The import contracts of pyproject.toml, shown to catch what they are there for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
STEPS = ["cli", "recipes", "training", "algorithms", "inner_loop", "program", "ops", "kernels"]
FILES = ["__main__.py", "_native.py", "batch.py", "random.py", "_checks.py", "_version.py"]
BESIDE = ["tasks", "nn"]


def lint(folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the import linter over a package with nothing in it but the given lines."""
    (folder / "pyproject.toml").write_text(PYPROJECT.read_text())
    package = folder / "fastmeta"
    empty = dict.fromkeys(["__init__.py", *FILES], "")
    empty |= {f"{step}/__init__.py": "" for step in STEPS + BESIDE}
    for name, text in {**empty, **files}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text + "\n")
    program = "from importlinter.cli import lint_imports_command as main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-logo", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_downwards_is_fine(tmp_path: Path) -> None:
    chain = {
        f"{upper}/a.py": f"import fastmeta.{lower}" for upper, lower in itertools.pairwise(STEPS)
    }
    beside = {"tasks/a.py": "import fastmeta.random", "training/b.py": "import fastmeta.tasks"}
    done = lint(tmp_path, {**chain, **beside, "__init__.py": "import fastmeta.algorithms"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/a.py", "import fastmeta.algorithms"),
        ("kernels/a.py", "import fastmeta.training"),
        ("inner_loop/a.py", "from fastmeta.training import loop"),
        ("inner_loop/a.py", "import fastmeta.tasks"),
        ("algorithms/a.py", "import fastmeta.tasks"),
        ("tasks/a.py", "import fastmeta.inner_loop"),
        ("nn/a.py", "import fastmeta.program"),
        ("batch.py", "import fastmeta.ops"),
        ("random.py", "import fastmeta._native"),
        ("_checks.py", "import fastmeta.batch"),
        ("training/a.py", "import pickle"),
        ("kernels/a.py", "def f():\n    import fastmeta.program"),
        ("unheard_of.py", ""),
    ],
    ids=lambda value: value.replace("\n", " "),
)
def test_what_the_contracts_catch(file: str, line: str, tmp_path: Path) -> None:
    done = lint(tmp_path, {file: line})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_the_package_itself_is_no_way_up(tmp_path: Path) -> None:
    """``from fastmeta import MAML`` in an operation, through the re-exports."""
    up = {"__init__.py": "from fastmeta.algorithms import MAML", "ops/a.py": "import fastmeta"}
    assert "BROKEN" in lint(tmp_path, up).stdout
