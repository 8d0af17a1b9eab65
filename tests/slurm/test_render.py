"""The batch script's text, and the script itself run with stand-ins for Slurm's programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.slurm.config import SlurmConfig
from millrace.slurm.render import render

GOLDEN = Path(__file__).with_name("golden")
ODD = ["a b", "$HOME", "it's", "*", "", 'q"q', "back\\slash", "#no", "`id`", "%j", "two\nlines", "--debug"]
GPU_NODES = SlurmConfig(
    nodes=16,
    gpus_per_node=8,
    cpus_per_task=96,
    time="1-12:00:00",
    partition="h100",
    account="project 7",
    qos="long",
    job_name="it's a run",
    environment={"HF_HUB_OFFLINE": "1", "NOTE": "$5 'each'"},
    setup=["module load cuda/13", "source ~/venv/bin/activate"],
    extra=["--exclusive", "--constraint=a100|h100"],
    accelerate_config="accelerate/zero 2.yaml",
)
CONTAINER = SlurmConfig(
    nodes=2,
    gpus_per_node=4,
    container="nvcr.io#nvidia/pytorch:26.01-py3",
    container_mounts=["/data:/data"],
    log="/logs/%x-%j.out",
)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/opt/my venv/bin/python")
    monkeypatch.setattr("os.getcwd", lambda: "/home/ada/mill")


@pytest.mark.parametrize(
    ("name", "config", "run_dir"),
    [
        ("gpu_nodes", GPU_NODES, "/runs/100% it's"),
        ("container", CONTAINER, "/runs/base"),
        ("one_cpu", SlurmConfig(), "runs/tiny"),
    ],
)
def test_golden(name: str, config: SlurmConfig, run_dir: str, fixed: None) -> None:
    command = ["-m", "millrace.pretrain", "configs/base.toml", "run.note=it's $5"]
    text = render(config, command, run_dir)
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sbatch")), ids=lambda path: path.stem)
def test_bash_and_shellcheck_accept_the_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        # 2016: $SLURM_NODEID in single quotes is for the inner shell. 1091: the user's own files.
        subprocess.run(["shellcheck", "--exclude=SC2016,SC1091,SC1090", str(path)], check=True)


def run_script(folder: Path, config: SlurmConfig, command: list[str], node: int) -> tuple[list[str], dict[str, str]]:
    """The launcher's arguments and environment on `node`; srun, scontrol and python are stand-ins."""
    programs = {
        "scontrol": '[[ $2 == hostnames ]] && seq -f gpu%g 3 || echo "NodeName=$4 NodeAddr=10.0.0.7 Port=1"',
        "srun": f'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID={node} exec "$@"',
        "py thon": f'exec {sys.executable} -c "import json, os, sys;'
        f" json.dump([sys.argv[1:], dict(os.environ)], open('seen.json', 'w'))\" \"$@\"",
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", str(folder / "py thon"))
        script = render(config, command, folder)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456"}
    environment |= {"SLURM_JOB_NODELIST": "gpu[1-3]"}
    subprocess.run(["bash", "-c", script], check=True, cwd=folder, env=environment, capture_output=True)
    seen, variables = json.loads((folder / "seen.json").read_text())
    return seen, variables


def test_what_reaches_the_launcher(tmp_path: Path) -> None:
    config = SlurmConfig(
        nodes=3,
        processes_per_node=2,
        cpus_per_task=10,
        environment={"A": "x $y 'z'"},
        setup=["unset_is_fine=$NOT_SET_AT_ALL", "export B=$((1 + 1))"],
    )
    seen, variables = run_script(tmp_path, config, ["-m", "millrace.pretrain", *ODD], node=2)
    assert seen == [
        *["-m", "accelerate.commands.launch", "--machine_rank", "2"],
        *["--use_deepspeed", "--deepspeed_multinode_launcher", "standard"],
        *["--num_machines", "3", "--num_processes", "6"],
        *["--main_process_ip", "10.0.0.7", "--main_process_port", "13456"],
        *["-m", "millrace.pretrain", *ODD],
    ]
    assert (variables["A"], variables["B"], variables["OMP_NUM_THREADS"]) == ("x $y 'z'", "2", "5")


def test_the_users_accelerate_file_and_threads_win(tmp_path: Path) -> None:
    config = SlurmConfig(accelerate_config="my file.yaml", environment={"OMP_NUM_THREADS": "3"}, cpus_per_task=8)
    seen, variables = run_script(tmp_path, config, ["x.py"], node=0)
    assert seen[4:6] == ["--config_file", "my file.yaml"]
    assert "--use_deepspeed" not in seen
    assert variables["OMP_NUM_THREADS"] == "3"


def ended(folder: Path, code: int, outcome: int | None, requeue: bool = True, restarts: int = 0) -> tuple[int, str]:
    """(exit code, output) of a job whose srun ends with `code`, the run having left `outcome`."""
    leave = "" if outcome is None else f"echo '{{\"code\": {outcome}}}' > {folder}/outcome.json; "
    programs = {
        "scontrol": f'[[ $1 == requeue ]] && echo "$2" >> {folder}/requeued; [[ $2 == hostnames ]] && echo n1;'
        f'[[ $3 == job ]] && echo "JobId=7 Restarts={restarts} BatchFlag=1"; true',
        "srun": f"{leave}exit {code}",
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "slurm").mkdir(exist_ok=True)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    script = render(SlurmConfig(requeue=requeue, node_check=0), ["x.py"], folder)
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "code, outcome, expected, again",
    [
        (0, 0, 0, 0),
        (0, None, 0, 0),
        (0, 75, 75, 1),
        (1, 75, 75, 1),
        (1, None, 75, 1),
        (137, None, 75, 1),
        (1, 93, 93, 0),
    ],
)
def test_all_but_done_and_stop_is_started_again(
    tmp_path: Path, code: int, outcome: int | None, expected: int, again: int
) -> None:
    found, _ = ended(tmp_path, code, outcome)
    requeued = tmp_path / "requeued"
    assert found == expected and (requeued.read_text().split() if requeued.exists() else []) == ["7"] * again


def test_three_starts_without_a_checkpoint_are_the_last(tmp_path: Path) -> None:
    def step(number: int, suffix: str = "") -> None:
        (tmp_path / f"checkpoints/step-{number:08d}{suffix}").mkdir(parents=True)

    assert [ended(tmp_path, 1, None)[0] for _ in range(2)] == [75, 75]
    step(100)
    step(200, ".tmp-3")  # unfinished: no progress
    assert [ended(tmp_path, 1, 75)[0] for _ in range(2)] == [75, 75]
    step(200)
    assert [ended(tmp_path, 1, None)[0] for _ in range(2)] == [75, 75]
    code, said = ended(tmp_path, 1, None)
    assert code == 93 and "3 starts on end made no checkpoint (newest: step-00000200)" in said
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 93
    assert (tmp_path / "requeued").read_text().split() == ["7"] * 6
    (tmp_path / "outcome.json").unlink()
    assert ended(tmp_path, 1, None)[0] == 75  # submitted by hand, it has three again


def test_a_job_that_slurm_has_queued_again_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, said = ended(tmp_path, 137, None, restarts=2)
    assert code == 75 and "Slurm has queued it again already" in said
    assert not (tmp_path / "requeued").exists() and not (tmp_path / "slurm" / "starts").exists()
    assert ended(tmp_path, 137, None, restarts=1)[0] == 75 and (tmp_path / "requeued").exists()


def test_without_requeue_the_job_ends_with_the_code(tmp_path: Path) -> None:
    assert [ended(tmp_path, 1, outcome, requeue=False)[0] for outcome in (None, 75, 93)] == [1, 75, 93]
    assert not (tmp_path / "requeued").exists()


def test_as_many_nodes_as_divide_the_batch(tmp_path: Path) -> None:
    elastic = SlurmConfig(nodes=2, max_nodes=6, processes_per_node=2)
    text = render(elastic, ["x.py"], tmp_path, shares=24)
    assert "#SBATCH --nodes=2-6\n" in text and "for count in 6 4 3 2; do" in text
    assert "#SBATCH --ntasks-per-node" not in text, (
        "or Slurm gives the least of them, see tests/faults/test_node_loss.py"
    )
    chosen = text[text.index("# As many nodes") : text.index("if ((nodes)); then")] + "echo $nodes"
    for got, used in ((6, 6), (5, 4), (4, 4), (3, 3), (2, 2), (1, 0), (0, 0)):
        hosts = f"hosts=({' '.join(f'n{number}' for number in range(got))})\n"
        assert int(subprocess.check_output(["bash", "-uc", hosts + chosen])) == used
    assert "#SBATCH --nodes=4-8\n" in render(SlurmConfig(nodes=3, max_nodes=9), ["x.py"], tmp_path, shares=16)
    with pytest.raises(UserError, match="gives 7 micro-batches, which 2 to 6 nodes with 2 processes each do not"):
        render(elastic, ["x.py"], tmp_path, shares=7)


@pytest.mark.parametrize(("most", "takes"), [(2, "n1"), (0, None)])
def test_a_bad_node_is_left_out(tmp_path: Path, most: int, takes: str | None) -> None:
    """Of n1 and n2 the second is bad: the run takes the first, or, if it needs two, the job is queued without it."""
    report = tmp_path / "slurm" / "check"
    wrong = """echo '{"own": ["GPU 3 multiplies wrong"]}'"""
    left = f"mkdir -p {report}; echo '{{}}' > {report}/n1.json; {wrong} > {report}/n2.json"
    programs = {
        "scontrol": f'echo "$@" >> {tmp_path}/told; [[ $2 == hostnames ]] && printf "n1\\nn2\\n";'
        '[[ $3 == job ]] && echo "JobId=7 ExcNodeList=n9 NodeList="; true',
        "srun": f'if [[ "$*" == *node_check* ]]; then {left}; else echo "$@" >> {tmp_path}/run; exit 1; fi',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    config = SlurmConfig(nodes=1 if most else 2, max_nodes=most)
    script = render(config, ["x.py"], tmp_path, shares=8)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 75 and "node n2 is left out: GPU 3 multiplies wrong" in said
    began = (tmp_path / "run").read_text() if (tmp_path / "run").exists() else ""
    assert ("--nodelist=n1 " in began and "--num_machines 1 " in began) if takes else not began
    assert ("too few good nodes: n1" in said) == (takes is None)
    told = (tmp_path / "told").read_text()
    assert "requeue 7\n" in told and told.endswith("update JobId=7 ExcNodeList=n9,n2\n")


def test_accelerate_itself_reads_these_arguments() -> None:
    """The options exist under these names, and the command's own options are left alone."""
    from accelerate.commands.launch import launch_command_parser

    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "millrace.pretrain", "c.toml", "--debug"]
        seen, _ = run_script(Path(folder), SlurmConfig(nodes=3), command, 1)
    read = launch_command_parser().parse_args(seen[2:])
    assert (read.machine_rank, read.num_machines, read.num_processes) == (1, 3, 3)
    assert (read.main_process_ip, read.main_process_port) == ("10.0.0.7", 13456)
    assert (read.use_deepspeed, read.deepspeed_multinode_launcher) == (True, "standard")
    assert (read.module, read.training_script) == (True, "millrace.pretrain")
    assert read.training_script_args == ["c.toml", "--debug"]


def test_a_line_break_in_a_path_is_refused() -> None:
    with pytest.raises(UserError, match=r"'--job-name=a\\nb' holds a line break.*rename"):
        render(SlurmConfig(), ["x.py"], "/runs/a\nb")


# Arguments and variables of a process are bytes without NUL; surrogates are no text.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=25)
@given(arguments=st.lists(TEXT, max_size=5), value=TEXT.filter(lambda text: not set(text) & {"\n", "\r"}))
def test_any_argument_and_variable_arrive_as_written(arguments: list[str], value: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = SlurmConfig(environment={"VALUE": value})
        seen, variables = run_script(Path(folder), config, ["x.py", *arguments], node=0)
    assert seen[seen.index("x.py") + 1 :] == arguments
    assert variables["VALUE"] == value
