"""`millrace checkpoint ls|verify|inspect|prune`, as a user sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.core.lease import acquire
from millrace.launch.cli import main
from tests.handmade import small_model, write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / "run" / "checkpoints", small_model(), step=step)
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def damage(run: Path, number: int) -> None:
    path = step(run, number) / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def there(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def shown(capsys: Capture) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_ls_names_them_newest_first(run: Path, capsys: Capture) -> None:
    (step(run, 2) / "MANIFEST.json").write_text("{")
    assert main(["checkpoint", "ls", str(run)]) == 0
    said = shown(capsys)
    assert "3 checkpoints" in said and said.index("step-00000003") < said.index("step-00000001")
    assert "2 × ZeRO 2" in said and "damaged:" in said and "3k" in said


def test_verify_names_what_is_wrong(run: Path, capsys: Capture) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": good\n") == 3
    damage(run, 2)
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert f"{step(run, 2)}: rank-00001.safetensors was altered" in said and said.count(": good\n") == 2
    assert main(["checkpoint", "verify", str(step(run, 3))]) == 0
    assert capsys.readouterr().out == f"{step(run, 3)}: good\n"


def test_inspect_shows_the_newest(run: Path, capsys: Capture) -> None:
    assert main(["checkpoint", "inspect", str(run)]) == 0
    said = shown(capsys)
    assert "step-00000003" in said.replace(" ", "") and "2 ranks at ZeRO 2" in said and "window 3, row 5" in said
    assert "model.lm_head.weight" in said or "embed_tokens.weight" in said


def test_prune_keeps_the_newest_that_verify(run: Path, capsys: Capture) -> None:
    damage(run, 3)
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--dry-run"]) == 0
    assert there(run) == [1, 2, 3] and shown(capsys).count("would remove") == 2
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert there(run) == [2]


def test_prune_removes_nothing_where_none_verifies_or_the_run_is_owned(run: Path, capsys: Capture) -> None:
    for number in (1, 2, 3):
        damage(run, number)
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 1
    assert "none of the 3 checkpoints" in shown(capsys) and there(run) == [1, 2, 3]


def test_prune_is_refused_while_the_run_is_trained(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from millrace.core import lease

    monkeypatch.setattr(lease, "EXPIRES", 0.3)
    with acquire(run):
        assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 1
    assert "is being written by process" in shown(capsys) and there(run) == [1, 2, 3]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["lss"], "unknown sub-command 'checkpoint lss'; did you mean 'ls'?"),
        (["ls", "nowhere"], "nowhere is neither a run directory nor one of its checkpoints/step-N folders"),
        (["prune", "nowhere", "--keep", "1"], "nowhere is not a run directory"),
        (["prune", "nowhere", "--keep", "0"], "at least 1 must stay"),
    ],
)
def test_mistakes_are_named(command: list[str], message: str, capsys: Capture) -> None:
    assert main(["checkpoint", *command]) == 1
    assert message in shown(capsys)
