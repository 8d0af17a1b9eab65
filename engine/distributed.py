"""Joining the process group, whoever started the process: a bare python, torchrun, accelerate or srun."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from millrace.core.errors import UserError
from millrace.engine.ops import use_operators
from millrace.engine.rendezvous import meet

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """This process's place: global rank, number of ranks, and the device it computes on."""

    rank: int
    size: int
    device: torch.device
    accelerator: Accelerator
    control: Any = None  # the process group of `sum` and of objects; None is the default one

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes the ledger and talks to people."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The element-wise sum over all ranks, in float64 (integers stay exact up to 2^53)."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its (small) result on every rank; its UserError is raised on every rank."""
        result: list[Any] = [None, None]
        if self.main:
            try:
                result[0] = action()
            except UserError as error:
                result[1] = str(error)
        dist.broadcast_object_list(result, src=0, group=self.control)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def gather_objects(self, item: Any) -> list[Any]:
        """`item` of every rank, on every rank. Small things only: it is pickled by torch between our own ranks."""
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, item, group=self.control)
        return out


def join_world(deepspeed_config: dict[str, Any]) -> World:
    """Start (or join) the process group and Accelerate with DeepSpeed.

    A user's own `accelerate launch --config_file` with DeepSpeed fields is read by Accelerate from its environment
    variables and was merged into `deepspeed_config` by `millrace.engine.zero`.

    Raises:
        UserError: the environment of the launcher is incomplete, Accelerate was told to use another engine, or ranks
            have different configurations.
    """
    _environment()
    _quiet_deepspeed()
    use_operators()
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    use_cpu = not torch.cuda.is_available()
    kind = os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_MEGATRON_LM")
    if kind == "true":
        raise UserError(
            "Accelerate was configured for FSDP or Megatron-LM; millrace shards with DeepSpeed. "
            "Use a configuration with distributed_type: DEEPSPEED, or none at all"
        )
    # Mixed precision is DeepSpeed's (bf16 in its configuration); Accelerate's autocast would be a second one.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    # The launcher's DeepSpeed fields were merged already; Accelerate would refuse them beside a configuration.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if use_cpu:
        # Accelerate's own CPU mode (`cpu=True`) excludes DeepSpeed; without a GPU it takes the CPU all the same.
        os.environ.pop("ACCELERATE_USE_CPU", None)
    # Named, because otherwise each rank on a CPU believes that it is alone.
    backend = "gloo" if use_cpu else "nccl"
    joining = InitProcessGroupKwargs(backend=backend)
    assert joining.timeout is not None
    meet(backend, joining.timeout)
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a line about each operator
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=deepspeed_config["gradient_accumulation_steps"],
            kwargs_handlers=[joining],
        )
    # The plugin tells transformers to partition every model that it constructs from now on; millrace does that itself.
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()
    size = dist.get_world_size()
    if size != int(os.environ["WORLD_SIZE"]):
        raise UserError(f"the launcher announced {os.environ['WORLD_SIZE']} ranks but {size} joined the group")
    # Numbers that the host decides by stay on the host: over NCCL each would wait for all kernels before it.
    control = None if use_cpu else dist.new_group(backend="gloo")
    world = World(dist.get_rank(), size, accelerator.device, accelerator, control)
    check_alike(world, deepspeed_config)
    return world


def join_group() -> World:
    """Start (or join) the process group alone, without Accelerate and DeepSpeed: for work that trains nothing.

    Ranks wait for each other as long as it takes.
    """
    _environment()
    meet("gloo", _PATIENCE)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    nobody: Any = None  # asks for the accelerator of what trains nothing
    return World(dist.get_rank(), dist.get_world_size(), device, nobody)


def check_alike(world: World, settings: dict[str, Any]) -> None:
    """Refuse ranks that would train differently, such as nodes whose hardware made "auto" another precision.

    Raises:
        UserError: on every rank.
    """
    everywhere = world.gather_objects(settings)
    for rank, other in enumerate(everywhere):
        differ = sorted(k for k in everywhere[0].keys() | other.keys() if everywhere[0].get(k) != other.get(k))
        if differ:
            raise UserError(
                f"rank {rank} would train with another {', '.join(differ)} than rank 0; give every rank the same "
                "configuration, and set engine.precision where the nodes' hardware differs"
            )


def leave_world() -> None:
    """Leave the process group, so that the process ends without a warning or a hang."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """The number of ranks the launcher announced, before joining."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS", "1") if _launched() else 1)


def announced_rank() -> int:
    """The rank the launcher gave this process, before joining."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0") if _launched() else 0)


def _launched() -> bool:
    return "WORLD_SIZE" in os.environ or _in_srun()


def _in_srun() -> bool:
    # SLURM_STEP_ID is set for tasks of srun, not in the batch shell, where SLURM_PROCID is 0 as well;
    # an interactive `srun --pty bash` is one task.
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def _environment() -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* from Slurm's variables, or for one process alone."""
    env = os.environ
    if "WORLD_SIZE" not in env and _in_srun():
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
        # Every task must derive the same port without talking: the job's and the step's number give it.
        number = int(env["SLURM_JOB_ID"]) * 131 + int(env["SLURM_STEP_ID"])
        env.setdefault("MASTER_PORT", str(20000 + number % 20000))
    if "WORLD_SIZE" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env["MASTER_PORT"] = str(_free_port())
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise UserError(
                f"WORLD_SIZE is set but {name} is not; start with torchrun, accelerate launch or srun, or unset it"
            )
    # "2", "2(x3)" or "2(x3),1": tasks on each node; a task cannot tell which entry is its own, nodes are alike.
    per_node = env.get("SLURM_TASKS_PER_NODE", "").split("(")[0].split(",")[0]
    env.setdefault("LOCAL_WORLD_SIZE", per_node if _in_srun() and per_node else env["WORLD_SIZE"])
    alone = env["LOCAL_WORLD_SIZE"] == env["WORLD_SIZE"] and env["MASTER_ADDR"] in ("127.0.0.1", "localhost")
    if alone and any(name == "lo" for _, name in socket.if_nameindex()):
        # gloo would look up this machine's own name, for every group, and listen on whatever address that has
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _first_host(nodelist: str) -> str:
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=False, timeout=30
    )
    if done.returncode or not done.stdout.split():
        raise UserError(f"cannot read the node list '{nodelist}' with scontrol: {done.stderr.strip()}")
    name = done.stdout.split()[0]
    try:
        socket.gethostbyname(name)
    except OSError:
        # Node names need not be host names (several slurmd on one host): ask Slurm for the address.
        shown = subprocess.run(
            ["scontrol", "show", "node", name], capture_output=True, text=True, check=False, timeout=30
        ).stdout
        addresses = [w.split("=", 1)[1] for w in shown.split() if w.startswith("NodeAddr=")]
        name = addresses[0] if addresses else name
    return name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quiet_deepspeed() -> None:
    """DeepSpeed's information lines, and deprecations of torch that it has not followed, would drown the run's own."""
    import logging
    import warnings

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
