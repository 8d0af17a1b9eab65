"""The command line itself: help, speed, mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from millrace import __version__
from millrace.launch.cli import COMMANDS, main

HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "pyarrow",
    "datasets",
    "numpy",
    "rich",
    "matplotlib",
    "wandb",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millrace.launch", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_names_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, (what, example, _) in COMMANDS.items():
        assert f"  {name:<10} {what}\n            {example}\n" in said
    assert max(map(len, said.splitlines())) <= 100
    assert main([]) == 0
    assert capsys.readouterr().out == said


def test_the_commands_of_the_project() -> None:
    expected = {"prepare", "pretrain", "finetune", "eval", "generate", "export", "submit", "report", "config"}
    assert expected <= COMMANDS.keys()


def test_help_answers_within_half_a_second() -> None:
    best = 9.0
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "millrace.launch", "--help"], check=True, capture_output=True)
        best = min(best, time.perf_counter() - began)
        if best < 0.5:
            break
    assert best < 0.5


def loaded(code: str) -> list[str]:
    """Heavy modules that `code` imports."""
    script = f"{code}\nimport sys\nprint('HEAVY', *[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pretrain", "--help"], ["nonsense"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert loaded(f"from millrace.launch.cli import main\nmain({arguments})") == []


@pytest.mark.parametrize("name", ["prepare", "submit", "config", "report", "eval", "generate", "export", "finetune"])
def test_help_of_a_command_does_not_import_torch(name: str) -> None:
    code = f"from millrace.launch.cli import main\ntry: main(['{name}', '--help'])\nexcept SystemExit: pass"
    assert not {"torch", "transformers", "deepspeed", "datasets"} & set(loaded(code))


def test_the_measure_of_imports_can_fail() -> None:
    assert loaded("import numpy") == ["numpy"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([name, "--help"])
    except SystemExit as done:
        code = done.code
    said = capsys.readouterr().out
    assert code == 0
    assert re.search(rf"example: +millrace {name} ", said), said
    assert f"usage: millrace {name}" in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_command_names_the_near_one() -> None:
    done = run("pretran", "x.toml")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown command 'pretran'; did you mean 'pretrain'?\n")


def test_a_users_mistake_has_no_traceback_unless_debug_is_given() -> None:
    done = run("pretrain", "nowhere.toml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no configuration file nowhere.toml\n"
    shown = run("pretrain", "nowhere.toml", "--debug")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr and "UserError: no configuration file nowhere.toml" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--fast"], "error: unknown flag --fast; options are written section.key=value, and --debug"),
        (["pretrain", "a.toml", "b.toml"], "error: give one configuration file, not a.toml, b.toml"),
        (["pretrain", "optim.lrr=3"], "error: unknown key 'optim.lrr' in override 'optim.lrr=3'; did you mean 'lr'?"),
        (["report", "nowhere"], "error: nowhere is not a run directory: it has no ledger.jsonl"),
        (["config", "optim.lr=-1"], "error: optim.lr = -1.0: must be positive"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", message + "\n")
