"""Check the types of every module: `python tests/house/typing_tree.py`.

Type checkers and editors cannot follow setuptools' `package-dir`, so a tree of symbolic links, `.typing/millrace/…`,
shows them the package as it is imported. Point an editor's search path at `.typing`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / ".typing"


def folders() -> dict[str, Path]:
    """{package name: its folder}, as pyproject.toml maps them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return {name: ROOT / path for name, path in settings["package-dir"].items()}


def modules() -> dict[str, Path]:
    """{module name: file} of everything that is packaged."""
    found = {}
    for package, folder in folders().items():
        for path in folder.glob("*.py"):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def make_tree() -> None:
    """Make `.typing` anew: links to the top folders (their sub-packages lie inside) and to millrace's own files."""
    shutil.rmtree(TREE, ignore_errors=True)
    top = TREE / "millrace"
    top.mkdir(parents=True)
    for package, folder in folders().items():
        if package == "millrace":
            for path in folder.iterdir():
                if path.is_file():
                    (top / path.name).symlink_to(path)
        elif package.count(".") == 1:
            (top / package.partition(".")[2]).symlink_to(folder)


def check() -> tuple[int, str, int]:
    """(mypy's exit code, what it said, the number of files that it checked)."""
    make_tree()
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "-p", "millrace"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    count = re.search(r"(\d+) source files?", said.splitlines()[-1]) if said else None
    return done.returncode, said, int(count[1]) if count else 0


def main() -> int:
    """Print what mypy says; fail also when it saw fewer files than there are."""
    code, said, count = check()
    print(said, end="")
    if count != len(modules()):
        print(f"mypy checked {count} files, but there are {len(modules())}; is a package missing in pyproject.toml?")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
