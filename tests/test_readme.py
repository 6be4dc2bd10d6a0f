"""The README's Python examples run, in order, as a reader would paste them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    assert blocks, "README.md must show an example"
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
