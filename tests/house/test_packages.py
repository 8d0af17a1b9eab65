"""The mapping of folders to packages, its guards, and the wheel that it makes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from millrace.core.registry import load
from tests.house.typing_tree import ROOT, folders, modules

TOP = sorted(name.partition(".")[2] for name in folders() if name.count(".") == 1)


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_equal_the_tree() -> None:
    """Every folder with an __init__.py below the mapped ones is listed in both tables, and nothing else is."""
    tree = {"millrace"}
    for name in TOP:
        for init in (ROOT / name).rglob("__init__.py"):
            tree.add(".".join(["millrace", *init.parent.relative_to(ROOT).parts]))
    listed = settings()["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == tree
    assert set(folders()) == tree
    for name, folder in folders().items():
        assert name == "millrace" or folder == ROOT.joinpath(*name.split(".")[1:])


def test_every_folder_with_python_is_a_package() -> None:
    """A module in a folder without __init__.py would be left out of the wheel without a word."""
    for name in TOP:
        for path in (ROOT / name).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_top_folders_are_banned_by_their_bare_names() -> None:
    ruff = settings()["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert sorted(ruff) == TOP


@pytest.mark.parametrize("name", TOP)
def test_a_bare_import_from_the_root_is_refused(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: import millrace.{name}, not {name}" in done.stderr


@pytest.mark.parametrize("name", sorted(n for n in folders() if n.count(".") == 2))
def test_sub_packages_have_the_guard_too(name: str) -> None:
    source = (folders()[name] / "__init__.py").read_text()
    assert f'if __name__ != "{name}":\n    raise ImportError(' in source


def test_the_guard_leaves_the_right_name_alone() -> None:
    for name in folders():
        __import__(name)


def registries() -> list[tuple[str, str, str, str]]:
    found = []
    for module in modules():
        for attribute in (
            "REGISTRY",
            "SOURCES",
            "STORES",
            "MODALITIES",
            "CONFIGS",
            "COMMANDS",
            "OPTIMIZERS",
            "SCHEDULES",
            "TASKS",
        ):
            if f"\n{attribute} = {{" in modules()[module].read_text():
                table = load(f"{module}:{attribute}")
                for kind, target in table.items():
                    found.append((module, attribute, kind, target[-1] if isinstance(target, tuple) else target))
    return found


@pytest.mark.parametrize(("module", "table", "kind", "target"), registries())
def test_every_target_of_a_registry_exists(module: str, table: str, kind: str, target: str) -> None:
    assert load(target) is not None


def test_registries_are_found() -> None:
    tables = {(module, table) for module, table, _, _ in registries()}
    assert {
        ("millrace.data", "SOURCES"),
        ("millrace.models", "REGISTRY"),
        ("millrace.launch.cli", "COMMANDS"),
    } <= tables


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build folder stays in the repository."""
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for name in listed:
        source = ROOT / name
        if source.is_file() and (source.suffix in (".py", ".toml", ".md", ".yaml", ".typed") or name == "LICENSE"):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (made,) = out.glob("millrace-*.whl")
    return made


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "/".join(name.split(".")) + ("/__init__.py" if path.stem == "__init__" else ".py")
        for name, path in modules().items()
    }
    python = {name for name in names if name.endswith(".py")}
    assert python == expected
    assert "millrace/py.typed" in names
    shipped = {f"millrace/launch/accelerate/{path.name}" for path in (ROOT / "launch/accelerate").glob("*.yaml")}
    assert shipped <= names


EVERYTHING = """
import importlib, pathlib, sys
import millrace
root = pathlib.Path(millrace.__file__).parent
assert str(root).startswith(sys.argv[1]), root
for path in sorted(root.rglob("*.py")):
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    if not name.endswith("__main__"):
        module = importlib.import_module(name)
        assert module.__file__.startswith(sys.argv[1]), module.__file__
        print(name)
"""


def test_the_installed_wheel_imports_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Installed where no editable install is seen: `-P` and a path of site-packages without its .pth files."""
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    script = tmp_path / "everything.py"
    libraries = next(p for p in sys.path if p.endswith("site-packages"))
    script.write_text(f"import sys\nsys.path[:0] = [{str(target)!r}]\nsys.path.append({libraries!r})\n{EVERYTHING}")
    done = subprocess.run(
        [sys.executable, "-S", "-P", str(script), str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = {name for name in modules() if not name.endswith("__main__")}
    assert set(done.stdout.split()) == expected
