"""The batch script of a run: sbatch header, rendezvous, one `accelerate launch` per node, outcome."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from millrace.core.errors import CONTINUE, DONE, STOP, UserError
from millrace.core.rundir import RunDir
from millrace.slurm.config import SlurmConfig

# NodeAddr is the name or address by which Slurm itself reaches a node from the others (`man slurm.conf`), the
# node's name unless the administrator says otherwise. The port lies below those that Linux hands out itself.
_RENDEZVOUS = """\
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_ip=$(scontrol --oneliner show node "${hosts[0]}" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
main_ip=${main_ip:-${hosts[0]}}
main_port=$((10000 + SLURM_JOB_ID % 20000))
echo "job $SLURM_JOB_ID on ${hosts[*]}, rendezvous at $main_ip:$main_port"
"""

# The launchers turn any worker's exit code into 0 or 1, so the run leaves its own in outcome.json.
_OUTCOME = f"""\
if [[ -r $outcome ]]; then
  recorded=$(sed -n 's/.*"code": *\\([0-9][0-9]*\\).*/\\1/p' "$outcome")
  case $recorded in
    {DONE} | {CONTINUE} | {STOP}) code=$recorded ;;
  esac
fi
exit "$code"
"""


def render(config: SlurmConfig, command: Sequence[str], run_dir: str | Path) -> str:
    """Return the text of an sbatch script that runs `command` on every node of `config`.

    `command` is what `accelerate launch` takes after its own options: `["-m", "millrace.pretrain", CONFIG]`
    or a script and its arguments. The job runs in the current directory: relative paths keep their meaning.
    It ends with the code in RUN/outcome.json (0 done, 75 continue me, 93 stop), or with srun's where there is
    none. A container is started by pyxis and must hold `bash`, `accelerate` and millrace.

    Raises:
        UserError: the run directory or the current one has a line break in its name.
    """
    assert command, "there is nothing to launch"
    run = RunDir(os.path.abspath(run_dir))
    header = _header(config, run)
    for line in header:
        if "\n" in line:
            raise UserError(f"{line!r} holds a line break, which an sbatch header cannot; rename that directory")
    parts = [
        "#!/usr/bin/env bash\n" + "".join(f"#SBATCH {shlex.quote(line)}\n" for line in header),
        _preamble(config),
        _RENDEZVOUS,
        f"outcome={shlex.quote(str(run.outcome))}\n"
        "# What an earlier job left must not be taken for this one's.\n"
        'rm -f "$outcome"\n',
        "code=0\n" + _srun(config, command, run),
        _OUTCOME,
    ]
    return "\n".join(parts)


def _header(config: SlurmConfig, run: RunDir) -> list[str]:
    # A percent sign starts one of Slurm's patterns (%j), so the run directory's own are doubled.
    log = config.log or str(run.path / "slurm").replace("%", "%%") + "/%j.out"
    lines = [
        f"--job-name={config.job_name or run.path.name}",
        f"--chdir={os.getcwd()}",
        f"--output={log}",
        f"--nodes={config.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={config.cpus}",
    ]
    if config.gpus_per_node:
        lines.append(f"--gres=gpu:{config.gpus_per_node}")
    for key in ("time", "partition", "account", "qos"):
        if value := getattr(config, key):
            lines.append(f"--{key}={value}")
    return lines + config.extra


def _preamble(config: SlurmConfig) -> str:
    variables = {"OMP_NUM_THREADS": str(config.cpus // config.processes)} | config.environment
    # `set -u` only after the set-up: activation scripts and `module` read variables that are not set.
    lines = ["set -eo pipefail", *config.setup, "set -u"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(lines) + "\n"


def _srun(config: SlurmConfig, command: Sequence[str], run: RunDir) -> str:
    # srun does not inherit --cpus-per-task (since 22.05), nor the environment under sbatch --export=NONE.
    step = [
        f"--nodes={config.nodes}",
        f"--ntasks={config.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={config.cpus}",
        "--kill-on-bad-exit=1",
        "--export=ALL",
    ]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if config.container:
        mounts = ",".join([f"{run.path}:{run.path}", *config.container_mounts])
        step += [f"--container-image={config.container}", f"--container-mounts={mounts}"]
        launcher = ["accelerate", "launch"]
    # The inner shell runs on each node and expands that node's number.
    inner = f'exec {shlex.join(launcher)} --machine_rank "$SLURM_NODEID" "$@"'
    deepspeed = ["--use_deepspeed"]
    if config.accelerate_config:
        deepspeed = ["--config_file", config.accelerate_config]
    rows = [
        "srun " + shlex.join(step),
        "bash -c " + shlex.quote(inner) + " accelerate",
        shlex.join(deepspeed) + " --deepspeed_multinode_launcher standard",
        f"--num_machines {config.nodes} --num_processes {config.nodes * config.processes}",
        '--main_process_ip "$main_ip" --main_process_port "$main_port"',
        shlex.join(command) + " || code=$?",
    ]
    return " \\\n  ".join(rows) + "\n"
