"""The examples of CONTRIBUTING.md are applied to a copy of the project, and run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.core.ledger import read
from tests.house.typing_tree import ROOT, folders

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (An? \w+)\n(.*?)(?=^## )", GUIDE, re.M | re.S))


def blocks(section: str) -> list[tuple[str, str]]:
    """(first line without its "# ", the rest) of every Python block."""
    return re.findall(r"```python\n# ([^\n]*)\n(.*?)```", SECTIONS[section], re.S)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the examples applied, importable as millrace from its folder."""
    copy = tmp_path_factory.mktemp("project")
    for name, folder in folders().items():
        target = copy.joinpath(*name.split("."))
        shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for section in SECTIONS:
        for head, text in blocks(section):
            path, _, table = head.partition(", in ")
            target = copy / "millrace" / path
            if table:
                before, opening, rest = target.read_text().partition(f"\n{table} = {{\n")
                assert opening
                entries, closing, after = rest.partition("\n}\n")
                key = text.partition(":")[0] + ":"  # where the table has it, its line is replaced
                kept = "\n".join(line for line in entries.split("\n") if not line.startswith(key))
                target.write_text(before + opening + text + kept + closing + after)
            elif head != "try it":
                assert not target.exists(), f"{path} exists: choose another example"
                target.write_text(text)
    return copy


def test_sections_have_one_file_lines_and_a_trial() -> None:
    assert list(SECTIONS) == ["An architecture", "A source", "A store", "A modality", "An objective", "A task"]
    for section in SECTIONS:
        heads = [head for head, _ in blocks(section)]
        files = [h for h in heads if h.endswith(".py")]
        assert len(files) == 1 and heads[-1] == "try it", heads
        assert len(heads) == (4 if section == "An objective" else 3)


# In one test, in the order of the guide: the task is tried on the model that the objective trained.
@pytest.mark.timeout(900)
def test_the_examples_work(project: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    said = {}
    for section in SECTIONS:
        (script,) = [text for head, text in blocks(section) if head == "try it"]
        where = f"import millrace.core as c\nassert c.__file__.startswith({str(project)!r}), c.__file__\n"
        done = subprocess.run(
            [sys.executable, "-c", where + script],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{section}:\n{done.stdout}\n{done.stderr}"
        said[section] = done.stdout
    assert said["An architecture"] == "128 384\n"
    assert "'series0': (4, 32), 'series1': (4, 32)" in said["A modality"]
    steps = [e for e in read(project / "runs/l2/ledger.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 2, 3]
    assert 0 <= float(said["A task"].splitlines()[-1]) <= 1


@pytest.mark.parametrize("section", list(SECTIONS))
def test_the_examples_are_in_style(section: str, tmp_path: Path) -> None:
    (text,) = [text for head, text in blocks(section) if head.endswith(".py")]
    path = tmp_path / "example.py"
    path.write_text(text)
    for command in (["check"], ["format", "--diff"]):
        config = ["--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config, str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
