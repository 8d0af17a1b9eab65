"""What a batch job asks Slurm for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from millrace.core.config import option

# Slurm's own forms: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS (`man sbatch`, --time).
_SIXTY = r"[0-5]?\d"
_TIME = re.compile(rf"\d+(:{_SIXTY})?|\d+:{_SIXTY}:{_SIXTY}|\d+-\d+(:{_SIXTY}){{0,2}}")
_EXTRA = re.compile(r"(?P<name>--[a-z][a-z-]*|-[A-Za-z])(=.*)?")
# sbatch options that have a key of their own; a second copy would win silently over the key.
_KEYS = {
    "--nodes": "nodes",
    "-N": "nodes",
    "--gres": "gpus_per_node",
    "--gpus-per-node": "gpus_per_node",
    "--ntasks": "processes_per_node",
    "-n": "processes_per_node",
    "--ntasks-per-node": "processes_per_node",
    "--cpus-per-task": "cpus_per_task",
    "-c": "cpus_per_task",
    "--time": "time",
    "-t": "time",
    "--partition": "partition",
    "-p": "partition",
    "--account": "account",
    "-A": "account",
    "--qos": "qos",
    "-q": "qos",
    "--job-name": "job_name",
    "-J": "job_name",
    "--output": "log",
    "-o": "log",
    "--signal": "grace",
    "--requeue": "requeue",
    "--no-requeue": "requeue",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """One Slurm job: one task per node, which starts that node's processes with `accelerate launch`.

    Raises:
        ValueError: a value that Slurm or the script could not carry; the message names the key.
    """

    nodes: int = option(1, "number of nodes")
    max_nodes: int = option(0, "take up to so many nodes, as many as there are and the batch divides; 0 = nodes")
    gpus_per_node: int = option(0, "GPUs on each node; 0 trains on the CPU")
    processes_per_node: int = option(0, "training processes on each node; 0 = one per GPU, or one without GPUs")
    cpus_per_task: int = option(0, "CPU cores on each node, shared by its processes; 0 = one per process")
    time: str = option("", "time limit as Slurm writes it, '2:00:00' or '1-12'; empty = the partition's default")
    partition: str = option("", "partition; empty = the cluster's default")
    account: str = option("", "account to charge; empty = the user's default")
    qos: str = option("", "quality of service; empty = the default")
    job_name: str = option("", "name in the queue; empty = the run directory's name")
    log: str = option("", "file of the job's output, %j is the job's number; empty = RUN/slurm/%j.out")
    requeue: bool = option(True, "start again by itself after a preemption, the time limit, a lost node or a crash")
    grace: int = option(120, "seconds before the time limit at which the run is asked to save and end")
    node_check: int = option(60, "seconds for a look at every node before the start, see docs/slurm.md; 0: none")
    container: str = option("", "container image (a path or URI), started by pyxis: srun --container-image")
    container_mounts: list[str] = option([], "further SOURCE:TARGET mounts; the run directory is always mounted")
    accelerate_config: str = option("", "file for accelerate launch --config_file; empty = --use_deepspeed")
    environment: dict[str, str] = option({}, "variables exported to every process; no secrets, the script is kept")
    setup: list[str] = option([], "shell lines before the start, such as 'module load cuda'")
    extra: list[str] = option([], "further sbatch options, such as '--exclusive' or '--constraint=a100'")

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_texts(self)
        if self.time and not _TIME.fullmatch(self.time):
            raise ValueError(
                f"time = {self.time!r} is not a time limit that Slurm reads; "
                "write '90' (minutes), '2:00:00' (hours) or '1-12:00' (days-hours)"
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment: {name!r} is not a variable's name; use letters, digits and _")
        if self.container_mounts and not self.container:
            raise ValueError("container_mounts is set and container is not; set container to an image, or drop it")
        for line in self.extra:
            _check_extra(line)

    @property
    def processes(self) -> int:
        """Training processes on each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def cpus(self) -> int:
        """CPU cores on each node."""
        return self.cpus_per_task or self.processes


def _check_numbers(config: SlurmConfig) -> None:
    least = {"nodes": 1, "grace": 1} | dict.fromkeys(
        ("max_nodes", "gpus_per_node", "processes_per_node", "cpus_per_task", "node_check"), 0
    )
    for key, smallest in least.items():
        value = getattr(config, key)
        if value < smallest:
            raise ValueError(f"{key} = {value} is too small; it is a whole number from {smallest} up")
    if config.max_nodes and config.max_nodes < config.nodes:
        raise ValueError(
            f"max_nodes = {config.max_nodes} is less than nodes = {config.nodes}; raise it, or leave it out"
        )
    if config.gpus_per_node and config.processes > config.gpus_per_node:
        raise ValueError(
            f"processes_per_node = {config.processes} is more than gpus_per_node = {config.gpus_per_node}; "
            "each process needs a GPU of its own, so leave processes_per_node at 0 or lower it"
        )
    if config.cpus < config.processes:
        raise ValueError(
            f"cpus_per_task = {config.cpus} is less than the {config.processes} processes "
            "that share these cores; raise it, or set 0 for one core per process"
        )


def _check_texts(config: SlurmConfig) -> None:
    keys = ("time", "partition", "account", "qos", "job_name", "log", "container", "accelerate_config")
    values = [(key, getattr(config, key)) for key in keys]
    for key in ("container_mounts", "setup", "extra"):
        values += [(f"{key}[{number}]", value) for number, value in enumerate(getattr(config, key))]
    values += [(f"environment.{name}", value) for name, value in config.environment.items()]
    for key, value in values:
        if not isinstance(value, str):
            raise ValueError(f"{key} = {value!r}: expected a string, not {type(value).__name__}; put it in quotes")
        if any(character in value for character in "\n\r\0"):
            raise ValueError(f"{key} = {value!r} holds a line break; write it on one line")


def _check_extra(line: str) -> None:
    match = _EXTRA.fullmatch(line)
    if match is None:
        raise ValueError(f"extra: {line!r} is not one sbatch option; write '--name' or '--name=value'")
    if key := _KEYS.get(match["name"]):
        raise ValueError(f"extra: {line!r} has a key of its own; set {key} instead")
    if match["name"] in ("--array", "-a"):
        raise ValueError(f"extra: {line!r} would start several jobs in one run directory; submit runs singly")
