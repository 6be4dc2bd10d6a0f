"""``import fastmeta`` is cheap: seen from a fresh process, with the doors locked."""

from __future__ import annotations

import subprocess
import sys

# Locks first, then the import, then a look at what came with it.
PROGRAM = """
import os, socket, subprocess, sys
import torch  # the core dependency; what it loads itself is its own business

def locked(*args, **kwargs):
    raise AssertionError(f"import fastmeta did something: {args} {kwargs}")

socket.socket.connect = locked
socket.create_connection = locked
subprocess.Popen.__init__ = locked
os.system = os.posix_spawn = os.fork = locked
torch.cuda.init = torch._C._cuda_init = locked

before = set(sys.modules)
import fastmeta
for name in fastmeta.__all__:
    getattr(fastmeta, name)
new = {module.partition(".")[0] for module in set(sys.modules) - before}
heavy = {"PIL", "matplotlib", "triton", "jax", "pandas", "hypothesis", "pytest", "torchvision"}
assert not new & heavy, new & heavy
assert not torch.cuda.is_initialized()
assert "fastmeta.cli" not in sys.modules and "fastmeta.recipes" not in sys.modules
print("lean")
"""


def test_import_touches_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "lean\n"
