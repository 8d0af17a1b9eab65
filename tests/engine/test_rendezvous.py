"""Ranks of one machine meet where no other machine can reach them."""

from __future__ import annotations

import ipaddress
import json
import socket
from pathlib import Path

import pytest

from millrace.engine import rendezvous
from tests.ranks import run_world


def test_only_the_loopback_interface_is_listened_at() -> None:
    out = run_world(Path(__file__).with_name("rendezvous_worker.py"), 2, timeout=120)
    found = json.loads(next(line for line in out.splitlines() if line.startswith("RESULT "))[7:])
    assert found["total"] == 2.0
    assert found["listening"] and all(ipaddress.ip_address(a).is_loopback for a in found["listening"]), found


def test_an_address_of_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert rendezvous._listen("203.0.113.7", 29500) is None
    assert "cannot listen at 203.0.113.7:29500 alone" in " ".join(capsys.readouterr().err.split())


def test_a_name_and_an_address() -> None:
    for host in ("localhost", "127.0.0.1"):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        listener = rendezvous._listen(host, port)
        assert listener is not None
        with listener:
            assert ipaddress.ip_address(listener.getsockname()[0]).is_loopback and listener.getsockname()[1] == port


def test_the_agents_store_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("RANK", raising=False)
    rendezvous.meet("gloo", None)  # type: ignore[arg-type]  # nothing is read
