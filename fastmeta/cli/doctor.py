"""What is installed, what runs here, and why not: the facts that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import shutil
from pathlib import Path

import numpy
import torch

import fastmeta.kernels
from fastmeta import _native
from fastmeta._version import __version__
from fastmeta.ops.backend import current_backend

__all__ = ["Facts", "gather", "main"]

Facts = dict[str, dict[str, str]]

_COMPILERS = ("c++", "g++", "clang++")
# Data set -> the files or folders, either of which is enough, that it is made of.
_DATA = {
    "omniglot": {
        "background": ("images_background", "images_background.zip"),
        "evaluation": ("images_evaluation", "images_evaluation.zip"),
    },
    "mini-imagenet": {"images": ("images", "mini-imagenet.zip")},
}


def gather() -> Facts:
    """Collects the facts; nothing is printed, and nothing is built or downloaded.

    Unlike ``import fastmeta`` this asks torch for its CUDA devices.

    Returns:
        Section -> name -> value, all in words, in the order in which they are printed.

    Example:
        >>> list(gather())
        ['versions', 'C++ core', 'backends', 'data']
    """
    return {
        "versions": {
            "fastmeta": __version__,
            "python": f"{platform.python_version()} on {platform.platform()}",
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "triton": _version("triton"),
        },
        "C++ core": _core(),
        "backends": _backends(),
        "data": _data(),
    }


def main() -> int:
    """Prints the facts; the exit status is 1 when an installed C++ core cannot be used."""
    facts = gather()
    width = max(len(name) for section in facts.values() for name in section)
    for section, values in facts.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<{width}}  {value}")
    installed = importlib.util.find_spec("fastmeta._core") is not None
    return int(installed and bool(_why_no_core()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _why_no_core() -> str:
    try:
        if _native.available():
            _native.isa()
        return _native.reason()
    except ValueError as error:  # FASTMETA_ISA asks for what this processor does not run
        return str(error)


def _core() -> dict[str, str]:
    threads = f"{torch.get_num_threads()} (torch.set_num_threads changes it)"
    if why := _native.reason():
        return {"extension": f"no: {why}", "compiler": _compiler(), "threads": threads}
    chosen = "forced by FASTMETA_ISA" if os.environ.get("FASTMETA_ISA") else "chosen"
    runs = ", ".join(_native.require("doctor").isas())
    return {
        "extension": "loaded",
        "instruction set": _why_no_core()
        or f"{_native.isa()}, {chosen}; this processor runs {runs}",
        "threads": threads,
    }


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else _COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        return f"{found} is here now: reinstall fastmeta to build the core"
    return f"none: {', '.join(names)} not found; install one, then fastmeta again"


def _backends() -> dict[str, str]:
    verdicts = {"cpp": _why_no_core(), "cuda": _why_no_cuda(), "triton": _why_no_triton()}
    return {
        "asked for": _asked_for(),
        "reference": "yes",
        **{name: f"no: {why}" if why else "yes" for name, why in verdicts.items()},
    }


def _asked_for() -> str:
    try:
        return current_backend()
    except ValueError as error:  # FASTMETA_BACKEND names none
        return str(error)


def _gpu() -> str:
    """Why there is no GPU; the empty string when there is one."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _why_no_cuda() -> str:
    return _gpu() or "this version of fastmeta has no CUDA kernels"


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(pkgutil.iter_modules(fastmeta.kernels.__path__)):
        return "this version of fastmeta has no Triton kernels"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return _gpu()


def _data() -> dict[str, str]:
    name = "FASTMETA_DATA"
    root = os.environ.get(name)
    if not root:
        return {name: "not set: recipes need --data-root"}
    if not Path(root).is_dir():
        return {name: f"{root} is no folder"}
    found = {
        dataset: ", ".join(
            part
            for part, names in parts.items()
            if any(Path(root, dataset, file).exists() for file in names)
        )
        for dataset, parts in _DATA.items()
    }
    return {name: root, **{dataset: parts or "not found" for dataset, parts in found.items()}}
