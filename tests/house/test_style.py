"""ruff, mypy, docstrings, and the budget of complexity."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.house.typing_tree import ROOT, check, modules

MODULES = sorted(modules())


def ours() -> list[Path]:
    """Every text file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]


def test_mypy_checks_every_module() -> None:
    code, said, count = check()
    assert code == 0, said
    assert count == len(MODULES)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Named arguments, self and cls left out."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def excused(node: ast.AST, lines: list[str]) -> bool:
    """Where an outside interface dictates the arguments, the line says so: `# noqa: PLR0913 (why)`."""
    return bool(re.search(r"noqa: PLR0913 \(\w", lines[node.lineno - 1]))  # type: ignore[attr-defined]


# Where a seventh argument is clearer than a bundle of them.
LARGER = {"build_loader": 7}


@pytest.mark.parametrize("module", MODULES)
def test_complexity_budget(module: str) -> None:
    text = modules()[module].read_text()
    lines = text.splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines"
    for node in functions(ast.parse(text)):
        length = (node.end_lineno or 0) - node.lineno + 1
        assert length <= 80, f"{node.name} has {length} lines"
        if not excused(node, lines):
            allowed = LARGER.get(node.name, 6)
            assert arguments(node) <= allowed, f"{node.name} has {arguments(node)} arguments"


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public classes, functions and methods of `module` without a docstring, their own or an overridden one's."""
    if not module.__doc__:
        yield "the module"
    for name, thing in vars(module).items():
        public = not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
        if not public or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if not thing.__doc__:
            yield name
        if inspect.isclass(thing):
            yield from (f"{name}.{method}" for method in undocumented_methods(thing))


def undocumented_methods(cls: type) -> Iterator[str]:
    for name, method in vars(cls).items():
        written = inspect.isfunction(method) or isinstance(method, (property, classmethod, staticmethod))
        if written and not name.startswith("_") and name != "forward" and not inspect.getdoc(getattr(cls, name)):
            yield name


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_what_is_public_is_documented(module: str) -> None:
    assert list(undocumented(importlib.import_module(module))) == []


def test_future_annotations_are_everywhere() -> None:
    without = [
        name
        for name, path in modules().items()
        if re.search(r"^\s*(def|class) ", path.read_text(), re.M)
        and "from __future__ import annotations" not in path.read_text()
    ]
    assert without == []


# The checkout's own place, the home folder of whoever runs this, and a root user's.
MACHINE = re.compile(rf"{re.escape(str(ROOT))}/|{re.escape(str(Path.home()))}/|/root/")


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in ours():
        if path == Path(__file__).resolve() or path.suffix in (".png", ".svg"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_file_is_large() -> None:
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in ours() if p.stat().st_size > 500_000}
    assert large == {}


def test_the_budgets_can_fail() -> None:
    tree = ast.parse("def f(self, a, b, c, d, e, f, g): pass")
    assert arguments(next(functions(tree))) == 7
    empty = ModuleType("empty")

    class Thing:
        def method(self) -> None: ...

    Thing.__module__ = "empty"
    empty.Thing = Thing  # type: ignore[attr-defined]
    assert list(undocumented(empty)) == ["the module", "Thing", "Thing.method"]
