"""The README's Python examples run, in order, as pasted, and print what it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.needs("cpp")  # what it shows is what an installation with the C++ core prints
def test_the_examples_run_and_print_what_is_shown(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```(python|text)\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    code = [block for language, block in blocks if language == "python"]
    shown = [block for language, block in blocks if language == "text"]
    assert code, "README.md must show an example"
    assert shown, "README.md must show what it prints"
    program = tmp_path / "readme.py"
    program.write_text("\n".join(code))
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(shown)
