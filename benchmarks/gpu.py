"""Everything that needs a GPU, in one go: ``python -m benchmarks.gpu --out FOLDER``.

Builds the core in place, runs the whole test suite (so that what needs a GPU is not skipped), once
more with each GPU backend forced, then the benchmarks. ``FOLDER`` then holds the output of each
step, ``benchmarks.json`` and ``.md``, and ``gpu.json``: device, driver, versions, and how each step
ended. Without a CUDA device it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine

ROOT = Path(__file__).parent.parent
NO_DEVICE = 2


class Step(NamedTuple):
    """A command, and what is set in its environment."""

    name: str
    command: list[str]
    environment: dict[str, str]


def steps(out: Path, kernels: set[str]) -> list[Step]:
    """What is run, given which GPU backends have kernels."""
    python = [sys.executable]
    tests = [*python, "-m", "pytest", "-q", "tests", "--ignore=tests/packaging"]
    needs = {"FASTMETA_REQUIRE": "cpp,gpu,triton" if "triton" in kernels else "cpp,gpu"}
    build = [Step("build", [*python, "setup.py", "build_ext", "--inplace"], {})]
    return [
        *(build if (ROOT / "setup.py").exists() else []),
        Step("tests", tests, needs),
        *(
            Step(f"tests-{name}", tests, {**needs, "FASTMETA_BACKEND": name})
            for name in sorted(kernels)
        ),
        Step(
            "benchmarks",
            [*python, "-m", "pytest", "-q", "benchmarks", f"--results={out}/benchmarks.json"],
            {},
        ),
    ]


def kernels() -> set[str]:
    """The GPU backends that have kernels here: Triton's are sources, CUDA's are in the core."""
    found = set()
    if importlib.util.find_spec("triton") and list((ROOT / "kernels").glob("[!_]*.py")):
        found.add("triton")
    if list((ROOT / "csrc").rglob("*.cu")):
        found.add("cuda")
    return found


def driver() -> str | None:
    """The driver's version, by its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None


def device() -> dict[str, Any]:
    """The device and the software that drives it."""
    versions: dict[str, str | None] = {"torch": torch.__version__}
    if importlib.util.find_spec("triton"):
        versions["triton"] = importlib.metadata.version("triton")
    properties = torch.cuda.get_device_properties(0)
    return {
        **machine.describe(versions),
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_bytes": properties.total_memory,
        "driver": driver(),
    }


def main() -> int:
    """The exit status: 0 if every step passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    out: Path = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        text = (
            f"benchmarks.gpu: a CUDA device must be there, and torch {torch.__version__} sees none"
        )
        print(text, file=sys.stderr)
        return NO_DEVICE
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {**device(), "kernels": sorted(kernels()), "steps": []}
    for step in steps(out, kernels()):
        start = time.perf_counter()
        with (out / f"{step.name}.txt").open("w") as log:
            status = subprocess.run(
                step.command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        seconds = round(time.perf_counter() - start, 1)
        found["steps"].append({"name": step.name, "status": status, "seconds": seconds})
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{step.name}: {'passed' if status == 0 else f'FAILED ({status})'}, {seconds} s")
    return int(any(step["status"] for step in found["steps"]))


if __name__ == "__main__":
    sys.exit(main())
