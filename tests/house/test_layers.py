"""Who may import whom, read from the sources: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.typing_tree import modules

# launch → finetune → pretrain → eval → engine → { models | data } → core;  launch → slurm → core
BELOW = {
    "core": set(),
    "data": {"core"},
    "models": {"core"},
    "slurm": {"core"},
    "engine": {"models", "data", "core"},
    "eval": {"engine", "models", "data", "core"},
    "pretrain": {"eval", "engine", "models", "data", "core"},
    "finetune": {"pretrain", "eval", "engine", "models", "data", "core"},
    "launch": {"slurm", "finetune", "pretrain", "eval", "engine", "models", "data", "core"},
}
HEAVY = {
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "datasets",
    "pyarrow",
    "peft",
    "matplotlib",
    "wandb",
    "lm_eval",
}


def imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import statement below `node`, those in functions too."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from ((found.lineno, alias.name) for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, f"line {found.lineno}: a relative import; write `from millrace.…`"
            yield from ((found.lineno, f"{found.module}.{alias.name}") for alias in found.names)


def at_import_time(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports that run when the module is imported: not in functions, not under `if TYPE_CHECKING`."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from imports(node)


def targets(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lazy strings of registries, "millrace.x.y:Z": they are imports too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, attribute = node.value.partition(":")
            if colon and module.startswith("millrace.") and attribute.isidentifier():
                yield node.lineno, module


def violations(module: str, path: Path) -> list[str]:
    folder = module.split(".")[1]
    allowed = BELOW[folder] | {folder}
    tree = ast.parse(path.read_text())
    wrong = []
    for line, name in [*imports(tree), *targets(tree)]:
        parts = name.split(".")
        if parts[0] == "millrace" and len(parts) > 1 and parts[1] in BELOW and parts[1] not in allowed:
            wrong.append(f"{path.name}:{line} imports millrace.{parts[1]}, which lies above or beside {folder}")
    return wrong


OURS = {name: path for name, path in modules().items() if name.count(".")}


@pytest.mark.parametrize("module", sorted(OURS))
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    assert violations(module, OURS[module]) == []


def test_every_folder_is_in_the_diagram() -> None:
    assert {name.split(".")[1] for name in OURS} == set(BELOW)


def test_the_diagram_has_no_cycle() -> None:
    for folder, below in BELOW.items():
        for lower in below:
            assert folder not in BELOW[lower] and BELOW[lower] <= below


@pytest.mark.parametrize(
    "text",
    [
        "from millrace.models.counts import flops",
        "import millrace.engine",
        "def f():\n    from millrace.pretrain import run",
        'X = {"a": "millrace.models.bridge:build_model"}',
        "from millrace import models",
    ],
)
def test_a_wrong_import_would_be_found(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(text)
    assert len(violations("millrace.data.x", path)) == 1


def heavy(path: Path) -> list[str]:
    found = at_import_time(ast.parse(path.read_text()))
    return [f"{path.name}:{line} {name}" for line, name in found if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("module", sorted(m for m in OURS if m.startswith(("millrace.core", "millrace.slurm"))))
def test_core_and_slurm_import_nothing_heavy(module: str) -> None:
    assert heavy(OURS[module]) == []


@pytest.mark.parametrize("module", sorted(m for m in OURS if m.startswith("millrace.core")))
def test_core_never_imports_torch(module: str) -> None:
    assert "torch" not in {name.split(".")[0] for _, name in imports(ast.parse(OURS[module].read_text()))}


@pytest.mark.parametrize("module", sorted(m for m, p in OURS.items() if p.stem in ("__init__", "config", "sections")))
def test_what_a_configuration_needs_is_light(module: str) -> None:
    assert heavy(OURS[module]) == []
