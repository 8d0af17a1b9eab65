"""What the guides say can be done: links, commands and keys exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from millrace.core.config import explain, load_config
from millrace.core.errors import UserError
from millrace.finetune.config import FinetuneConfig
from millrace.launch.cli import COMMANDS
from millrace.pretrain.config import PretrainConfig
from millrace.slurm.config import SlurmConfig
from tests.house.typing_tree import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# The log is a diary: what it names may have gone since.
GUIDES = [path for path in GUIDES if path.name != "LOG.md"]


def commands(path: Path) -> list[str]:
    """Lines of indented blocks and fenced ones that call millrace."""
    return re.findall(r"^(?: {4})?(millrace \w.*?)(?: {2,}#.*)?$", path.read_text(), re.M)


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.name)
def test_commands_and_their_keys_exist(path: Path) -> None:
    for line in commands(path):
        words = line.split()
        assert words[1] in COMMANDS, line
        for recipe in re.findall(r"configs/\S+\.toml", line):
            assert (ROOT / recipe).exists(), line
        if words[1] in ("pretrain", "config", "submit"):
            cls = FinetuneConfig if "--for finetune" in line else PretrainConfig
            try:
                load_config(cls, None, [w for w in split(line) if "=" in w and not w.startswith(("slurm.", "-"))])
                load_config(SlurmConfig, None, [w[6:] for w in split(line) if w.startswith("slurm.")])
            except UserError as error:
                pytest.fail(f"{path.name}: {line}: {error}")


def split(line: str) -> list[str]:
    import shlex

    return shlex.split(line.partition(" > ")[0])


def test_guides_have_commands() -> None:
    assert len(commands(ROOT / "docs" / "configuration.md")) >= 5


def test_every_section_is_explained() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    sections = [key[1:-1] for key, _, _ in explain(PretrainConfig()) if key.startswith("[")]
    assert [name for name in sections if f"| `{name}` |" not in text] == []


def test_every_slurm_key_is_explained() -> None:
    text = (ROOT / "docs" / "slurm.md").read_text()
    assert [key for key, _, _ in explain(SlurmConfig()) if f"`{key}`" not in text] == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for path in GUIDES for name in re.findall(r"(?:`|^ {4})make ([a-z]+)", path.read_text(), re.M)}
    assert named and named <= targets


def test_the_version_has_an_entry() -> None:
    from millrace import __version__

    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_what_the_project_depends_on() -> None:
    pins = re.findall(r"^([a-z0-9-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [w for extra in project["optional-dependencies"].values() for w in extra]
    names = {re.match(r"[A-Za-z0-9_.-]+", w)[0].lower().replace("_", "-") for w in wanted} - {"millrace"}
    assert names <= set(pins)
    rest = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert len(rest) == len(pins) == len(set(pins)), "only plain pins: no URL, no local version"
    assert "+" not in "".join(rest)
