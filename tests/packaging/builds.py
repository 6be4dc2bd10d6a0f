"""How the packaging tests build, and run things far from the sources."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Built:
    """What one build left: its exit status, all it printed, the archive if there is one."""

    status: int
    output: str
    archive: Path | None


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command far from the sources, with nothing inherited that would find them."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTMETA_ISA")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def build(kind: str, source: Path, out: Path, **environment: str) -> Built:
    """Runs the PEP 517 backend; isolation is what `make test` itself installs with."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", out, source]
    done = run(*command, cwd=source, **environment)
    archives = sorted(out.glob("fastmeta-*")) if out.is_dir() else []
    return Built(done.returncode, done.stdout, archives[0] if archives else None)


def archive_of(built: Built) -> Path:
    assert built.status == 0, built.output
    assert built.archive is not None
    return built.archive
