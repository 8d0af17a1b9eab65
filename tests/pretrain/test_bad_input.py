"""Mistakes and damage: the message says what, where and how to mend it, and nothing is overwritten."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace.core.ledger import read
from millrace.engine.checkpoint.read import list_checkpoints
from tests.ranks import ROOT, environment, launch_world, run_alone


def launch(*arguments: str, preexec: Any = None) -> subprocess.CompletedProcess[str]:
    """`millrace pretrain`, which starts one rank."""
    command = [sys.executable, "-m", "millrace.launch", "pretrain", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, preexec_fn=preexec
    )


def pretrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The rank alone."""
    return run_alone("millrace.pretrain", arguments)


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a refused start must leave alone."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    done = launch(str(config_file), *options(folder, "6 steps"))
    assert done.returncode == 0, done.stderr
    return folder


def options(folder: Path, duration: str) -> list[str]:
    return [
        f"run.dir={folder}", "run.name=run", f"train.duration={duration}", "checkpoint.every=2 steps",
        "checkpoint.keep=0", "engine.zero_stage=1", "schedule.kind=constant", "run.sample_ids=true",
    ]  # fmt: skip


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, file, says",
    [
        (flip, "rank-00000.safetensors", "rank-00000.safetensors was altered"),
        (truncate, "rank-00000.safetensors", "(torn)"),
        (Path.unlink, "trainer.json", "trainer.json is missing"),
        (Path.unlink, "MANIFEST.json", "no MANIFEST.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    run: Path, config_file: Path, damage: Any, file: str, says: str
) -> None:
    damage(run / "checkpoints" / "step-00000006" / file)
    done = pretrain(str(config_file), *options(run.parent, "8 steps"))
    assert done.returncode == 0, done.stderr
    assert "step-00000006" in done.stderr and says in done.stderr.replace("\n", " ")
    events = read(run / "ledger.jsonl")
    resume = next(e for e in events if e["event"] == "resume")
    assert resume["step"] == 4 and "step-00000006" in resume["rejected"][0]["path"]
    steps = [e for e in events if e["event"] == "step"]
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert [s["loss_hex"] for s in steps[4:6]] == [s["loss_hex"] for s in steps[6:8]], "recomputed to the bit"


def test_quarantined_samples_stay_out_of_recomputed_steps(run: Path, config_file: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    before = next(e for e in read(run / "ledger.jsonl") if e["event"] == "step" and e["step"] == 5)
    sample = before["samples"][0][0]
    lost = sum(end - start for other, start, end in before["samples"] if other == sample)
    entry = {"event": "quarantine", "time": 0.0, "step": 5, "sample": sample, "shard": "documents", "why": "spoilt"}
    with open(run / "ledger.jsonl", "a") as ledger:
        ledger.write(json.dumps(entry) + "\n")
    done = pretrain(str(config_file), *options(run.parent, "6 steps"))
    assert done.returncode == 0, done.stderr
    events = read(run / "ledger.jsonl")
    after = [e for e in events if e["event"] == "step" and e["step"] == 5][-1]
    assert lost > 0 and after["tokens"] == before["tokens"] - lost
    assert after["samples"] == before["samples"], "the plan is the same"
    assert sum(e["event"] == "quarantine" for e in events) == 1, "an entry is made once"


def test_when_no_checkpoint_verifies_the_run_does_not_start_over(run: Path, config_file: Path) -> None:
    for path in list_checkpoints(run / "checkpoints"):
        flip(path / "rank-00000.safetensors")
    before = snapshot(run / "checkpoints")
    done = pretrain(str(config_file), *options(run.parent, "8 steps"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no checkpoint in" in done.stderr and "does not start over in silence" in done.stderr.replace("\n", " ")
    assert snapshot(run / "checkpoints") == before


@pytest.mark.parametrize(
    "change, says",
    [
        ("model.config.hidden_size=64", "already holds another run (model:"),
        ("run.seed=7", "already holds another run (seed: 0 there, 7 now)"),
        ("train.batch=16", "already holds another run (batch: 8 there, 16 now)"),
    ],
)
def test_another_run_in_the_directory_is_refused(run: Path, config_file: Path, change: str, says: str) -> None:
    before = snapshot(run)
    done = pretrain(str(config_file), *options(run.parent, "8 steps"), change)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    assert says in text and "set run.name to a new name" in text
    assert snapshot(run) == before


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(run: Path, config_file: Path) -> None:
    before = snapshot(run / "checkpoints")
    largest = max(p.stat().st_size for p in (run / "checkpoints").rglob("*.safetensors"))

    def limit() -> None:
        # Writing past the limit fails as on a full disk, with another errno; a quota of the whole disk needs root.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, largest - 1000))

    done = launch(str(config_file), *options(run.parent, "8 steps"), preexec=limit)
    text = " ".join(done.stderr.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not write the checkpoint on rank 0" in text and "free space" in text
    assert snapshot(run / "checkpoints") == before, "no half-written folder, nothing lost"


OF_THE_LAUNCHER = [  # which reads the configuration before it starts ranks
    (["optim.momentun=0.9"], "unknown key 'optim.momentun'"),
    (["optim.lr=fast"], "optim.lr = 'fast' in override 'optim.lr=fast': expected a number"),
    (["train.batch=6", "train.micro_batch=4"], "train.batch = 6 is not a multiple of train.micro_batch = 4"),
    (["engine.zero_stage=5"], "engine.zero_stage = 5"),
    (["engine.offload_params=true"], "engine.offload_params needs engine.zero_stage = 3"),
    (["train.duration=forever"], "cannot read 'forever' as a quantity"),
    (["--fast"], "unknown flag --fast"),
]
OF_A_RANK = [
    (["data.manifest=/nowhere"], "/nowhere"),
    (["model.kind=qwen33"], "did you mean 'qwen3'"),
    (["model.config.vocab_size=64"], "tokenizer has"),
    (["model.kind=xlstm", "model.config={hidden_size=32, num_heads=2, num_hidden_layers=1}"], "xlstm"),
    (["engine.deepspeed_config=/nowhere.json"], "no DeepSpeed configuration /nowhere.json"),
]
MISTAKES = [
    *((launch, *mistake) for mistake in [*OF_THE_LAUNCHER, OF_A_RANK[0]]),
    *((pretrain, *mistake) for mistake in OF_A_RANK[1:]),
]


@pytest.mark.parametrize("start, arguments, says", MISTAKES, ids=[" ".join(m[1])[:40] for m in MISTAKES])
def test_mistakes_are_told_in_one_line(
    config_file: Path, tmp_path: Path, start: Any, arguments: list[str], says: str
) -> None:
    done = start(str(config_file), f"run.dir={tmp_path}/runs", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and says in " ".join(done.stderr.split()), done.stderr
    assert done.stderr.count("error:") == 1


def test_a_mistake_is_told_once_not_by_every_rank(config_file: Path, tmp_path: Path) -> None:
    arguments = [str(config_file), f"run.dir={tmp_path}/runs", "train.batch=6"]
    codes, said = launch_world("millrace.pretrain", 4, arguments)
    assert codes == [1] * 4 and "Traceback" not in "".join(said)
    assert "numbers of ranks that work: 1, 2, 3, 6" in " ".join(said[0].split()) and said[0].count("error:") == 1
    assert "error:" not in "".join(said[1:])


def test_debug_shows_the_traceback(config_file: Path, tmp_path: Path) -> None:
    done = launch(str(config_file), f"run.dir={tmp_path}/runs", "optim.lr=fast", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_deepspeed_json_is_honoured_and_its_conflicts_are_refused(config_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 4096}}))
    arguments = [*options(tmp_path, "1 steps"), f"engine.deepspeed_config={path}"]
    done = pretrain(str(config_file), *arguments)
    assert done.returncode == 0, done.stderr
    start = next(e for e in read(tmp_path / "run" / "ledger.jsonl") if e["event"] == "start")
    assert start["zero_stage"] == 3
    path.write_text(json.dumps({"gradient_clipping": 7.0}))
    done = pretrain(str(config_file), *arguments)
    assert done.returncode == 1 and "use optim.clip instead" in " ".join(done.stderr.split())
