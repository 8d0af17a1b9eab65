"""Where ranks meet, if no launcher has a store for them: one that listens at MASTER_ADDR alone."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from millrace.core.console import warn


def meet(backend: str, timeout: timedelta) -> None:
    """Start the process group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    torch's own store listens on every interface of rank 0's machine, and asks nobody who he is. This one listens at the
    address that the ranks use, the loopback address for ranks of one machine. The store of torchrun's and accelerate's
    agents is taken as it is.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized():
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = _listen(host, port) if rank == 0 else None
    store = dist.TCPStore(
        host, port, size, rank == 0, timeout, master_listen_fd=listener.detach() if listener else None
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _listen(host: str, port: int) -> socket.socket | None:
    """None where `host` is no address of this machine, behind a translation of addresses for one."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        warn(f"cannot listen at {host}:{port} alone ({error}); listening on every interface of this machine")
        return None
