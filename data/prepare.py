"""`millrace prepare`: inputs → tokenizer → index (and tokenised shards) → manifest.

Interruptible at any point: units of work appear whole, and `manifest.json` appears last. The same command
continues, and does nothing when all is done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from millrace.core.config import option
from millrace.core.console import warn
from millrace.core.errors import UserError, did_you_mean
from millrace.core.rundir import write_atomic
from millrace.data import SOURCES
from millrace.data.index import Entries, to_entries
from millrace.data.inputs import DATASET, InputFile, Progress, import_dataset, resolve
from millrace.data.manifest import Shard, build_manifest, commit_manifest
from millrace.data.reader import file_sha256
from millrace.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from millrace.data.units import PARTS, UnitOptions, documents, make_units, run_unit, unit_key


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What becomes a manifest, and how."""

    inputs: list[str] = option([], f"files, folders, globs, or data sets as {DATASET}NAME[:CONFIG[:SPLIT]]")
    out: str = option("", "folder to write the manifest to")
    kind: str = option("auto", f"format of the files: auto (by suffix), {', '.join(SOURCES)}")
    text: str = option("text", "column or field that holds the text")
    tokenizer: str | None = option(None, "tokenizer folder, file or hub name (default: train a byte-level BPE)")
    vocab_size: int = option(8192, "vocabulary of the tokenizer to train")
    train_bytes: int = option(64 * 2**20, "text that the tokenizer is trained on, at most", unit="bytes")
    count_tokens: bool = option(True, "count tokens, which best-fit packing needs")
    tokenize: bool = option(False, "write tokenised Parquet shards instead of reading the inputs in place")
    shard_size: int = option(64 * 2**20, "size of the shards that are written", unit="bytes")
    heldout: float = option(0.0, "share of the documents to hold out")
    heldout_by: Literal["hash", "nth"] = option(
        "hash", "hold out by the document's hash, or every n-th document of each 64 MiB of files"
    )
    on_bad: Literal["stop", "skip"] = option("stop", "what an undecodable document does")

    def __post_init__(self) -> None:
        if self.kind != "auto" and self.kind not in SOURCES:
            known = ", ".join(("auto", *SOURCES))
            raise ValueError(f"kind = '{self.kind}': expected one of {known}{did_you_mean(self.kind, SOURCES)}")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout = {self.heldout} must be at least 0 and below 1")
        if self.heldout_by == "nth" and self.heldout > 0.5:
            raise ValueError(f"heldout = {self.heldout} is above 0.5, which heldout_by = 'nth' cannot do")
        for name in ("train_bytes", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1 byte")
        if self.tokenize and not self.count_tokens:
            raise ValueError("tokenize = true needs count_tokens = true")


@dataclass(frozen=True)
class Summary:
    """What `prepare` wrote: counts per source, {name, documents, bytes, tokens}, of both parts."""

    out: str
    fingerprint: str
    tokenizer: str | None
    vocab_size: int
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)
    reused_units: int = 0
    already_done: bool = False


def _no_progress(what: str, done: int, total: int) -> None:
    pass


def prepare(config: PrepareConfig, progress: Progress = _no_progress) -> Summary:
    """Write a manifest folder, continuing what an interrupted call with the same options left.

    A finished folder is never changed: the same call returns its summary, any other is refused. Inputs that
    changed during an unfinished preparation are prepared again.

    Raises:
        UserError: inputs that are missing, empty, undecodable or changed; a folder that holds something else.
    """
    if not config.inputs:
        raise UserError("nothing to prepare: name at least one file, folder, glob or data set")
    if not config.out:
        raise UserError("no folder to write to: set out, such as --out data/corpus")
    out = Path(config.out).absolute()
    options = _options(config)
    finished = (out / "manifest.json").exists()
    if not finished:
        _claim(out, options)
    files = _files(config, out, progress)
    if finished:
        return _check_finished(out, options, files)
    tokenizer = _tokenizer(config, files, out, progress)
    try:
        return _finish(config, tokenizer, files, out, progress)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; free space there and run the same command again "
            "to continue"
        ) from None


def _finish(
    config: PrepareConfig, tokenizer: Tokenizer | None, files: Sequence[InputFile], out: Path, progress: Progress
) -> Summary:
    """Do the units that are left, then make the manifest visible."""
    units = make_units(files)
    reused = _run(units, _unit_options(config, tokenizer), out, progress)
    records = [_record(out, number) for number in range(len(units))]
    made, summary = _write(config, tokenizer, records, out)
    hashes = {name: sha for record in records for name, sha in record["hashes"].items()}
    known = [[str(f.path), f.size, f.mtime_ns, hashes[str(f.path)]] for f in files]
    kept = {name: value for name, value in asdict(summary).items() if name not in ("out", "tokenizer")}
    prepared = {"options": _options(config), "files": known, "summary": kept}
    write_atomic(out / "prepared.json", json.dumps(prepared, indent=1))
    commit_manifest(out, made)
    shutil.rmtree(out / ".work")
    return replace(summary, reused_units=reused)


def _unit_options(config: PrepareConfig, tokenizer: Tokenizer | None) -> UnitOptions:
    return UnitOptions(
        text=config.text,
        tokenizer=tokenizer,
        tokenize=config.tokenize,
        shard_size=config.shard_size,
        heldout=config.heldout,
        heldout_by=config.heldout_by,
        on_bad=config.on_bad,
    )


def _options(config: PrepareConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "out"}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [key for key in new if old.get(key) != new[key]]
    return "; ".join(f"{key} was {old.get(key)!r} and is now {new[key]!r}" for key in changed)


def _claim(out: Path, options: dict[str, Any]) -> None:
    """Take `out` for this preparation, or continue it; where no unit is finished yet, other options start it anew."""
    path = out / ".work" / "options.json"
    if path.exists():
        old = json.loads(path.read_text())
        if old == options:
            return
        if not _only_skips(old, options):
            if any(path.parent.glob("[0-9]*.json")):
                raise UserError(
                    f"{out} is half prepared with other options ({_difference(old, options)}); finish with the old "
                    f"ones, name another folder, or delete {out}"
                )
            for begun in (out / "raw", path.parent):
                shutil.rmtree(begun, ignore_errors=True)
    else:
        # Only a folder of its own: files of others beside a manifest would one day be taken for data.
        there = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
        if there:
            raise UserError(f"{out} holds '{there[0]}' that no `prepare` left here; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(options))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None


def _only_skips(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether bad documents are now skipped that stopped the work before: finished units have none."""
    return old | {"on_bad": "skip"} == new


def _files(config: PrepareConfig, out: Path, progress: Progress) -> list[InputFile]:
    names = [
        import_dataset(name, number, config.text, out / "raw", config.shard_size, progress)
        if name.startswith(DATASET)
        else name
        for number, name in enumerate(config.inputs)
    ]
    return resolve(names, config.kind, out)


def _check_finished(out: Path, options: dict[str, Any], files: Sequence[InputFile]) -> Summary:
    path = out / "prepared.json"
    if not path.exists():
        raise UserError(f"{out} holds a manifest that `prepare` did not write; name a new folder")
    done = json.loads(path.read_text())
    changed = _difference(done["options"], options)
    if changed:
        raise UserError(f"{out} was prepared with other options ({changed}); name a new folder")
    known = {name: (size, mtime, sha) for name, size, mtime, sha in done["files"]}
    for file in files:
        size, mtime, sha = known.pop(str(file.path), (None, None, None))
        if size is None:
            raise UserError(f"{file.path} was added after {out} was prepared; prepare into a new folder")
        same = file.size == size and (file.mtime_ns == mtime or file_sha256(file.path) == sha)
        if not same:
            raise UserError(f"{file.path} changed after {out} was prepared; prepare into a new folder")
    if known:
        raise UserError(f"{next(iter(known))} is gone since {out} was prepared; prepare into a new folder")
    shutil.rmtree(out / ".work", ignore_errors=True)
    tokenizer = str(out / "tokenizer") if (out / "tokenizer").is_dir() else None
    return Summary(**{**done["summary"], "out": str(out), "tokenizer": tokenizer, "already_done": True})


def _tokenizer(config: PrepareConfig, files: Sequence[InputFile], out: Path, progress: Progress) -> Tokenizer | None:
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    if not config.count_tokens:
        return None
    kept, mark = out / ".work" / "tokenizer", out / ".work" / "tokenizer-key.json"
    key = json.dumps([file.key() for file in files])
    if not (mark.exists() and mark.read_text() == key):
        train_bpe(_sample(config, files, progress), config.vocab_size).save(kept)
        write_atomic(mark, key)
    return load_tokenizer(kept)


def _sample(config: PrepareConfig, files: Sequence[InputFile], progress: Progress) -> Iterator[str]:
    """Text for the tokenizer, spread over all units, without the held-out part."""
    options = _unit_options(config, None)
    total = max(sum(file.size for file in files), 1)
    share = min(1.0, config.train_bytes / total)
    done = 0
    for unit in make_units(files):
        quota = share * sum(file.size for file in unit) if share < 1 else float("inf")
        for document in documents(unit, options, []):
            if quota <= 0:
                break
            if not document.heldout:
                quota -= document.sample.bytes
                done += document.sample.bytes
                progress("reading text for the tokenizer", done, min(total, config.train_bytes))
                yield document.text


def _record(out: Path, number: int) -> dict[str, Any]:
    path = out / ".work" / f"{number:05d}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _run(units: Sequence[Sequence[InputFile]], options: UnitOptions, out: Path, progress: Progress) -> int:
    """Finish all units; return how many an earlier call had finished."""
    total = sum(file.size for unit in units for file in unit)
    before = reused = 0
    for number, unit in enumerate(units):
        size = sum(file.size for file in unit)
        record = _record(out, number)
        if record.get("key") == unit_key(unit, options):
            reused += 1
        else:
            if record:
                warn(f"inputs changed since the interruption: preparing {unit[0].path} again")
            text = 0

            def tick(count: int, before: int = before, size: int = size) -> None:
                nonlocal text
                text += count
                progress("preparing", before + min(text, size), total)

            run_unit(number, unit, options, out, tick)
        before += size
        progress("preparing", before, total)
    return reused


def _write(
    config: PrepareConfig, tokenizer: Tokenizer | None, records: list[dict[str, Any]], out: Path
) -> tuple[dict[str, Any], Summary]:
    """Write tokenizer, indexes and the held-out manifest; return the main one's record, to be committed."""
    counts = {part: _counts(config.inputs, records, part) for part in PARTS}
    documents_in = {part: sum(source["documents"] for source in counts[part]) for part in PARTS}
    if not documents_in["train"]:
        where = ", ".join(config.inputs)
        held = documents_in["heldout"]
        why = f"all {held} documents were held out; lower heldout" if held else "it has no documents"
        raise UserError(f"the corpus is empty ({where}): {why}")
    if tokenizer:
        tokenizer.save(out / "tokenizer")
    made: dict[str, dict[str, Any]] = {}
    for part, folder in (("heldout", out / "heldout"), ("train", out)):
        if documents_in[part]:
            made[part] = build_manifest(
                folder,
                _shards(records, part, out, folder),
                counts[part],
                _entries(out, part, len(records)),
                columns={"tokens": "tokens", "bytes": "bytes"} if config.tokenize else {"text": config.text},
                tokenizer=tokenizer.sha256 if tokenizer else None,
            )
    if "heldout" in made:
        commit_manifest(out / "heldout", made["heldout"])
    return made["train"], Summary(
        out=str(out),
        fingerprint=made["train"]["fingerprint"],
        tokenizer=str(out / "tokenizer") if tokenizer else None,
        vocab_size=tokenizer.vocab_size if tokenizer else 0,
        train=counts["train"],
        heldout=counts["heldout"],
        skipped=[why for record in records for why in record["skipped"]],
    )


def _counts(names: Sequence[str], records: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    totals = [[0, 0, 0] for _ in names]
    for record in records:
        for source, *counts in record[part]["counts"]:
            totals[source] = [a + b for a, b in zip(totals[source], counts, strict=True)]
    return [
        {"name": name, "documents": documents, "bytes": size, "tokens": tokens}
        for name, (documents, size, tokens) in zip(names, totals, strict=True)
    ]


def _shards(records: list[dict[str, Any]], part: str, out: Path, folder: Path) -> list[Shard]:
    """Shards of all units; what lies below `out` is named relative to the manifest's folder."""
    shards = [Shard(**shard) for record in records for shard in record[part]["shards"]]
    inside = [Path(shard.url).is_relative_to(out) for shard in shards]
    return [replace(s, url=os.path.relpath(s.url, folder)) if i else s for s, i in zip(shards, inside, strict=True)]


def _entries(out: Path, part: str, units: int) -> Iterator[Entries]:
    for number in range(units):
        yield to_entries(pq.read_table(out / ".work" / f"{number:05d}.{part}.parquet"))
