"""A look at the nodes of a job: several processes as nodes, and the verdict over what they report."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.slurm import node_parts
from millrace.slurm.node_check import bad_nodes, tournament
from millrace.slurm.node_verdict import Report, judge
from tests.ranks import environment

SECONDS = 30  # for a healthy node it takes as long as importing torch


@given(st.integers(2, 40))
def test_everybody_meets_everybody_once(nodes: int) -> None:
    rounds = list(tournament(nodes))
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(nodes), 2))
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == nodes - (nodes % 2 == 0)


@given(st.integers(3, 12), st.data())
def test_the_one_that_talks_with_nobody_is_named_whoever_tells_it(nodes: int, data: st.DataObject) -> None:
    names = [f"n{number}" for number in range(nodes)]
    bad = data.draw(st.sampled_from(names))
    told = {name: data.draw(st.booleans()) for name in names}  # one of the two sides may have seen nothing
    reports = {name: Report(pairs={bad: "x"}) if name != bad and told[name] else Report() for name in names}
    reports[bad] = Report(pairs={name: "x" for name in names if name != bad and not told[name]})
    verdict = judge(names, reports)
    assert list(verdict.bad) == [bad] and verdict.unclear == []


def test_who_is_bad() -> None:
    good = Report()
    assert judge(["a", "b"], {"a": good, "b": good}).bad == {}
    assert judge(["a", "b"], {"a": Report(own=["GPU 3 multiplies wrong"]), "b": good}).bad == {
        "a": "GPU 3 multiplies wrong"
    }
    assert judge(["a", "b", "c"], {"a": Report(pairs={"c": "x"}), "b": good}).bad == {"c": "it did not report in time"}
    two = judge(["a", "b"], {"a": Report(pairs={"b": "no answer within 5 s"}), "b": good})
    assert two.bad == {} and two.unclear == ["a and b cannot talk with each other: no answer within 5 s"]
    one_link = judge(["a", "b", "c", "d"], {n: good for n in "bcd"} | {"a": Report(pairs={"b": "x"})})
    assert one_link.bad == {} and one_link.unclear == ["a and b cannot talk with each other: x"]
    full = Report(shared=["/run: 3 MiB are free"])
    assert judge(["a", "b"], {"a": full, "b": full}) == judge(["b", "a"], {"a": full, "b": full})
    assert judge(["a", "b"], {"a": full, "b": full}).bad == {}, "of all nodes: not a node's fault"
    assert judge(["a", "b"], {"a": full, "b": good}).bad == {"a": "/run: 3 MiB are free"}
    assert judge(["a"], {"a": Report(own=["x"])}).bad == {"a": "x"}
    assert judge(["a", "b"], {}).bad == {}


def test_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(node_parts.disk(tmp_path)) == []
    (found,) = node_parts.disk(tmp_path / "nowhere")
    assert "nowhere cannot be written: " in found
    monkeypatch.setattr(node_parts, "ROOM", 2**62)
    (found,) = node_parts.disk(tmp_path)
    assert "MiB are free" in found
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    assert "reads otherwise" in next(node_parts.disk(tmp_path))


def test_gpus_that_are_not_there() -> None:
    import torch

    assert list(node_parts.gpus(0)) == []
    assert next(node_parts.gpus(99)) == f"{torch.cuda.device_count()} of 99 GPUs are visible"


LATE_CLOCK = "import sys, time; now = time.time; time.time = lambda: now() + 60\n"
WRONG_SUM = "import sys\nfrom millrace.slurm import node_parts\ntalk = node_parts.talk\n" \
            "node_parts.talk = lambda *a: talk(*a) or 'a sum came out wrong'\n"  # fmt: skip
MAIN = "from millrace.slurm.node_check import main; sys.exit(main(sys.argv[1:]))"
HEALTHY = "import sys\n"
STOPS = "import os, signal, sys\nfrom millrace.slurm import node_parts\n" \
        "node_parts.talk = lambda *a: os.kill(os.getpid(), signal.SIGSTOP)\n"  # fmt: skip


def look(run: Path, programs: list[str]) -> list[str]:
    """Nodes n0, n1, … run these programs before their look; the bad ones."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [f"n{number}" for number in range(len(programs))]
    run.mkdir(exist_ok=True)
    children = []
    for number, program in enumerate(programs):
        if not program:
            continue
        options = ["--first", "n0", "--nodes", str(len(nodes)), "--number", str(number), "--name", nodes[number]]
        command = [sys.executable, "-c", program + MAIN, "look", str(run), "127.0.0.1", str(port), *options]
        children.append(subprocess.Popen([*command, "--seconds", str(SECONDS)], env=environment()))
    until = time.monotonic() + SECONDS + 20
    try:
        while any(child.poll() is None for child in children) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
            child.wait()
    return bad_nodes(run / "slurm" / "check", nodes)


def test_healthy_nodes(tmp_path: Path) -> None:
    assert look(tmp_path / "run", [HEALTHY] * 3) == []
    reports = sorted((tmp_path / "run/slurm/check").glob("*.json"))
    assert [json.loads(path.read_text()) for path in reports] == [{"own": [], "shared": [], "pairs": {}}] * 3


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("", "it did not report in time"),
        (STOPS, "it did not report in time"),
        (LATE_CLOCK, "their clocks are 60 s apart"),
        (WRONG_SUM, "a sum came out wrong"),
    ],
    ids=["absent", "stopped", "clock", "sum"],
)
def test_one_bad_node_among_three_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, says: str, place: int
) -> None:
    programs = [HEALTHY] * 3
    programs[place] = program
    assert look(tmp_path / "run", programs) == [f"n{place}"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"node n{place} is left out: " in said and says in said


def test_a_temporary_folder_that_is_gone(tmp_path: Path) -> None:
    gone = f"import sys, tempfile; tempfile.tempdir = {os.fspath(tmp_path / 'gone')!r}\n"
    assert look(tmp_path / "run", [HEALTHY, gone]) == ["n1"]
