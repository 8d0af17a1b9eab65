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

STARTS = 3  # without a newer checkpoint, after which a job is not started again

# NodeAddr is the name or address by which Slurm itself reaches a node from the others (`man slurm.conf`), the
# node's name unless the administrator says otherwise. The port lies below those that Linux hands out itself.
_RENDEZVOUS = """\
address() {
  local found
  found=$(scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
  echo "${found:-$1}"
}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_port=$((10000 + SLURM_JOB_ID % 20000))
echo "job $SLURM_JOB_ID on ${hosts[*]}"
"""

# The launchers turn any worker's exit code into 0 or 1, so the run leaves its own in outcome.json.
_OUTCOME = f"""\
if [[ -r $outcome ]]; then
  recorded=$(sed -n 's/.*"code": *\\([0-9][0-9]*\\).*/\\1/p' "$outcome")
  case $recorded in
    {DONE} | {CONTINUE} | {STOP}) code=$recorded ;;
  esac
fi
"""

# Not left to Slurm's RequeueExit, which only an administrator can set.
_REQUEUE = f"""\
if [[ $code == {DONE} || $code == {STOP} ]]; then exit "$code"; fi
# Slurm itself queues a job that lost a node; what is left of this script must not touch the next start.
if [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") =~ \ Restarts=([0-9]+) ]] &&
  ((BASH_REMATCH[1] != ${{SLURM_RESTART_COUNT:-0}})); then
  echo "job $SLURM_JOB_ID ended with $code; Slurm has queued it again already"
  exit {CONTINUE}
fi
# Start again, but not after three starts that made no checkpoint.
newest=none
for path in "$run"/checkpoints/step-*; do
  if [[ $path =~ /step-[0-9]+$ ]]; then newest=${{path##*/}}; fi
done
before='' starts=0
if [[ -r $run/slurm/starts ]]; then read -r before starts < "$run/slurm/starts"; fi
if [[ $newest == "$before" ]]; then starts=$((starts + 1)); else starts=1; fi
echo "$newest $starts" > "$run/slurm/starts"
if ((starts >= {STARTS})); then
  why="{STARTS} starts on end made no checkpoint (newest: $newest)"
  echo "job $SLURM_JOB_ID ended with $code: $why; it is not started again"
  echo "{{\\"code\\": {STOP}, \\"why\\": \\"$why\\", \\"step\\": 0}}" > "$outcome"
  rm -f "$run/slurm/starts"
  exit {STOP}
fi
echo "job $SLURM_JOB_ID ended with $code and is queued again (newest checkpoint: $newest)"
date +%s > "$run/slurm/ended"
trap : TERM  # what requeueing sends to this script
scontrol requeue "$SLURM_JOB_ID" || echo "it could not be queued again; submit it again"
if [[ -n $bad ]]; then
  # Possible once the job waits again; nodes that were left out before stay so.
  before=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\\([^ ]*\\).*/\\1/p')
  if [[ $before && $before != "(null)" ]]; then bad=$before,$bad; fi
  scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$bad" && echo "it will not be given $bad"
fi
exit {CONTINUE}
"""


def render(config: SlurmConfig, command: Sequence[str], run_dir: str | Path, shares: int | None = None) -> str:
    """Return the text of an sbatch script that runs `command` on every node of `config`.

    `shares` is the number of micro-batches in a global batch; with `max_nodes` the job takes as many nodes
    as divide it.

    `command` is what `accelerate launch` takes after its own options: `["-m", "millrace.pretrain", CONFIG]`
    or a script and its arguments. The job runs in the current directory: relative paths keep their meaning.
    It ends with the code in RUN/outcome.json (0 done, 75 continue me, 93 stop), or with srun's where there is
    none; with `requeue` everything but 0 and 93 is started again, and ends with 93 after three starts without a
    checkpoint. A container is started by pyxis and must hold `bash`, `accelerate` and millrace.

    Raises:
        UserError: the run directory or the current one has a line break in its name; no number of nodes divides the
            batch.
    """
    assert command, "there is nothing to launch"
    run = RunDir(os.path.abspath(run_dir))
    usable = usable_nodes(config, shares)
    header = _header(config, run, usable)
    for line in header:
        if "\n" in line:
            raise UserError(f"{line!r} holds a line break, which an sbatch header cannot; rename that directory")
    parts = [
        "#!/usr/bin/env bash\n" + "".join(f"#SBATCH {shlex.quote(line)}\n" for line in header),
        _preamble(config),
        _RENDEZVOUS,
        f"run={shlex.quote(str(run.path))}\n"
        "outcome=$run/outcome.json\n"
        "# What an earlier job left must not be taken for this one's.\n"
        'rm -f "$outcome"\n'
        "# For the report, which tells how long a restart took.\n"
        "MILLRACE_JOB_ENDED=\n"
        'if [[ -r $run/slurm/ended ]]; then read -r MILLRACE_JOB_ENDED < "$run/slurm/ended"; fi\n'
        "MILLRACE_JOB_BEGAN=$(date +%s)\n"
        "export MILLRACE_JOB_ENDED MILLRACE_JOB_BEGAN\n",
        _check(config, run),
        _nodes(usable),
        _srun(config, command, run),
        _OUTCOME,
        _REQUEUE if config.requeue else 'exit "$code"\n',
    ]
    return "\n".join(parts)


def _header(config: SlurmConfig, run: RunDir, usable: list[int]) -> list[str]:
    # A percent sign starts one of Slurm's patterns (%j), so the run directory's own are doubled.
    log = config.log or str(run.path / "slurm").replace("%", "%%") + "/%j.out"
    lines = [
        f"--job-name={config.job_name or run.path.name}",
        f"--chdir={os.getcwd()}",
        f"--output={log}",
        f"--nodes={usable[-1]}" + (f"-{usable[0]}" if len(usable) > 1 else ""),
        # With it, Slurm gives a range of nodes its least (22.05); srun asks for it anyway.
        *(["--ntasks-per-node=1"] if len(usable) == 1 else []),
        f"--cpus-per-task={config.cpus}",
        # To the steps, not to this script, which then sees how the run ended.
        f"--signal=USR1@{config.grace}",
        "--open-mode=append",
        "--requeue" if config.requeue else "--no-requeue",
    ]
    if config.gpus_per_node:
        lines.append(f"--gres=gpu:{config.gpus_per_node}")
    for key in ("time", "partition", "account", "qos"):
        if value := getattr(config, key):
            lines.append(f"--{key}={value}")
    return lines + config.extra


def _preamble(config: SlurmConfig) -> str:
    variables = {
        "OMP_NUM_THREADS": str(config.cpus // config.processes),
        # Without these torchrun, inside accelerate, dies of SIGUSR1, and kills ranks that save for more than 30 s.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(config.grace),
    } | config.environment
    # `set -u` only after the set-up: activation scripts and `module` read variables that are not set.
    lines = ["set -eo pipefail", *config.setup, "set -u"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(lines) + "\n"


def usable_nodes(config: SlurmConfig, shares: int | None) -> list[int]:
    """Numbers of nodes among which the batch can be divided, the largest first."""
    counts = range(config.max_nodes or config.nodes, config.nodes - 1, -1)
    usable = [count for count in counts if shares is None or shares % (count * config.processes) == 0]
    if not usable:
        many = f"{config.nodes} to {config.max_nodes}" if config.max_nodes else f"{config.nodes}"
        raise UserError(
            f"train.batch gives {shares} micro-batches, which {many} nodes with {config.processes} processes each do "
            "not divide; change slurm.nodes, train.batch or train.micro_batch"
        )
    return usable


def _check(config: SlurmConfig, run: RunDir) -> str:
    """A look at every node; those that are bad are taken out of `hosts` and left in `bad`."""
    if not config.node_check:
        return "bad=\n"
    prefix, python = _container(config, run), shlex.quote("python" if config.container else sys.executable)
    # One node that hangs or is lost ends the look of no other.
    alike = ["--no-kill", "--kill-on-bad-exit=0", "--ntasks-per-node=1", f"--cpus-per-task={config.cpus}"]
    each = shlex.join([*alike, "--export=ALL", *prefix])
    alone = "srun --nodes=1 --ntasks=1 " + shlex.join(["--export=ALL", *prefix]) + " " if config.container else ""
    look = f"--gpus {config.gpus_per_node} --seconds {config.node_check}"
    return (
        "# A look at every node: GPUs, disks, clocks, and talk between all pairs.\n"
        'rm -rf "$run/slurm/check"\n'
        f"timeout --kill-after=10 {config.node_check + 60} \\\n"
        f'  srun --nodes="${{#hosts[@]}}" --ntasks="${{#hosts[@]}}" {each} \\\n'
        f"  {python} -m millrace.slurm.node_check look \\\n"
        f'  "$run" "$(address "${{hosts[0]}}")" $((main_port + 1)) --first "${{hosts[0]}}" {look} || true\n'
        f'bad=$({alone}{python} -m millrace.slurm.node_check judge "$run" "${{hosts[@]}}") || bad=\n'
        "good=()\n"
        'for host in "${hosts[@]}"; do\n'
        '  if [[ ,$bad, != *,"$host",* ]]; then good+=("$host"); fi\n'
        "done\n"
        'hosts=("${good[@]}")\n'
    )


def _nodes(usable: list[int]) -> str:
    """The number of nodes that the run takes, of those that the job got; 0 where they are too few."""
    if len(usable) == 1:
        return f"nodes=$((${{#hosts[@]}} < {usable[0]} ? 0 : {usable[0]}))\n"
    return (
        "# As many nodes as there are and as divide the batch.\n"
        "nodes=0\n"
        f"for count in {' '.join(map(str, usable))}; do\n"
        "  if ((count <= ${#hosts[@]})); then nodes=$count; break; fi\n"
        "done\n"
    )


def _container(config: SlurmConfig, run: RunDir) -> list[str]:
    """Options of srun."""
    if not config.container:
        return []
    mounts = ",".join([f"{run.path}:{run.path}", *config.container_mounts])
    return [f"--container-image={config.container}", f"--container-mounts={mounts}"]


def _srun(config: SlurmConfig, command: Sequence[str], run: RunDir) -> str:
    # srun does not inherit --cpus-per-task (since 22.05), nor the environment under sbatch --export=NONE.
    step = [
        "--ntasks-per-node=1",
        f"--cpus-per-task={config.cpus}",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        *_container(config, run),
    ]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if config.container:
        launcher = ["accelerate", "launch"]
    # The inner shell runs on each node and expands that node's number.
    inner = f'exec {shlex.join(launcher)} --machine_rank "$SLURM_NODEID" "$@"'
    deepspeed = ["--use_deepspeed"]
    if config.accelerate_config:
        deepspeed = ["--config_file", config.accelerate_config]
    rows = [
        '  srun --nodes="$nodes" --ntasks="$nodes" --nodelist="$taken" ' + shlex.join(step),
        "bash -c " + shlex.quote(inner) + " accelerate",
        shlex.join(deepspeed) + " --deepspeed_multinode_launcher standard",
        f'--num_machines "$nodes" --num_processes $((nodes * {config.processes}))',
        '--main_process_ip "$main_ip" --main_process_port "$main_port"',
        shlex.join(command) + " || code=$?",
    ]
    return (
        "if ((nodes)); then\n"
        '  taken=$(IFS=,; echo "${hosts[*]:0:nodes}")\n'
        '  main_ip=$(address "${hosts[0]}")\n'
        '  echo "the run takes $taken, rendezvous at $main_ip:$main_port"\n'
        "  code=0\n" + " \\\n    ".join(rows) + "\n"
        "else\n"
        '  echo "too few good nodes: ${hosts[*]}"\n'
        f"  code={CONTINUE}\n"
        "fi\n"
    )
