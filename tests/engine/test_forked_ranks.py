"""Ranks that the tests fork are processes as `python SCRIPT` would have started."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import launch_world

SEEN = """
import atexit, json, os, signal, sys
atexit.register(lambda: print("at exit"))
seen = {"argv": sys.argv[1:], "rank": os.environ["RANK"], "home": sys.path[0], "hash": hash("mill"), "main": __name__}
seen |= {"session": os.getsid(0) == os.getpid(), "ours": [m for m in sys.modules if m.startswith("millrace")]}
print(json.dumps(seen))
what = sys.argv[1]
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fails":
    raise ValueError("no grain")
sys.exit(int(what))
"""


def test_they_start_and_end_as_processes_do(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(SEEN)

    def start(*arguments: str) -> tuple[list[int], list[Any]]:
        codes, said = launch_world(tmp_path / "seen.py", 2, arguments, timeout=100)
        ends = [text.partition("\n") for text in said]
        return codes, [(json.loads(first), rest) for first, _, rest in ends if first]

    codes, ranks = start("7", "a b")
    assert codes == [7, 7] and [rest for _, rest in ranks] == ["at exit\n"] * 2
    for number, (seen, _) in enumerate(ranks):
        expected = {"argv": ["7", "a b"], "rank": str(number), "home": str(tmp_path), "main": "__main__"}
        assert seen == expected | {"hash": seen["hash"], "session": True, "ours": []}
    again = [seen["hash"] for seen, _ in start("0")[1]]
    codes, others = start("fails")
    assert codes == [1, 1] and all("ValueError: no grain\n" in rest and "at exit\n" in rest for _, rest in others)
    hashes = [seen["hash"] for seen, _ in ranks]
    assert hashes[0] != hashes[1] == again[0] != again[1], "what depends on the order of a set shows"
    assert start("dies")[0] == [-signal.SIGKILL] * 2


def test_a_rank_that_does_not_end_is_killed(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time; print('here', flush=True); time.sleep(600)")
    codes, said = launch_world(tmp_path / "waits.py", 1, timeout=2)
    assert codes == [-signal.SIGKILL] and said == ["here\n", "no end after 2 s"]


@pytest.mark.parametrize("inside", [(), ("env",)], ids=["forked", "started"])
def test_two_ranks_may_say_more_than_a_pipe_holds(tmp_path: Path, inside: tuple[str, ...]) -> None:
    (tmp_path / "talks.py").write_text("print('mill ' * 100_000)")
    codes, said = launch_world(tmp_path / "talks.py", 2, timeout=60, inside=inside)
    assert codes == [0, 0] and said == ["mill " * 100_000 + "\n"] * 2
