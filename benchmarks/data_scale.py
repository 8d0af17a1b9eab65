"""An hour of training at 10M tokens/s on 1,024 ranks, planned: seconds, memory and state of a rank.

    python benchmarks/data_scale.py [--tokens 36B] [--node 8] [--dir FOLDER]

The corpus is a manifest and its index as `prepare` writes them, without shards: documents of log-normal length, 1,000
tokens on average, in row groups of 1,000, three sources mixed by weights. A step is 4,096 rows of 8,192 positions.
Every rank plans every step, so what one rank's plan costs is what planning costs. A measurement is a fresh process:

    whole    all steps of the hour, by one of 1,024 ranks, and by one of 512
    resumed  from states that `whole` left at 0, 10, 50, 90 and 100% of the hour: seconds until its next step is planned
    from 50% on, the rest of the hour: the order that `whole` had
    node     8 ranks at once, a twentieth of the hour: what they share

Memory is what a process took on top of what it had before it opened the manifest: at the peak, in pages of its own, and
by its share of all pages (PSS). The index is mapped, so its pages are the system's to reclaim and a node's ranks share
them. About 4 minutes on 2 cores; the manifest takes 0.6 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import fresh, worker_result

from millrace.core.console import say
from millrace.core.units import parse_count

RATE, WORLD = 10_000_000, 1024  # tokens/s, ranks
_BATCH, _LENGTH = 4096, 8192
_MEAN_TOKENS, _BYTES_PER_TOKEN = 1000, 4
_GROUP, _SHARD = 1000, 9000  # documents in a row group, in a shard
_SOURCES = {"web": 0.6, "code": 0.3, "papers": 0.1}  # share of the documents
_WEIGHTS = {"web": 0.7, "code": 0.15, "papers": 0.15}  # share of the stream's tokens
_MARKS = (0.0, 0.1, 0.5, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, default=3600 * RATE, help="tokens of the hour")
    parser.add_argument("--node", type=int, default=8, help="ranks of a node")
    parser.add_argument("--dir", type=Path, help="keep the manifest here, and use it if it is there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job = json.loads(options.worker)
        {"build": _build, "plan": _plan}[job.pop("do")](**job)
        return
    common.warn_if_busy()
    environment = common.environment()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.dir or Path(folder), options.tokens, options.node)
    _report(found, {"environment": environment, "tokens": options.tokens, "node": options.node})


def measure(folder: Path, tokens: int, node: int) -> dict[str, dict[str, Any]]:
    """All measurements by name; an hour has `tokens` tokens."""
    found: dict[str, dict[str, Any]] = {}

    def take(name: str, ranks: int = 1, **job: Any) -> None:
        say(name)
        found[name] = fresh(__file__, {"folder": str(folder)} | job, ranks)
        if "error" in found[name]:
            raise SystemExit(f"{name}: {found[name]['error']}")

    take("manifest", do="build", tokens=tokens)
    take("whole", do="plan", tokens=tokens)
    take("whole, 512 ranks", do="plan", tokens=tokens, world=WORLD // 2)
    states = found["whole"].pop("states")
    for mark, state in zip(_MARKS, states, strict=True):
        take(f"resumed at {mark:.0%}", do="plan", tokens=0, state=state)
    middle = found["whole"]["tokens"] - found["whole"]["marks"][_MARKS.index(0.5)]
    take("from 50% on", do="plan", tokens=middle, state=states[_MARKS.index(0.5)])
    with tempfile.TemporaryDirectory() as hall:
        take(f"{node} ranks at once, 5%", ranks=node, do="plan", tokens=tokens // 20, hall=hall)
    _compare(found)
    return found


def _compare(found: dict[str, dict[str, Any]]) -> None:
    """Whether all planned the same steps; the steps' hashes are then needed no longer."""
    steps = found["whole"].pop("steps")
    found["whole"]["order"] = hashlib.sha256("".join(steps).encode()).hexdigest()
    for one in found.values():
        if "steps" in one:
            mine, known = one.pop("steps"), steps[one["first_step"] :]
            compared = min(len(mine), len(known))
            one["same_order"] = mine[:compared] == known[:compared] if compared else None
            one.pop("states", None)


def _build(folder: str, tokens: int) -> None:
    """Write the manifest of a corpus of `tokens` tokens and a little more, or find it."""
    from millrace.data.manifest import Header, Kept, Manifest, Shard, build_manifest, commit_manifest
    from millrace.data.tokenizer import train_bpe

    out, began = Path(folder), time.perf_counter()
    if not (out / "manifest.json").exists():
        tokenizer = train_bpe(["one two three"], 300)
        tokenizer.save(out / "tokenizer")
        shards: list[Shard] = []
        header = Header(columns={"text": "text"}, tokenizer=tokenizer.sha256, costs={})
        documents = int(1.02 * tokens / _MEAN_TOKENS)
        record = build_manifest(out, header, list(_SOURCES), shards, _entries(documents, shards), Kept())
        commit_manifest(out, record)
    seconds = time.perf_counter() - began
    manifest = Manifest.load(out)
    worker_result(
        seconds=seconds,
        samples=manifest.samples,
        tokens=manifest.tokens,
        shards=len(manifest.shards),
        blocks=len(manifest.block_sizes()),
        manifest_bytes=(out / "manifest.json").stat().st_size,
        index_bytes=sum(path.stat().st_size for path in (out / "index").iterdir()),
    )


def _entries(documents: int, shards: list[Any]) -> Iterator[Any]:
    """Entries of one shard after the other, which is put into `shards`."""
    from millrace.data.index import Entries
    from millrace.data.manifest import Shard

    borders = np.cumsum(list(_SOURCES.values())) * documents
    for number, start in enumerate(range(0, documents, _SHARD)):
        count = min(_SHARD, documents - start)
        random = np.random.default_rng(number)
        tokens = random.lognormal(np.log(_MEAN_TOKENS) - 0.5, 1.0, count).astype(np.int64) + 1
        place = np.arange(count)
        check = random.integers(0, 2**63 - 1, count)
        entries = Entries(place // _GROUP, place % _GROUP, tokens * _BYTES_PER_TOKEN, tokens, check)
        full, rest = divmod(count, _GROUP)
        shards.append(
            Shard(
                url=f"/nowhere/{number:05d}.parquet",
                kind="parquet",
                source=int(np.searchsorted(borders[:-1], start, side="right")),
                size=int(entries.bytes.sum()),
                sha256=hashlib.sha256(b"%d" % number).hexdigest(),
                samples=count,
                bytes=int(entries.bytes.sum()),
                tokens=int(tokens.sum()),
                groups=[[_GROUP, full]] * bool(full) + [[rest, 1]] * bool(rest),
                entries=entries.digest(),
            )
        )
        yield entries


def _plan(
    folder: str, tokens: int, world: int = WORLD, state: dict[str, Any] | None = None, hall: str | None = None
) -> None:
    """Plan one step, and further ones until they hold `tokens` tokens, as the last of `world` ranks.

    Processes that plan at once meet in the folder `hall`, so that all of them are there when memory is measured.
    """
    from millrace.data.builder import Opened, Spec
    from millrace.data.config import DataConfig, MixtureConfig
    from millrace.data.state import LoaderState
    from millrace.data.stream import Deal

    config = DataConfig(manifest=folder, sequence_length=_LENGTH, mixture=MixtureConfig(weights=_WEIGHTS))
    spec = Spec(config=config, seed=1, deal=Deal(_BATCH, 1, world - 1, world))
    _meet(hall, "ready")
    memory, clock = _Memory(), _Clock()
    opened = Opened(spec, LoaderState.from_dict(state) if state else None)
    stream, now, opening = opened.plan(), opened.state, clock.lap()
    first_step, planned, hashes = now.steps, 0, []
    laps: list[dict[str, float]] = []
    marks, states = [0], [now.to_dict()]
    while not laps or planned < tokens:
        step = stream.step(now)
        laps.append(clock.lap())
        spans = np.concatenate(step.rows)[:, :3]
        planned, now = planned + int((spans[:, 2] - spans[:, 1]).sum()), step.after
        hashes.append(hashlib.sha256(np.ascontiguousarray(spans, "<i8").tobytes()).hexdigest()[:16])
        while len(marks) < len(_MARKS) and planned >= _MARKS[len(marks)] * tokens:
            marks.append(planned)
            states.append(now.to_dict())
        clock.lap()  # hashing is not planning
    _meet(hall, "planned")
    growth = memory.growth()
    _meet(hall, "measured")
    worker_result(
        tokens=planned,
        first_step=first_step,
        steps=hashes,
        open=opening,
        first=laps[0],
        cpu=sum(lap["cpu"] for lap in laps),
        clock=sum(lap["clock"] for lap in laps),
        step_median=statistics.median(lap["clock"] for lap in laps),
        step_most=max(lap["clock"] for lap in laps),
        memory=growth,
        state_bytes=len(json.dumps(now.to_dict())),
        marks=marks,
        states=states,
    )


def _meet(hall: str | None, point: str) -> None:
    """Wait until every rank has come to this point."""
    if hall:
        Path(hall, f"{point}-{os.environ['RANK']}").touch()
        while len(list(Path(hall).glob(f"{point}-*"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.05)


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._cpu, self._clock = time.process_time(), time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Seconds of this process's CPU, and of the clock."""
        before = self._cpu, self._clock
        self._cpu, self._clock = time.process_time(), time.perf_counter()
        return {"cpu": self._cpu - before[0], "clock": self._clock - before[1]}


class _Memory:
    """Bytes that this process took since construction."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        self._before = self._read()

    @staticmethod
    def _read() -> dict[str, int]:
        text = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
        lines = (line.split() for line in text.splitlines())
        kept = {"VmHWM:": "peak", "RssAnon:": "anonymous", "RssFile:": "mapped", "Pss:": "proportional"}
        return {kept[words[0]]: 1024 * int(words[1]) for words in lines if words and words[0] in kept}

    def growth(self) -> dict[str, int]:
        """Of the largest resident set; of its anonymous and its mapped pages now; of the proportional set now."""
        now = self._read()
        return {name: now[name] - before for name, before in self._before.items()}


def _report(found: dict[str, dict[str, Any]], setup: dict[str, Any]) -> None:
    corpus, rows = found["manifest"], []
    for name, one in found.items():
        if one is corpus:
            continue
        whole = name.startswith("whole")  # every index file is verified once, so a part is no measure of the hour
        start = one["open"]["clock"] + one["first"]["clock"]
        rows.append(
            (
                name,
                *((f"{one[kind]:.1f}" if whole else "") for kind in ("cpu", "clock")),
                *((f"{1000 * one[kind]:.0f}" if whole else "") for kind in ("step_median", "step_most")),
                f"{start:.2f}",
                *(f"{one['memory'][kind] / 1e6:.0f}" for kind in ("peak", "anonymous", "proportional")),
                one["state_bytes"],
                {True: "yes", False: "NO", None: ""}[one.get("same_order")],
            )
        )
    path = common.save("data_scale", setup | {"measurements": found})
    columns = ("", "CPU s", "s", "ms/step", "most", "start s", "peak MB", "own", "PSS", "state B", "same order")
    size = f"{corpus['samples']:,} documents, {corpus['tokens']:,} tokens in {corpus['shards']:,} shards"
    disk = f"manifest {corpus['manifest_bytes'] / 1e6:.1f} MB, index {corpus['index_bytes'] / 1e6:.0f} MB"
    common.report(f"{size}; {disk}", columns, rows, path)


if __name__ == "__main__":
    main()
