"""A worker process: builds every `stride`-th step of a rank and writes it to standard output.

Its own process, so that decoding never waits for the rank's interpreter; started with plain JSON and without torch.
What the rank tells it later (samples to leave out) comes as JSON lines on standard input, whose end ends the worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any, BinaryIO

from millrace.core.errors import UserError
from millrace.data.builder import Builder, Opened, Spec
from millrace.data.frames import Frame, write_frame
from millrace.data.heap import keep_freed_memory
from millrace.data.state import LoaderState
from millrace.data.stores.waiting import stalls
from millrace.data.stream import Share

_REPORT_EVERY = 3.0  # seconds


def main() -> int:
    """Work until standard input or output ends."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not get between the frames
    keep_freed_memory()
    start = json.loads(sys.stdin.readline())
    try:
        _work(start, out)
    except UserError as error:
        write_frame(out, Frame({"error": str(error)}))
    except BrokenPipeError:
        pass
    return 0


def _work(start: dict[str, Any], out: BinaryIO) -> None:
    state = LoaderState.from_dict(start["state"])
    share = Share(start["offset"], start["stride"], state.steps)
    builder = Opened(Spec.from_json(start["spec"]), state).builder(share)
    builder.documents.exclude(_samples(start["exclude"]))
    threading.Thread(target=_listen, args=(builder,), name="millrace-listen", daemon=True).start()
    writing = threading.Lock()
    threading.Thread(target=_report, args=(out, writing), name="millrace-report", daemon=True).start()
    for frame, after in builder.steps(state):
        frame.meta["state"] = after.to_dict()
        with writing:
            write_frame(out, frame)


def _report(out: BinaryIO, writing: threading.Lock) -> None:
    """Tell the rank of reads that take long."""
    while True:
        time.sleep(_REPORT_EVERY)
        if reads := stalls():
            with writing, contextlib.suppress(BrokenPipeError):
                write_frame(out, Frame({"stalls": reads}))


def _samples(plain: dict[str, str]) -> dict[int, str]:
    return {int(sample): why for sample, why in plain.items()}


def _listen(builder: Builder) -> None:
    for line in sys.stdin:
        try:
            builder.documents.exclude(_samples(json.loads(line)["exclude"]))
        except UserError:  # over the budget: the rank knows, and stops
            return
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
