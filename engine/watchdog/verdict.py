"""Which rank a hanging run waits for, from what every rank's watcher saw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Frames in which a rank waits for others; faulthandler writes `File "…/x.py", line 7 in name`, newest first.
_WAITING = re.compile(r'File "[^"]*(/torch/distributed/|/deepspeed/comm/|/torch/autograd/graph\.py)')
_FRAME = re.compile(r'File "([^"]*)", line (\d+) in (\S+)')
_NEAR = 12  # newest frames of a thread that are looked at
_STOPPED = "tT"  # states in /proc: by a signal, by a debugger
_ENDED = ("", "Z", "X")


@dataclass(frozen=True)
class Seen:
    """What a watcher saw of its rank when the hang was called; `state` is the letter in /proc/PID/stat."""

    rank: int
    host: str
    section: str
    step: int
    begun: int
    seconds: float  # in this section
    state: str
    stack: str  # faulthandler's

    def waits(self) -> bool:
        """Whether one of its threads is inside a collective."""
        threads = self.stack.split("\n\n")
        return any(_WAITING.search("\n".join(thread.splitlines()[:_NEAR])) for thread in threads)

    def where(self) -> str:
        """The newest frame of the main thread, which faulthandler writes last."""
        main = self.stack.strip().rsplit("\n\n", 1)[-1]
        frame = _FRAME.search(main)
        return f"{frame[1]}:{frame[2]} in {frame[3]}" if frame else "unknown"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def judge(hosts: Sequence[str], seen: Mapping[int, Seen]) -> tuple[list[int], str]:
    """(ranks that the others wait for, what is known of them); `hosts` has every rank's node, `seen` may lack some."""
    missing = [rank for rank in range(len(hosts)) if rank not in seen]
    if missing:
        names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in missing)
        return missing, f"{names} and the watcher beside it do not answer: the node is lost, or its file system"
    ended = [s for s in seen.values() if s.state in _ENDED]
    if ended:
        return _all(ended), "; ".join(f"{s} has ended" for s in ended)
    stopped = [s for s in seen.values() if s.state in _STOPPED]
    if stopped:
        return _all(stopped), "; ".join(f"{s} is stopped by a signal or a debugger, {_at(s)}" for s in stopped)
    return _by_place(list(seen.values()))


def _by_place(seen: list[Seen]) -> tuple[list[int], str]:
    first, last = min(s.begun for s in seen), max(s.begun for s in seen)
    behind = [s for s in seen if s.begun == first]
    busy = [s for s in behind if not s.waits()]
    if busy:
        return _all(busy), "; ".join(f"{s} is {_at(s)}, in {s.where()}" for s in busy)
    ahead = [s for s in seen if s.begun == last]
    if first < last:
        # Nobody gets past a collective that another is still waiting in, unless by leaving it out.
        return _all(ahead), "; ".join(f"{s} left out a collective and is {_at(s)} already" for s in ahead)
    return [], f"all ranks wait for each other, {_at(behind[0])}, in {behind[0].where()}: is the network cut?"


def _all(seen: Sequence[Seen]) -> list[int]:
    return sorted(s.rank for s in seen)


def _at(s: Seen) -> str:
    return f"in '{s.section}' of step {s.step} for {s.seconds:.0f} s"
