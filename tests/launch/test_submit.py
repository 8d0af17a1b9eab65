"""`millrace submit`, as far as it goes without a Slurm (tests/slurm has a real one)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from millrace.core.errors import UserError
from millrace.launch.submit import main


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('[run]\nname = "mill"\n[data]\nmanifest = "x"\n')
    return "run.toml"


def test_dry_run_prints_a_script_and_writes_nothing(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ["slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.time=12:00:00"]
    assert main([recipe, *asked, "train.batch=64", "optim.lr=3e-4", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gres=gpu:8\n" in script
    assert re.search(r"^#SBATCH '?--time=12:00:00'?$", script, re.M)
    assert "#SBATCH --job-name=mill\n" in script
    assert "-m millrace.pretrain run.toml train.batch=64 optim.lr=3e-4 || code=$?" in script
    assert "\nnodes=$((${#hosts[@]} < 2 ? 0 : 2))\n" in script
    assert '--num_machines "$nodes" --num_processes $((nodes * 8))' in script
    assert "slurm." not in script.partition("if ((nodes)); then")[2]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


def test_a_site_file_gives_what_the_command_line_does_not(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("site.toml").write_text('partition = "long"\nnodes = 4\nsetup = ["module load cuda"]\n')
    assert main([recipe, "--site", "site.toml", "slurm.nodes=2", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --partition=long\n" in script and "#SBATCH --nodes=2\n" in script
    assert "\nset -eo pipefail\nmodule load cuda\n" in script


def test_a_number_of_nodes_that_does_not_divide_the_batch_is_refused(recipe: str) -> None:
    with pytest.raises(
        UserError, match="train.batch gives 8 micro-batches, which 3 nodes with 1 processes each do not"
    ):
        main([recipe, "slurm.nodes=3", "--dry-run"])


def test_mistakes_are_found_before_anything_is_submitted(recipe: str) -> None:
    with pytest.raises(UserError, match="unknown key 'gpus_per_nod' in override .*did you mean 'gpus_per_node'"):
        main([recipe, "slurm.gpus_per_nod=8", "--dry-run"])
    with pytest.raises(UserError, match="unknown key 'optim.lrr'"):
        main([recipe, "optim.lrr=1", "--dry-run"])
    with pytest.raises(UserError, match="give one configuration file, not none"):
        main(["optim.lr=1", "--dry-run"])
    with pytest.raises(UserError, match="no configuration file other.toml"):
        main(["other.toml", "--dry-run"])
    Path("site.toml").write_text('partitoin = "x"\n')
    with pytest.raises(UserError, match=r"unknown key 'partitoin' in site.toml:1; did you mean 'partition'\?"):
        main([recipe, "--site", "site.toml", "--dry-run"])


def test_without_slurm_it_says_so(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine's PATH; .*--dry-run"):
        main([recipe])


def test_a_submission_prints_the_jobs_number(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "$@" > called\necho "123;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    assert main([recipe, "run.name=other"]) == 0
    assert capsys.readouterr().out == "123\n"
    called = Path("called").read_text().split()
    assert called == ["--parsable", str(tmp_path / "runs/other/slurm/job-1.sbatch")]
    assert "millrace.pretrain run.toml run.name=other" in Path(called[1]).read_text()
