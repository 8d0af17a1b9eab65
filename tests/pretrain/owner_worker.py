"""One rank, with a lease that expires soon; told "elsewhere", it cannot look at the processes of this machine."""

from __future__ import annotations

import runpy
import sys

from millrace.core import lease

lease.EXPIRES, lease._TOUCHED = 2.0, 0.4
if sys.argv.pop(1) == "elsewhere":
    lease._machine = lambda: "elsewhere"
runpy.run_module("millrace.pretrain", run_name="__main__", alter_sys=True)
