"""A source distribution and a wheel of the repository, and environments to install them in."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.builds import archive_of, build, run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the repository tracks, so that a working folder is left alone."""
    copy = tmp_path_factory.mktemp("repository")
    listed = run("git", "ls-files", "-z", cwd=REPOSITORY)
    assert listed.returncode == 0, listed.stdout
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_symlink() or (REPOSITORY / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name, follow_symlinks=False)
    return archive_of(build("sdist", copy, tmp_path_factory.mktemp("sdist")))


@pytest.fixture
def source(sdist: Path, tmp_path: Path) -> Path:
    """The unpacked source distribution, this test's own."""
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    return next((tmp_path / "unpacked").iterdir())


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution, with the C++ core."""
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, folder, filter="data")
    built = build("wheel", next(folder.iterdir()), tmp_path_factory.mktemp("wheel"))
    return archive_of(built)


@pytest.fixture
def install(tmp_path: Path) -> Callable[[Path], Path]:
    """Installs a wheel into a new environment and returns that environment's Python.

    torch and numpy are not installed again: the environment looks for what it lacks where this
    Python looks.
    """

    def install(wheel: Path) -> Path:
        home = tmp_path / "environment"
        venv.create(home, with_pip=False)
        python = home / "bin" / "python"
        paths = {"base": str(home), "platbase": str(home)}
        own = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        (own / "torch_and_numpy.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--no-deps",
            "--no-index",
        ]
        # Over whatever fastmeta the borrowed folder holds, which must stay as it is.
        done = run(*pip, "--ignore-installed", wheel, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert (own / "fastmeta").is_dir()
        return python

    return install
