"""The arms of save_stall.py: one engine and one step, and a checkpoint of it in different ways, in this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import worker_result

LENGTH, VOCABULARY = 64, 8192
SIZES = {"10M": (320, 6), "30M": (512, 8), "100M": (768, 13), "250M": (1024, 19), "500M": (1280, 25)}  # width, blocks
# what is flushed to the disk; what shows that a checkpoint is whole; what finds one that is damaged
_OURS, _DCP = ("files, folders", "rename", "SHA-256"), ("files", ".metadata", "no")
FACTS = {
    "millrace": _OURS, "millrace-sync": _OURS, "deepspeed": ("no", "no", "no"),
    "deepspeed-decoupled": ("no", "latest", "no"), "dcp-thread": _DCP, "dcp-thread-cached": _DCP, "dcp-process": _DCP,
}  # fmt: skip


class Arm:
    """A way to save: `begin` takes what a step must wait for; once no rank is `busy`, `finish` makes it visible."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.engine, self.folder, self.visible = engine, folder, 0.0

    def begin(self, step: int) -> None:
        """Start to save."""

    def busy(self) -> bool:
        """Whether this rank still writes."""
        return False

    def finish(self) -> float:
        """The moment (perf_counter) at which it became visible."""
        return self.visible

    def close(self) -> None:
        """At the end."""


class Millrace(Arm):
    """`Saver`, behind the steps or not."""

    background = True

    def __init__(self, engine: Any, folder: Path) -> None:
        from millrace.engine.checkpoint.saver import Saver

        super().__init__(engine, folder)
        self._saver = Saver(folder, engine.adapter, engine.world, background=self.background)

    def begin(self, step: int) -> None:
        self._saver.begin(step, {"trainer": {"step": step}})
        if not self.background:
            self.finish()

    def busy(self) -> bool:
        return self._saver.writing

    def finish(self) -> float:
        if self._saver.pending:
            self._saver.finish()
            self.visible = time.perf_counter()
        return self.visible


class MillraceSync(Millrace):
    background = False


class DeepSpeed(Arm):
    """`engine.save_checkpoint`: torch.save in the foreground."""

    def begin(self, step: int) -> None:
        self.engine.ds.save_checkpoint(str(self.folder / f"step-{step}"))
        self.visible = time.perf_counter()


class Decoupled(DeepSpeed):
    """The same with the writer that DeepSpeed calls decoupled: a process; the next optimiser step waits for it."""

    def busy(self) -> bool:
        return self.engine.ds.checkpoint_engine.get_commit_info() is not None

    def finish(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        self.engine.ds.checkpoint_engine.cleanup()


class Dcp(Arm):
    """`torch.distributed.checkpoint.async_save` of the very slices that millrace writes.

    Each start of a save waits for the one before, as its documentation asks.
    """

    process = cached = False

    def __init__(self, engine: Any, folder: Path) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(engine, folder)
        self._group, self._future = dist.new_group(backend="gloo"), None
        # Pinned memory, asynchronous staging and copies that do not block need a GPU.
        options = StagingOptions(False, self.process, False, False)
        self._stager = DefaultStager(options) if self.cached else None

    def begin(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        from millrace.engine.checkpoint.write import owned_slices

        adapter = self.engine.adapter
        state = {f"{s.key}@{s.start}": s.values for s in owned_slices(adapter)}
        kind = AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD
        self._future = dcp.async_save(
            state, checkpoint_id=str(self.folder / f"step-{step}"), process_group=self._group,
            async_checkpointer_type=kind, async_stager=self._stager,
        )  # fmt: skip
        self._future.add_done_callback(self._done)

    def _done(self, _future: Any) -> None:
        self.visible = time.perf_counter()

    def busy(self) -> bool:
        return not self._future.done()

    def finish(self) -> float:
        self._future.result()
        return self.visible

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class DcpCached(Dcp):
    cached = True


class DcpProcess(Dcp):
    process = cached = True


ARMS = {
    "millrace": Millrace, "millrace-sync": MillraceSync, "deepspeed": DeepSpeed, "deepspeed-decoupled": Decoupled,
    "dcp-thread": Dcp, "dcp-thread-cached": DcpCached, "dcp-process": DcpProcess,
}  # fmt: skip
assert ARMS.keys() == FACTS.keys()


def measure(job: dict[str, Any]) -> None:
    """Build the engine, take steps, save several times among them, and hand the figures to the parent."""
    from millrace.engine.distributed import leave_world

    engine = _engine(job)
    world, folder = engine.world, Path(job["folder"])
    run = ARMS[job["arm"]](engine, folder)
    for _ in range(job["warmup"]):
        _step(engine)
    memory = Memory()
    rest = [_timed(engine)[0] for _ in range(job["rest"])]
    before, saves = memory.peak, []
    for number in range(job["saves"]):
        saves.append(_save(engine, run, number, job["after"]))
        rest += [_timed(engine)[0] for _ in range(job["rest"])]
        saves[-1]["bytes"] = world.on_main(lambda: _size_and_remove(folder))
    growth = memory.peak - before
    memory.stop()
    ranks = world.gather_objects({"saves": saves, "memory": growth, "rest": rest})
    parameters = sum(p.numel() for p in engine.module.parameters())
    run.close()
    worker_result(ranks=ranks, parameters=parameters, peak_without=before)
    leave_world()


def _engine(job: dict[str, Any]) -> Any:
    from millrace.core.config import load_config
    from millrace.engine.distributed import join_world
    from millrace.engine.zero import deepspeed_config
    from millrace.pretrain.config import PretrainConfig
    from millrace.pretrain.run import build_engines, objective_of

    width, blocks = SIZES[job["size"]]
    sizes = {
        "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": blocks,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64,
        "tie_word_embeddings": "true",
    }  # fmt: skip
    overrides = [f"model.config.{key}={value}" for key, value in sizes.items()]
    overrides += [f"engine.zero_stage={job['stage']}", f"data.sequence_length={LENGTH}", "train.micro_batch=1"]
    config = load_config(PretrainConfig, None, [*overrides, f"train.batch={job['ranks']}"])
    settings = deepspeed_config(config.engine, "fp32", micro_batch=1, accumulation=1, clip=config.optim.clip)
    if job["arm"] == "deepspeed-decoupled":
        settings["checkpoint"] = {"writer": {"type": "python", "decoupled": True, "data_parallel": "replica"}}
        # What DeepSpeed's own launcher sets, and this writer reads.
        os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": str(job["ranks"])}
    world = join_world(settings)
    kind, setting = objective_of(config, settings, SimpleNamespace(vocab_size=VOCABULARY))  # type: ignore[arg-type]
    return build_engines(config, world, kind.build(setting)).main


def _step(engine: Any) -> None:
    import torch

    from millrace.data.batch import MicroBatch

    ids = torch.randint(0, VOCABULARY, (1, LENGTH))
    batch = MicroBatch(ids, ids.clone(), torch.arange(LENGTH)[None], [np.array([[0, 0, LENGTH]])])
    loss, _ = engine.forward(batch)
    engine.backward(loss, LENGTH * engine.world.size, last=True)
    engine.gradient_square()
    engine.step(1e-3)


def _timed(engine: Any, run: Arm | None = None) -> tuple[float, float | None]:
    """Seconds of a step, and when the save under way in `run` became visible, if it did.

    At its end the ranks ask each other whether one still writes, without a save too, as a run does.
    """
    began = time.perf_counter()
    _step(engine)
    (writing,) = engine.world.sum(float(run is not None and run.busy()))
    visible = run.finish() if run is not None and not writing else None
    return time.perf_counter() - began, visible


def _save(engine: Any, run: Arm, number: int, after: int) -> dict[str, Any]:
    """One save among steps: what the call takes, and the steps behind it, until it is visible and `after` at least.

    The first `flying` of the steps are those until it is visible.
    """
    engine.world.barrier()
    began = time.perf_counter()
    run.begin(number)
    blocked, visible, steps = time.perf_counter() - began, None, []
    while visible is None:
        seconds, visible = _timed(engine, run)
        steps.append(seconds)
    flying = len(steps)
    while len(steps) < after:
        steps.append(_timed(engine)[0])
    return {"blocked": blocked, "steps": steps, "flying": flying, "visible": visible - began}


def _size_and_remove(folder: Path) -> int:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for path in folder.iterdir():
        shutil.rmtree(path)
    return size


class Memory:
    """The largest anonymous and shared memory of this process and those it started, looked at 20 times a second.

    From /proc/PID/status, which takes microseconds; what several processes share is counted once. Pages of files, the
    page cache among them, are not counted.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        from peers.run import descendants

        while not self._ended.wait(0.05):
            found = [_rss(pid) for pid in descendants(os.getpid())]
            self.peak = max(self.peak, sum(own for own, _ in found) + max(shared for _, shared in found))

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()


def _rss(pid: int) -> tuple[int, int]:
    """Bytes of (anonymous, shared) memory of a process."""
    found = {"RssAnon": 0, "RssShmem": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = 1024 * int(rest.split()[0])
    return found["RssAnon"], found["RssShmem"]
