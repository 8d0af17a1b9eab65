"""`millrace config`, and every recipe in configs/."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from millrace.core.config import load_config, to_toml
from millrace.core.errors import UserError
from millrace.core.registry import load
from millrace.finetune.config import FinetuneConfig
from millrace.launch.config import main
from millrace.pretrain.config import PretrainConfig, resolve

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.toml"))


def test_toml_that_is_printed_is_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim.lr=3e-4", "schedule.kind=cosine", "--toml"]) == 0
    path = tmp_path / "resolved.toml"
    path.write_text(capsys.readouterr().out)
    config = load_config(PretrainConfig, path)
    assert config == load_config(PretrainConfig, None, ["optim.lr=3e-4", "schedule.kind=cosine"])
    assert to_toml(config).strip() == path.read_text().strip()


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    keys = [line for line in said.splitlines() if line and not line.startswith("[")]
    assert len(keys) > 50
    assert all(re.fullmatch(r"\w+ = .+ # \S.*", line) for line in keys), said


def test_fine_tuning_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--for", "finetune", "--toml"]) == 0
    assert set(tomllib.loads(capsys.readouterr().out)) >= {"run", "optim", "train"}


def test_the_number_of_ranks_is_checked_when_asked() -> None:
    given = ["data.manifest=x", "train.batch=8", "train.micro_batch=2"]
    assert main([*given, "--world", "4"]) == 0
    with pytest.raises(UserError, match=r"3 ranks.*1, 2, 4"):
        main([*given, "--world", "3"])


def test_only_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["a.toml", "b.toml"])
    assert "give one configuration file, not a.toml, b.toml" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_loads_and_resolves(path: Path) -> None:
    head = path.read_text().partition("\n[")[0]
    assert head.startswith("#"), "a recipe's header states command, cost and expected result"
    command = re.search(r"millrace (pretrain|finetune) (configs/\S+\.toml)(.*)", head)
    assert command and ROOT / command[2] == path, "the header shows the command that runs this recipe"
    assert "cost:" in head.lower(), "the header does not state the cost"
    assert re.search(r"\b(expect|result)", head, re.I), "the header does not state the expected result"
    cls = PretrainConfig if command[1] == "pretrain" else FinetuneConfig
    config = load_config(cls, path, shlex.split(command[3]))
    if cls is PretrainConfig:
        derived = resolve(config, max(1, config.run.processes))
        assert derived.accumulation >= 1


def test_there_are_recipes() -> None:
    assert RECIPES


def test_examples_of_the_command_line_name_recipes_that_exist() -> None:
    commands = load("millrace.launch.cli:COMMANDS")
    named = {name for _, example, _ in commands.values() for name in re.findall(r"configs/\S+\.toml", example)}
    assert named and all((ROOT / name).exists() for name in named), named
