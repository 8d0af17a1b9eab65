"""A real two-node Slurm on this one host, without systemd: `local_cluster.py start|stop|status DIR`.

Installs Debian's `slurm-wlm` and `munge` where they are missing (root only), and runs its own munged,
slurmctld and two slurmd (nodes n1 and n2) with their configuration, keys, state and logs in DIR. The packages
apart, nothing outside DIR is touched.

Every daemon carries DIR in its environment under MARK, and job steps inherit it. So `stop` ends exactly what
this cluster started, by process id, even after a crash that lost every other record.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

MARK = "MILLRACE_LOCAL_SLURM"
OWNER = "MILLRACE_LOCAL_SLURM_OWNER"
NODES = ("n1", "n2")
UNAVAILABLE = 77
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Daemons live where an unprivileged or minimal PATH does not look.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])

CONFIG = """\
ClusterName=millrace
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={dir}/prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=2
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=5
SlurmdTimeout=15
SlurmdParameters=config_overrides
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=2
"""

# A test may write lines `export NAME=value` for the tasks of a node into DIRECTORY/prolog-NODE.
PROLOG = """\
#!/bin/sh
cat "{dir}/prolog-$SLURMD_NODENAME" 2> /dev/null || true
"""


class Unavailable(Exception):
    """This host cannot run the cluster; the message says why."""


def install() -> None:
    """Make the programs available, from Debian's packages if need be.

    Raises:
        Unavailable: not root, no apt, or the packages cannot be installed.
    """
    if os.geteuid() != 0:
        raise Unavailable("a local Slurm needs root (slurmd starts jobs as their users)")
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if not missing:
        return
    if shutil.which("apt-get", path=PATH) is None:
        raise Unavailable(f"no {', '.join(missing)}, and no apt-get to install slurm-wlm and munge")
    # RUNLEVEL=1 keeps the packages' own services from being started.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1", "PATH": PATH}
    wait = ["-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2"]
    packages = ["-y", "--no-install-recommends", "slurm-wlm", "munge"]
    for command in (["apt-get", *wait, "update"], ["apt-get", *wait, "install", *packages]):
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{' '.join(command)} did not end within 300 s") from None
        # An update may fail for one unrelated repository; whether the packages arrive is what counts.
        if done.returncode and "update" not in command:
            raise Unavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        raise Unavailable(f"slurm-wlm and munge are installed, yet {', '.join(missing)} is missing")


def start(directory: Path, owner: int | None = None) -> dict[str, str]:
    """Start a fresh cluster in `directory` and return the environment (SLURM_CONF, PATH) that reaches it.

    A cluster already there is stopped first, and so is any cluster whose `owner` process has died.

    Raises:
        Unavailable: see `install`.
        RuntimeError: a daemon died or the nodes did not become idle within 60 s; holds the ends of the logs.
    """
    install()
    directory = directory.resolve()
    for stale in {Path(d) for d in _abandoned()} | {directory}:
        stop(stale)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / name).mkdir(parents=True)
    for old in (*directory.glob("*.log"), *directory.glob("munge.*")):
        old.unlink()
    (directory / "slurm.conf").write_text(_config(directory))
    (directory / "prolog").write_text(PROLOG.format(dir=directory))
    (directory / "prolog").chmod(0o755)
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    environment = client_environment(directory)
    marked = environment | {MARK: str(directory), OWNER: _identity(owner) if owner else ""}
    try:
        _start_daemons(directory, marked)
        _wait(lambda: _node_states(environment) == ["idle"] * len(NODES), 60, "both nodes idle")
    except BaseException as error:
        logs = _log_ends(directory)
        stop(directory)
        if isinstance(error, RuntimeError):
            raise RuntimeError(f"{error}\n{logs}") from None
        raise
    return environment


def client_environment(directory: Path) -> dict[str, str]:
    """This process's environment, pointing at the cluster in `directory` (and at no other Slurm job)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    return kept | {"SLURM_CONF": str(directory.resolve() / "slurm.conf"), "PATH": PATH}


def stop(directory: Path) -> None:
    """Cancel the jobs and end every process of the cluster in `directory`; does nothing when none runs."""
    directory = directory.resolve()
    if not _processes(directory):
        return
    with contextlib.suppress(subprocess.TimeoutExpired, FileNotFoundError):
        environment = client_environment(directory)
        cancel = ["scancel", "--full", "--state", "RUNNING", "--user", "root"]
        for command in (["scancel", "--user", "root"], cancel):
            subprocess.run(command, env=environment, capture_output=True, timeout=10)
        with contextlib.suppress(RuntimeError):
            _wait(lambda: _run(["squeue", "--noheader"], environment) == "", 8, "an empty queue")
    # Collected first: a job's process whose slurmstepd dies is no longer anybody's descendant.
    known: set[str] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        known.update(_identities(directory))
        for pid in _alive(known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(RuntimeError):
            _wait(partial(_none_alive, known), 5, "all processes ended")


def lose(directory: Path, node: str) -> None:
    """End the node's slurmd, and all that it started, by SIGKILL: what a power cut leaves."""
    doomed = [pid for pid in _processes(directory.resolve()) if _is_of(pid, node)]
    assert doomed, f"nothing runs on {node}"
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, or one of them reports the end of another
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _is_of(pid: int, node: str) -> bool:
    """A slurmd or slurmstepd holds its node's log open; what they start carries the node's name."""
    with contextlib.suppress(OSError):
        if f"SLURMD_NODENAME={node}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return True
        return any(os.readlink(link).endswith(f"/slurmd-{node}.log") for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def revive(directory: Path, node: str, owner: int) -> None:
    """Start a lost node's slurmd again."""
    directory = directory.resolve()
    environment = client_environment(directory)
    marked = environment | {MARK: str(directory), OWNER: _identity(owner)}
    _daemon(["slurmd", "-D", "-N", node, "-f", str(directory / "slurm.conf")], f"slurmd-{node}", directory, marked)
    _wait(lambda: _node_states(environment) == ["idle"] * len(NODES), 60, "both nodes idle")


def _config(directory: Path) -> str:
    host = socket.gethostname().split(".")[0]
    # CPUs=2 a node even on a smaller host (config_overrides allows it): the jobs are tiny.
    controller, *node_ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostName={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
        for name, port in zip(NODES, node_ports, strict=True)
    )
    return CONFIG.format(host=host, dir=directory, controller_port=controller, nodes=nodes, names=",".join(NODES))


def _free_ports(count: int) -> list[int]:
    """Ports below those that the kernel hands out itself: none is taken before its daemon starts."""
    found: list[int] = []
    for port in random.sample(range(30000, 32768), 2768):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free port between 30000 and 32767")


def _start_daemons(directory: Path, environment: dict[str, str]) -> None:
    munge = [f"--key-file={directory}/munge.key", f"--socket={directory}/munge.socket"]
    munge += [f"--pid-file={directory}/munged.pid", f"--log-file={directory}/munged.log"]
    munge += [f"--seed-file={directory}/munge.seed"]
    config = str(directory / "slurm.conf")
    # --force: munged otherwise refuses a directory whose parents others may write, such as /tmp.
    _daemon(["munged", "--foreground", "--force", *munge], "munged", directory, environment)
    _wait(lambda: (directory / "munge.socket").exists(), 20, "munged's socket")
    _daemon(["slurmctld", "-D", "-f", config], "slurmctld", directory, environment)
    for node in NODES:
        _daemon(["slurmd", "-D", "-N", node, "-f", config], f"slurmd-{node}", directory, environment)


def _daemon(command: list[str], name: str, directory: Path, environment: dict[str, str]) -> None:
    with open(directory / f"{name}.out.log", "wb") as output:
        subprocess.Popen(
            command,
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _node_states(environment: dict[str, str]) -> list[str]:
    return _run(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"], environment).split()


def _run(command: list[str], environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "no answer"
    return done.stdout.strip() if done.returncode == 0 else "no answer"


def _wait(ready: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


def _log_ends(directory: Path) -> str:
    parts = []
    for log in sorted(directory.glob("*.log")):
        parts.append(f"--- {log.name}\n" + log.read_text(errors="replace")[-800:])
    return "\n".join(parts)


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """The marked processes of all clusters: (process id, its environment)."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if _stat(int(entry.name))[0] == "Z":
                continue
            lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(line.split("=", 1) for line in lines if "=" in line)
            if MARK in environment:
                yield int(entry.name), environment


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: [0] state, [1] parent, [19] start time."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _processes(directory: Path) -> set[int]:
    """Process ids of the cluster in `directory` and their descendants (the jobs' own processes)."""
    found = {pid for pid, environment in _environments() if environment[MARK] == str(directory)}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, *_ = _stat(int(entry.name))
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    queue = list(found)
    while queue:
        new = [pid for pid in children.get(queue.pop(), []) if pid not in found]
        found.update(new)
        queue += new
    return found


def _identities(directory: Path) -> set[str]:
    found = set()
    for pid in _processes(directory):
        with contextlib.suppress(OSError):
            found.add(_identity(pid))
    return found


def _alive(identities: set[str]) -> list[int]:
    """Process ids of those that still run."""
    found = []
    for identity in identities:
        pid = int(identity.partition("@")[0])
        with contextlib.suppress(OSError):
            if _identity(pid) == identity and _stat(pid)[0] != "Z":
                found.append(pid)
    return found


def _none_alive(identities: set[str]) -> bool:
    return not _alive(identities)


def _identity(pid: int) -> str:
    """A process id with its start time, so that a recycled number is not taken for the same process."""
    return f"{pid}@{_stat(pid)[19]}"


def _abandoned() -> set[str]:
    """Directories of clusters whose owner has died."""
    found = set()
    for _, environment in _environments():
        owner = environment.get(OWNER, "")
        with contextlib.suppress(OSError):
            if not owner or _identity(int(owner.partition("@")[0])) == owner:
                continue
        found.add(environment[MARK])
    return found


def main(arguments: list[str]) -> int:
    """0 done, 1 failed, UNAVAILABLE when this host cannot run the cluster."""
    if len(arguments) not in (2, 3) or arguments[0] not in ("start", "stop", "status"):
        print("usage: local_cluster.py start|stop|status DIR [OWNER_PID, with start]", file=sys.stderr)
        return 2
    action, directory = arguments[0], Path(arguments[1])
    if action == "stop":
        stop(directory)
        return 0
    if action == "status":
        return subprocess.run(["sinfo", "--Node", "--long"], env=client_environment(directory)).returncode
    try:
        environment = start(directory, int(arguments[2]) if len(arguments) == 3 else None)
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return UNAVAILABLE
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={environment['SLURM_CONF']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
