"""The rules of the house that neither ruff nor the import linter can hold."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fastmeta

PACKAGE = Path(fastmeta.__file__).parent
TESTS = Path(__file__).parent
LONGEST = 600

Finding = tuple[ast.AST, str]
Rule = Callable[[ast.Module], Iterator[Finding]]


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call, with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> object:
    """The constant given by that keyword; None where it is absent, the tree where it is none."""
    for each in call.keywords:
        if each.arg == name:
            return each.value.value if isinstance(each.value, ast.Constant) else each.value
    return None


def unpickles(tree: ast.Module) -> Iterator[Finding]:
    """torch.load without weights_only=True, and numpy.load with allow_pickle."""
    for call, name in calls(tree):
        if name == "torch.load" and keyword(call, "weights_only") is not True:
            yield call, "torch.load must be given weights_only=True"
        if name in {"np.load", "numpy.load"} and keyword(call, "allow_pickle") not in (None, False):
            yield call, "numpy.load must not be given allow_pickle"


def hides_an_import(tree: ast.Module) -> Iterator[Finding]:
    """A dynamic import of the package's own modules, which the import linter cannot see."""
    for call, name in calls(tree):
        if name in {"importlib.import_module", "import_module", "__import__"}:
            target = call.args[0] if call.args else None
            literal = isinstance(target, ast.Constant) and isinstance(target.value, str)
            if not literal or target.value == "fastmeta" or target.value.startswith("fastmeta."):
                yield call, "a module of fastmeta must be imported by an import statement"


def skips(tree: ast.Module) -> Iterator[Finding]:
    """Any way not to run a test but @pytest.mark.needs, whose skips are listed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {
            "importorskip",
            "skip",
            "skipif",
            "skipTest",
            "xfail",
        }:
            yield node, "a test may be skipped by @pytest.mark.needs alone"


def findings(root: Path, rule: Rule, exempt: set[str]) -> list[str]:
    return [
        f"{path.relative_to(root)}:{node.lineno}: {message}"
        for path in sorted(root.rglob("*.py"))
        if str(path.relative_to(root)) not in exempt
        for node, message in rule(ast.parse(path.read_text()))
    ]


@pytest.mark.parametrize(
    ("root", "rule", "exempt"),
    [
        pytest.param(PACKAGE, unpickles, set(), id="package-reads-no-pickle"),
        pytest.param(PACKAGE, hides_an_import, {"_native.py"}, id="package-hides-no-import"),
        pytest.param(TESTS, skips, {"conftest.py"}, id="tests-skip-visibly"),
    ],
)
def test_rule(root: Path, rule: Rule, exempt: set[str]) -> None:
    assert findings(root, rule, exempt) == []


@pytest.mark.parametrize("root", [PACKAGE, TESTS], ids=["package", "tests"])
def test_no_file_is_too_long(root: Path) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in root.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize(
    ("rule", "wrong", "right"),
    [
        (unpickles, "torch.load(f)", "torch.load(f, weights_only=True)"),
        (unpickles, "torch.load(f, weights_only=False)", "json.load(f)"),
        (unpickles, "np.load(f, allow_pickle=flag)", "np.load(f, allow_pickle=False)"),
        (hides_an_import, "importlib.import_module('fastmeta.tasks')", "import fastmeta.tasks"),
        (hides_an_import, "__import__(name)", "__import__('json')"),
        (skips, "pytest.skip('later')", "pytest.fail('now')"),
        (skips, "@pytest.mark.xfail\ndef test(): ...", "@pytest.mark.needs('x')\ndef test(): ..."),
    ],
)
def test_the_rules_themselves(rule: Rule, wrong: str, right: str) -> None:
    assert list(rule(ast.parse(wrong)))
    assert not list(rule(ast.parse(right)))
