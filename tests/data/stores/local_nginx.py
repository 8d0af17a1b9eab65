"""nginx on a free port of this host: Debian's `nginx-light`, installed where it is missing (root only)."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])

CONFIG = """\
daemon off;
master_process off;
pid {dir}/nginx.pid;
error_log {dir}/error.log;
events {{}}
http {{
    access_log {dir}/access.log;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    gzip on;
    gzip_types *;
    server {{
        listen 127.0.0.1:{port};
        root {dir}/files;
        location /moved/ {{ return 302 /; }}
        location /away/ {{ return 302 http://169.254.169.254/; }}
    }}
}}
"""


class Unavailable(Exception):
    """This host cannot run nginx; the message says why."""


def install() -> str:
    """The program's path, after installing Debian's package if need be.

    Raises:
        Unavailable: it is missing, and cannot be installed.
    """
    if found := shutil.which("nginx", path=PATH):
        return found
    if os.geteuid() != 0 or shutil.which("apt-get", path=PATH) is None:
        raise Unavailable("nginx is missing, and to install it takes root and apt-get")
    # RUNLEVEL=1 keeps the package's own service from being started.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1", "PATH": PATH}
    wait = ["-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2"]
    for command in (["update"], ["install", "-y", "--no-install-recommends", "nginx-light"]):
        try:
            done = subprocess.run(
                ["apt-get", *wait, *command], env=environment, capture_output=True, text=True, timeout=300
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"apt-get {command[0]} did not end within 300 s") from None
        # An update may fail for one unrelated repository; whether the package arrives is what counts.
        if done.returncode and command[0] == "install":
            raise Unavailable(f"apt-get install nginx-light failed: {done.stderr.strip()[-300:]}")
    if found := shutil.which("nginx", path=PATH):
        return found
    raise Unavailable("nginx-light is installed, yet there is no nginx")


@contextlib.contextmanager
def running(directory: Path) -> Iterator[str]:
    """Serve `directory`/files; the server ends with the block, and with the process that started it."""
    program = install()
    (directory / "files").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = directory / "nginx.conf"
    config.write_text(CONFIG.format(dir=directory, port=port))
    command = ["setpriv", "--pdeathsig", "KILL", program, "-e", f"{directory}/error.log", "-c", str(config)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            assert server.poll() is None, server.stderr and server.stderr.read()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)
